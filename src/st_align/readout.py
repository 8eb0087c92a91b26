"""Readouts: each embedding on the principal axes that the training slides have in common.

An embedding is centred on its slide's own mean, so that what all spots of a slide share (stain,
batch) is gone, and projected on axes fitted once, on training slides. Nothing is fitted on the
slide that is read. Linear algebra only; `infer` computes the embeddings.

Shape letters: N spots of a slide, d the model's width, D an embedding's width, R axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from st_align.config import Use
from st_align.embedding import SlideVectors
from st_align.errors import ModelError, nearest
from st_align.keys import USES

MAX_AXES = 32


@dataclass(frozen=True)
class Readouts:
    """`axes` float32 [D, R] by use, orthonormal columns, the most variable first. A use whose
    modality no training slide has is absent.
    """

    axes: Mapping[Use, NDArray[np.float32]]

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


def fit_readouts(slides: Sequence[SlideVectors]) -> Readouts:
    """Axes of every use from embeddings of training slides: at most 32, as many as vary.

    The axes are eigenvectors of the covariance pooled over all spots, each spot centred on its
    slide; the largest entry of each is positive, so that a refit gives the same axes.
    """
    axes: dict[Use, NDArray[np.float32]] = {}
    for use in USES:
        covariance, n = None, 0
        for slide in slides:
            centred, present = _centred(slide, use)
            part = centred.T @ centred
            covariance = part if covariance is None else covariance + part
            n += int(present.sum())
        if covariance is not None and n > 1:
            axes[use] = _principal_axes(covariance)
    return Readouts(axes)


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
