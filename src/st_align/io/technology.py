"""Visium or legacy ST, told from barcodes, places or the pattern of the spots."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from st_align.slide import Technology

_VISIUM_BARCODE = re.compile(r"(?<![A-Za-z])[ACGT]{16}(?![A-Za-z])")
_HD_BARCODE: dict[Technology, re.Pattern[str]] = {
    "VisiumHD-16um": re.compile(r"^s_016um_\d+_\d+"),
    "VisiumHD-8um": re.compile(r"^s_008um_\d+_\d+"),
}
_ST_NAME = re.compile(r"(?:^|_)(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)$")


def from_barcodes(barcodes: Sequence[str] | NDArray[np.str_]) -> tuple[Technology, str] | None:
    """Tell by the form of nine in ten barcodes, with the reason; None when they don't tell."""
    forms: list[tuple[Technology, re.Pattern[str], str]] = [
        ("Visium", _VISIUM_BARCODE, "barcodes of 16 bases"),
        ("ST", _ST_NAME, "spots named COLxROW"),
        *((name, form, "barcodes of bins") for name, form in _HD_BARCODE.items()),
    ]
    for technology, form, reason in forms:
        if sum(form.search(str(b)) is not None for b in barcodes) >= 0.9 * max(1, len(barcodes)):
            return technology, reason
    return None


def guess_technology(
    barcodes: NDArray[np.str_], places: NDArray[np.int32] | None, xy: NDArray[np.float64]
) -> tuple[Technology, str]:
    """The technology of a slide that doesn't name it, and the reason."""
    told = from_barcodes(barcodes)
    if told is not None:
        return told
    if places is not None and np.unique(places[:, 0] % 2).size == 2:
        if hexagonal_parity(places):
            return "Visium", "odd rows hold odd columns only"
        return "ST", "rows hold odd and even columns"
    ring = _typical_ring(xy)
    if ring >= 5:
        return "Visium", f"spots have {ring} nearest neighbours: a hexagonal lattice"
    if ring >= 3:
        return "ST", f"spots have {ring} nearest neighbours: a square lattice"
    return "Visium", "nothing tells it, so the usual one"


def hexagonal_parity(places: NDArray[np.int32]) -> bool:
    """Whether row + column has one parity everywhere, as on Visium's lattice."""
    return bool(np.unique(places.sum(axis=1) % 2).size == 1)


def st_names(barcodes: NDArray[np.str_]) -> NDArray[np.float64] | None:
    """[N, 2] the two numbers of names such as `slide_10x13`; None unless all have them."""
    found = [_ST_NAME.search(str(barcode)) for barcode in barcodes]
    if not found or any(match is None for match in found):
        return None
    return np.array([[float(match[1]), float(match[2])] for match in found if match])


def st_places(barcodes: NDArray[np.str_], xy: NDArray[np.float64]) -> NDArray[np.int32] | None:
    """Places [N, 2] (row, column) from names `COLxROW` or `ROWxCOL`.

    The number that goes with x is the column. Numbers may be measured ones (`9.97x13.04`); None
    when spots would share a place or names hold no numbers.
    """
    numbers = st_names(barcodes)
    if numbers is None or numbers.max() >= 1 << 31:
        return None
    first_is_column = _corr(numbers[:, 0], xy[:, 0]) + _corr(numbers[:, 1], xy[:, 1]) >= _corr(
        numbers[:, 0], xy[:, 1]
    ) + _corr(numbers[:, 1], xy[:, 0])
    places = np.rint(numbers[:, ::-1] if first_is_column else numbers).astype(np.int32)
    return places if len(np.unique(places, axis=0)) == len(places) else None


def _corr(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return abs(float(a @ b)) / norm if norm > 0 else 0.0


def _typical_ring(xy: NDArray[np.float64]) -> int:
    """Neighbours within 1.25 pitch that an inner spot has: 6 on a hexagon, 4 on a square."""
    from scipy.spatial import cKDTree

    if len(xy) < 7:
        return 0
    distances, _ = cKDTree(xy).query(xy, k=7)
    pitch = np.median(distances[:, 1])
    return round(float(np.quantile((distances[:, 1:] < 1.25 * pitch).sum(axis=1), 0.75)))
