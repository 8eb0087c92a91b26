"""CSV tables that a person writes: patients, extra columns per spot, an index of slides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from st_align.errors import SlideError, nearest, require_file
from st_align.slide import Slide


def read_table(path: Path, columns: Sequence[str], what: str) -> pd.DataFrame:
    """Read a comma- or tab-separated table and name its columns `columns` in lower case.

    Column names are matched without regard to case; further columns keep their names. Nothing is
    taken for missing but an empty cell: 'NA' is a label like any other.
    """
    require_file(path, what)
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline()
        table = pd.read_csv(
            path,
            sep="\t" if "\t" in header else ",",
            encoding="utf-8-sig",
            keep_default_na=False,
            dtype={name: str for name in _split(header) if name.lower() in columns},
        )
    except (ValueError, pd.errors.ParserError) as error:  # empty and not-text are ValueErrors
        raise SlideError(
            f"{what} {path} is not a table", expected="CSV with a header", found=str(error)
        ) from error
    table = table.rename(columns={c: str(c).lower() for c in table if str(c).lower() in columns})
    for column in columns:
        if column not in table:
            names = [str(name) for name in table]
            raise SlideError(
                f"{what} {path} has no column {column!r}",
                expected=", ".join(columns),
                found=", ".join(names),
                fix=f"rename one of them to {column!r} ({nearest(column, names)})",
            )
    return table


def _split(header: str) -> list[str]:
    return [name.strip().strip('"') for name in header.replace("\t", ",").split(",")]


def join_obs(slide: Slide, table: pd.DataFrame, source: Path) -> Slide:
    """Add the columns of `table` (barcode, optionally slide) to the slide's obs."""
    if "slide" in table:
        table = table[table["slide"] == slide.id].drop(columns="slide")
        if table.empty:
            return replace(slide, warnings=(*slide.warnings, f"{source.name} has no row for it"))
    table = table.set_index("barcode")
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()][0]
        raise SlideError(
            f"{source} names a spot twice",
            expected="one row per barcode",
            found=f"{twice!r} for slide {slide.id!r}",
            fix="add a column 'slide' when the table holds several slides",
        )
    matched = int(pd.Index(slide.barcodes).isin(table.index).sum())
    if matched == 0:
        raise SlideError(
            f"{source} fits no spot of slide {slide.id!r}",
            expected=f"barcodes such as {str(slide.barcodes[0])!r}",
            found=f"barcodes such as {str(table.index[0])!r}",
        )
    warnings = slide.warnings
    if matched < slide.n_spots:
        missing = slide.n_spots - matched
        warnings = (*warnings, f"{missing} of {slide.n_spots} spots have no row in {source.name}")
    kept = slide.obs.drop(columns=[c for c in table if c in slide.obs])
    joined = pd.concat([kept, table.reindex(slide.obs.index)], axis=1)
    return replace(slide, obs=joined, warnings=warnings)
