"""`st-align retrieve`: the spots most like one spot, as a table or a page with thumbnails."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align import keys, shown, store
from st_align.checkpoint import load_run
from st_align.errors import ConfigError, OutputError, SlideError
from st_align.errors import nearest as did_you_mean
from st_align.files import replace_file
from st_align.infer import Embedder
from st_align.io import ReadOptions
from st_align.retrieve import KINDS, Kind, Shelf, aligned, nearest
from st_align.slide import PreparedSlide
from st_align.sources import open_slide

if TYPE_CHECKING:
    from anndata import AnnData

_AROUND = 3.0
"""Side of a thumbnail, in spots."""
_THUMB_PX = 96


@dataclass(frozen=True, kw_only=True)
class RetrieveRequest:
    """Options of `st-align retrieve`: ask `by` one kind and `find` another (None: the same)."""

    by: str = "image"
    find: str | None = None
    model: str | None = None
    n: int = 10


def find_spots(
    query: str, files: Sequence[Path], request: RetrieveRequest, out: Path
) -> dict[str, Any]:
    """`st-align retrieve`: spots of the embedded `files` most like `QUERY.h5ad::BARCODE`, as .csv
    or as an .html page with thumbnails in `out`.
    """
    if out.suffix not in (".csv", ".html"):
        raise OutputError(
            f"--out {out} is to end in .csv or .html", found=out.suffix or "no ending"
        )
    by, find = _kind(request.by), _kind(request.find or request.by)
    path, barcode = _query(query)
    tables = {str(p): store.read_h5ad(p) for p in dict.fromkeys((path, *files))}
    names = {p: str(store.notes(a).get("slide", Path(p).stem)) for p, a in tables.items()}
    asked = _row(tables[str(path)], barcode, query)
    if by == find:
        vectors = {p: _embedding(adata, by, p) for p, adata in tables.items()}
        wanted = vectors[str(path)][asked]
    elif request.model is None:
        raise ConfigError(f"from {by} to {find} goes through the model", fix="give it: --model RUN")
    else:
        reader = Embedder(load_run(request.model), progress=True)
        vectors, sought = {}, None
        for p in tables:
            slide, _ = open_slide(p, reader.run.preprocess, ReadOptions())
            seen = reader.embed(slide)
            vectors[p] = _by_row(tables[p], slide, aligned(seen, find))
            if p == str(path):
                sought = _by_row(tables[p], slide, aligned(seen, by))[asked]
        if sought is None:
            raise ValueError("the query's slide was not read")
        wanted = sought
    shelves = [
        Shelf(
            slide=names[str(p)],
            barcodes=tables[str(p)].obs_names.to_numpy().astype(str),
            vectors=vectors[str(p)],
        )
        for p in dict.fromkeys(files)
    ]
    hits = nearest(wanted, shelves, n=request.n, leave_out=(names[str(path)], barcode))
    by_name = {names[p]: adata for p, adata in tables.items()}
    if out.suffix == ".csv":
        replace_file(out, hits.to_csv(index=False).encode())
    else:
        replace_file(out, _page(query, by, find, (names[str(path)], asked), hits, by_name).encode())
    print(hits.to_string(index=False))
    print(f"written: {out}")
    return {
        "query": {"slide": names[str(path)], "barcode": barcode},
        "by": by,
        "find": find,
        "hits": hits.to_dict("records"),
        "out": str(out),
    }


def _kind(text: str) -> Kind:
    found = next((kind for kind in KINDS if kind == text), None)
    if found is None:
        raise ConfigError(f"{text!r} is no kind of vector", fix=did_you_mean(text, KINDS))
    return found


def _query(text: str) -> tuple[Path, str]:
    path, separator, barcode = text.rpartition("::")
    if not separator or not barcode:
        raise ConfigError("the query names no spot", expected="QUERY.h5ad::BARCODE", found=text)
    return Path(path), barcode


def _row(adata: AnnData, barcode: str, query: str) -> int:
    rows = np.flatnonzero(adata.obs_names.to_numpy().astype(str) == barcode)
    if len(rows) != 1:
        raise SlideError(
            f"{query}: the slide has {len(rows) or 'no'} spots of this name",
            expected="one of its barcodes",
            found=f"{adata.n_obs} spots such as {', '.join(map(str, adata.obs_names[:3]))}",
        )
    return int(rows[0])


def _by_row(
    adata: AnnData, slide: PreparedSlide, values: NDArray[np.float32]
) -> NDArray[np.float32]:
    """`values` [N, D] of the slide's spots by row of its file: rows that are not read, such as
    those off the tissue, hold 0.
    """
    names = adata.obs_names.astype(str)
    placed = np.zeros((adata.n_obs, values.shape[1]), np.float32)
    placed[names.get_indexer(pd.Index(slide.spots["barcode"].astype(str)))] = values
    return placed


def _embedding(adata: AnnData, kind: Kind, path: str) -> NDArray[np.float32]:
    if keys.embedding(kind) not in adata.obsm:
        raise SlideError(
            f"{path} has no {kind} embedding",
            expected=f"obsm[{keys.embedding(kind)!r}]",
            fix="run: st-align embed SLIDE --model RUN --out FILE.h5ad",
        )
    return np.asarray(adata.obsm[keys.embedding(kind)], np.float32)


def _page(
    query: str,
    by: str,
    find: str,
    asked: tuple[str, int],
    hits: pd.DataFrame,
    slides: Mapping[str, AnnData],
) -> str:
    """One page that opens offline: the query and its hits with what lies around them."""
    views = {name: shown.slide_view(adata) for name, adata in slides.items()}

    def card(slide: str, row: int, words: str) -> str:
        return (
            f"<figure>{_thumbnail(views[slide], row)}"
            f"<figcaption>{escape(words)}</figcaption></figure>"
        )

    first = card(*asked, query.rpartition("::")[2])
    others = "".join(
        card(hit.slide, int(hit.row), f"{hit.similarity:.3f} {hit.slide} {hit.barcode}")
        for hit in hits.itertuples()
    )
    title = escape(f"Spots like {Path(query).name}: {by} to {find}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>'
        "body{font:15px system-ui;margin:2rem;color-scheme:light dark}"
        "section{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;width:9rem}"
        "img,.none{width:9rem;height:9rem;border-radius:4px;background:#8884;display:block}"
        "figcaption{font-size:.8rem;overflow-wrap:anywhere}</style>"
        f"<h1>{title}</h1><h2>Query</h2><section>{first}</section>"
        f"<h2>Most similar</h2><section>{others}</section></html>\n"
    )


def _thumbnail(view: Any, row: int) -> str:
    """The image around a spot as an <img>; an empty box where there is none."""
    from PIL import Image

    if view.image is None:
        return '<div class="none" title="no image"></div>'
    half = _AROUND * view.diameter / 2
    x, y = view.xy[row]
    box = np.array([x - half, y - half, x + half, y + half]) * view.scale
    picture = Image.fromarray(view.image).transform(
        (_THUMB_PX, _THUMB_PX), Image.Transform.EXTENT, tuple(box), Image.Resampling.BILINEAR
    )
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=88)
    code = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="around the spot" src="data:image/jpeg;base64,{code}">'
