"""Scores of predicted expression, gene by gene within a slide.

Shape letters: M scored spots, g genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from st_align.benchmarks.cells import Cell
from st_align.benchmarks.table import Row
from st_align.expression import Panel
from st_align.slide import PreparedSlide
from st_align.targets import targets

Floats = NDArray[np.float64]
POOLED = "pcc_pooled"
"""Over the spots of all test slides of a fold at once: differences between slides count in it."""


def gene_scores(true: Floats, guess: Floats) -> dict[str, Floats]:
    """Scores [g] of `guess` [M, g] against `true` [M, g], both log1p CP10k, within one slide.

    mse, mae, r2 as usual (r2 against the slide's own mean); pcc Pearson correlation over the spots;
    and the two parts of the error: mse = centred_mse_over_variance x variance + offset_mse, what is
    wrong within the slide once both means are taken out (1 for a constant), and the squared
    distance of the means (a new donor shifts every gene). NaN where a score is not defined.
    """
    error = guess - true
    variance, mse = true.var(axis=0), (error**2).mean(axis=0)
    return {
        "mse": mse,
        "mae": np.abs(error).mean(axis=0),
        "r2": 1 - _ratio(mse, variance),
        "pcc": correlation(true, guess),
        "centred_mse_over_variance": _ratio(error.var(axis=0), variance),
        "offset_mse": error.mean(axis=0) ** 2,
    }


def correlation(a: Floats, b: Floats) -> Floats:
    """[g] Pearson correlation of the columns of [M, g]; NaN where a column does not vary."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    spread = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    # Rounding leaves a constant column with a spread of its own precision.
    return _ratio((a * b).sum(axis=0), np.where(spread > 1e-9 * len(a), spread, 0))


def score_slides(
    of: Row,
    slides: Sequence[PreparedSlide],
    predicted: Mapping[str, Floats],
    panel: Panel,
    means: Floats,
) -> Cell:
    """Scores of `predicted` (slide id -> [N, g]) as rows like `of`, which names method and fold.

    Per slide and gene (`item`), and the slide's means over genes (item ''), there with MSE and MAE
    over those of answering the training `means` [g]; pooled PCC per gene, and its mean, with the
    fold's name for slide. The cell's arrays hold each spot's squared error, mean over genes, by
    slide. Spots without counts and genes a slide did not measure are left out.
    """
    rows: list[Row] = []
    errors: dict[str, Floats] = {}
    pooled: list[tuple[Floats, Floats]] = []
    for slide in slides:
        found = targets(slide, panel)
        true, guess = found.values[found.valid], predicted[slide.id][found.valid]
        pooled.append((_measured(true, found.measured), _measured(guess, found.measured)))
        true, guess = true[:, found.measured], guess[:, found.measured]
        genes = [g for g, m in zip(panel.genes, found.measured, strict=True) if m]
        if not genes:
            continue
        scores = gene_scores(true, guess)
        base = gene_scores(true, np.broadcast_to(means[found.measured], true.shape))
        rows += _rows(of, slide.id, genes, scores)
        ratios = {
            f"{name}_over_mean_predictor": scores[name].mean() / base[name].mean()
            for name in ("mse", "mae")
            if base[name].mean() > 0
        }
        rows += [_row(of, slide.id, "", name, value) for name, value in ratios.items()]
        errors[slide.id] = ((guess - true) ** 2).mean(axis=1)
    true, guess = (np.concatenate(part) for part in zip(*pooled, strict=True))
    rows += _rows(of, of.slide, panel.genes, {POOLED: _pooled(true, guess)})
    return Cell(rows=tuple(rows), arrays=errors)


def _rows(of: Row, slide: str, genes: Sequence[str], scores: Mapping[str, Floats]) -> Iterator[Row]:
    """Every gene's scores, then their means."""
    for name, values in scores.items():
        for gene, value in zip(genes, values, strict=True):
            yield _row(of, slide, gene, name, value)
        known = values[~np.isnan(values)]
        yield _row(of, slide, "", name, known.mean() if len(known) else np.nan)


def _row(of: Row, slide: str, item: str, metric: str, value: float) -> Row:
    known = None if np.isnan(value) else float(value)
    return Row(
        slide=slide,
        method=of.method,
        track=of.track,
        item=item,
        protocol=of.protocol,
        seed=of.seed,
        metric=metric,
        value=known,
    )


def _pooled(true: Floats, guess: Floats) -> Floats:
    """[g] over the spots that measured the gene."""
    values = np.full(true.shape[1], np.nan)
    for j in range(true.shape[1]):
        use = ~np.isnan(true[:, j])
        if use.sum() > 1:
            values[j] = correlation(true[use, j, None], guess[use, j, None])[0]
    return values


def _measured(values: Floats, measured: NDArray[np.bool_]) -> Floats:
    return np.where(measured, values, np.nan)


def _ratio(above: Floats, below: Floats) -> Floats:
    share: Floats = np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)
    return share
