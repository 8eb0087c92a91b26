"""Linear niche axes: mean log-expression of niches on the principal axes of training slides.

No network. In the mean a neighbour counts the less the further it is (`geometry.own_weight`): in
legacy ST, 200 um apart, it is often of another tissue. A slide's niches are centred on the slide;
`linear-scaled` also divides each gene by the slide's own spread of it, so that a few loud genes do
not decide. A gene that the slide did not measure is left out of the projection, which then is the
posterior mean of probabilistic PCA (Tipping and Bishop 1999) given the genes that are there: it has
the scale that all genes would give, where a plain projection would shrink.

Shape letters: N spots, M of them, P genes of the panel, R axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from st_align.slide import spread

LinearUse = Literal["linear", "linear-scaled"]

Floats = NDArray[np.float64]

_SOFT = 0.05
"""Added to a gene's spread (log1p CP10k), so that hardly expressed genes stay small."""
_BLOCK = 4096
_KEPT_SPOTS = 2_000


class NicheExpression(Protocol):
    """Niche means of a slide, a few rows at a time."""

    def read(self, rows: NDArray[np.intp]) -> tuple[NDArray[np.float32], ...]:
        """[M, P] of the spots `rows`, the only entry."""
        ...


@dataclass(frozen=True, kw_only=True)
class LinearAxes:
    """What training slides have in common: orthonormal `axes` [P, R], the most variable first,
    their `variances` [R], and the variance `noise` of a gene off the axes.
    """

    axes: NDArray[np.float32]
    variances: NDArray[np.float32]
    noise: float
    explained: float = 1.0
    """Share of the variance of training niches that lies on the axes."""
    spots: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """[M, R] coordinates of some spots of all training slides, 2,000 at most."""

    def projection(self, measured: NDArray[np.bool_]) -> Floats:
        """[P, R] that takes centred niche expression to coordinates; 0 for genes not `measured`."""
        signal = np.sqrt(np.maximum(self.variances.astype(np.float64) - self.noise, 0))
        loadings = self.axes[measured].astype(np.float64) * signal
        inner = loadings.T @ loadings + max(self.noise, 1e-12) * np.eye(len(signal))
        weights = np.zeros(self.axes.shape)
        weights[measured] = np.linalg.solve(inner, loadings.T).T * signal
        return weights


def fit_linear(
    niches: Sequence[NDArray[np.float32]], use: LinearUse, n_axes: int
) -> LinearAxes | None:
    """Axes of niche expression [M, P] of spots of each training slide; None without any.

    A pair of genes counts on the slides that measured both.
    """
    covariance, counted = None, None
    for values in (centred(slide, use) for slide in niches):
        measured = values.any(axis=0).astype(np.float64)
        part, pairs = values.T @ values, len(values) * np.outer(measured, measured)
        covariance = part if covariance is None else covariance + part
        counted = pairs if counted is None else counted + pairs
    if covariance is None or counted is None:
        return None
    variances, axes = np.linalg.eigh(covariance / np.maximum(counted, 1))
    variances, axes = variances[::-1].clip(min=0), axes[:, ::-1]
    kept = int((variances[:n_axes] > 1e-9 * max(variances[0], 1e-30)).sum())
    axes, rest = axes[:, :kept], variances[kept:]
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.sign(axes[largest, np.arange(kept)])
    fitted = LinearAxes(
        axes=axes.astype(np.float32),
        variances=variances[:kept].astype(np.float32),
        noise=float(rest.sum() / max((rest > 0).sum(), 1)),
        explained=float(variances[:kept].sum() / max(variances.sum(), 1e-30)),
    )
    parts = (centred(slide, use) for slide in niches)
    spots = np.concatenate([v @ fitted.projection((v != 0).any(axis=0)) for v in parts])
    return replace(fitted, spots=spots[spread(len(spots), _KEPT_SPOTS)].astype(np.float32))


class NicheFacts(NamedTuple):
    """Of a slide's `n` spots: `mean` and standard deviation `spread` [P] of niche expression, and
    which genes were `measured` [P].
    """

    n: int
    mean: Floats
    spread: Floats
    measured: NDArray[np.bool_]

    def scale(self, use: LinearUse) -> Floats:
        """[P] what each centred gene is divided by."""
        return self.spread + _SOFT if use == "linear-scaled" else np.ones_like(self.spread)


def niche_facts(niches: NicheExpression, n: int) -> NicheFacts:
    """All that is fitted on a slide; memory does not grow with N x P."""
    return _facts(_blocks(niches, n))


def centred(values: NDArray[np.float32], use: LinearUse) -> Floats:
    """Niche expression [M, P] of one slide less its mean; scaled where `use` says so."""
    facts = _facts([values])
    return np.asarray((values - facts.mean) / facts.scale(use))


def coordinates(
    axes: LinearAxes, niches: NicheExpression, facts: NicheFacts, use: LinearUse
) -> Floats:
    """[N, R] of a slide's spots; nothing is fitted on it but the mean, and for `linear-scaled` the
    spread, of each gene. Memory does not grow with N x P.
    """
    weights = axes.projection(facts.measured) / facts.scale(use)[:, None]
    return np.concatenate([(block - facts.mean) @ weights for block in _blocks(niches, facts.n)])


def share_explained(
    axes: LinearAxes, niches: NicheExpression, facts: NicheFacts, use: LinearUse
) -> float:
    """Share of the variance of a slide's niches, 0 to 1, that lies on the training axes: how far
    the slide's tissue is from that of training. Compare with `axes.explained`.
    """
    basis, _ = np.linalg.qr(axes.axes[facts.measured].astype(np.float64))
    inside = total = 0.0
    for block in _blocks(niches, facts.n):
        values = ((block - facts.mean) / facts.scale(use))[:, facts.measured]
        inside += float(((values @ basis) ** 2).sum())
        total += float((values**2).sum())
    return min(inside / total, 1.0) if total else 0.0


def _blocks(niches: NicheExpression, n: int) -> Iterator[NDArray[np.float32]]:
    for start in range(0, n, _BLOCK):
        yield niches.read(np.arange(start, min(start + _BLOCK, n)))[0]


def _facts(blocks: Iterable[NDArray[np.float32]]) -> NicheFacts:
    n, total, square = 0, np.zeros(1), np.zeros(1)
    for block in blocks:
        values = block.astype(np.float64)
        n, total, square = n + len(values), total + values.sum(0), square + (values**2).sum(0)
    mean = total / n
    return NicheFacts(n, mean, np.sqrt(np.maximum(square / n - mean**2, 0)), square > 0)
