"""Predictors of expression from images: ridge on any features, the product's head, the mean.

A predictor learns from slides with counts and is asked of slides that have none: `Task.test`
holds images alone, so that no count of a slide that is scored can reach its prediction.

Shape letters: N spots, D features, g genes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from st_align.expression import Panel
from st_align.ridge import Moments, choose_alpha, moments, solve, total
from st_align.slide import PreparedSlide
from st_align.targets import Targets, inner_folds, targets

if TYPE_CHECKING:
    from st_align.checkpoint import Run
    from st_align.corpus import Corpus

Floats = NDArray[np.float64]
Features = Callable[[PreparedSlide], NDArray[np.float32]]

MEAN = "mean predictor"
PER_SLIDE = "standardised per slide"
"""Features by the slide's own images, targets centred on each training slide: the offset of a new
donor is left at the training mean."""
BY_TRAINING = "standardised by training"
"""Features and targets by the training slides' mean and spread: plain ridge."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One fold for one panel: `train` has images and counts, `test` images alone."""

    train: Sequence[PreparedSlide]
    test: Sequence[PreparedSlide]
    panel: Panel

    def training_targets(self) -> list[Targets]:
        """Of the training slides, in their order."""
        return [targets(slide, self.panel) for slide in self.train]

    def means(self) -> Floats:
        """[g] mean of each gene over the training spots that measured it."""
        total, n = np.zeros((2, len(self.panel)))
        for found in self.training_targets():
            total += np.where(found.measured, found.values[found.valid].sum(axis=0), 0)
            n += np.where(found.measured, found.valid.sum(), 0)
        return np.asarray(total / np.maximum(n, 1))


class Predictor(Protocol):
    """A row of the table; `tracks` are the ways in which it is run, `identity` tells all that
    decides its predictions apart from the task.
    """

    name: str
    identity: str
    tracks: tuple[str, ...]

    def predict(self, task: Task, track: str) -> dict[str, Floats]:
        """Slide id -> log1p CP10k [N, g] of every test slide."""
        ...


class MeanPredictor:
    """The training mean of every gene, everywhere."""

    name = MEAN
    identity = ""
    tracks: tuple[str, ...] = ("",)

    def predict(self, task: Task, track: str) -> dict[str, Floats]:
        """The same row for every spot."""
        means = task.means()
        return {s.id: np.tile(means, (s.n_spots, 1)) for s in task.test}


@dataclass
class RidgePredictor:
    """Ridge regression on features of a slide's images; the penalty is chosen by leaving out
    training patients in turn, slides where there is one patient, strips where there is one slide.
    """

    name: str
    features: Features
    identity: str
    tracks: tuple[str, ...] = (PER_SLIDE, BY_TRAINING)
    _seen: dict[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)

    def predict(self, task: Task, track: str) -> dict[str, Floats]:
        """Fit on the training slides, predict the test slides; not below 0."""
        per_slide = track == PER_SLIDE
        fitted = None if per_slide else Scaling.of([self._of(s) for s in task.train])
        means, folds = task.means(), inner_folds(task.train).of
        samples = []
        for slide, target in zip(task.train, task.training_targets(), strict=True):
            x = (fitted or Scaling.of([self._of(slide)])).apply(self._of(slide))
            use = target.valid
            own = target.values[use].mean(axis=0) if per_slide else means
            samples.append(
                Sample(x[use], target.values[use] - own, target.measured, folds[slide.id][use])
            )
        weights = ridge_weights(samples)
        return {
            s.id: np.maximum(
                (fitted or Scaling.of([self._of(s)])).apply(self._of(s)) @ weights + means, 0
            )
            for s in task.test
        }

    def _of(self, slide: PreparedSlide) -> NDArray[np.float32]:
        """Features of a slide, computed once; its counts are taken away before."""
        from st_align.infer import without_counts

        if slide.id not in self._seen:
            self._seen[slide.id] = self.features(without_counts(slide))
        return self._seen[slide.id]


class Sample(NamedTuple):
    """Spots of a slide to fit on: features [M, D], targets [M, g] of which `measured` [g] hold
    values, and the inner fold [M] of each spot.
    """

    features: Floats
    targets: Floats
    measured: NDArray[np.bool_]
    folds: NDArray[np.intp]


def ridge_weights(samples: Sequence[Sample]) -> Floats:
    """[D, g] by the penalty that predicts each inner fold best from the others."""
    parts: dict[int, Moments] = {}
    for x, y, measured, folds in samples:
        for fold in np.unique(folds).tolist():
            part = moments(x[folds == fold], y[folds == fold], measured)
            parts[fold] = parts[fold] + part if fold in parts else part
    alpha, _ = choose_alpha(list(parts.values()))
    return solve(total(list(parts.values())), alpha)


@dataclass(frozen=True)
class Scaling:
    """Columns to mean 0 and equal spread, their total variance 1.

    Those that hardly vary (a thousandth of the median spread) become 0: what is next to constant
    in training would be blown up on a slide where it is not.
    """

    mean: Floats
    factor: Floats

    @classmethod
    def of(cls, blocks: Sequence[NDArray[np.float32]]) -> Scaling:
        """By the rows of all `blocks` [N, D]."""
        n = sum(map(len, blocks))
        mean = sum(b.sum(axis=0, dtype=np.float64) for b in blocks) / n
        spread = np.sqrt(sum(((b - mean) ** 2).sum(axis=0) for b in blocks) / n)
        varies = spread > max(1e-6, 1e-3 * float(np.median(spread)))
        factor = np.where(varies, 1 / np.where(varies, spread, 1), 0)
        return cls(np.asarray(mean), factor / np.sqrt(max(int(varies.sum()), 1)))

    def apply(self, block: NDArray[np.float32]) -> Floats:
        """[N, D] scaled."""
        return np.asarray((block - self.mean) * self.factor)


@dataclass
class HeadPredictor:
    """What `st-align genes fit` and `st-align genes predict` give."""

    name: str
    run: Run
    corpus: Corpus
    identity: str
    tracks: tuple[str, ...] = ("",)

    def predict(self, task: Task, track: str) -> dict[str, Floats]:
        """Fit the head on the training slides, predict the test slides."""
        from st_align.infer import Embedder
        from st_align.predict import fit_head, predict

        head = fit_head(self.run, task.train, task.panel.genes, corpus=self.corpus)
        reader = Embedder(self.run, corpus=self.corpus)
        return {s.id: predict(head, reader, s).to_numpy(np.float64) for s in task.test}
