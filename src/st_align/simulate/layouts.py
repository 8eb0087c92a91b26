"""Simulated slides in the layouts of Space Ranger and of STimage-1K4M.

Shape letters: M places of the lattice, N spots in tissue, G genes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from st_align.simulate.genes import ensembl_ids
from st_align.simulate.section import Section

_STATED_UM_PER_PITCH = 65 / 100
"""Space Ranger's spot diameter stands for about 65 um, not 55."""
_LOWRES_SIDE = 600
_GENOME = "GRCh38"
_CODES = 4**16


@dataclass(frozen=True, kw_only=True)
class SimulatedSlide:
    """One slide ready to be written."""

    id: str
    section: Section
    barcodes: NDArray[np.str_]
    """[M]"""
    symbols: NDArray[np.str_]
    """[G]"""
    counts: sparse.csr_array
    """int32 [N, G]"""
    image: NDArray[np.uint8]
    """[H, W, 3]"""
    hires_scale: float
    """Pixels of `image` per full-resolution pixel."""


@dataclass(frozen=True)
class Layout:
    """How a cohort lies on disk."""

    slides: str
    """Folder of the cohort that holds the slides: what `prepare` is given."""
    slide_id: str
    """Format of an id, of `patient` and `section`."""
    write: Callable[[Path, SimulatedSlide], None]
    """Writes a slide below that folder."""


def barcodes(n: int) -> NDArray[np.str_]:
    """[n] distinct barcodes of 16 bases; place i has the same on every slide, as on real ones."""
    codes = (np.arange(n, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(40503)) % _CODES
    digits = (codes[:, None] >> (2 * np.arange(16, dtype=np.uint64))) & np.uint64(3)
    bases = np.array(list("ACGT"))[digits.astype(int)]
    return np.array(["".join(row) + "-1" for row in bases])


def _write_spaceranger(folder: Path, slide: SimulatedSlide) -> None:
    """SAMPLE/outs as Space Ranger 2 and later write it."""
    outs = folder / slide.id / "outs"
    spatial = outs / "spatial"
    spatial.mkdir(parents=True)
    section, scale = slide.section, slide.hires_scale
    fullres = np.rint(section.xy / scale).astype(int)
    pd.DataFrame(
        {
            "barcode": slide.barcodes,
            "in_tissue": section.in_tissue.astype(int),
            "array_row": section.places[:, 0],
            "array_col": section.places[:, 1],
            "pxl_row_in_fullres": fullres[:, 1],
            "pxl_col_in_fullres": fullres[:, 0],
        }
    ).to_csv(spatial / "tissue_positions.csv", index=False)
    side = max(section.shape)
    low = min(1.0, _LOWRES_SIDE / side)
    diameter = _STATED_UM_PER_PITCH * section.pitch_px / scale
    factors = {
        "spot_diameter_fullres": diameter,
        "fiducial_diameter_fullres": diameter * 1.6,
        "tissue_hires_scalef": scale,
        "tissue_lowres_scalef": scale * low,
    }
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))
    _write_png(spatial / "tissue_hires_image.png", slide.image)
    _write_png(spatial / "tissue_lowres_image.png", slide.image, low)
    _write_h5(outs / "filtered_feature_bc_matrix.h5", slide)


def _write_h5(path: Path, slide: SimulatedSlide) -> None:
    """The matrix in the layout of Cell Ranger 3: features x barcodes, CSC, all of them genes."""
    import h5py

    counts, n_genes = slide.counts, len(slide.symbols)
    names = slide.barcodes[slide.section.in_tissue]
    features: Mapping[str, NDArray[np.str_]] = {
        "id": np.array(ensembl_ids(n_genes)),
        "name": slide.symbols,
        "feature_type": np.full(n_genes, "Gene Expression"),
        "genome": np.full(n_genes, _GENOME),
    }
    with h5py.File(path, "w") as file:
        file.attrs["filetype"] = "matrix"
        file.attrs["version"] = 2
        file.attrs["software_version"] = "st-align simulate"
        group = file.create_group("matrix")
        group["barcodes"] = names.astype("S")
        # Rows of CSR are spots: the same arrays are the columns of features x barcodes.
        group.create_dataset("data", data=counts.data.astype(np.int32), compression="gzip")
        group.create_dataset("indices", data=counts.indices.astype(np.int64), compression="gzip")
        group["indptr"] = counts.indptr.astype(np.int64)
        group["shape"] = np.array([n_genes, len(names)], np.int32)
        table = group.create_group("features")
        table["_all_tag_keys"] = np.array([b"genome"])
        for key, values in features.items():
            table[key] = values.astype("S")


def _write_stimage(folder: Path, slide: SimulatedSlide) -> None:
    """Visium/{coord,gene_exp,image}; coordinates are pixels of the image."""
    section, root = slide.section, folder / "Visium"
    for name in ("coord", "gene_exp", "image"):
        (root / name).mkdir(parents=True, exist_ok=True)
    names = slide.barcodes[section.in_tissue]
    xy = section.xy[section.in_tissue]
    radius = _STATED_UM_PER_PITCH * section.pitch_px / 2
    coordinates = {"yaxis": xy[:, 1], "xaxis": xy[:, 0], "r": radius}
    pd.DataFrame(coordinates, index=names).to_csv(root / "coord" / f"{slide.id}_coord.csv")
    counts = pd.DataFrame(slide.counts.toarray(), index=names, columns=slide.symbols)
    counts.to_csv(root / "gene_exp" / f"{slide.id}_count.csv")
    _write_png(root / "image" / f"{slide.id}.png", slide.image)


def _write_png(path: Path, pixels: NDArray[np.uint8], scale: float = 1.0) -> None:
    from PIL import Image

    image = Image.fromarray(pixels)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BOX)
    image.save(path, compress_level=1)  # noise hardly compresses: more effort takes time only


LAYOUTS: dict[str, Layout] = {
    "spaceranger": Layout("slides", "P{patient}_S{section}", _write_spaceranger),
    "stimage": Layout(".", "SIM{patient:03d}_S{section}", _write_stimage),
}
"""The study of an STimage name is a patient's, so that it splits rightly without a table too."""
