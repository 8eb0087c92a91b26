"""Embeddings of made-up training slides, and readouts fitted on them."""

from __future__ import annotations

import numpy as np

from st_align.embedding import SlideVectors
from st_align.readout import Readouts, TrainingSpots, fit_readouts


def toy_vectors(rng, n=50, d=4, scale=None, image=True, counts=True) -> SlideVectors:
    def vectors(width, present):
        values = rng.normal(size=(n, width)) * np.linspace(2, 0.1, width) + rng.normal(size=width)
        return values.astype(np.float32) * present

    return SlideVectors(
        r=vectors(d, image),
        u=vectors(d, counts),
        e=vectors(d, image),
        t=vectors(d, counts),
        h_spot=vectors(2 * d, True),
        h_niche=vectors(2 * d, True),
        has_image=np.full(n, image),
        has_counts=np.full(n, counts),
    )


def toy_niches(rng, n=50, genes=3) -> np.ndarray:
    return rng.normal(size=(n, genes)).astype(np.float32)


def readouts_of(slides, niches=None) -> Readouts:
    return fit_readouts([TrainingSpots(vectors=s, niches=niches) for s in slides])


def toy_readouts(rng) -> Readouts:
    return readouts_of([toy_vectors(rng)], toy_niches(rng))
