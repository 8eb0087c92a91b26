"""Slide: one validated tissue section as a reader gives it; PreparedSlide: what a model reads.

Shape letters: N spots, G measured genes, K neighbours, p and q pixels of a patch side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if TYPE_CHECKING:
    from st_align.expression import Genes
    from st_align.image import ImageSource

Technology = Literal["Visium", "ST", "VisiumHD-16um", "VisiumHD-8um"]
"""Bins of Visium HD touch each other: their side is their pitch."""
Lattice = Literal["hex", "square"]

LATTICE: dict[Technology, Lattice] = {
    "Visium": "hex",
    "ST": "square",
    "VisiumHD-16um": "square",
    "VisiumHD-8um": "square",
}
PITCH_UM: dict[Technology, float] = {
    "Visium": 100.0,
    "ST": 200.0,
    "VisiumHD-16um": 16.0,
    "VisiumHD-8um": 8.0,
}
SPOT_UM: dict[Technology, float] = {
    "Visium": 55.0,
    "ST": 100.0,
    "VisiumHD-16um": 16.0,
    "VisiumHD-8um": 8.0,
}


def spread(n: int, most: int) -> NDArray[np.intp]:
    """At most `most` of the numbers 0..n-1, evenly spread over them."""
    return np.linspace(0, n - 1, min(n, most)).astype(np.intp)


@dataclass(frozen=True, kw_only=True)
class Slide:
    """One section: spots in the order of the source, with counts, an image, or both.

    Built by the readers of `st_align.io`, which validate it with `st_align.io.check_slide`.
    """

    id: str
    technology: Technology
    source: str
    barcodes: NDArray[np.str_]
    """[N], unique."""
    xy: NDArray[np.float64]
    """[N, 2] spot centres, x then y, in pixels of the full-resolution image."""
    places: NDArray[np.int32] | None
    """[N, 2] array_row, array_col; None where the source has none."""
    counts: Any | None
    """CSR int32 [N, G], raw counts of all genes measured; None without counts."""
    genes: Genes | None
    total_umi: NDArray[np.float64] | None
    """[N] library size over all genes of the experiment, not only those kept."""
    image: ImageSource | None
    obs: pd.DataFrame
    """The source's other per-spot columns (labels too), indexed by barcode."""
    patient: str
    patient_origin: Literal["table", "obs", "study", "slide"]
    tissue: str = ""
    species: str = ""
    licence: str = ""
    """As the source states it; empty where it does not."""
    warnings: tuple[str, ...] = ()

    @property
    def n_spots(self) -> int:
        """Number of spots N."""
        return len(self.barcodes)


@dataclass(frozen=True, kw_only=True)
class Niche:
    """Neighbourhoods of one niche spec: `neighbors` [N, K+1] row numbers, self first, -1 fills;
    `boxes` [N, 4] x0 y0 x1 y1 in full-resolution px; `patches` uint8 [N, q, q, 3] or None.
    """

    neighbors: NDArray[np.int32]
    boxes: NDArray[np.float64]
    patches: NDArray[np.uint8] | None


@dataclass(frozen=True, kw_only=True)
class PreparedSlide:
    """A slide cut into what the model reads, in memory or memory-mapped from a corpus."""

    id: str
    technology: Technology
    source: str
    patient: str
    patient_origin: str
    tissue: str
    species: str
    um_per_px: float | None
    """None when coordinates are not pixels of an image."""
    spots: pd.DataFrame
    """[N] rows; columns barcode, array_row, array_col (-1 where unknown), x, y, total_umi
    (NaN without counts), then the source's obs."""
    genes: Genes | None
    counts: Any | None
    spot_patches: NDArray[np.uint8] | None
    """[N, p, p, 3]"""
    niches: Mapping[str, Niche]
    licence: str = ""
    warnings: tuple[str, ...] = field(default=())
    image: ImageSource | None = None
    """What it was cut from, where that is open."""

    @property
    def n_spots(self) -> int:
        """Number of spots N."""
        return len(self.spots)

    @property
    def has_image(self) -> bool:
        """Whether patches were cut."""
        return self.spot_patches is not None

    @property
    def total_umi(self) -> NDArray[np.float64]:
        """[N] library sizes."""
        umi: NDArray[np.float64] = self.spots["total_umi"].to_numpy(np.float64)
        return umi

    def spread(self, most: int) -> NDArray[np.intp]:
        """At most `most` row numbers, spread evenly over the barcodes in their order: the same
        spots whatever the order of the rows.
        """
        order = np.argsort(self.spots["barcode"].to_numpy().astype(str), kind="stable")
        return order[spread(self.n_spots, most)]
