"""Validation that every reader shares: what a Slide must be before anything reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from st_align import keys
from st_align.errors import SlideError
from st_align.image import ImageSource
from st_align.io.technology import hexagonal_parity
from st_align.slide import Slide

RESERVED = ("barcode", keys.ARRAY_ROW, keys.ARRAY_COL, "x", "y", keys.TOTAL_UMI)
"""Columns of a prepared slide that the source's obs cannot have."""


def check_id(id: str, source: Path | str) -> str:
    """Return a slide id that is safe as the name of a folder."""
    if not id or id.startswith(".") or set(id) & set("/\\\0\n") or "::" in id or len(id) > 200:
        raise SlideError(
            f"slide id {id!r} cannot be used (from {source})",
            expected="a plain name: no '/', '\\', '::', no leading '.', at most 200 characters",
            fix="rename the file, folder or library",
        )
    return id


def raw_counts(matrix: Any, what: str) -> sparse.csr_array:
    """Return `matrix` [N, G] as CSR int32, or say why it does not hold raw counts."""
    counts = sparse.csr_array(matrix)
    found = not_counts(counts.data)
    if found is not None:
        raise SlideError(
            f"{what} does not hold raw counts",
            expected="whole numbers >= 0 (molecules), neither normalised nor log-transformed",
            found=found,
            fix="give the raw matrix (for AnnData: in X, layers['counts'] or raw)",
        )
    return counts.astype(np.int32, copy=False)


def not_counts(values: NDArray[Any]) -> str | None:
    """What makes `values` no raw counts; None when they are."""
    kind = values.dtype.kind
    if kind not in "biuf":
        return f"values of type {values.dtype}"
    problems = [("negative values", values < 0)]
    if kind == "f":
        problems.insert(0, ("NaN or infinite values", ~np.isfinite(values)))
        problems.append(("fractions", values != np.floor(values)))
    problems.append(("values above 2^31", values > np.iinfo(np.int32).max))
    for name, bad in problems:
        if bad.any():
            return f"{int(bad.sum()):,} {name}, such as {values[bad][0]:.6g}"
    return None


def image_scale(value: Any, what: str) -> float:
    """The stored px per full-resolution px that a source gives, as a number above 0."""
    try:
        scale = float(value)
    except (TypeError, ValueError) as error:
        raise SlideError(
            f"{what} does not give the image's scale", expected="a number", found=repr(value)
        ) from error
    if not 0 < scale <= 10:
        raise SlideError(
            f"{what} is out of range", expected="above 0, at most 10", found=f"{scale}"
        )
    return scale


def match_barcodes(
    matrix: Sequence[str] | NDArray[np.str_], positions: Sequence[str] | NDArray[np.str_], what: str
) -> NDArray[np.intp]:
    """Row of `positions` of each barcode of `matrix`; every one must be there."""
    require_unique(positions, f"the positions of {what}")
    rows = pd.Index(positions).get_indexer(pd.Index(matrix))
    lost = np.flatnonzero(rows < 0)
    if lost.size:
        raise SlideError(
            f"barcodes of counts and positions do not match in {what}",
            expected=f"a position for each of {len(matrix)} spots, such as {str(positions[0])!r}",
            found=f"{lost.size} without one, such as {str(matrix[lost[0]])!r}",
            fix="give counts and positions of the same slide",
        )
    return np.asarray(rows, np.intp)


def require_unique(barcodes: Sequence[str] | NDArray[np.str_], what: str) -> None:
    """Refuse barcodes that occur twice, and none at all."""
    if len(barcodes) == 0:
        raise SlideError(f"{what}: no spots", expected="at least 2 spots", found="0")
    index = pd.Index(barcodes)
    if index.has_duplicates:
        twice = index[index.duplicated()]
        raise SlideError(
            f"{what}: barcodes occur twice",
            expected="unique barcodes",
            found=f"{len(twice)} repeated, such as {str(twice[0])!r}",
            fix="split a file of several sections, or make the names unique",
        )


def spacing(xy: NDArray[np.float64]) -> float:
    """Median distance from a spot to its nearest; NaN for fewer than two."""
    if len(xy) < 2:
        return float("nan")
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))


def plain_obs(obs: pd.DataFrame, barcodes: NDArray[np.str_]) -> pd.DataFrame:
    """The source's columns, less `RESERVED`, as types that a parquet file holds."""
    kept = obs.drop(columns=[c for c in obs if c in RESERVED])
    kept = kept.set_axis(pd.Index(barcodes, name=None), axis=0)
    kept.columns = kept.columns.astype(str)
    for column in kept:
        if kept[column].dtype == object:
            kept[column] = kept[column].map(lambda value: value if pd.isna(value) else str(value))
    return kept


