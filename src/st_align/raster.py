"""Pixels by region: crops at float boxes and thumbnails of images in memory, mapped or in tiles.

Shape letters: M boxes, s pixels of a crop's side, H and W pixels of the stored image.
"""

from __future__ import annotations

import math
import struct
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from st_align.errors import SlideError

MAX_PIXELS = 4_000_000_000
"""Larger images are refused: 12 GB decoded, and more likely a bomb than a slide."""
WHOLE_BYTES = 1 << 30
"""An image that decodes to more than this is read by tile where its format allows it."""
CACHE_BYTES = 1 << 28
"""Decoded tiles kept for the next crop."""
DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, RuntimeError, LookupError, TypeError,
    AttributeError, ArithmeticError, MemoryError, struct.error, zlib.error,
)  # fmt: skip
"""What decoders raise on damaged files."""
CONVERT = "save it as a tiled RGB TIFF (e.g. vips tiffsave IN OUT --tile --pyramid)"

Pixels = NDArray[np.uint8]


class RegionImage(ABC):
    """An image of which any rectangle can be had; resampling is antialiased and bilinear.

    A crop equals the box of the whole image resampled, so values do not depend on how the image
    is read; beyond the border the edge pixels go on.
    """

    def __init__(self, shape: tuple[int, int], scale: float) -> None:
        self.shape, self.scale = shape, float(scale)

    @abstractmethod
    def region(self, top: int, bottom: int, left: int, right: int) -> Pixels:
        """RGB of rows top:bottom and columns left:right, which lie inside the image."""

    def crops(self, boxes: ArrayLike, side: int) -> Pixels:
        """Cut `boxes` [M, 4] (x0 y0 x1 y1, full-resolution px) to uint8 [M, s, s, 3]."""
        stored = np.asarray(boxes, np.float64).reshape(-1, 4) * self.scale
        out = np.empty((len(stored), side, side, 3), np.uint8)
        # Spots come in the order of their barcodes; bands of the image keep tiles in the cache.
        for i in np.lexsort((stored[:, 0], stored[:, 1] // 1024)):
            out[i] = self._resampled(stored[i], side, side)
        return out

    def thumbnail(self, max_side: int) -> tuple[Pixels, float]:
        """The whole image, at most `max_side` px long, and its px per full-resolution px."""
        height, width = self.shape
        shrink = min(1.0, max_side / max(self.shape))
        rows, cols = max(1, round(height * shrink)), max(1, round(width * shrink))
        band = max(1, int(CACHE_BYTES * rows / (3 * height * width)))
        bands = []
        for first in range(0, rows, band):
            last = min(rows, first + band)
            box = np.array([0, first * height / rows, width, last * height / rows])
            bands.append(self._resampled(box, last - first, cols))
        return np.concatenate(bands), self.scale * cols / width

    def _resampled(self, box: NDArray[np.float64], rows: int, cols: int) -> Pixels:
        """`box` (x0 y0 x1 y1, stored px) as uint8 [rows, cols, 3]."""
        x0, y0, x1, y1 = box.tolist()
        # The filter reaches one source pixel, or one target pixel when shrinking, past the box.
        reach_x, reach_y = math.ceil(max(1, (x1 - x0) / cols)), math.ceil(max(1, (y1 - y0) / rows))
        left, right = math.floor(x0) - reach_x, math.ceil(x1) + reach_x
        top, bottom = math.floor(y0) - reach_y, math.ceil(y1) + reach_y
        window = self._padded(top, bottom, left, right)
        resized = Image.fromarray(window).resize(
            (cols, rows),
            Image.Resampling.BILINEAR,
            box=(x0 - left, y0 - top, x1 - left, y1 - top),
        )
        return np.asarray(resized)

    def _padded(self, top: int, bottom: int, left: int, right: int) -> Pixels:
        """The region, its edge pixels repeated where it leaves the image."""
        height, width = self.shape
        if top >= 0 and left >= 0 and bottom <= height and right <= width:
            return np.ascontiguousarray(self.region(top, bottom, left, right))
        rows = np.clip(np.arange(top, bottom), 0, height - 1)
        cols = np.clip(np.arange(left, right), 0, width - 1)
        inside = self.region(rows[0], rows[-1] + 1, cols[0], cols[-1] + 1)
        return inside[np.ix_(rows - rows[0], cols - cols[0])]


class ArrayImage(RegionImage):
    """An image in memory (or memory-mapped): uint8 [H, W, 3]."""

    def __init__(self, pixels: Pixels, scale: float = 1.0) -> None:
        super().__init__((pixels.shape[0], pixels.shape[1]), scale)
        self.pixels = pixels

    def region(self, top: int, bottom: int, left: int, right: int) -> Pixels:
        """RGB of rows top:bottom and columns left:right."""
        return self.pixels[top:bottom, left:right]


@dataclass(frozen=True)
class Level:
    """A coarser copy of an image: its size, and how to read all of it as stored."""

    height: int
    width: int
    read: Callable[[], NDArray[Any]]


class TiledImage(RegionImage):
    """An image read tile by tile (or strip by strip), the last tiles kept decoded.

    Args:
        shape: (H, W) of the image.
        scale: stored px per full-resolution px.
        tile: (rows, columns) of a tile; those at the right and bottom may be larger than needed.
        read_tile: the tile in row i, column j of the grid as stored, [rows, columns, samples].
        levels: coarser copies, finest first, for thumbnails.

    """

    def __init__(
        self,
        shape: tuple[int, int],
        scale: float,
        *,
        tile: tuple[int, int],
        read_tile: Callable[[int, int], NDArray[Any]],
        levels: Sequence[Level] = (),
    ) -> None:
        super().__init__(shape, scale)
        self._tile, self._read_tile, self._levels = tile, read_tile, levels
        self._cache: OrderedDict[tuple[int, int], Pixels] = OrderedDict()
        self._white = self._probe()

    def region(self, top: int, bottom: int, left: int, right: int) -> Pixels:
        """RGB of rows top:bottom and columns left:right."""
        out = np.empty((bottom - top, right - left, 3), np.uint8)
        rows, cols = self._tile
        for i in range(top // rows, math.ceil(bottom / rows)):
            for j in range(left // cols, math.ceil(right / cols)):
                y, x = i * rows, j * cols
                y0, x0 = max(top, y), max(left, x)
                y1, x1 = min(bottom, y + rows), min(right, x + cols)
                tile = self._rgb(i, j)[y0 - y : y1 - y, x0 - x : x1 - x]
                out[y0 - top : y1 - top, x0 - left : x1 - left] = tile
        return out

    def thumbnail(self, max_side: int) -> tuple[Pixels, float]:
        """From the coarsest level that is large enough."""
        for level in reversed(self._levels):
            large_enough = max(level.height, level.width) >= max_side
            if large_enough and 3 * level.height * level.width <= WHOLE_BYTES:
                scale = self.scale * level.width / self.shape[1]
                return ArrayImage(_to_rgb(level.read(), self._white), scale).thumbnail(max_side)
        return super().thumbnail(max_side)

    def _rgb(self, i: int, j: int) -> Pixels:
        if (i, j) in self._cache:
            self._cache.move_to_end((i, j))
            return self._cache[i, j]
        tile = self._cache[i, j] = _to_rgb(self._read_tile(i, j), self._white)
        while len(self._cache) > max(1, CACHE_BYTES // tile.nbytes):
            self._cache.popitem(last=False)
        return tile

    def _probe(self) -> float:
        """The value of white, from some tiles along the diagonals of the grid."""
        down, across = (math.ceil(n / t) for n, t in zip(self.shape, self._tile, strict=True))
        steps = np.linspace(0, 1, 8)
        pairs = {(int(s * (down - 1)), int(s * (across - 1))) for s in steps}
        pairs |= {(int(s * (down - 1)), int((1 - s) * (across - 1))) for s in steps}
        first = self._read_tile(0, 0)
        if first.dtype == np.uint8:
            return 255.0
        return max(_white(self._read_tile(i, j)) for i, j in pairs)


def rgb_array(pixels: NDArray[Any]) -> Pixels:
    """Any image array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] as uint8 [H, W, 3].

    Floats and 16-bit integers are scaled by the range that they use: 1, 255, 4095 or 65535.
    """
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise SlideError(
            "the image array has an unknown layout",
            expected="[H, W], [H, W, 1], [H, W, 3] or [H, W, 4]",
            found=f"shape {pixels.shape}",
        )
    if 0 in pixels.shape:
        raise SlideError("the image is empty", found=f"shape {pixels.shape}")
    return _to_rgb(pixels, _white(pixels))


def _to_rgb(pixels: NDArray[Any], white: float) -> Pixels:
    if pixels.dtype != np.uint8:
        pixels = np.clip(pixels * (255.0 / white) + 0.5, 0, 255).astype(np.uint8)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] == 4:
        alpha = pixels[..., 3:].astype(np.uint16)
        if (alpha == 255).all():
            return np.ascontiguousarray(pixels[..., :3])
        on_white = pixels[..., :3] * alpha + 255 * (255 - alpha)
        return ((on_white + 127) // 255).astype(np.uint8)
    return pixels


def _white(pixels: NDArray[Any]) -> float:
    """The value that stands for white: the smallest usual full scale that holds the maximum."""
    if pixels.dtype == np.uint8:
        return 255.0
    highest = float(pixels.max())
    if not np.isfinite(highest):
        raise SlideError("the image holds NaN or infinite values", expected="finite pixels")
    scales = (
        (1.0, 255.0, 4095.0, 65535.0) if pixels.dtype.kind in "fb" else (255.0, 4095.0, 65535.0)
    )
    return next((scale for scale in scales if highest <= scale), highest)


def require_size(path: Path, width: int, height: int) -> None:
    """Refuse an image above `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise SlideError(
            f"{path} is too large",
            expected=f"at most {MAX_PIXELS:,} pixels",
            found=f"{width:,} x {height:,} = {width * height:,} pixels",
            fix="downscale it and give the smaller image with its scale",
        )


def damaged(path: Path, error: Exception) -> SlideError:
    """What to raise when a decoder fails with `error`."""
    return SlideError(
        f"{path} is truncated or damaged",
        expected="a complete PNG, JPEG, TIFF or BTF",
        found=str(error) or type(error).__name__,
        fix="copy or download the image again",
    )
