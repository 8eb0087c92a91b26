"""The paper's equations as literal loops in double precision: slow, and meant to be read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def distance(c_n: Array, c_m: Array) -> float:
    """Eq. 1."""
    return math.sqrt(sum((c_n[axis] - c_m[axis]) ** 2 for axis in range(2)))


def niche(coordinates: Array, n: int, k: int) -> list[int]:
    """N_K(n): the spot and its K nearest; ties by row number."""
    others = [m for m in range(len(coordinates)) if m != n]
    return [n, *sorted(others, key=lambda m: (distance(coordinates[n], coordinates[m]), m))[:k]]


def niche_expression(q: Array, members: Sequence[int]) -> Array:
    """Eq. 2."""
    total = np.zeros(q.shape[1])
    for j in members:
        total = total + q[j]
    return total / len(members)


def softmax(scores: Sequence[float]) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def cross_attention(
    f: Array, other: Array, w_q: Array, w_k: Array, w_v: Array, heads: int = 1
) -> Array:
    """Eq. 7 and 8 for every token of `f` [T, d] over those of `other` [T', d], by heads."""
    d = f.shape[1] // heads
    q, k, v = f @ w_q, other @ w_k, other @ w_v
    z = np.zeros_like(f)
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        for i in range(len(f)):
            scores = [float(q[i, part] @ k[j, part]) / math.sqrt(d) for j in range(len(other))]
            for j, weight in enumerate(softmax(scores)):
                z[i, part] += weight * v[j, part]
    return z


def fuse(z_image: Array, z_gene: Array, w_image: Array, w_gene: Array) -> Array:
    """Eq. 9."""
    return np.concatenate([z_image @ w_image, z_gene @ w_gene])


def one_way(
    a: Array, b: Array, tau: float, *, excluded: Array | None = None, rows: Sequence[int]
) -> float:
    """Eq. 11, and one direction of eq. 10: the mean over `rows`, which are also the only
    negatives; an `excluded` pair is no negative.
    """

    def similarity(i: int, j: int) -> float:
        return math.exp(a[i] @ b[j] / (np.linalg.norm(a[i]) * np.linalg.norm(b[j])) / tau)

    total = 0.0
    for i in rows:
        kept = [j for j in rows if j == i or excluded is None or not excluded[i, j]]
        total -= math.log(similarity(i, i) / sum(similarity(i, j) for j in kept))
    return total / len(rows) if rows else 0.0


def two_way(
    a: Array, b: Array, tau: float, *, excluded: Array | None = None, rows: Sequence[int]
) -> float:
    """Eq. 10."""
    forward = one_way(a, b, tau, excluded=excluded, rows=rows)
    return (forward + one_way(b, a, tau, excluded=excluded, rows=rows)) / 2
