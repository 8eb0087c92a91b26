"""Physical scale, neighbours, niches and their boxes: pure NumPy and SciPy.

Distances between places (array_row, array_col) are whole numbers, so that ties are exact:
hexagonal 3 dr^2 + dc^2, square dr^2 + dc^2. Nothing here builds an N x N array.

Shape letters: N spots, K neighbours, P values per spot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from st_align.errors import ConfigError, SlideError
from st_align.slide import Lattice

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RING: dict[Lattice, tuple[tuple[int, int], ...]] = {
    "hex": ((-1, -1), (-1, 1), (0, -2), (0, 2), (1, -1), (1, 1)),
    "square": ((-1, 0), (0, -1), (0, 1), (1, 0)),
}
_ROW_WEIGHT: dict[Lattice, int] = {"hex": 3, "square": 1}
_PITCH_UNITS: dict[Lattice, float] = {"hex": 2.0, "square": 1.0}
_PIXEL_STEPS = 20
"""Without places, distances are compared in steps of 1/20 of the pitch."""
_RING_REACH = 1.3
"""Without places, a spot nearer than this many pitches is in the first ring."""
_MAX_PLACE = 1_000_000
_SPARE = 5
"""Candidates beyond the K wanted: with them the shell after the K-th is nearly always reached."""
_REACH_UM = 100.0
_CELLS = 4_000_000
"""Candidates looked at in one go: bounds memory."""


class Scale(NamedTuple):
    """`pitch_px`: px between neighbouring spots; `um_per_px`: nominal pitch / fitted pitch."""

    pitch_px: float
    um_per_px: float


def parse_niche_spec(spec: str) -> int | None:
    """K of `k3`, `k6`, ...; None for `lattice`, `rings2`, ...; anything else is a ConfigError."""
    if rings_of(spec):
        return None
    match = re.fullmatch(r"k([1-9]\d{0,2})", spec)
    if not match:
        raise ConfigError(
            f"no niche is called {spec!r}",
            expected="lattice (the whole first ring), rings2, rings3, ... (so many rings), or "
            "k3, k6, ... (that many nearest spots)",
        )
    return int(match[1])


def rings_of(spec: str) -> int | None:
    """How many rings of the lattice a niche spec takes: 1 for `lattice`, n for `rings<n>`; None
    for others.
    """
    match = re.fullmatch(r"rings([1-9]\d?)", spec)
    return 1 if spec == "lattice" else int(match[1]) if match else None


def fit_scale(
    xy: Floats, places: NDArray[np.int32] | None, lattice: Lattice, pitch_um: float
) -> Scale:
    """Median distance over all pairs of spots on neighbouring places, in px and as um per px.

    Where no two places touch, over each spot and the spot of its nearest place, divided by
    their distance on the lattice; without places, over each spot and the nearest other one.
    `xy` [N, 2] px; `places` [N, 2] array_row, array_col; `pitch_um` the nominal distance.

    Fewer than two spots, or a pitch that is not above 0, is a SlideError.
    """
    _require_two(len(xy))
    if places is None:
        pitch = _pitch(cKDTree(xy))
    else:
        rows = _Places(places, np.zeros(len(xy), np.int64))
        first, second = rows.pairs(RING[lattice])
        unit = np.ones(len(first))
        if not len(first):
            first, second = np.arange(len(xy)), _nearest_places(rows, 1, lattice)[:, 1]
            unit = np.sqrt(_place_distance(rows.places[second] - rows.places, lattice))
            unit /= _PITCH_UNITS[lattice]
        apart = np.hypot(*(xy[first] - xy[second]).T)
        pitch = float(np.median(np.divide(apart, unit, out=np.zeros_like(apart), where=unit > 0)))
    return Scale(pitch, pitch_um / _positive(pitch))


def _pitch(tree: cKDTree) -> float:
    """Median distance of the points of a tree to the nearest other one; not above 0: SlideError."""
    _require_two(tree.n)
    # In the tree's order: points that follow each other lie close to each other.
    distance = tree.query(tree.data[tree.indices], k=2)[0][:, 1]
    return _positive(float(np.median(distance)))


def _require_two(n_spots: int) -> None:
    if n_spots < 2:
        raise SlideError("the scale needs two spots", expected="2 or more", found=str(n_spots))


def _positive(pitch: float) -> float:
    if not pitch > 0:
        raise SlideError(
            "the distance between neighbouring spots is 0",
            expected="spots at places of their own",
            fix="look whether several sections were put into one file",
        )
    return pitch


def neighbors(
    spec: str,
    *,
    xy: Floats,
    places: NDArray[np.int32] | None,
    lattice: Lattice,
    barcodes: NDArray[np.str_],
) -> NDArray[np.int32]:
    """Row numbers of each spot's niche: [N, K+1], the spot itself first, -1 fills.

    `kK` takes the K nearest, in the order of (distance of places, array_row, array_col,
    barcode); without places of (distance in steps of 5 % of the pitch, barcode). `lattice` takes
    the first ring in the same order: [N, 7] hexagonal, [N, 5] square; `rings2`, ... all places at
    most so many steps from neighbour to neighbour away: 3 n (n + 1) and 2 n (n + 1) of them.
    Members follow the spots when rows are shuffled and do not change when `xy` is shifted, turned
    or scaled.

    An unknown spec, and `lattice` on a square lattice without places, is a ConfigError.
    """
    k, rings = parse_niche_spec(spec), rings_of(spec)
    n_spots = len(xy)
    rank = np.empty(n_spots, np.int64)
    rank[np.argsort(barcodes, kind="stable")] = np.arange(n_spots)
    if places is not None:
        rows = _Places(places, rank)
        members = (
            _rings(rows, lattice, rings or 1) if k is None else _nearest_places(rows, k, lattice)
        )
    elif k is not None:
        members = _nearest_pixels(xy, rank, k)[0]
    elif lattice == "hex" and rings == 1:
        members, apart, pitch = _nearest_pixels(xy, rank, len(RING[lattice]))
        members = _left_aligned(np.where(apart < _RING_REACH * pitch, members, -1))
    else:
        raise ConfigError(
            f"the niche {spec!r} needs array positions" + " on a square lattice" * (rings == 1),
            expected="array_row and array_col",
            found="spots with pixel positions only",
            fix='use the niche k4: prepare with --niche k4, train with niche = "k4" under [data]',
        )
    return members.astype(np.int32)


def spot_boxes(xy: Floats, diameter_px: float) -> Floats:
    """[N, 4] x0 y0 x1 y1 of each spot's bounding square, px; neither rounded nor clipped."""
    return np.concatenate([xy - diameter_px / 2, xy + diameter_px / 2], axis=1)


