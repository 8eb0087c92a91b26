"""Tied Gaussian mixtures by expectation maximisation: one covariance for all components.

Shape letters: N spots, D axes, R of them after whitening, C components.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

FIT_SPOTS = 20_000
"""Starts are tried on at most so many spots; the best goes on over all."""
_MAX_ITER, _SHORT_ITER = 500, 100
_TOLERANCE = 1e-5
"""EM ends when the mean log-likelihood of a spot grows by less."""
_RIDGE = 1e-6
SPOTS_PER_AXIS = 10


class Solution(NamedTuple):
    """A converged mixture."""

    loglik: float
    """Mean over the whitened spots it was fitted on."""
    posterior: Floats
    """[N, C]"""

    @property
    def rank(self) -> tuple[int, float]:
        """Solutions in which every component has a spot come first."""
        return len(np.unique(self.posterior.argmax(axis=1))), self.loglik


def solutions(
    x: Floats, n_domains: int, rng: np.random.Generator, starts: int
) -> Sequence[Solution]:
    """A converged mixture per start; only the best where the spots are too many for all."""
    white = _whitening(x)(x)
    if len(x) > FIT_SPOTS:
        rows = np.sort(rng.choice(len(x), FIT_SPOTS, replace=False))
        found = _solutions_of(x[rows], white[rows], n_domains, rng, starts)
        best = max(found, key=lambda solution: solution.rank)
        first = _expectation_maximisation(white[rows], best.posterior, of=white, iterations=1)
        return [_expectation_maximisation(white, first.posterior)]
    with one_thread(len(x)):
        return _solutions_of(x, white, n_domains, rng, starts)


def best_mixture(
    x: Floats, n_domains: int, rng: np.random.Generator, starts: int, *, of: Floats
) -> Solution:
    """The best of several starts on `x` [N, D]; its posterior is of the spots `of` [M, D].

    To be called within `one_thread`.
    """
    white = _whitening(x)
    z, target = white(x), white(of)
    found = []
    for labels in _starts(x, z, n_domains, rng, starts):
        start = np.eye(n_domains)[labels]
        found.append(_expectation_maximisation(z, start, of=target, iterations=_SHORT_ITER))
    return max(found, key=lambda solution: solution.loglik)


def _starts(
    x: Floats, white: Floats, n_domains: int, rng: np.random.Generator, starts: int
) -> Iterator[Labels]:
    """k-means partitions, half of `x` as it is and half of `x` whitened: either kind alone misses
    the best optimum on some slides.
    """
    for start in range(starts if n_domains > 1 else 1):
        yield kmeans_partition(white if start % 2 else x, n_domains, rng)[0]


def _solutions_of(
    x: Floats, white: Floats, n_domains: int, rng: np.random.Generator, starts: int
) -> list[Solution]:
    labels = _starts(x, white, n_domains, rng, starts)
    return [_expectation_maximisation(white, np.eye(n_domains)[start]) for start in labels]


def _expectation_maximisation(
    x: Floats, posterior: Floats, *, of: Floats | None = None, iterations: int = _MAX_ITER
) -> Solution:
    """Tied mixture of `x` [N, D] from a `posterior` [N, C]; the answer is on the spots `of`, on
    `x` itself by default.

    The shared covariance is E[x x^T] - sum_c w_c m_c m_c^T, so that an iteration costs two
    products N x D x C and none N x D x D. Shares are held [C, N]: maxima and sums over a few
    components are then sums of long rows, a third of the time.
    """
    moment = x.T @ x / len(x)
    share, loglik = posterior.T, -np.inf
    for _ in range(iterations):
        weights = share.mean(axis=1) + 1e-12
        means = share @ x / (len(x) * weights[:, None])
        covariance = moment - (means.T * weights) @ means + _RIDGE * np.eye(x.shape[1])
        solved = np.linalg.solve(covariance, np.concatenate([means.T, moment], axis=1))
        directions, whitened = np.split(solved, [len(means)], axis=1)
        offsets = np.log(weights) - (means.T * directions).sum(axis=0) / 2
        share, evidence = _shares(x, directions, offsets)
        common = np.trace(whitened) + np.linalg.slogdet(covariance)[1]
        common += x.shape[1] * np.log(2 * np.pi)
        before, loglik = loglik, float(evidence - common / 2)
        if loglik - before < _TOLERANCE:
            break
    if of is not None:
        share, _ = _shares(of, directions, offsets)
    return Solution(loglik, share.T)


@contextmanager
def one_thread(n_spots: int) -> Iterator[None]:
    """Products of one slide are too small to share: threads cost more than they bring, and the
    answer would depend on how many there are.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1 if n_spots <= FIT_SPOTS else None):
        yield


def _shares(x: Floats, directions: Floats, offsets: Floats) -> tuple[Floats, float]:
    """Each component's share [C, N] of the spots, and the mean logarithm of what they share."""
    share = directions.T @ x.T
    share += offsets[:, None]
    top = share.max(axis=0)
    share -= top
    np.exp(share, out=share)
    total = share.sum(axis=0)
    share /= total
    return share, float(np.mean(top + np.log(total)))


def kmeans_partition(x: Floats, n_domains: int, rng: np.random.Generator) -> tuple[Labels, float]:
    """Labels [N] of one k-means run, and its inertia."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    model = KMeans(n_domains, n_init=1, max_iter=50, random_state=int(rng.integers(2**31)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = model.fit_predict(x)
    return labels.astype(np.int64), float(model.inertia_)


class _Whitening(NamedTuple):
    mean: Floats
    axes: Floats
    """[D, R]"""

    def __call__(self, x: Floats) -> Floats:
        return np.asarray((x - self.mean) @ self.axes)


def _whitening(x: Floats) -> _Whitening:
    """Makes `x` [N, D] centred, uncorrelated, of unit variance [N, R]; axes that hardly vary are
    left out, and those beyond one for ten spots.
    """
    mean = x.mean(axis=0)
    centred = x - mean
    variance, axes = np.linalg.eigh(centred.T @ centred / len(x))
    most = max(1, len(x) // SPOTS_PER_AXIS)
    kept = np.flatnonzero(variance > 1e-9 * variance[-1])[-most:]
    return _Whitening(mean, axes[:, kept] / np.sqrt(variance[kept]))
