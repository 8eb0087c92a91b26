"""What `pp`, `tl` and `pl` share: which slides an object holds, and where answers go.

Shape letters: N rows of a table, n spots of one slide.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from st_align import keys, store
from st_align.errors import SlideError
from st_align.io.objects import Part
from st_align.io.objects import parts_of as parts_of
from st_align.io.refs import ReadOptions

if TYPE_CHECKING:
    from anndata import AnnData

_LOG = logging.getLogger("st_align")


class Where(TypedDict, total=False):
    """Options that every function takes: which slides of an object are meant."""

    library_key: str | None
    """obs column that tells the slides of one AnnData apart."""
    table: str
    """The table of a SpatialData; `table` by default."""
    region: str | None
    """One region of a SpatialData; all by default."""
    coordinates: ArrayLike | None
    """[N, 2] full-resolution pixels, of one AnnData without `obsm["spatial"]`."""


def opened(data: Any, copy: bool, where: Where) -> tuple[Any, list[Part]]:
    """The object that answers go into, a copy where asked for, and its slides."""
    if copy:
        data = _copied(data, where.get("table", "table"))
    return data, parts_of(data, **where)


def options(
    *, image: str | Path | None = None, no_image: bool = False, technology: str | None = None
) -> ReadOptions:
    """How a slide is read."""
    path = None if image is None else Path(image)
    return ReadOptions(image=path, no_image=no_image, technology=technology)


def tell(part: Part, warnings: Iterable[str]) -> None:
    """Warnings of a slide go to the logger `st_align`."""
    for text in warnings:
        _LOG.warning("%s: %s", part.id, text)


def scatter(
    part: Part, name: str, rows: NDArray[np.intp], values: NDArray[Any] | pd.DataFrame
) -> None:
    """`values` [n, ...] into `obsm[name]` of the part's table; other rows keep what they hold where
    it has the same columns, else NaN (0 in whole numbers).
    """
    table = part.table
    before = table.obsm.get(name)
    if isinstance(values, pd.DataFrame):
        same = isinstance(before, pd.DataFrame) and list(before) == list(values)
        frame = before.copy() if same else pd.DataFrame(np.nan, table.obs_names, values.columns)
        frame.iloc[rows] = values.to_numpy()
        table.obsm[name] = frame
        return
    shape = (table.n_obs, *values.shape[1:])
    if isinstance(before, np.ndarray) and before.shape == shape and before.dtype == values.dtype:
        full = before.copy()
    else:
        full = np.full(shape, np.nan if values.dtype.kind == "f" else 0, values.dtype)
    full[rows] = values
    table.obsm[name] = full


def set_column(
    part: Part, parts: Sequence[Part], name: str, rows: NDArray[np.intp], values: Sequence[str]
) -> None:
    """`values` [n] into the categorical `obs[name]`; rows of the table that belong to none of the
    `parts` written so far are missing.
    """
    table, first = part.table, next(p for p in parts if p.table is part.table)
    if part is first or name not in table.obs:
        column = pd.Series(pd.NA, table.obs_names, dtype=object)
    else:
        column = table.obs[name].astype(object)
    column.iloc[rows] = np.asarray(values, object)
    table.obs[name] = pd.Categorical(column)


def note(part: Part, parts: Sequence[Part], **items: Any) -> None:
    """Keep notes on a slide in `uns["stalign"]`: as they are where the table holds one slide, by
    slide under `slides` where it holds several.
    """
    if sum(p.table is part.table for p in parts) == 1:
        store.note(part.table, **items)
        return
    slides = dict(store.notes(part.table).get("slides") or {})
    slides[part.id] = {**slides.get(part.id, {}), **items}
    store.note(part.table, slides=slides)


def notes(part: Part) -> dict[str, Any]:
    """What `note` kept of a slide."""
    kept = store.notes(part.table)
    by_slide = kept.get("slides")
    if isinstance(by_slide, Mapping) and part.id in by_slide:
        return dict(by_slide[part.id])
    return kept


def embedded(part: Part) -> tuple[AnnData, NDArray[np.intp]]:
    """A small AnnData of one slide's embeddings, columns and notes, and the rows [n] of the table
    that it holds: those that are embedded. A SlideError where none is.
    """
    import anndata

    table = part.table
    if keys.EMBEDDING not in table.obsm:
        raise SlideError(
            f"obsm[{keys.EMBEDDING!r}] not found",
            found=f"obsm: {', '.join(table.obsm) or 'empty'}",
            fix="run sta.tl.embed(adata, model=RUN) first",
        )
    known = np.isfinite(np.asarray(table.obsm[keys.EMBEDDING])[part.rows]).all(axis=1)
    rows = part.rows[known]
    if not len(rows):
        raise SlideError(
            f"slide {part.id!r} is not embedded",
            found="NaN at every spot",
            fix="run sta.tl.embed on all slides of the table",
        )
    names = [n for n in table.obsm if n == keys.SPATIAL or n.startswith(keys.EMBEDDING)]
    sub = anndata.AnnData(
        obs=table.obs.iloc[rows].copy(), obsm={n: np.asarray(table.obsm[n])[rows] for n in names}
    )
    if keys.TRAINING in table.uns:
        sub.uns[keys.TRAINING] = table.uns[keys.TRAINING]
    store.note(sub, **notes(part))
    return sub, rows


def _copied(data: Any, table: str) -> Any:
    if isinstance(data, Mapping):
        return {name: item.copy() for name, item in data.items()}
    if not hasattr(data, "tables"):
        return data.copy()
    names = [name for _, name, _ in data.gen_elements()]
    other = data.subset(names, filter_tables=False)
    if table in other.tables:
        other.tables[table] = other.tables[table].copy()
    return other
