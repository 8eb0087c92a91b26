"""Small slides as a reader gives them, and references to them that worker processes can read."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from st_align.errors import SlideError
from st_align.image import ArrayImage
from st_align.io.refs import SlideRef
from st_align.slide import Slide
from toys import hex_places, hex_xy, toy_genes

PITCH = 20.0


def toy_slide(
    id: str = "toy",
    *,
    rows: int = 4,
    cols: int = 4,
    n_genes: int = 12,
    image: bool = True,
    counts: bool = True,
    scale: float = 1.0,
    seed: int = 0,
) -> Slide:
    rng = np.random.default_rng([seed, *id.encode()])
    places = hex_places(rows, cols)
    n, xy = len(places), hex_xy(places, PITCH)
    matrix = sparse.csr_array(rng.poisson(1.0, (n, n_genes)).astype(np.int32)) if counts else None
    size = (xy.max(axis=0)[::-1] + PITCH) * scale
    pixels = rng.integers(0, 256, (*size.astype(int), 3), dtype=np.uint8)
    barcodes = np.array([f"{id}-{i}" for i in rng.permutation(n)])
    return Slide(
        id=id,
        technology="Visium",
        source=f"/somewhere/{id}.h5ad",
        barcodes=barcodes,
        xy=xy,
        places=places,
        counts=matrix,
        genes=toy_genes(n_genes) if counts else None,
        total_umi=matrix.sum(axis=1).astype(np.float64) if matrix is not None else None,
        image=ArrayImage(pixels, scale) if image else None,
        obs=pd.DataFrame(
            {"layer": pd.Categorical((["L1", "L2"] * n)[:n]), "note": (["ö", None] * n)[:n]},
            index=pd.Index(barcodes),
        ),
        patient=id[0],
        patient_origin="table",
        tissue="toy",
        species="human",
    )


def read_toy(id: str, seed: int, damaged: bool, rows: int) -> Slide:
    if damaged:
        raise SlideError(f"/somewhere/{id}.h5ad is truncated", found="nothing", fix="copy it again")
    return toy_slide(id, seed=seed, rows=rows)


def toy_ref(id: str, *, seed: int = 0, damaged: bool = False, rows: int = 4) -> SlideRef:
    read = functools.partial(read_toy, id, seed, damaged, rows)
    return SlideRef(id, "h5ad", Path(f"/somewhere/{id}.h5ad"), read)