def niche_boxes(members: NDArray[np.integer[Any]], boxes: Floats) -> Floats:
    """[N, 4] smallest boxes around the `boxes` [N, 4] of each row of `members` [N, K+1]."""
    absent = (members < 0)[:, :, None]
    of_members = boxes[members]
    low = np.where(absent, np.inf, of_members[:, :, :2]).min(axis=1)
    high = np.where(absent, -np.inf, of_members[:, :, 2:]).max(axis=1)
    return np.concatenate([low, high], axis=1)


def ring_mean(
    values: NDArray[Any],
    members: NDArray[np.integer[Any]],
    valid: NDArray[np.bool_] | None = None,
    *,
    own: float = 1.0,
) -> NDArray[Any]:
    """Mean of `values` [N, P] over each niche (eq. 2) -> [M, P], float32 or float64.

    Absent members (-1) and spots that are not `valid` [N] are left out; a niche without any
    member left gives zeros. The spot itself, the first member, counts `own` times as much as a
    neighbour.
    """
    dtype = np.result_type(values.dtype, np.float32)
    sums = incidence(members, len(values), valid, dtype)
    if own != 1:
        first = members[:, 0]
        present = (first >= 0) & (True if valid is None else valid[first])
        sums.data[sums.indptr[:-1][present]] = own
    count = np.asarray(sums.sum(axis=1)).reshape(-1, 1)
    total: NDArray[Any] = np.asarray(sums @ values.astype(dtype, copy=False))
    mean: NDArray[Any] = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    return mean


def own_weight(pitch_um: float) -> float:
    """How much more a spot itself counts than a neighbour at `pitch_um`, where weights fall off
    with the distance as a Gaussian of 100 um, one pitch of Visium: 1.6 there, 7.4 in legacy ST.
    """
    return math.exp((pitch_um / _REACH_UM) ** 2 / 2)


