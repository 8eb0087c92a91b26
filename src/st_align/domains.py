"""Spatial domains: clusters of a slide's embedding, how many there are, smoothing over the lattice.

No clusterer sees labels, coordinates or other slides. Of several runs, which differ in their
random starts alone, the one that fits the embedding best is stored. Nothing is N x N.

Shape letters: N spots, D axes of the embedding, C domains, K neighbours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from st_align.errors import ConfigError, SlideError, nearest

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

MAX_AUTO = 15
"""The most domains that `auto` finds."""
_SWEEP = 25
"""Mixtures of up to so many components are fitted to find how many are needed."""
_STARTS = 24
_SWEEP_STARTS, _SWEEP_SPOTS = 6, 5_000
_TAIL = 0.6
"""From this share of the sweep on, components outnumber the domains."""
_PENALTY = 3.0
"""In units of the slope; theory says 2, which finds two domains too many on brain and breast."""
_FIT_SPOTS = 20_000
"""Starts are tried on at most so many spots; the best goes on over all."""
_MAX_ITER = 500
_TOLERANCE = 1e-5
"""EM ends when the mean log-likelihood of a spot grows by less."""
_RIDGE = 1e-6
_SPOTS_PER_AXIS = 10


class Clustering(NamedTuple):
    """`labels` [N] in 0..C-1 and how well they fit the embedding: more is better, and
    comparable between runs of one method on one embedding.
    """

    labels: Labels
    fit: float


@dataclass(frozen=True, kw_only=True)
class Domains:
    """What `assign_domains` found; labels are 0..n_domains-1, the largest domain first."""

    method: str
    n_domains: int
    is_refined: bool
    """Whether `runs` and `labels` are the smoothed ones."""
    best: int
    """The run with the best fit."""
    fits: tuple[float, ...]
    unrefined: tuple[Labels, ...]
    """[N] of each run."""
    refined: tuple[Labels, ...] | None
    """[N] of each run, smoothed over the lattice; None without neighbours."""

    @property
    def runs(self) -> tuple[Labels, ...]:
        """Labels [N] of each run in the form that was asked for."""
        return self.refined if self.is_refined and self.refined is not None else self.unrefined

    @property
    def labels(self) -> Labels:
        """[N] labels of the best run in the form that was asked for."""
        return self.runs[self.best]


def assign_domains(
    x: NDArray[np.floating[Any]],
    n_domains: int | Literal["auto"] | str,
    *,
    method: str = "gmm",
    runs: int = 5,
    seed: int = 0,
    neighbors: NDArray[np.integer[Any]] | None = None,
    refine: bool = True,
) -> Domains:
    """Cluster an embedding `x` [N, D] into `n_domains`, `runs` times with new random starts.

    Args:
        x: one row a spot; finite.
        n_domains: 2 to N, or "auto": `choose_n_domains`.
        method: a name of `METHODS`.
        runs: how often the clusterer is started anew.
        seed: of all that is drawn by chance; run i does not depend on how many follow.
        neighbors: [N, K+1] rows of each spot's ring, self first, -1 fills.
        refine: smooth over `neighbors`; without these labels stay as they are.

    Raises:
        ConfigError: unknown method, `n_domains` or `runs` out of range.
        SlideError: an embedding with NaN, or with fewer distinct rows than domains.

    """
    x = _checked(x)
    if method not in METHODS:
        raise ConfigError(f"no clusterer is called {method!r}", fix=nearest(method, METHODS))
    if runs < 1:
        raise ConfigError("the number of runs is out of range", expected=">= 1", found=str(runs))
    count = choose_n_domains(x, seed=seed) if n_domains == "auto" else _count(n_domains, x)
    found = [METHODS[method](x, count, np.random.default_rng((seed, run))) for run in range(runs)]
    unrefined = tuple(_by_size(clustering.labels) for clustering in found)
    smooth = None
    if neighbors is not None:
        smooth = tuple(refine_labels(labels, neighbors) for labels in unrefined)
    fits = tuple(clustering.fit for clustering in found)
    return Domains(
        method=method,
        n_domains=count,
        is_refined=refine and neighbors is not None,
        best=int(np.argmax(fits)),
        fits=fits,
        unrefined=unrefined,
        refined=smooth,
    )


def choose_n_domains(x: NDArray[np.floating[Any]], *, seed: int = 0) -> int:
    """How many domains, 2 to 15, an embedding [N, D] holds; no labels, no coordinates.

    Slope heuristic: once the components of a tied mixture outnumber the domains, each further
    one raises the log-likelihood by about as much, s. The number c that maximises
    loglik(c) - `_PENALTY` s c is taken. (BIC supposes independent Gaussian spots; niches
    overlap, and it asks for ever more components.)
    """
    x = _checked(x)
    rng = np.random.default_rng((seed, _SWEEP))
    if len(x) > _SWEEP_SPOTS:
        x = x[np.sort(rng.choice(len(x), _SWEEP_SPOTS, replace=False))]
    last = min(_SWEEP, len(np.unique(x, axis=0)), max(2, len(x) // _SPOTS_PER_AXIS))
    counts = np.arange(1, last + 1)
    fits = np.array([gaussian_mixture(x, int(c), rng, starts=_SWEEP_STARTS).fit for c in counts])
    tail = counts >= _TAIL * last
    slope = np.polyfit(counts[tail], fits[tail], 1)[0] if tail.sum() > 2 else 0.0
    gain = fits - _PENALTY * slope * counts
    return int(counts[1:MAX_AUTO][gain[1:MAX_AUTO].argmax()])


def refine_labels(labels: Labels, neighbors: NDArray[np.integer[Any]]) -> Labels:
    """Majority of each spot's ring, itself counted, once; a tie keeps the spot's own label.

    A domain that the vote would wipe out keeps its spots. `labels` [N] in 0..C-1; `neighbors`
    [N, K+1], self first, -1 fills.
    """
    if len(neighbors) != len(labels):
        raise ValueError(f"{len(labels)} labels, neighbours of {len(neighbors)} spots")
    spots = np.arange(len(labels))
    votes = np.zeros((len(labels), labels.max() + 1))
    for column in np.asarray(neighbors).T:
        present = np.flatnonzero(column >= 0)
        votes[present, labels[column[present]]] += 1
    votes[spots, labels] += 0.5
    winner = votes.argmax(axis=1)
    lost = np.setdiff1d(labels, winner)
    return np.where(np.isin(labels, lost), labels, winner)


def gaussian_mixture(
    x: Floats, n_domains: int, rng: np.random.Generator, *, starts: int = _STARTS
) -> Clustering:
    """Gaussian mixture with one covariance for all components, the best of several starts.

    Starts are k-means partitions, half of `x` as it is and half of `x` whitened: either kind
    alone misses the best optimum on some slides. The model itself does not change when `x` is
    rotated or rescaled. `fit` is the mean log-likelihood of whitened spots.
    """
    best = max(_solutions(x, n_domains, rng, starts), key=lambda solution: solution.rank)
    return Clustering(best.posterior.argmax(axis=1), best.loglik)


def consensus(x: Floats, n_domains: int, rng: np.random.Generator) -> Clustering:
    """Posteriors of the better half of a mixture's starts, matched to the best one and averaged.

    `fit` is that of the best start.
    """
    from scipy.optimize import linear_sum_assignment

    found = sorted(_solutions(x, n_domains, rng, _STARTS), key=lambda s: s.rank, reverse=True)
    best, total = found[0], np.zeros_like(found[0].posterior)
    for solution in found[: _STARTS // 2]:
        overlap = best.posterior.T @ solution.posterior
        total += solution.posterior[:, linear_sum_assignment(overlap, maximize=True)[1]]
    return Clustering(total.argmax(axis=1), best.loglik)


def kmeans(x: Floats, n_domains: int, rng: np.random.Generator) -> Clustering:
    """k-means on `x` as it is, the best of several starts; `fit` is minus the inertia."""
    with _one_thread(len(x)):
        found = [_kmeans(x, n_domains, rng) for _ in range(_STARTS)]
    return max(found, key=lambda clustering: clustering.fit)


METHODS: dict[str, Callable[[Floats, int, np.random.Generator], Clustering]] = {
    "gmm": gaussian_mixture,
    "kmeans": kmeans,
    "consensus": consensus,
}


class _Solution(NamedTuple):
    loglik: float
    posterior: Floats
    """[N, C]"""

    @property
    def rank(self) -> tuple[int, float]:
        """Solutions in which every component has a spot come first."""
        return len(np.unique(self.posterior.argmax(axis=1))), self.loglik


def _solutions(
    x: Floats, n_domains: int, rng: np.random.Generator, starts: int
) -> Sequence[_Solution]:
    """A converged mixture per start; only the best where the spots are too many for all."""
    white = _whitened(x)
    if len(x) > _FIT_SPOTS:
        rows = np.sort(rng.choice(len(x), _FIT_SPOTS, replace=False))
        found = _solutions_of(x[rows], white[rows], n_domains, rng, starts)
        best = max(found, key=lambda solution: solution.rank)
        first = _expectation_maximisation(white[rows], best.posterior, of=white, iterations=1)
        return [_expectation_maximisation(white, first.posterior)]
    with _one_thread(len(x)):
        return _solutions_of(x, white, n_domains, rng, starts)


def _solutions_of(
    x: Floats, white: Floats, n_domains: int, rng: np.random.Generator, starts: int
) -> list[_Solution]:
    found = []
    for start in range(starts if n_domains > 1 else 1):
        labels = _kmeans(white if start % 2 else x, n_domains, rng).labels
        found.append(_expectation_maximisation(white, np.eye(n_domains)[labels]))
    return found


def _expectation_maximisation(
    x: Floats, posterior: Floats, *, of: Floats | None = None, iterations: int = _MAX_ITER
) -> _Solution:
    """Tied mixture of `x` [N, D] from a `posterior` [N, C]; the answer is on the spots `of`, on
    `x` itself by default.

    The shared covariance is E[x x^T] - sum_c w_c m_c m_c^T, so that an iteration costs two
    products N x D x C and none N x D x D.
    """
    moment = x.T @ x / len(x)
    loglik = -np.inf
    for _ in range(iterations):
        weights = posterior.mean(axis=0) + 1e-12
        means = posterior.T @ x / (len(x) * weights[:, None])
        covariance = moment - (means.T * weights) @ means + _RIDGE * np.eye(x.shape[1])
        directions = np.linalg.solve(covariance, means.T)
        offsets = np.log(weights) - (means.T * directions).sum(axis=0) / 2
        posterior, evidence = _softmax(x @ directions + offsets)
        common = np.trace(np.linalg.solve(covariance, moment)) + np.linalg.slogdet(covariance)[1]
        common += x.shape[1] * np.log(2 * np.pi)
        before, loglik = loglik, float(evidence - common / 2)
        if loglik - before < _TOLERANCE:
            break
    if of is not None:
        posterior, _ = _softmax(of @ directions + offsets)
    return _Solution(loglik, posterior)


@contextmanager
def _one_thread(n_spots: int) -> Iterator[None]:
    """Products of one slide are too small to share: threads cost more than they bring, and the
    answer would depend on how many there are.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1 if n_spots <= _FIT_SPOTS else None):
        yield