def check_slide(slide: Slide) -> Slide:
    """Validate a slide; return it with what a person should know added to `warnings`.

    Raises SlideError for ids that are no folder names, fewer than two spots, repeated barcodes or
    places, coordinates that are not finite or outside the image, counts that are not raw, no
    molecule at all, and for a slide with neither counts nor image.
    """
    check_id(slide.id, slide.source)
    name = f"slide {slide.id!r}"
    require_unique(slide.barcodes, name)
    _check_spots(slide, name)
    if slide.counts is None and slide.image is None:
        raise SlideError(
            f"{name} has neither counts nor an image",
            expected="one of them at least",
            fix="give an image, or leave out 'no image'",
        )
    warnings = list(slide.warnings)
    places = slide.places
    if places is not None and slide.technology == "Visium" and not hexagonal_parity(places):
        warnings.append("array_row and array_col are not Visium places (odd rows with odd columns)")
        places = None
    total_umi = slide.total_umi
    counts = slide.counts
    if counts is not None:
        counts = raw_counts(counts, name)
        total_umi = _check_counts(slide, counts, name, warnings)
    if slide.image is not None:
        _check_inside(slide, slide.image, name, warnings)
    return replace(
        slide,
        places=places,
        counts=counts,
        total_umi=total_umi,
        obs=plain_obs(slide.obs, slide.barcodes),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _check_spots(slide: Slide, name: str) -> None:
    n = slide.n_spots
    if n < 2:
        raise SlideError(f"{name}: one spot", expected="at least 2 spots", found=str(n))
    lengths = {"xy": len(slide.xy), "obs": len(slide.obs)}
    if slide.counts is not None:
        lengths["counts"] = slide.counts.shape[0]
    if slide.places is not None:
        lengths["places"] = len(slide.places)
    if any(length != n for length in lengths.values()):
        raise SlideError(f"{name}: columns differ in length", expected=f"{n}", found=f"{lengths}")
    bad = ~np.isfinite(slide.xy).all(axis=1)
    if bad.any():
        raise SlideError(
            f"{name}: coordinates are not finite",
            expected="x and y of every spot",
            found=f"{int(bad.sum())} spots, such as {str(slide.barcodes[bad][0])!r}",
        )
    if spacing(slide.xy) == 0:
        raise SlideError(
            f"{name}: most spots have the coordinates of another",
            expected="one spot per position",
            fix="check the columns of x and y",
        )
    if slide.places is not None:
        shared = n - len(np.unique(slide.places, axis=0))
        if shared:
            raise SlideError(
                f"{name}: spots share a place",
                expected="one spot per (array_row, array_col)",
                found=f"{shared} of {n} spots on a place already taken",
                fix="split a file that holds several sections",
            )


def _check_counts(
    slide: Slide, counts: sparse.csr_array, name: str, warnings: list[str]
) -> NDArray[np.float64]:
    """Library sizes [N], with warnings on empty spots."""
    if slide.genes is None or len(slide.genes) != counts.shape[1] or counts.shape[1] == 0:
        named = 0 if slide.genes is None else len(slide.genes)
        raise SlideError(f"{name}: {named} genes are named, the matrix has {counts.shape[1]}")
    sums = np.asarray(counts.sum(axis=1), np.float64)
    total = sums if slide.total_umi is None else np.asarray(slide.total_umi, np.float64)
    if not np.isfinite(total).all() or (total < sums).any():
        raise SlideError(
            f"{name}: library sizes are smaller than the counts",
            expected=f"{keys.TOTAL_UMI} >= the sum over the genes",
        )
    empty = int((total == 0).sum())
    if empty == slide.n_spots:
        raise SlideError(f"{name}: all {empty} spots are empty", expected="counts above 0")
    if empty:
        share = empty / slide.n_spots
        warnings.append(f"{empty} of {slide.n_spots} spots ({share:.1%}) have no counts: masked")
    return total


def _check_inside(slide: Slide, image: ImageSource, name: str, warnings: list[str]) -> None:
    """Spots may touch the border (patches are edge-padded) but not lie a pitch beyond it."""
    height, width = image.shape
    size = np.array([width, height]) / image.scale
    pitch = spacing(slide.xy)

    def outside(xy: NDArray[np.float64], slack: float) -> NDArray[np.bool_]:
        return np.asarray(((xy < -slack) | (xy > size + slack)).any(axis=1))

    far = outside(slide.xy, pitch)
    if far.any():
        swapped = not outside(slide.xy[:, ::-1], pitch).any()
        low, high = slide.xy.min(axis=0), slide.xy.max(axis=0)
        raise SlideError(
            f"{name}: coordinates lie outside the image",
            expected=f"x in 0..{size[0]:.0f}, y in 0..{size[1]:.0f} (full-resolution px)",
            found=f"{int(far.sum())} of {slide.n_spots} spots outside: x {low[0]:.0f}.."
            f"{high[0]:.0f}, y {low[1]:.0f}..{high[1]:.0f}",
            fix="x and y seem to be swapped"
            if swapped
            else "check that image, scale factor and coordinates belong together",
        )
    near = int(outside(slide.xy, 0.0).sum())
    if near:
        warnings.append(f"{near} spots lie just outside the image: their patches are edge-padded")