def incidence(
    members: NDArray[np.integer[Any]],
    n_spots: int,
    valid: NDArray[np.bool_] | None = None,
    dtype: Any = np.float32,
) -> sparse.csr_array:
    """CSR [M, N]: 1 where a spot is a (valid) member of the niche of a row of `members`."""
    present = members >= 0
    if valid is not None:
        present &= valid[members]
    indptr = np.concatenate([[0], np.cumsum(present.sum(axis=1))])
    columns = members[present]
    ones = np.ones(len(columns), dtype)
    return sparse.csr_array((ones, columns, indptr), shape=(len(members), n_spots))


class _Places:
    """Looks up which spot stands on a place; of several on one place, the first by rank."""

    def __init__(self, places: NDArray[np.int32], rank: Ints) -> None:
        shifted = places.astype(np.int64) - places.min(axis=0)
        if shifted.max() > _MAX_PLACE:
            raise SlideError(
                "array positions are out of range",
                expected=f"rows and columns within {_MAX_PLACE:,} of each other",
                found=f"{shifted.max():,} apart",
            )
        self.places = shifted
        self.order = np.lexsort((rank, shifted[:, 1], shifted[:, 0]))
        """[N] rows by (array_row, array_col, rank)."""
        # A margin on both sides of each row keeps an offset from reaching into the next one.
        self._width = 2 * int(shifted[:, 1].max()) + 3
        self._keys = self._key(shifted[self.order])
        self.repeated = bool((np.diff(self._keys) == 0).any())

    def _key(self, places: Ints) -> Ints:
        key: Ints = places[:, 0] * self._width + places[:, 1]
        return key

    def at(self, places: Ints) -> Ints:
        """[M] row of the spot on each of `places` [M, 2], -1 where none stands."""
        inside = (places >= 0).all(axis=1) & (places[:, 1] < self._width)
        key = self._key(places)
        where = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        return np.where(inside & (self._keys[where] == key), self.order[where], -1)

    def pairs(self, offsets: tuple[tuple[int, int], ...]) -> tuple[Ints, Ints]:
        """Rows (a, b) of all spots that stand `offsets` apart."""
        found = [self.at(self.places[self.order] + np.array(offset)) for offset in offsets]
        second = np.concatenate(found)
        first = np.tile(self.order, len(offsets))
        return first[second >= 0], second[second >= 0]


def _rings(rows: _Places, lattice: Lattice, n: int) -> Ints:
    """[N, K+1] all spots at most `n` steps away, ring by ring, self first."""
    offsets = RING[lattice] if n == 1 else _within(lattice, n)
    members = np.empty((len(rows.order), len(offsets) + 1), np.int64)
    ring = [rows.at(rows.places[rows.order] + np.array(offset)) for offset in offsets]
    members[rows.order] = _left_aligned(np.stack([rows.order, *ring], axis=1))
    return members


