"""A partition that many mixtures agree on.

One mixture on one number of axes moves by .1 in adjusted Rand index when that number changes. Here
many are fitted: on several embeddings of the slide, on 8 to 30 of their axes, on random parts of
the spots; where spots of the training slides are known, half of them on these as well, so that what
the slide shares with others counts for more. How often two spots fall into one component, over all
members, is their similarity (evidence accumulation, Fred and Jain 2005); average linkage cuts it
into the domains asked for.

Shape letters: N spots, M training spots, L landmarks, D axes, C domains, m members.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from st_align.mixture import Labels, best_mixture, one_thread
from st_align.slide import spread

Posterior = NDArray[np.float32]

DIMS = (8, 12, 16, 20, 30)
_ROUNDS, _STARTS = 1, 2
"""Pairs of members for each number of axes: one on the slide, one with training spots as well."""
_SHARE = 0.8
"""Of the spots, drawn anew for each member."""
_MOST = 10_000
"""A member is fitted on at most so many spots, and says to which domain each of the others goes."""
_LANDMARKS = 5_000
"""Linkage is of at most so many spots, a whole Visium slide; the others join the domain whose
landmarks they fall together with most.
"""


class View(NamedTuple):
    """One embedding of a slide's spots, the most variable axis first."""

    x: NDArray[Any]
    """[N, D]"""
    training: NDArray[Any] | None = None
    """[M, D] of spots of the training slides on the same axes."""


class Agreed(NamedTuple):
    """`labels` [N], and how well members agree with them: their mean adjusted Rand index."""

    labels: Labels
    agreement: float


def agreed_mixture(views: Sequence[View], n_domains: int, rng: np.random.Generator) -> Agreed:
    """Domains that members on all `views` of the same spots agree on."""
    from sklearn.metrics import adjusted_rand_score

    with one_thread(len(views[0].x)):
        posteriors = [found for view in views for found in _members(view, n_domains, rng)]
    profile = np.concatenate(posteriors, axis=1) / np.sqrt(len(posteriors))
    n = len(profile)
    some = np.arange(n)
    if n > _LANDMARKS:
        some = np.sort(rng.choice(n, _LANDMARKS, replace=False))
    labels = _linked(profile[some], n_domains)
    if n > _LANDMARKS:
        groups = range(labels.max() + 1)
        means = np.stack([profile[some[labels == c]].mean(axis=0) for c in groups])
        everyone = (profile @ means.T).argmax(axis=1)
        everyone[some] = labels
        labels = everyone
    scores = [adjusted_rand_score(labels, p.argmax(axis=1)) for p in posteriors]
    return Agreed(labels, float(np.mean(scores)))


def _members(view: View, n_domains: int, rng: np.random.Generator) -> Iterator[Posterior]:
    """Posteriors [N, C] of every member on one view."""
    with_training = [view.x]
    if view.training is not None:
        # No more than there are of the slide: it is the slide's domains that are asked for.
        with_training.append(view.training[spread(len(view.training), len(view.x))])
    for dims in dict.fromkeys(min(d, view.x.shape[1]) for d in DIMS):
        own = np.asarray(view.x[:, :dims], np.float64)
        both = np.concatenate([part[:, :dims] for part in with_training], dtype=np.float64)
        for fitted in (own, both) * _ROUNDS:
            size = min(max(round(_SHARE * len(fitted)), min(len(fitted), 2 * n_domains)), _MOST)
            rows = np.sort(rng.choice(len(fitted), size, replace=False))
            found = best_mixture(fitted[rows], n_domains, rng, _STARTS, of=own)
            yield found.posterior.astype(np.float32)


def _linked(profile: Posterior, n_domains: int) -> Labels:
    """[L] domains by average linkage of 1 - the share of members that put two spots together."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    apart = profile @ profile.T
    np.maximum(np.subtract(1, apart, out=apart), 0, out=apart)
    np.fill_diagonal(apart, 0)
    tree = linkage(squareform(apart, checks=False), "average")
    found: Labels = fcluster(tree, n_domains, "maxclust").astype(np.int64) - 1
    return found
