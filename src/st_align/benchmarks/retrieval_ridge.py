"""The retriever that a learned model has to beat: ridge regression from frozen image features.

A slide's expression on principal axes of the training slides is predicted from its image; image
and counts of a spot then lie in one space. Nothing is fitted on the slide that is searched.

Shape letters: N spots, P genes of the panel, R axes, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from st_align.benchmarks.genes_models import Sample, Scaling, ridge_weights
from st_align.benchmarks.image_rows import Read
from st_align.errors import SlideError
from st_align.expression import Panel, choose_panel, panel_expression
from st_align.geometry import ring_mean
from st_align.slide import PreparedSlide
from st_align.targets import inner_folds

Floats = NDArray[np.float64]
N_GENES, N_AXES = 1000, 32
SCALES = ("spot", "niche")


@dataclass(frozen=True, kw_only=True)
class RidgeRetriever:
    """By scale: axes [P, R] of expression, their spread [R] and the weights [D, R] to them."""

    panel: Panel
    niche: str
    features: Mapping[str, Sequence[Read]]
    axes: Mapping[str, Floats]
    spread: Mapping[str, Floats]
    weights: Mapping[str, Floats]

    def from_image(self, slide: PreparedSlide, scale: str, *, whiten: bool) -> Floats:
        """[N, R] what the slide's image predicts; `whiten` divides the axes by their spread on the
        training slides.
        """
        predicted = _features(slide, self.features[scale]) @ self.weights[scale]
        return predicted / self.spread[scale] if whiten else predicted

    def from_counts(self, slide: PreparedSlide, scale: str, *, whiten: bool) -> Floats:
        """[N, R] what its counts are, in the same space."""
        found = _expression(slide, self.panel, self.niche, scale) @ self.axes[scale]
        return found / self.spread[scale] if whiten else found


def fit_ridge_retriever(
    train: Sequence[PreparedSlide], niche: str, features: Mapping[str, Sequence[Read]]
) -> RidgeRetriever:
    """Fit on training slides with image and counts: 32 axes of the 1,000 genes that vary most,
    `features` of each scale standardised per slide, the penalty by inner cross-validation.
    """
    if not train:
        raise SlideError(
            "the corpus holds no training slide of the model with image and counts",
            fix="give the corpus it was trained on: the ridge retriever learns from those slides",
        )
    panel, folds = choose_panel(train, N_GENES), inner_folds(train).of
    axes, spread, weights = {}, {}, {}
    for scale in SCALES:
        covariance, n = np.zeros((len(panel), len(panel))), 0
        for slide in train:
            values = _expression(slide, panel, niche, scale)
            covariance += values.T @ values
            n += len(values)
        variance, vectors = np.linalg.eigh(covariance / n)
        kept = np.argsort(-variance)[:N_AXES]
        kept = kept[variance[kept] > 1e-9 * max(variance[kept[0]], 1e-30)]
        axes[scale], spread[scale] = vectors[:, kept], np.sqrt(variance[kept])
        samples = []
        for slide in train:
            use = slide.total_umi > 0
            x = _features(slide, features[scale])[use]
            y = _expression(slide, panel, niche, scale)[use] @ axes[scale]
            samples.append(Sample(x, y, np.ones(y.shape[1], np.bool_), folds[slide.id][use]))
        weights[scale] = ridge_weights(samples)
    return RidgeRetriever(
        panel=panel, niche=niche, features=features, axes=axes, spread=spread, weights=weights
    )


def _features(slide: PreparedSlide, reads: Sequence[Read]) -> Floats:
    """[N, D] standardised on the slide, every block weighing the same."""
    blocks = [read(slide) for read in reads]
    return np.concatenate([Scaling.of([b]).apply(b) for b in blocks], axis=1)


def _expression(slide: PreparedSlide, panel: Panel, niche: str, scale: str) -> Floats:
    """[N, P] of spots or of niches, centred on the slide."""
    found = panel_expression(slide, panel)
    values = found.values.astype(np.float64)
    if scale == "niche":
        values = ring_mean(found.values, slide.niches[niche].neighbors, found.valid)
        values = np.asarray(values, np.float64)
        values[~found.valid] = 0
        values[found.valid] -= values[found.valid].mean(axis=0)
    return values
