"""The plan of a simulated section: lattice, tissue with holes, domains, programme.

Shape letters: M places of the lattice, N spots in tissue, C domains, h and w cells of the grid on
which fields are defined (`GRID_PX` pixels of the hires image each).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from st_align.simulate.constants import Constants
from st_align.simulate.fields import Field, smooth_noise

GRID_PX = 4
_PITCH_PER_SPOT = 100 / 55
_ROW = np.sqrt(3) / 2
_MARGIN = 1.2
"""Pitches between the lattice and the border of the image."""
_SMALLEST_BAND, _LARGEST_BAND = 0.7, 1.3


@dataclass(frozen=True, kw_only=True)
class Section:
    """What is where. Pixels are those of the hires image, x first."""

    shape: tuple[int, int]
    """Height and width of the image."""
    pitch_px: float
    places: NDArray[np.int32]
    """[M, 2] array_row, array_col."""
    xy: NDArray[np.float64]
    """[M, 2]"""
    in_tissue: NDArray[np.bool_]
    """[M]; N of them."""
    domain: NDArray[np.int64]
    """[N] 0..C-1"""
    programme: NDArray[np.float64]
    """[N] of mean 0 and sd 1."""
    arrangement: str
    """`layered` or `nested`."""
    tissue_map: NDArray[np.bool_]
    domain_map: NDArray[np.int64]
    programme_map: Field
    """[h, w] each."""


def draw_section(
    rng: np.random.Generator, constants: Constants, *, n_spots: int, n_domains: int
) -> Section:
    """Draw a section with exactly `n_spots` spots in tissue, each domain holding some of them."""
    places, xy, pitch, shape = _lattice(constants, n_spots)
    grid = (-(-shape[0] // GRID_PX), -(-shape[1] // GRID_PX))
    centre = np.array(shape[::-1]) / 2
    reach = (np.ptp(xy, axis=0) + pitch) / 2
    rows, columns = np.indices(grid) * GRID_PX + GRID_PX / 2
    x, y = (columns - centre[0]) / reach[0], (rows - centre[1]) / reach[1]

    emptiness = _emptiness(rng, constants, x, y, pitch / GRID_PX, pitch / reach.mean())
    at_places = _at(emptiness, xy)
    inside = np.zeros(len(xy), bool)
    inside[np.argsort(at_places, kind="stable")[:n_spots]] = True
    border = at_places[inside].max()

    is_nested = rng.random() < constants.nested_share
    bend = constants.border_curvature * smooth_noise(rng, grid, min(grid) / 3)
    fray_cells = constants.rough_pitches * pitch / GRID_PX
    bend += constants.border_roughness * smooth_noise(rng, grid, fray_cells)
    depth = (_rings(rng, x, y) if is_nested else _slope(rng, x, y)) + bend
    bands = rng.uniform(_SMALLEST_BAND, _LARGEST_BAND, n_domains)
    spot_depth = _at(depth, xy[inside])
    cuts = np.quantile(spot_depth, np.cumsum(bands)[:-1] / bands.sum())
    flip = rng.random() < 0.5

    def domains(values: NDArray[np.floating]) -> NDArray[np.int64]:
        found = np.searchsorted(cuts, values)
        return np.asarray(n_domains - 1 - found if flip else found, np.int64)

    programme = 0.8 * smooth_noise(rng, grid, constants.coarse_pitches * pitch / GRID_PX)
    programme += 0.6 * smooth_noise(rng, grid, constants.fine_pitches * pitch / GRID_PX)
    of_spots = _at(programme, xy[inside])
    mean, sd = of_spots.mean(), of_spots.std()
    return Section(
        shape=shape,
        pitch_px=pitch,
        places=places,
        xy=xy,
        in_tissue=inside,
        domain=domains(spot_depth),
        programme=(of_spots - mean) / sd,
        arrangement="nested" if is_nested else "layered",
        tissue_map=emptiness <= border,
        domain_map=domains(depth),
        programme_map=np.asarray((programme - mean) / sd, np.float32),
    )


def _lattice(
    constants: Constants, n_spots: int
) -> tuple[NDArray[np.int32], NDArray[np.float64], float, tuple[int, int]]:
    """Places [M, 2], their pixels [M, 2], the pitch in px, and the image's height and width."""
    n_rows = round(np.sqrt(constants.places_per_spot * n_spots / _ROW))
    n_columns = -(-round(constants.places_per_spot * n_spots) // n_rows)
    row, column = (axis.ravel() for axis in np.indices((n_rows, n_columns)))
    places = np.stack([row, 2 * column + row % 2], axis=1).astype(np.int32)
    in_pitches = places[:, ::-1] * [0.5, _ROW] + _MARGIN
    extent = in_pitches.max(axis=0) + _MARGIN
    pitch = min(constants.px_per_spot * _PITCH_PER_SPOT, constants.max_side_px / extent.max())
    width, height = np.floor(extent * pitch).astype(int)
    return places, in_pitches * pitch, float(pitch), (int(height), int(width))


def _emptiness(
    rng: np.random.Generator,
    constants: Constants,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    pitch_cells: float,
    pitch: float,
) -> NDArray[np.float64]:
    """[h, w] grows from the middle outwards, with hills where holes will be."""
    field = np.hypot(x, y) + 0.08 * smooth_noise(rng, x.shape, 5 * pitch_cells)
    for _ in range(rng.integers(constants.holes[0], constants.holes[1] + 1)):
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.6)
        radius = rng.uniform(0.55, 0.9) * pitch
        from_hole = (x - distance * np.cos(angle)) ** 2 + (y - distance * np.sin(angle)) ** 2
        field = field + 2.5 * np.exp(-from_hole / (2 * radius**2))
    return np.asarray(field, np.float64)


def _slope(
    rng: np.random.Generator, x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[h, w] depth of layers: a direction, bowed."""
    angle = rng.uniform(0, 2 * np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return np.asarray(along + rng.uniform(-0.5, 0.5) * across**2)


def _rings(
    rng: np.random.Generator, x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[h, w] depth of nested domains: distance from a point off the middle."""
    dx, dy = x - rng.uniform(-0.35, 0.35), y - rng.uniform(-0.35, 0.35)
    stretch = rng.uniform(0.8, 1.25)
    return np.asarray(1.5 * np.hypot(dx * stretch, dy / stretch))


def _at(field: NDArray[np.floating], xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N] values of a grid field at pixels [N, 2]."""
    from scipy.ndimage import map_coordinates

    cells = xy[:, ::-1].T / GRID_PX - 0.5
    return np.asarray(map_coordinates(field, cells, order=1, mode="nearest"), np.float64)
