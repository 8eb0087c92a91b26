"""A Space Ranger 3 folder of Visium HD, simulated, of any number of bins.

    python examples/visium_hd.py OUT [BINS]

Writes OUT/binned_outputs/square_016um: bins of 16 um on a square (100,000 by default), 18,000
genes, about 300 molecules a bin, six bands of tissue that genes and image show, a hires image of
at most 4,000 px. It has the sizes of a real slide, so that time and memory can be measured with it;
what a model finds in it says nothing about tissue.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from PIL import Image
from scipy import sparse

from st_align.simulate import genes

BINS, GENES, MOLECULES, BANDS = 100_000, 18_000, 300, 6
UM, FULLRES_UM_PER_PX, MOST_PX = 16, 0.5, 4_000
BLOCK = 5_000


def main(out: Path, n_bins: int) -> None:
    """Write the folder."""
    rng = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(n_bins)))
    row, column = (axis[:n_bins] for axis in np.divmod(np.arange(side * side), side))
    band = ((row + 12 * np.sin(column / 25)) * BANDS / side).clip(0, BANDS - 1).astype(int)
    folder = out / "binned_outputs" / f"square_{UM:03d}um"
    (folder / "spatial").mkdir(parents=True)
    places = zip(row, column, strict=True)
    barcodes = np.array([f"s_{UM:03d}um_{r:05d}_{c:05d}-1" for r, c in places])
    write_places(folder / "spatial", barcodes, row, column)
    write_image(folder / "spatial", rng, band, side)
    write_matrix(folder / "filtered_feature_bc_matrix.h5", rng, barcodes, band)


def write_places(spatial: Path, barcodes: np.ndarray, row: np.ndarray, column: np.ndarray) -> None:
    """Places and the scale of the hires image."""
    px = UM / FULLRES_UM_PER_PX
    table = {"barcode": barcodes, "in_tissue": 1, "array_row": row, "array_col": column}
    table |= {"pxl_row_in_fullres": (row + 0.5) * px, "pxl_col_in_fullres": (column + 0.5) * px}
    pd.DataFrame(table).to_parquet(spatial / "tissue_positions.parquet")
    hires = min(1.0, MOST_PX / ((row.max() + 1) * px))
    factors = {"tissue_hires_scalef": hires, "spot_diameter_fullres": px, "bin_size_um": UM}
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))


def write_image(spatial: Path, rng: np.random.Generator, band: np.ndarray, side: int) -> None:
    """Each band has a colour of its own, with noise of a pixel's size."""
    pixels = min(MOST_PX, round(side * UM / FULLRES_UM_PER_PX))
    colors = rng.uniform([150, 90, 150], [235, 190, 225], (BANDS, 3))
    of_bins = np.zeros((side * side, 3))
    of_bins[: len(band)] = colors[band]
    at = np.arange(pixels) * side // pixels
    image = of_bins.reshape(side, side, 3)[at][:, at]
    image += rng.normal(0, 12, (pixels, pixels, 1))
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(spatial / "tissue_hires_image.png")


def write_matrix(
    path: Path, rng: np.random.Generator, barcodes: np.ndarray, band: np.ndarray
) -> None:
    """Features x barcodes in the layout of Cell Ranger 3; Poisson around the band's profile."""
    symbols = [*genes.symbols(), *genes.silent(GENES - len(genes.symbols()))]
    profile = np.exp(rng.normal(0, 2, GENES) + rng.normal(0, 0.6, (BANDS, GENES)))
    profile *= MOLECULES / profile.sum(axis=1, keepdims=True)
    parts = [
        sparse.csr_array(rng.poisson(profile[band[i : i + BLOCK]]).astype(np.int32))
        for i in range(0, len(band), BLOCK)
    ]
    counts = sparse.vstack(parts, format="csr")
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = barcodes.astype("S")
        group["data"], group["indices"] = counts.data, counts.indices.astype(np.int64)
        group["indptr"] = counts.indptr.astype(np.int64)
        group["shape"] = np.array([GENES, len(band)], np.int32)
        features = group.create_group("features")
        features["id"] = np.array([f"ENSG{i:011d}" for i in range(GENES)], "S")
        features["name"] = np.array(symbols, "S")
        features["feature_type"] = np.array(["Gene Expression"] * GENES, "S")
        features["genome"] = np.array(["GRCh38"] * GENES, "S")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else BINS)
