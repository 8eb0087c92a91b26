"""Ridge regression from sums over spots: one pass over the slides, then any fold and penalty.

Shape letters: M spots, D features, g targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PENALTIES = np.logspace(-4, 1, 16)
"""Tried penalties, as shares of the features' total variance."""
_SPANNED = 1e-8
"""Share of the largest eigenvalue below which an axis is rounding."""


@dataclass(frozen=True)
class Moments:
    """Sums over some spots; features and targets are centred beforehand."""

    gram: Floats
    """[D, D] X^T X."""
    cross: Floats
    """[D, g] X^T Y."""
    square: Floats
    """[g] sum of Y^2."""
    spots: int
    counted: Floats
    """[g] spots at which the target was measured."""

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.gram + other.gram,
            self.cross + other.cross,
            self.square + other.square,
            self.spots + other.spots,
            self.counted + other.counted,
        )


class Choice(NamedTuple):
    """The penalty with the least error, squared error over variance averaged over targets."""

    alpha: float
    error: float


def moments(
    features: NDArray[np.floating], targets: NDArray[np.floating], measured: NDArray[np.bool_]
) -> Moments:
    """Sums over [M, D] features and [M, g] targets, of which `measured` [g] hold values."""
    x, y = features.astype(np.float64), np.where(measured, targets, 0).astype(np.float64)
    counted = np.where(measured, float(len(x)), 0.0)
    return Moments(x.T @ x, x.T @ y, (y**2).sum(axis=0), len(x), counted)


def leading_axes(rows: Sequence[NDArray[np.floating]], most: int) -> NDArray[np.float32]:
    """[D, A] the first principal axes, at most `most`, of centred rows [M, D] in parts.

    Ridge on them is ridge on the D features where they span all rows; the cost is that of M.
    """
    stacked = np.concatenate(rows).astype(np.float64)
    values, vectors = np.linalg.eigh(stacked @ stacked.T)
    kept = np.flatnonzero(values > _SPANNED * max(values[-1], 1e-30))[-most:]
    return np.asarray(stacked.T @ (vectors[:, kept] / np.sqrt(values[kept])), np.float32)


def total(parts: Sequence[Moments]) -> Moments:
    """The sums over all `parts`."""
    return reduce(Moments.__add__, parts)


def solve(train: Moments, alpha: float) -> Floats:
    """Weights [D, g] that minimise |y - X w|^2 / n + alpha |w|^2 for each target.

    Sums are divided by the spots they run over, so that a target measured on some slides alone
    is fitted on those: X^T X / n hardly differs between slides of standardised features.
    """
    values, vectors = np.linalg.eigh(train.gram / train.spots)
    weights: Floats = vectors @ _shrunk(vectors, values, train, alpha)
    return weights


def choose_alpha(folds: Sequence[Moments]) -> Choice:
    """The penalty that predicts each fold best from the others.

    With a single fold nothing can be left out: the largest penalty, and an error of 1.
    """
    every = total(folds)
    penalties = PENALTIES * np.trace(every.gram) / every.spots
    if len(folds) < 2:
        return Choice(float(penalties[-1]), 1.0)
    errors = np.zeros((len(folds), len(penalties)))
    for i, fold in enumerate(folds):
        train = total([part for j, part in enumerate(folds) if j != i])
        errors[i] = _errors(train, fold, penalties)
    mean = errors.mean(axis=0)
    best = int(mean.argmin())
    return Choice(float(penalties[best]), float(mean[best]))


def _errors(train: Moments, fold: Moments, penalties: Floats) -> Floats:
    """Squared error over variance on `fold` for each penalty, mean over targets."""
    values, vectors = np.linalg.eigh(train.gram / train.spots)
    gram = vectors.T @ (fold.gram / fold.spots) @ vectors
    use = (fold.square > 0) & (train.counted > 0)
    if not use.any():
        return np.ones(len(penalties))
    cross = vectors.T @ (fold.cross[:, use] / fold.counted[use])
    square = fold.square[use] / fold.counted[use]
    errors = []
    for alpha in penalties:
        w = _shrunk(vectors, values, train, alpha)[:, use]
        explained = 2 * (w * cross).sum(axis=0) - (w * (gram @ w)).sum(axis=0)
        errors.append(float(np.mean(1 - explained / square)))
    return np.array(errors)


def _shrunk(vectors: Floats, values: Floats, train: Moments, alpha: float) -> Floats:
    """Weights in the eigenvectors' coordinates."""
    cross = vectors.T @ (train.cross / np.maximum(train.counted, 1))
    weights: Floats = cross / (np.maximum(values, 0) + alpha)[:, None]
    return weights
