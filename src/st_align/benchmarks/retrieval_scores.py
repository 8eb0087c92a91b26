"""How well one modality finds the other: ranks in a gallery, recall, chance, neighbours.

Shape letters: Q queries, Q candidates of the gallery, D width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
KS = (1, 5, 10, 50)
NEAR = "within one ring"
_AT_ONCE = 4_000_000
"""Cosines held at a time, 32 MB: a pooled gallery of a cohort has more pairs than fit into memory.
"""
_TIE = 1e-12
"""Cosines nearer than this are equal: products of equal vectors differ in their last bits."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Of each query [Q], 1 the best: the rank of its own spot, and of the first among its own
    and its ring. Ties share the mean of the ranks they take up.
    """

    own: Floats
    near: Floats


def ranks(
    queries: NDArray[np.floating], gallery: NDArray[np.floating], rings: NDArray[np.integer]
) -> Ranks:
    """Query i [Q, D] belongs to candidate i of `gallery` [Q, D]; `rings` [Q, K+1] are the
    candidates that are itself or next to it, -1 where there are fewer.

    The score is the cosine. A constant retriever ranks everybody (Q + 1) / 2: ties help nobody.
    """
    a, b = _unit(queries), _unit(gallery)
    own, near = np.empty(len(a)), np.empty(len(a))
    step = max(1, _AT_ONCE // len(b))
    for start in range(0, len(a), step):
        rows = np.arange(start, min(start + step, len(a)))
        scores = a[rows] @ b.T
        mine = scores[np.arange(len(rows)), rows]
        around = np.take_along_axis(scores, np.maximum(rings[rows], 0), axis=1)
        nearest = np.where(rings[rows] >= 0, around, -np.inf).max(axis=1)
        own[rows] = _rank(scores, mine)
        near[rows] = _rank(scores, np.maximum(nearest, mine))
    return Ranks(own=own, near=near)


def retrieval_scores(found: Ranks) -> dict[str, float]:
    """recall@k, median rank, and recall@k where the own ring counts as a hit too."""
    scores = {f"recall@{k}": float((found.own <= k).mean()) for k in KS}
    scores["median rank"] = float(np.median(found.own))
    return scores | {f"recall@{k} {NEAR}": float((found.near <= k).mean()) for k in KS}


def chance_scores(rings: NDArray[np.integer]) -> Mapping[str, float]:
    """What `retrieval_scores` are on average for ranks drawn by chance, over Q candidates."""
    n, right = len(rings), (rings >= 0).sum(axis=1)
    scores = {f"recall@{k}": min(k, n) / n for k in KS}
    scores["median rank"] = (n + 1) / 2
    return scores | {f"recall@{k} {NEAR}": float(_hit(n, k, right).mean()) for k in KS}


def _hit(n: int, k: int, right: NDArray[np.integer]) -> Floats:
    """Probability that k of n candidates, drawn without replacement, hold one of `right`."""
    missed = np.ones(len(right))
    for drawn in range(min(k, n)):
        missed *= np.clip((n - right - drawn) / (n - drawn), 0, 1)
    return np.asarray(1 - missed)


def _rank(scores: Floats, mine: Floats) -> Floats:
    above = scores - mine[:, None]
    better, ties = (above > _TIE).sum(axis=1), (np.abs(above) <= _TIE).sum(axis=1)
    return np.asarray(better + (ties + 1) / 2)


def _unit(values: NDArray[np.floating]) -> Floats:
    wide = values.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(np.divide(wide, length, out=np.zeros_like(wide), where=length > 0))
