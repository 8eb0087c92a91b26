"""Readouts: each embedding on the principal axes that the training slides have in common.

An embedding is centred on its slide's own mean, so that what all spots of a slide share (stain,
batch) is gone, and projected on axes fitted once, on training slides. Nothing is fitted on the
slide that is read. Linear algebra only; `infer` computes the embeddings. Beside what the model
learned stand the linear niche axes (`linear`).

Shape letters: N spots of a slide, M some of them, D an embedding's width, P genes of the panel,
R axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from st_align.config import Use
from st_align.embedding import SlideVectors, embed_spots
from st_align.errors import ModelError, nearest
from st_align.keys import LINEAR_USES, USES
from st_align.linear import LinearAxes, LinearUse, fit_linear
from st_align.loader import SpotData
from st_align.model import STAlign
from st_align.slide import spread

MAX_AXES = 32
_SPOTS, _SLIDES = 20_000, 64


@dataclass(frozen=True)
class Readouts:
    """`axes` float32 [D, R] by use, orthonormal columns, the most variable first. A use whose
    modality no training slide has is absent.
    """

    axes: Mapping[Use, NDArray[np.float32]]
    linear: Mapping[LinearUse, LinearAxes] = field(default_factory=dict)

    def apply(self, use: Use, vectors: SlideVectors) -> NDArray[np.float32]:
        """[N, R] coordinates of one slide's spots: centred on the slide, projected on the axes.

        Rows without the modality hold 0, the slide's mean. A use without axes is a ModelError.
        """
        if use not in self.axes:
            raise ModelError(
                f"the model has no readout for {use!r}",
                expected=f"one of {', '.join(self.axes) or 'none: its training has not ended'}",
                fix=nearest(use, self.axes)
                if self.axes
                else "finish it with st-align train --resume",
            )
        centred, _ = _centred(vectors, use)
        coordinates: NDArray[np.float32] = (centred @ self.axes[use]).astype(np.float32)
        return coordinates


@dataclass(frozen=True, kw_only=True)
class TrainingSpots:
    """Some spots of a training slide: what the model makes of them, and the mean expression of
    their niches [M, P], None where the slide has no counts.
    """

    vectors: SlideVectors
    niches: NDArray[np.float32] | None


def training_spots(model: STAlign, data: SpotData) -> list[TrainingSpots]:
    """Spots of training slides spread over each of them: 20,000 in all, of 64 slides at most."""
    chosen = range(0, len(data.slides), -(-len(data.slides) // _SLIDES))
    most = _SPOTS // len(chosen)
    found = []
    for number in chosen:
        start, stop = data.starts[number : number + 2]
        ids = start + spread(stop - start, most)
        vectors = embed_spots(model, data, ids)
        source, known = data.slides[number].near_expression, vectors.has_counts
        niches = None
        if source is not None and known.any():
            niches = source.read((ids - start)[known])[0]
        found.append(TrainingSpots(vectors=vectors, niches=niches))
    return found


def fit_readouts(slides: Sequence[TrainingSpots]) -> Readouts:
    """Axes of every use from spots of training slides: at most 32, as many as vary.

    The axes are eigenvectors of the covariance pooled over all spots, each spot centred on its
    slide; the largest entry of each is positive, so that a refit gives the same axes.
    """
    axes: dict[Use, NDArray[np.float32]] = {}
    for use in USES:
        found = [_centred(slide.vectors, use) for slide in slides]
        if sum(int(present.sum()) for _, present in found) > 1:
            axes[use] = _principal_axes(reduce(np.add, [v.T @ v for v, _ in found]))
    niches = [slide.niches for slide in slides if slide.niches is not None]
    linear: dict[LinearUse, LinearAxes] = {}
    for kind in LINEAR_USES:
        fitted = fit_linear(niches, kind, MAX_AXES)
        if fitted is not None:
            linear[kind] = fitted
    return Readouts(axes, linear)


def _centred(slide: SlideVectors, use: Use) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """[N, D] less the mean of the rows that hold something; 0 in the others."""
    vectors, present = slide.of(use)
    centred = vectors.astype(np.float64)
    if present.any():
        centred -= centred[present].mean(axis=0)
    centred[~present] = 0
    return centred, present


def _principal_axes(covariance: NDArray[np.float64]) -> NDArray[np.float32]:
    variance, vectors = np.linalg.eigh(covariance)
    variance, vectors = variance[::-1][:MAX_AXES], vectors[:, ::-1][:, :MAX_AXES]
    vectors = vectors[:, variance > 1e-9 * max(variance[0], 1e-30)]
    largest = np.abs(vectors).argmax(axis=0)
    sign = np.sign(vectors[largest, np.arange(vectors.shape[1])])
    axes: NDArray[np.float32] = (vectors * sign).astype(np.float32)
    return axes
