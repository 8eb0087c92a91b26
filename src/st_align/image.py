"""Tissue images from files: told by content, refused when damaged, RGB whatever they hold.

Shape letters: M boxes, s pixels of a crop's side, H and W pixels of the stored image.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, UnidentifiedImageError

from st_align.errors import SlideError, require_file
from st_align.inflation import IMAGE_RATIO, require_plausible
from st_align.raster import (
    CONVERT,
    DAMAGED,
    ArrayImage,
    Pixels,
    RegionImage,
    damaged,
    require_size,
    rgb_array,
)
from st_align.tiff import open_tiff

__all__ = ["ArrayImage", "ImageSource", "open_image", "rgb_array"]

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class ImageSource(Protocol):
    """What a slide needs of its image."""

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of the stored image."""

    @property
    def scale(self) -> float:
        """Stored pixels per full-resolution pixel."""

    def crops(self, boxes: ArrayLike, side: int) -> Pixels:
        """Cut `boxes` [M, 4] (x0 y0 x1 y1, full-resolution px) to uint8 [M, s, s, 3]."""

    def thumbnail(self, max_side: int) -> tuple[Pixels, float]:
        """The whole image, at most `max_side` px long, and its px per full-resolution px."""


def open_image(path: Path, scale: float = 1.0) -> RegionImage:
    """Open a PNG, JPEG, TIFF or BTF, told by its content and not by its name.

    Greyscale, palette, alpha (on white) and 16-bit images become RGB uint8. Raises SlideError
    for what is missing, truncated, not an image, or above `MAX_PIXELS`.
    """
    path = require_file(Path(path), "image")
    with path.open("rb") as file:
        magic = file.read(4)
    opened = open_tiff(path, scale) if magic in _TIFF_MAGIC else None
    return opened or ArrayImage(_decoded(path), scale)


def _decoded(path: Path) -> Pixels:
    """Decode a whole image with PIL to uint8 [H, W, 3]."""
    try:
        with _no_pixel_limit(), Image.open(path) as image:
            require_size(path, *image.size)
            # PIL holds it once as stored, this function once more as RGB.
            decoded = image.size[0] * image.size[1] * (3 + len(image.getbands()))
            require_plausible(str(path), decoded, path.stat().st_size, ratio=IMAGE_RATIO)
            if image.mode.startswith(("I", "F")):
                return rgb_array(np.asarray(image))
            alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa")
            mode = "RGBA" if alpha or "transparency" in image.info else "RGB"
            width, height = image.size
            out = np.empty((height, width, 3), np.uint8)
            image.load()
            for top in range(0, height, 512):  # in bands: a whole copy more would be GBs
                band = image.crop((0, top, width, min(top + 512, height)))
                out[top : top + 512] = rgb_array(np.asarray(band.convert(mode)))
            return out
    except UnidentifiedImageError as error:
        with path.open("rb") as file:
            start = file.read(24)
        raise SlideError(
            f"{path} is not an image",
            expected="PNG, JPEG, TIFF or BTF",
            found=f"a file of {path.stat().st_size} bytes that begins {start!r}",
        ) from error
    except MemoryError as error:
        raise SlideError(f"{path} does not fit into memory when decoded", fix=CONVERT) from error
    except DAMAGED as error:
        raise damaged(path, error) from error


_LIMIT_LOCK = threading.Lock()


@contextmanager
def _no_pixel_limit() -> Iterator[None]:
    """Lift PIL's limit while one image is opened: `require_size` decides instead."""
    with _LIMIT_LOCK:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
