"""Colour of patches in a few numbers: what stain and tissue look like before any network."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

N_STATISTICS = 21
_BLOCK = 512


def colour_statistics(patches: NDArray[np.uint8]) -> NDArray[np.float32]:
    """RGB patches [N, p, p, 3] -> [N, 21]: mean and standard deviation of each channel, the same
    of its optical density -ln(I / 256), and its 10th, 50th and 90th percentile.
    """
    rows = np.empty((len(patches), N_STATISTICS), np.float32)
    for start in range(0, len(patches), _BLOCK):
        block = np.asarray(patches[start : start + _BLOCK], np.float32)
        pixels = block.reshape(len(block), -1, 3)
        density = -np.log((pixels + 1) / 256)
        moments = [f(v, axis=1) for v in (pixels, density) for f in (np.mean, np.std)]
        percentiles = np.percentile(pixels, (10, 50, 90), axis=1)
        rows[start : start + len(block)] = np.concatenate([*moments, *percentiles], axis=1)
    return rows