def _softmax(logits: Floats) -> tuple[Floats, float]:
    """Rows that sum to 1, and the mean of the logarithm of what they were divided by."""
    top = logits.max(axis=1, keepdims=True)
    share = np.exp(logits - top)
    total = share.sum(axis=1, keepdims=True)
    return share / total, float(np.mean(top + np.log(total)))


def _kmeans(x: Floats, n_domains: int, rng: np.random.Generator) -> Clustering:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    model = KMeans(n_domains, n_init=1, max_iter=50, random_state=int(rng.integers(2**31)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = model.fit_predict(x)
    return Clustering(labels.astype(np.int64), -float(model.inertia_))


def _whitened(x: Floats) -> Floats:
    """[N, R] centred, uncorrelated, of unit variance; axes that hardly vary are left out, and
    those beyond one for ten spots.
    """
    centred = x - x.mean(axis=0)
    variance, axes = np.linalg.eigh(centred.T @ centred / len(x))
    most = max(1, len(x) // _SPOTS_PER_AXIS)
    kept = np.flatnonzero(variance > 1e-9 * variance[-1])[-most:]
    return np.asarray(centred @ axes[:, kept] / np.sqrt(variance[kept]))


def _checked(x: NDArray[np.floating[Any]]) -> Floats:
    """`x` as float64, of unit overall variance; what cannot be clustered is a SlideError."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or not x.shape[1]:
        raise SlideError("the embedding is no table", expected="[N, D]", found=str(x.shape))
    bad = int((~np.isfinite(x)).any(axis=1).sum())
    if bad:
        raise SlideError(
            "the embedding holds NaN or infinite values",
            found=f"in {bad} of {len(x)} spots",
            fix="embed the slide again",
        )
    x = x - x.mean(axis=0)
    spread = float(np.sqrt(np.mean(x**2)))
    if len(x) < 2 or spread < 1e-12:
        raise SlideError(
            "the embedding is the same at every spot: there are no domains to find",
            expected="2 spots that differ, or more",
            found=f"{len(x)} spots",
            fix="cluster another embedding with --use",
        )
    return np.asarray(x / spread)


def _count(n_domains: int | str, x: Floats) -> int:
    distinct = len(np.unique(x, axis=0))
    valid = isinstance(n_domains, int | np.integer) and 2 <= n_domains <= distinct
    if not valid:
        spots = f"{len(x)} spots" + (f", {distinct} of them distinct" if distinct < len(x) else "")
        raise ConfigError(
            "the number of domains is out of range",
            expected=f"2 to {distinct} ({spots}), or auto",
            found=repr(n_domains),
        )
    return int(n_domains)


def _by_size(labels: Labels) -> Labels:
    """Labels renumbered, the largest domain 0; ties in order of first appearance."""
    _, first, number, size = np.unique(
        labels, return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.empty(len(size), np.int64)
    rank[np.lexsort((first, -size))] = np.arange(len(size))
    return rank[number]
