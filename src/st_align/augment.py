"""Augmentation of raw patches, a function of (seed, epoch, spot) and nothing else.

Random numbers come from a hash of the spot's number, not from a generator's stream, so that the
same spot looks the same whichever batch or rank it falls into.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GAIN = 0.1
"""Each colour channel is multiplied by 1 +- this."""
SHIFT = 12.0
"""All channels are shifted by +- this many grey levels."""
_AT_ONCE = 16
"""Patches: what is computed of them stays in the processor's cache."""


def augment(
    patches: NDArray[np.uint8], ids: NDArray[np.int64], key: tuple[int, int]
) -> NDArray[np.uint8]:
    """One of the 8 symmetries of the square and mild colour jitter for each of `patches`
    [B, p, p, 3]; `ids` [B] are the spots' numbers, `key` is (seed, epoch).
    """
    draws = spot_uniform(ids, key, 5)
    turned = _turned(patches, (draws[:, 0] * 8).astype(int))
    jitter = (2 * draws[:, 1:] - 1).astype(np.float32)
    # Lines of pixels, not pixels, are multiplied: a loop over three channels costs ten times more.
    side = patches.shape[2]
    gain = np.tile(1 + GAIN * jitter[:, None, :3], (1, 1, side))
    shift = SHIFT * jitter[:, None, 3:]
    for start in range(0, len(ids), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        lines = turned[rows].reshape(-1, patches.shape[1], 3 * side)
        colours = np.multiply(lines, gain[rows])
        colours += shift[rows]
        lines[...] = np.clip(colours, 0, 255, out=colours)
    return turned


def _turned(patches: NDArray[np.uint8], symmetry: NDArray[np.int_]) -> NDArray[np.uint8]:
    """A copy of each patch, mirrored and transposed by the three bits of its `symmetry` [B]."""
    pixels = np.ascontiguousarray(patches).view("V3")[..., 0]
    turned = np.empty_like(pixels)
    for code in np.unique(symmetry):
        rows = symmetry == code
        some = pixels[rows]
        some = some.transpose(0, 2, 1) if code & 4 else some
        turned[rows] = some[:, :: -1 if code & 2 else 1, :: -1 if code & 1 else 1]
    return turned.view(np.uint8).reshape(patches.shape)


def spot_uniform(ids: NDArray[np.int64], key: tuple[int, int], n: int) -> NDArray[np.float64]:
    """[B, n] numbers in [0, 1) that depend on (seed, epoch) and each spot's number alone."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state ^ np.array([part], np.uint64))
    state = _mix(state[:, None] ^ ids.astype(np.uint64)[:, None])
    return _mix(state ^ np.arange(1, n + 1, dtype=np.uint64)) / 2.0**64


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: every input bit changes each output bit half of the time."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
