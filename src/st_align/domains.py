"""Spatial domains: clusters of a slide's embedding, how many there are, smoothing over the lattice.

No clusterer sees labels or coordinates; of other slides, only spots of those a model was trained
on. Of several runs, which differ in their random starts alone, the one that fits the embedding best
is stored. Nothing is N x N.

Shape letters: N spots, D axes of the embedding, C domains, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from st_align.agreement import View, agreed_mixture
from st_align.errors import ConfigError, SlideError, nearest
from st_align.mixture import (
    SPOTS_PER_AXIS,
    Floats,
    Labels,
    kmeans_partition,
    one_thread,
    solutions,
)

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
_VOTERS = 8_192
"""Spots whose votes are counted at once."""


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
    views: Sequence[View] = (),
    progress: bool = False,
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
        views: what "consensus" fits its members on; `x` by default. Then `x` decides only how
            many domains there are.
        progress: show a bar over the runs.

    Raises:
        ConfigError: unknown method, `n_domains` or `runs` out of range.
        SlideError: an embedding with NaN, or with fewer distinct rows than domains.

    """
    from tqdm import tqdm

    x = _checked(x)
    if method not in METHODS:
        raise ConfigError(f"no clusterer is called {method!r}", fix=nearest(method, METHODS))
    if runs < 1:
        raise ConfigError("the number of runs is out of range", expected=">= 1", found=str(runs))
    count = choose_n_domains(x, seed=seed) if n_domains == "auto" else _count(n_domains, x)
    seen = _checked_views(views, len(x)) if method == "consensus" and views else [View(x)]
    rngs = [np.random.default_rng((seed, run)) for run in range(runs)]
    bar = tqdm(rngs, desc="domains", unit="run", disable=not progress)
    found = [METHODS[method](seen, count, rng) for rng in bar]
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
    last = min(_SWEEP, len(np.unique(x, axis=0)), max(2, len(x) // SPOTS_PER_AXIS))
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
    n_domains = int(labels.max()) + 1
    # Narrow, so that what is looked up in any order stays in the processor's cache.
    looked_up = labels.astype(np.min_scalar_type(n_domains))
    found: Labels = np.empty(len(labels), np.int64)
    for start in range(0, len(labels), _VOTERS):
        rows = slice(start, start + _VOTERS)
        ring, own = np.asarray(neighbors[rows]), labels[rows]
        first = (n_domains + 1) * np.arange(len(own))
        ballots = np.where(ring >= 0, looked_up[ring], n_domains) + first[:, None]
        votes = 2 * np.bincount(ballots.ravel(), minlength=(n_domains + 1) * len(own))
        votes[first + own] += 1
        found[rows] = votes.reshape(len(own), -1)[:, :n_domains].argmax(axis=1)
    # Spots given back to one domain may have been all that another one had won.
    there = np.bincount(labels) > 0
    while (lost := there & (np.bincount(found, minlength=n_domains) == 0)).any():
        found = np.where(lost[labels], labels, found)
    return found


def gaussian_mixture(
    x: Floats, n_domains: int, rng: np.random.Generator, *, starts: int = _STARTS
) -> Clustering:
    """Gaussian mixture with one covariance for all components, the best of several starts.

    Starts are k-means partitions, half of `x` as it is and half of `x` whitened: either kind
    alone misses the best optimum on some slides. The model itself does not change when `x` is
    rotated or rescaled. `fit` is the mean log-likelihood of whitened spots.
    """
    best = max(solutions(x, n_domains, rng, starts), key=lambda solution: solution.rank)
    return Clustering(best.posterior.argmax(axis=1), best.loglik)


def consensus(views: Sequence[View], n_domains: int, rng: np.random.Generator) -> Clustering:
    """The partition that many mixtures agree on (`agreement`), fitted on all `views`; `fit` is
    its agreement.
    """
    return Clustering(*agreed_mixture(views, n_domains, rng))


def kmeans(x: Floats, n_domains: int, rng: np.random.Generator) -> Clustering:
    """k-means on `x` as it is, the best of several starts; `fit` is minus the inertia."""
    with one_thread(len(x)):
        found = [kmeans_partition(x, n_domains, rng) for _ in range(_STARTS)]
    labels, inertia = min(found, key=lambda partition: partition[1])
    return Clustering(labels, -inertia)


METHODS: dict[str, Callable[[Sequence[View], int, np.random.Generator], Clustering]] = {
    "consensus": consensus,
    "gmm": lambda views, n_domains, rng: gaussian_mixture(views[0].x, n_domains, rng),
    "kmeans": lambda views, n_domains, rng: kmeans(views[0].x, n_domains, rng),
}
"""Only `consensus` looks at more than the first view."""


def _checked_views(views: Sequence[View], n_spots: int) -> list[View]:
    """Views of the same spots, finite and not the same everywhere."""
    for view in views:
        if len(view.x) != n_spots:
            raise ValueError(f"{n_spots} spots, a view of {len(view.x)}")
        if view.training is not None and view.training.shape[1] != view.x.shape[1]:
            raise ValueError(f"{view.training.shape[1]} axes of training, {view.x.shape[1]} here")
        _checked(view.x)
    return list(views)


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
