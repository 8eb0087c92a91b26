"""Scores of domains: agreement with labels, coherence in space, and intervals of differences.

Shape letters: N spots, L labelled spots, C domains, R runs, B bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st_align.benchmarks.bootstrap import Interval, percentiles

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

AGREEMENT = ("ari", "nmi", "homogeneity", "completeness")
COHERENCE = ("chaos", "pas")
_PAS_NEIGHBOURS, _PAS_OTHERS = 10, 6
REPLICATES = 1000


def scores(labels: NDArray[Any], found: NDArray[Any], xy: Floats) -> dict[str, float]:
    """All metrics of domains `found` [N] on the spots that have a label ('' has none).

    `labels` [N], `xy` [N, 2] in any unit.
    """
    from sklearn import metrics

    kept = labels != ""
    true, guess = labels[kept], found[kept]
    homogeneity, completeness, nmi = metrics.homogeneity_completeness_v_measure(true, guess)
    return {
        "ari": float(metrics.adjusted_rand_score(true, guess)),
        "nmi": float(nmi),
        "homogeneity": float(homogeneity),
        "completeness": float(completeness),
        **coherence(guess, xy[kept]),
    }


def coherence(found: NDArray[Any], xy: Floats) -> dict[str, float]:
    """CHAOS and PAS (Shang and Zhou 2022, as in SDMBench); lower is more coherent.

    CHAOS: distance from a spot to the nearest one of its domain, on coordinates of unit variance,
    mean over the spots; a domain of one spot adds nothing. PAS: share of spots of whose 10
    nearest neighbours 6 or more are of another domain.
    """
    from scipy.spatial import cKDTree

    scaled = (xy - xy.mean(axis=0)) / np.maximum(xy.std(axis=0), 1e-12)
    apart = 0.0
    for domain in np.unique(found):
        own = scaled[found == domain]
        if len(own) > 1:
            apart += float(cKDTree(own).query(own, k=2)[0][:, 1].sum())
    k = min(_PAS_NEIGHBOURS, len(xy) - 1)
    near = cKDTree(xy).query(xy, k=k + 1)[1][:, 1:]
    others = (found[near] != found[:, None]).sum(axis=1)
    pas = float((others >= min(_PAS_OTHERS, k)).mean()) if k else 0.0
    return {"chaos": apart / len(xy), "pas": pas}


def resampled_ari(labels: NDArray[Any], runs: Sequence[NDArray[Any]], weights: Floats) -> Floats:
    """[B] ARI of each resampling of the labelled spots, mean over the runs.

    `weights` [B, L] says how often each labelled spot was drawn; the ARI of weighted pairs.
    """
    kept = labels != ""
    true = np.unique(labels[kept], return_inverse=True)[1]
    found = [np.unique(run[kept], return_inverse=True)[1] for run in runs]
    return np.asarray(np.mean([_weighted_ari(true, guess, weights) for guess in found], axis=0))


def draw(n_labelled: int, rng: np.random.Generator, replicates: int = REPLICATES) -> Floats:
    """[B, L] counts of a bootstrap of labelled spots, the same for all methods of a slide."""
    share = np.full(n_labelled, 1 / n_labelled)
    return rng.multinomial(n_labelled, share, size=replicates).astype(np.float64)


def interval(differences: Sequence[Floats], observed: float, rng: np.random.Generator) -> Interval:
    """95 % interval of the mean over slides of paired differences [B], slides resampled too."""
    table = np.stack(differences)
    if len(table) > 1:
        picked = rng.integers(len(table), size=table.shape)
        table = np.take_along_axis(table, picked, axis=0)
    return percentiles(observed, table.mean(axis=0))


def _weighted_ari(true: Codes, found: Codes, weights: Floats) -> Floats:
    """[B] adjusted Rand index of spots that count `weights` [B, L] times."""
    n_true, n_found = true.max() + 1, found.max() + 1
    cell = true * n_found + found
    counts = weights @ np.eye(n_true * n_found)[cell]
    counts = counts.reshape(len(weights), n_true, n_found)

    def pairs(values: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(values * (values - 1) / 2)

    both = pairs(counts).sum(axis=(1, 2))
    in_true = pairs(counts.sum(axis=2)).sum(axis=1)
    in_found = pairs(counts.sum(axis=1)).sum(axis=1)
    chance = in_true * in_found / pairs(weights.sum(axis=1))
    most = (in_true + in_found) / 2
    spread = np.where(most == chance, 1.0, most - chance)
    return np.asarray(np.where(most == chance, 1.0, (both - chance) / spread))