def _within(lattice: Lattice, n: int) -> list[tuple[int, int]]:
    """Offsets of the places at most `n` steps away, by (steps, row, column)."""
    reach = range(-2 * n, 2 * n + 1)
    steps = {
        (row, column): max(abs(row), (abs(row) + abs(column)) // 2)
        if lattice == "hex"
        else abs(row) + abs(column)
        for row in reach
        for column in reach
        if lattice == "square" or (row + column) % 2 == 0
    }
    found = [place for place, distance in steps.items() if 0 < distance <= n]
    return sorted(found, key=lambda place: (steps[place], *place))


def _nearest_places(rows: _Places, k: int, lattice: Lattice) -> Ints:
    """[N, k+1] by (distance of places, array_row, array_col, rank), self first.

    On a lattice nearly every spot finds its k by trying offsets from near to far; those at
    thin edges and the isolated ones are left to a KD-tree.
    """
    n_spots = len(rows.places)
    members = np.full((n_spots, k + 1), -1, np.int64)
    members[:, 0] = np.arange(n_spots)
    active, filled = rows.order, np.ones(n_spots, np.int64)
    if not rows.repeated:
        for offset in _offsets(k, lattice):
            found = rows.at(rows.places[active] + offset)
            hit = active[found >= 0]
            members[hit, filled[hit]] = found[found >= 0]
            filled[hit] += 1
            active = active[filled[active] <= k]
    rank = np.empty(n_spots, np.int64)
    rank[rows.order] = np.arange(n_spots)
    if len(active):
        tree = cKDTree(rows.places * np.sqrt([_ROW_WEIGHT[lattice], 1]))
        members[active] = _nearest(tree, active, k, _squared, rank)[0]
    return members


def _squared(apart: Floats) -> Ints:
    """The distance of places, exact: what floats get wrong of a square is far below 1/2."""
    return np.rint(apart**2).astype(np.int64)


def _offsets(k: int, lattice: Lattice) -> Ints:
    """[M, 2] offsets by (distance, row, column), in whole shells, about 3 k places and more."""
    side = 3 + int(np.sqrt(4 * k))
    grid = np.mgrid[-side : side + 1, -2 * side : 2 * side + 1].reshape(2, -1).T
    distance = _place_distance(grid, lattice)
    order = np.lexsort((grid[:, 1], grid[:, 0], distance))[1:]
    places_per_offset = 2 if lattice == "hex" else 1
    last = distance[order][places_per_offset * (3 * k + 6)]
    return np.asarray(grid[order][distance[order] <= last])


def _nearest_pixels(xy: Floats, rank: Ints, k: int) -> tuple[Ints, Floats, float]:
    """[N, k+1] by (distance in steps of the pitch, rank), self first; their distances, px; the
    pitch, px.
    """
    tree = cKDTree(xy)
    pitch = _pitch(tree)

    def steps(apart: Floats) -> Ints:
        return np.rint(_PIXEL_STEPS / pitch * apart).astype(np.int64)

    return *_nearest(tree, np.arange(len(xy)), k, steps, rank), pitch


def _nearest(
    tree: cKDTree, of: Ints, k: int, distance: Callable[[Floats], Ints], rank: Ints
) -> tuple[Ints, Floats]:
    """[M, k+1] the k spots nearest to each spot of `of` by (distance, rank), self first, and how
    far they are in the tree's unit, inf where there is none.

    `distance` makes whole numbers of how far points are. The tree gives candidates; they hold the
    answer when the farthest lies beyond the k-th, else twice as many are looked at.
    """
    n_spots = tree.n
    members, apart = np.full((len(of), k + 1), -1, np.int64), np.full((len(of), k + 1), np.inf)
    members[:, 0], apart[:, 0] = of, 0
    if not len(of) or n_spots < 2:
        return members, apart
    wanted = min(k, n_spots - 1)
    row_of = np.full(n_spots, -1)
    row_of[of] = np.arange(len(of))
    # The tree's own order keeps queries that follow each other close to each other.
    todo = row_of[tree.indices]
    todo, width = todo[todo >= 0], min(n_spots, k + _SPARE)
    while len(todo):
        unsure: list[Ints] = []
        step = max(1, _CELLS // width)
        for rows in (todo[i : i + step] for i in range(0, len(todo), step)):
            spot = of[rows]
            away, found = tree.query(tree.data[spot], k=width)
            far = distance(away)
            far[found == spot[:, None]] = -1
            order = _by_distance_and_rank(far, rank[found])[:, 1 : wanted + 1]
            members[rows, 1 : wanted + 1] = np.take_along_axis(found, order, axis=1)
            apart[rows, 1 : wanted + 1] = np.take_along_axis(away, order, axis=1)
            last = np.take_along_axis(far, order[:, -1:], axis=1)[:, 0]
            unsure.append(rows[last >= far.max(axis=1)])
        todo = np.concatenate(unsure) if width < n_spots else np.empty(0, np.int64)
        width = min(n_spots, 2 * width)
    return members, apart


def _by_distance_and_rank(far: Ints, rank: Ints) -> Ints:
    """[M, W] order of each row by (far, rank)."""
    most = int(rank.max()) + 1
    if int(far.max()) < np.iinfo(np.int64).max // most - 1:
        return (far * most + rank).argsort(axis=1)
    return np.lexsort((rank, far), axis=1)


def _place_distance(offset: Ints, lattice: Lattice) -> Ints:
    """Squared distance of places `offset` [..., 2] apart, in whole units."""
    return np.asarray(_ROW_WEIGHT[lattice] * offset[..., 0] ** 2 + offset[..., 1] ** 2)


def _left_aligned(members: Ints) -> Ints:
    """`members` with -1 moved to the end of each row, the others in their order."""
    order = np.argsort(members < 0, axis=1, kind="stable")
    return np.take_along_axis(members, order, axis=1)
