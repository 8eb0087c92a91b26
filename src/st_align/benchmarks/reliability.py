"""How well a gene can be predicted at all: counts split in two, and the halves compared.

A spot's count is a draw around what the tissue holds. Thinning it gives two counts that share the
tissue and not the draw; what they agree on is signal, and no predictor can explain the rest.

Shape letters: N spots, g genes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from st_align.expression import Panel, log_normalise, panel_columns
from st_align.slide import PreparedSlide

Floats = NDArray[np.float64]
SPLITS = 5


def reliability(
    slide: PreparedSlide, panel: Panel, rng: np.random.Generator, *, splits: int = SPLITS
) -> Floats:
    """[g] share of each gene's variance over the slide's spots (log1p CP10k) that is not counting
    noise, 0 to 1; NaN where the gene was not measured or does not vary.

    Counts and library sizes are thinned to halves (binomial, 1/2), each half is normalised by its
    own library, and the halves' Pearson correlation r, averaged over `splits` draws, is stepped up
    to the whole count: 2 r / (1 + r) (Spearman, Brown).

    A perfect predictor of what the tissue holds has a PCC of about the square root of it, and a
    centred MSE over variance of about one minus it.
    """
    values = np.full(len(panel), np.nan)
    if slide.counts is None or slide.genes is None:
        return values
    columns, valid = panel_columns(slide.genes, panel), slide.total_umi > 0
    measured = columns >= 0
    counts = slide.counts[:, columns[measured]].toarray()[valid].astype(np.int64)
    library = np.maximum(np.rint(slide.total_umi[valid]), counts.sum(axis=1)).astype(np.int64)
    if len(counts) < 3:
        return values
    drawn = [_half_correlation(counts, library, rng) for _ in range(splits)]
    r = np.clip(np.mean(drawn, axis=0), 0, 1)
    values[measured] = 2 * r / (1 + r)
    return values


def _half_correlation(
    counts: NDArray[np.int64], library: NDArray[np.int64], rng: np.random.Generator
) -> Floats:
    """[g] correlation over spots of the two halves of one draw; NaN where a half is constant."""
    first = rng.binomial(counts, 0.5)
    rest = library - counts.sum(axis=1)  # genes that are not asked for
    first_library = first.sum(axis=1) + rng.binomial(rest, 0.5)
    halves = (first, first_library), (counts - first, library - first_library)
    a, b = (
        _centred(log_normalise(c, total.astype(np.float64))[0].toarray()) for c, total in halves
    )
    spread = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    r: Floats = np.divide(
        (a * b).sum(axis=0), spread, out=np.full(len(spread), np.nan), where=spread > 0
    )
    return r


def _centred(values: NDArray[np.float32]) -> Floats:
    wide = values.astype(np.float64)
    return np.asarray(wide - wide.mean(axis=0))
