"""A partition that many mixtures agree on.

One mixture on one number of axes moves by .1 in adjusted Rand index when that number changes. Here
many are fitted: on several embeddings of the slide, on 8 to 30 of their axes, on random parts of
the spots, and once more from where a mixture of the training slides would begin. The member that
agrees best with all others, by the mean adjusted Rand index, is the answer: a medoid, so a
partition that one mixture found, and members that went astray have no say in its borders.

Shape letters: N spots, M training spots, D axes, C domains, m members.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from st_align.mixture import Floats, Labels, best_mixture, continued

DIMS = (8, 12, 16, 20, 30)
_ROUNDS, _STARTS = 2, 2
_SHARE = 0.8
"""Of the spots, drawn anew for each member."""
_MOST = 10_000
"""A member is fitted on at most so many spots, and says to which domain each of the others goes."""


class View(NamedTuple):
    """One embedding of the spots: `x` [N, D], the most variable axis first, and the coordinates
    `reference` [M, D] of training spots on the same axes, where they are known.
    """

    x: NDArray[Any]
    reference: NDArray[np.floating] | None = None


class Agreed(NamedTuple):
    """`labels` [N] of the medoid, and its mean adjusted Rand index with the other members."""

    labels: Labels
    agreement: float


def agreed_mixture(views: Sequence[View], n_domains: int, rng: np.random.Generator) -> Agreed:
    """The medoid of all members on all `views` of the same spots."""
    members = [labels for view in views for labels in _members(view, n_domains, rng)]
    index = rand_indices(members, n_domains)
    # A partition that lost a domain can agree with many and still not be what was asked for.
    whole = np.array([len(np.unique(labels)) == n_domains for labels in members])
    mean = (index.sum(axis=1) - 1) / max(len(members) - 1, 1)
    best = int(np.where(whole | ~whole.any(), mean, -2).argmax())
    return Agreed(members[best], float(mean[best]))


def rand_indices(members: Sequence[Labels], n_domains: int) -> Floats:
    """[m, m] adjusted Rand index (Hubert and Arabie 1985) of every pair of partitions [N]."""
    n = len(members[0])
    table = np.concatenate([np.eye(n_domains, dtype=np.float32)[m] for m in members], axis=1)
    together = (table.T @ table).astype(np.float64)
    cells = together.reshape(len(members), n_domains, len(members), n_domains)
    pairs = (cells * (cells - 1) / 2).sum(axis=(1, 3))
    own = pairs.diagonal()
    expected = np.outer(own, own) / max(n * (n - 1) / 2, 1)
    span = (own[:, None] + own) / 2 - expected
    flat = np.abs(span) < 1e-12
    return np.asarray(np.where(flat, 1.0, (pairs - expected) / np.where(flat, 1, span)))


def _members(view: View, n_domains: int, rng: np.random.Generator) -> Iterator[Labels]:
    """Labels [N] of every member on one view."""
    for dims in dict.fromkeys(min(d, view.x.shape[1]) for d in DIMS):
        x = view.x[:, :dims]
        for _ in range(_ROUNDS):
            rows = _drawn(len(x), n_domains, rng)
            yield best_mixture(x[rows], n_domains, rng, _STARTS, of=x).posterior.argmax(axis=1)
            if view.reference is None or len(view.reference) <= n_domains:
                continue
            other = view.reference[:, :dims].astype(np.float64)
            rows = _drawn(len(other), n_domains, rng)
            start = best_mixture(other[rows], n_domains, rng, _STARTS, of=x).posterior
            rows = _drawn(len(x), n_domains, rng) if len(x) > _MOST else np.arange(len(x))
            yield continued(x[rows], start[rows], of=x).posterior.argmax(axis=1)


def _drawn(n: int, n_domains: int, rng: np.random.Generator) -> NDArray[np.intp]:
    size = min(max(round(_SHARE * n), min(n, 2 * n_domains)), _MOST)
    return np.sort(rng.choice(n, size, replace=False))
