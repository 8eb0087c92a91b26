"""Seeded cohorts of Visium slides with known truth, in layouts that the readers read, or prepared.

`simulate_cohort` is all of it: sections (`section`) with domains and a continuous programme, the
image that shows them (`histology`), the counts that they shape (`counts`), on disk (`layouts`,
`corpora`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from st_align.errors import ConfigError, OutputError, nearest, require_new_or_empty
from st_align.simulate import corpora
from st_align.simulate.constants import Constants
from st_align.simulate.counts import Biology, draw_batch, draw_biology, draw_counts
from st_align.simulate.histology import Stain, draw_stain, draw_tissue, render
from st_align.simulate.layouts import LAYOUTS, SimulatedSlide, barcodes
from st_align.simulate.section import draw_section

__all__ = ["simulate_cohort"]

CORPUS = "corpus"
"""The layout that needs no `prepare`."""
_SPOTS = (50, 15_000)
_PER_PATIENT = 2
_COHORT, _PATIENT, _SLIDE = range(3)
"""Streams of chance: what is drawn for a slide does not depend on how many slides there are."""


@dataclass(frozen=True)
class _Drawn:
    slide: SimulatedSlide
    patient: str
    stain: Stain


def simulate_cohort(
    out: Path,
    *,
    slides: int = 8,
    spots: int = 400,
    seed: int = 0,
    layout: str = "spaceranger",
    sparse: bool = False,
) -> dict[str, Any]:
    """Write a cohort of `slides` slides of exactly `spots` spots, two slides a patient.

    Beside the slides lie `patients.csv` (slide, patient), `truth.csv` (barcode, slide, domain,
    programme: for `prepare --obs`) and `truth.json` (constants, markers, slopes, stains). Equal
    arguments write equal values.

    Args:
        out: new or empty folder; it appears whole or not at all.
        slides: 1 or more.
        spots: in tissue, 50 to 15,000 a slide. From about 600 on, pixels per spot get fewer: the
            image has at most 2,000 a side.
        seed: of everything, 0 or more.
        layout: "spaceranger" or "stimage", which `prepare` reads, or "corpus": prepared already,
            of 18,000 genes, its truth in the columns domain and programme of its spots. `corpora`
            says what repeats in it.
        sparse: the corpus takes a fortieth of the room: patches are files of their full length
            that hold nothing, and there are 1,200 genes.

    Returns:
        JSON-able: `slides` {id: patient}, `n_spots`, `n_genes`, `n_domains`, `layout`, and, but
        for a corpus, the paths below `out` `source` (what `prepare` is given), `patients`, `obs`,
        `truth`.

    Raises:
        ConfigError: an argument out of range. OutputError: `out` holds files, or cannot be written.

    """
    _require_arguments(slides, spots, seed, layout, sparse)
    require_new_or_empty(out, "the cohort's folder", "choose another, or remove it")
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
            whole = Path(work, "cohort")
            whole.mkdir()
            if layout == CORPUS:
                summary = _write_corpus(whole, slides=slides, spots=spots, seed=seed, sparse=sparse)
            else:
                summary = _write(whole, slides=slides, spots=spots, seed=seed, layout=layout)
            whole.replace(out)
    except OSError as error:
        raise OutputError(f"cannot write {out}", found=error.strerror or str(error)) from error
    return summary


def _require_arguments(slides: int, spots: int, seed: int, layout: str, sparse: bool) -> None:
    layouts = (*LAYOUTS, CORPUS)
    if layout not in layouts:
        raise ConfigError(
            f"unknown layout {layout!r}", expected=" | ".join(layouts), fix=nearest(layout, layouts)
        )
    if sparse and layout != CORPUS:
        raise ConfigError("only a corpus can be sparse", expected=CORPUS, found=layout)
    _require("number of slides", slides, 1, None)
    _require("number of spots", spots, *_SPOTS)
    _require("seed", seed, 0, None)


def _require(what: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        expected = f"{low:,} or more" if high is None else f"{low:,} to {high:,}"
        raise ConfigError(
            f"the number of {what} is out of range", expected=expected, found=f"{value:,}"
        )


def _write(folder: Path, *, slides: int, spots: int, seed: int, layout: str) -> dict[str, Any]:
    constants = Constants()
    biology = draw_biology(np.random.default_rng((seed, _COHORT)), constants)
    domains = [f"domain_{i + 1}" for i in range(biology.n_domains)]
    shape, patients, truth, facts = LAYOUTS[layout], {}, [], {}
    for drawn in _draw(constants, biology, slides=slides, spots=spots, seed=seed, layout=layout):
        slide, section = drawn.slide, drawn.slide.section
        shape.write(folder / shape.slides, slide)
        patients[slide.id] = drawn.patient
        truth.append(
            pd.DataFrame(
                {
                    "barcode": slide.barcodes[section.in_tissue],
                    "slide": slide.id,
                    "domain": np.array(domains)[section.domain],
                    "programme": section.programme.round(4),
                }
            )
        )
        stain = {name: np.round(v, 4).tolist() for name, v in asdict(drawn.stain).items()}
        facts[slide.id] = {"arrangement": section.arrangement, "stain": stain}
    pd.concat(truth).to_csv(folder / "truth.csv", index=False)
    pd.Series(patients, name="patient").to_csv(folder / "patients.csv", index_label="slide")
    slopes = zip(biology.symbols.tolist(), biology.slope.round(4).tolist(), strict=True)
    known = {
        "seed": seed,
        "constants": asdict(constants),
        "markers": dict(zip(domains, biology.markers, strict=True)),
        "programme_log_slopes": {gene: slope for gene, slope in slopes if slope},
        "slides": facts,
    }
    (folder / "truth.json").write_text(json.dumps(known, indent=1) + "\n")
    return {
        "slides": patients,
        "layout": layout,
        "source": shape.slides,
        "patients": "patients.csv",
        "obs": "truth.csv",
        "truth": "truth.json",
        "n_spots": slides * spots,
        "n_genes": len(biology.symbols),
        "n_domains": biology.n_domains,
    }


def _write_corpus(
    folder: Path, *, slides: int, spots: int, seed: int, sparse: bool
) -> dict[str, Any]:
    from tqdm import tqdm

    constants = Constants()
    rng = np.random.default_rng((seed, _COHORT))
    biology = draw_biology(rng, constants, silent=0 if sparse else corpora.SILENT_GENES)
    pool = corpora.draw_pool(rng, constants, biology, spots)
    patients, entries = {}, {}
    for index in tqdm(range(slides), "simulate", unit="slide"):
        patient = f"P{index // _PER_PATIENT + 1:03d}"
        id = f"{patient}_S{index % _PER_PATIENT + 1}"
        patients[id] = patient
        entries[id] = corpora.write_slide(
            folder / "slides" / id,
            id,
            patient,
            rng=np.random.default_rng((seed, _SLIDE, index)),
            constants=constants,
            pool=pool,
            n_spots=spots,
            n_domains=biology.n_domains,
            sparse=sparse,
        )
    corpora.write_corpus(folder, entries)
    return {
        "slides": patients,
        "layout": CORPUS,
        "n_spots": slides * spots,
        "n_genes": len(biology.symbols),
        "n_domains": biology.n_domains,
    }


def _draw(
    constants: Constants, biology: Biology, *, slides: int, spots: int, seed: int, layout: str
) -> Iterator[_Drawn]:
    """One slide after the other: an image takes megabytes."""
    tissue = draw_tissue(np.random.default_rng((seed, _COHORT, 1)), biology.n_domains)
    n_genes = len(biology.symbols)
    for index in range(slides):
        number, section_number = index // _PER_PATIENT + 1, index % _PER_PATIENT + 1
        of_patient = np.random.default_rng((seed, _PATIENT, number))
        patient_batch = draw_batch(of_patient, n_genes, constants.patient_log_sd)
        stain = draw_stain(of_patient, constants.stain_shift)
        rng = np.random.default_rng((seed, _SLIDE, index))
        section = draw_section(rng, constants, n_spots=spots, n_domains=biology.n_domains)
        batch = patient_batch + draw_batch(rng, n_genes, constants.slide_log_sd)
        slide = SimulatedSlide(
            id=LAYOUTS[layout].slide_id.format(patient=number, section=section_number),
            section=section,
            barcodes=barcodes(len(section.places)),
            symbols=biology.symbols,
            counts=draw_counts(rng, constants, biology, section, batch),
            image=render(rng, section, tissue, stain),
            hires_scale=constants.hires_scale,
        )
        yield _Drawn(slide, f"P{number}", stain)
