"""A simulated corpus, written straight to disk: for figures at the size of real collections.

Every slide has a section of its own: places, domains, programme. Its counts and patches are those
of spots of a few sections that were drawn and cut in full, of the same domain and of like
programme: values repeat, sizes and formats are those of prepared slides.

Shape letters: N spots of a slide, M spots of the drawn sections.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align.corpus import QUARANTINE, SPOT_PATCHES
from st_align.corpus_files import (
    new_folder,
    slide_columns,
    slide_entry,
    write_columns,
    write_json,
    write_manifest,
    write_record,
)
from st_align.expression import Genes
from st_align.image import ArrayImage
from st_align.prepare import NICHE_PX, SPOT_PX, prepare_slide
from st_align.simulate import genes
from st_align.simulate.constants import Constants
from st_align.simulate.counts import Biology, draw_batch, draw_counts
from st_align.simulate.histology import draw_stain, draw_tissue, render
from st_align.simulate.layouts import barcodes
from st_align.simulate.section import Section, draw_section
from st_align.slide import PITCH_UM, PreparedSlide, Slide

SILENT_GENES = 16_800
"""Genes beyond those of a simulated cohort: 18,000 in all, as a probe set for Visium has."""
_SECTIONS, _SECTION_SPOTS = 4, 1_000
_NICHE = "lattice"
_JITTER = 8
"""Spots are taken from among so many on either side of the one whose programme is nearest."""
_ZEROS = bytes(1 << 20)


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Spots of drawn sections, by domain, and by programme within a domain."""

    domain: NDArray[np.int64]
    """[M] ascending"""
    programme: NDArray[np.float64]
    """[M]"""
    counts: Any
    """CSR int32 [M, G]"""
    genes: Genes
    spot_patches: NDArray[np.uint8]
    niche_patches: NDArray[np.uint8]

    def alike(self, rng: np.random.Generator, section: Section) -> NDArray[np.intp]:
        """[N] a row of the pool for each spot in tissue."""
        rows = np.empty(len(section.domain), np.intp)
        for domain in np.unique(section.domain):
            spots = section.domain == domain
            first, stop = np.searchsorted(self.domain, [domain, domain + 1])
            near = np.searchsorted(self.programme[first:stop], section.programme[spots])
            near += rng.integers(-_JITTER, _JITTER + 1, len(near))
            rows[spots] = first + near.clip(0, stop - first - 1)
        return rows


def draw_pool(rng: np.random.Generator, constants: Constants, biology: Biology, spots: int) -> Pool:
    """Draw some sections of at most `spots` spots, of a stain each, and cut them."""
    tissue = draw_tissue(rng, biology.n_domains)
    of_all = Genes(
        symbols=biology.symbols, ensembl=np.array(genes.ensembl_ids(len(biology.symbols)))
    )
    drawn, sections = [], []
    for _ in range(_SECTIONS):
        n = min(spots, _SECTION_SPOTS)
        section = draw_section(rng, constants, n_spots=n, n_domains=biology.n_domains)
        batch = draw_batch(rng, len(biology.symbols), constants.patient_log_sd)
        counts = draw_counts(rng, constants, biology, section, batch)
        image = render(rng, section, tissue, draw_stain(rng, constants.stain_shift))
        slide = dataclasses.replace(
            _bare(section, constants, "pool", "pool"),
            counts=counts,
            genes=of_all,
            image=ArrayImage(image, constants.hires_scale),
        )
        drawn.append(prepare_slide(slide, (_NICHE,)))
        sections.append(section)
    return _pooled(drawn, sections, of_all)


def _pooled(drawn: list[PreparedSlide], sections: list[Section], of_all: Genes) -> Pool:
    from scipy import sparse

    domain = np.concatenate([s.domain for s in sections])
    programme = np.concatenate([s.programme for s in sections])
    order = np.lexsort((programme, domain))
    counts = sparse.vstack([s.counts for s in drawn], format="csr")[order]
    return Pool(
        domain=domain[order],
        programme=programme[order],
        counts=counts,
        genes=of_all,
        spot_patches=np.concatenate([s.spot_patches for s in drawn])[order],
        niche_patches=np.concatenate([s.niches[_NICHE].patches for s in drawn])[order],
    )


def write_slide(
    folder: Path, id: str, patient: str, *, rng: np.random.Generator, constants: Constants,
    pool: Pool, n_spots: int, n_domains: int, sparse: bool,
) -> dict[str, Any]:  # fmt: skip
    """Write one slide's folder, as `prepare` does; gives its entry of the manifest.

    `sparse`: patches are files of their full length that hold nothing (zeros when read).
    """
    section = draw_section(rng, constants, n_spots=n_spots, n_domains=n_domains)
    rows = pool.alike(rng, section)
    counts = pool.counts[rows]
    bare = dataclasses.replace(
        _bare(section, constants, id, patient),
        counts=counts,
        genes=pool.genes,
        total_umi=np.asarray(counts.sum(axis=1), np.float64),
    )
    slide = prepare_slide(bare, (_NICHE,))
    um_per_px = PITCH_UM["Visium"] / (section.pitch_px / constants.hires_scale)
    entry = slide_entry(slide, format="simulated", source=id) | {"um_per_px": um_per_px}
    columns = slide_columns(slide)
    patches = {SPOT_PATCHES: pool.spot_patches, f"niches/{_NICHE}/patches.npy": pool.niche_patches}
    if not sparse:
        columns |= {name: values[rows] for name, values in patches.items()}
    with new_folder(folder, sum(column.nbytes for column in columns.values())) as part:
        sums = write_columns(part, columns)
        if sparse:
            for name, values in patches.items():
                sums[name] = write_hole(part / name, (n_spots, *values.shape[1:]))
        return write_record(part, "simulated", entry, sums)


def write_corpus(out: Path, slides: Mapping[str, Any]) -> None:
    """The files beside the slides' folders."""
    write_json(out / QUARANTINE, {})
    write_manifest(out, slides, spot_px=SPOT_PX, niche_px=NICHE_PX)


def write_hole(path: Path, shape: tuple[int, ...], dtype: str = "|u1") -> str:
    """A `.npy` file of zeros that takes no room on a disk that knows holes; gives its sha256."""
    head = io.BytesIO()
    facts = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, facts)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with path.open("wb") as file:
        file.write(head.getvalue())
        file.truncate(head.tell() + size)
        file.flush()
        os.fsync(file.fileno())
    return _hash_of_zeros(head.getvalue(), size)


@lru_cache
def _hash_of_zeros(head: bytes, size: int) -> str:
    """sha256 of `head` and so many zeros: most slides are of one size, so once is enough."""
    digest = sha256(head)
    for _ in range(size // len(_ZEROS)):
        digest.update(_ZEROS)
    digest.update(_ZEROS[: size % len(_ZEROS)])
    return digest.hexdigest()


def _bare(section: Section, constants: Constants, id: str, patient: str) -> Slide:
    """The spots in tissue, without counts and image; its truth in `obs`."""
    inside = section.in_tissue
    names = barcodes(len(section.places))[inside]
    truth = {
        "domain": [f"domain_{i + 1}" for i in section.domain],
        "programme": section.programme.round(4),
    }
    return Slide(
        id=id,
        technology="Visium",
        source=id,
        barcodes=names,
        xy=section.xy[inside] / constants.hires_scale,
        places=section.places[inside],
        counts=None,
        genes=None,
        total_umi=None,
        image=None,
        obs=pd.DataFrame(truth, index=pd.Index(names)),
        patient=patient,
        patient_origin="table",
        tissue="simulated",
        species="human",
    )
