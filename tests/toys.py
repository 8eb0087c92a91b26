"""Small slides for tests, built without any reader.

places of a 4 x 4 hexagonal toy:    row 0   .   .   .   .
                                    row 1     .   .   .   .
                                    row 2   .   .   .   .
                                    row 3     .   .   .   .
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import sparse

from st_align.expression import Genes
from st_align.slide import Niche, PreparedSlide

HEX_RING = [(0, -2), (0, 2), (-1, -1), (-1, 1), (1, -1), (1, 1)]


def hex_places(rows: int, cols: int) -> np.ndarray:
    return np.array([(r, 2 * c + r % 2) for r in range(rows) for c in range(cols)], np.int32)


def hex_xy(places: np.ndarray, pitch: float) -> np.ndarray:
    row, col = places.T.astype(float)
    return np.c_[(col / 2 + 1) * pitch, (row * np.sqrt(3) / 2 + 1) * pitch]


def toy_genes(n: int) -> Genes:
    return Genes(
        symbols=np.array([f"GENE{i}" for i in range(n)]),
        ensembl=np.array([f"ENSG{i:011d}" for i in range(n)]),
    )


def toy_rings(places: np.ndarray) -> np.ndarray:
    """[N, 7] each spot and its ring of a hexagonal lattice, -1 fills."""
    row_at = {tuple(p): i for i, p in enumerate(places.tolist())}
    neighbors = np.full((len(places), 7), -1, np.int32)
    for i, (r, c) in enumerate(places.tolist()):
        ring = [row_at[r + dr, c + dc] for dr, dc in HEX_RING if (r + dr, c + dc) in row_at]
        neighbors[i, : len(ring) + 1] = [i, *ring]
    return neighbors


def toy_prepared(
    rng: np.random.Generator,
    *,
    id: str = "toy",
    patient: str = "p0",
    rows: int = 6,
    cols: int = 6,
    n_genes: int = 30,
    patch: int = 16,
    niche_patch: int = 24,
    image: bool = True,
    counts: bool = True,
    niche: str = "lattice",
) -> PreparedSlide:
    """Two halves (left, right) that differ in their genes and in their colour."""
    places = hex_places(rows, cols)
    n, xy = len(places), hex_xy(places, 20.0)
    right = places[:, 1] >= cols
    means = np.where(right[:, None], np.linspace(8, 1, n_genes), np.linspace(1, 8, n_genes))
    matrix = sparse.csr_array(rng.poisson(means).astype(np.int32)) if counts else None
    colour = np.where(right[:, None], [200, 80, 120], [90, 60, 160])

    def patches(side: int) -> np.ndarray:
        noise = rng.integers(-30, 30, (n, side, side, 3))
        return np.clip(colour[:, None, None] + noise, 0, 255).astype(np.uint8)

    spots = pd.DataFrame(
        {
            "barcode": [f"{id}-{i}" for i in range(n)],
            "array_row": places[:, 0],
            "array_col": places[:, 1],
            "x": xy[:, 0],
            "y": xy[:, 1],
            "total_umi": matrix.sum(axis=1).astype(float) if matrix is not None else np.nan,
            "domain": np.where(right, "right", "left"),
        }
    )
    boxes = np.c_[xy - 15, xy + 15]
    return PreparedSlide(
        id=id,
        technology="Visium",
        source="toy",
        patient=patient,
        patient_origin="table",
        tissue="toy",
        species="human",
        um_per_px=5.0,
        spots=spots,
        genes=toy_genes(n_genes) if counts else None,
        counts=matrix,
        spot_patches=patches(patch) if image else None,
        niches={
            niche: Niche(
                neighbors=toy_rings(places),
                boxes=boxes,
                patches=patches(niche_patch) if image else None,
            )
        },
    )


def two_patients(rng: np.random.Generator, **changes) -> list[PreparedSlide]:
    """a1 and a2 of patient A, b1 of patient B."""
    return [
        toy_prepared(rng, id=i, patient=i[0].upper(), rows=8, cols=8, **changes)
        for i in ("a1", "a2", "b1")
    ]
