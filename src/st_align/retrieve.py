"""The spots most like one spot, over many slides: by image, by genes, or from one to the other.

    same kind   cosine of the image or gene embeddings, centred on their slide (`X_stalign_image`,
                `X_stalign_gene`)
    across      cosine in the space that training aligned: r with u at the spot, e with t at the
                niche, the mean of both (eq. 10)

Shape letters: N spots of a slide, D axes, d the model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align.embedding import SlideVectors
from st_align.errors import ConfigError, SlideError

Kind = Literal["image", "gene"]
KINDS: tuple[Kind, ...] = ("image", "gene")


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """The spots of one slide that can be found: `vectors` [N, D], rows of zeros cannot."""

    slide: str
    barcodes: NDArray[np.str_]
    vectors: NDArray[np.floating]


def aligned(vectors: SlideVectors, kind: Kind) -> NDArray[np.float32]:
    """[N, 2d] of one kind, such that the product with the other kind is the mean cosine of spot
    and niche; rows without the modality are 0.
    """
    spot, niche = (vectors.r, vectors.e) if kind == "image" else (vectors.u, vectors.t)
    both = np.concatenate([unit(spot), unit(niche)], axis=1) / np.sqrt(2)
    return np.asarray(both, np.float32)


def unit(x: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows of length 1; rows of zeros stay."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(np.divide(x, length, out=np.zeros_like(x), where=length > 0), np.float32)


def nearest(
    query: NDArray[np.floating],
    shelves: Sequence[Shelf],
    *,
    n: int = 10,
    leave_out: tuple[str, str] | None = None,
) -> pd.DataFrame:
    """The `n` spots most like the vector `query` [D]: columns slide, barcode, row, similarity
    (cosine), the most similar first; of equal ones the first slide and row.

    `leave_out` (slide, barcode) is not among them: the query itself.

    Raises:
        ConfigError: `n` below 1. SlideError: the query holds nothing, or axes that differ.

    """
    if n < 1:
        raise ConfigError("the number of hits is out of range", expected="1 or more", found=str(n))
    wanted = unit(np.asarray(query, np.float32)[None])[0]
    if not np.isfinite(wanted).all() or not wanted.any():
        raise SlideError(
            "the query spot has no such embedding",
            expected="a spot with the modality that is asked by",
            fix="choose another spot, or another --by",
        )
    found = []
    for shelf in shelves:
        if shelf.vectors.shape[1] != len(wanted):
            raise SlideError(
                f"slide {shelf.slide!r} was embedded by another model",
                expected=f"{len(wanted)} axes",
                found=str(shelf.vectors.shape[1]),
                fix="embed all slides with one model",
            )
        held = unit(np.nan_to_num(np.asarray(shelf.vectors, np.float32)))
        usable = held.any(axis=1)
        if leave_out is not None and shelf.slide == leave_out[0]:
            usable &= shelf.barcodes != leave_out[1]
        rows = np.flatnonzero(usable)
        similarity = held[rows] @ wanted
        first = np.argsort(-similarity, kind="stable")[:n]
        found.append(
            pd.DataFrame(
                {
                    "slide": shelf.slide,
                    "barcode": shelf.barcodes[rows[first]],
                    "row": rows[first],
                    "similarity": similarity[first].astype(np.float64),
                }
            )
        )
    every = pd.concat(found, ignore_index=True) if found else pd.DataFrame()
    if every.empty:
        raise SlideError("there is no spot to find", fix="give slides that hold the modality")
    return every.sort_values("similarity", ascending=False, kind="stable", ignore_index=True)[:n]
