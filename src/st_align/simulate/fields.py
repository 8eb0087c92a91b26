"""Smooth random fields on a grid of pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
_CELLS = 2.0
"""Cells of the coarse noise per correlation length."""


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], length_px: float) -> Field:
    """[H, W] Gaussian field of mean 0 and sd 1 that varies over about `length_px`."""
    from scipy.ndimage import gaussian_filter

    cell = max(1.0, length_px / _CELLS)
    coarse = (int(shape[0] / cell) + 4, int(shape[1] / cell) + 4)
    noise = rng.standard_normal(coarse, dtype=np.float32)
    field = resize(gaussian_filter(noise, length_px / cell / 2, mode="wrap"), shape)
    return np.asarray((field - field.mean()) / field.std(), np.float32)


def resize(field: NDArray[Any], shape: tuple[int, int]) -> Field:
    """[H, W] of `shape`, bicubic."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(field, np.float32))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BICUBIC), np.float32)
