"""TIFF and BTF images: decoded whole when small, else memory-mapped or read by tile."""

from __future__ import annotations

import functools
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st_align import raster
from st_align.errors import SlideError
from st_align.inflation import IMAGE_RATIO, require_plausible
from st_align.raster import (
    CONVERT,
    DAMAGED,
    ArrayImage,
    Level,
    RegionImage,
    TiledImage,
    damaged,
    require_size,
    rgb_array,
)

_RGB_OR_GREY = (1, 2, 6)  # black-is-zero, RGB, YCbCr


def open_tiff(path: Path, scale: float) -> RegionImage | None:
    """Open the first image of a TIFF; its pyramid serves thumbnails.

    None for palettes, CMYK and white-is-zero, which PIL converts. Raises SlideError for what is
    damaged, too large, or no single image.
    """
    import tifffile

    try:
        tif = tifffile.TiffFile(path)
    except (*DAMAGED, tifffile.TiffFileError) as error:
        raise damaged(path, error) from error
    by_region = None
    try:
        series = tif.series[0]
        page = series.keyframe
        require_size(path, page.imagewidth, page.imagelength)
        _require_complete(path, tif)
        if page.photometric not in _RGB_OR_GREY:
            return None
        if series.nbytes <= raster.WHOLE_BYTES:
            require_plausible(str(path), series.nbytes, path.stat().st_size, ratio=IMAGE_RATIO)
            return ArrayImage(rgb_array(_channels_last(series)), scale)
        by_region = _by_region(path, tif, scale)
        weakref.finalize(by_region, tif.close)
        return by_region
    except DAMAGED as error:
        raise damaged(path, error) from error
    finally:
        if by_region is None:
            tif.close()


def _by_region(path: Path, tif: Any, scale: float) -> RegionImage:
    series, page = tif.series[0], tif.series[0].keyframe
    if page.is_memmappable and page.dtype == np.uint8 and page.shape[2:] == (3,):
        import tifffile

        return ArrayImage(tifffile.memmap(path, page=page.index, mode="r"), scale)
    rows, cols = page.chunks[:2]
    if len(series.pages) > 1 or rows * cols * page.samplesperpixel > raster.WHOLE_BYTES:
        raise SlideError(
            f"{path} cannot be read by region",
            expected="one page in tiles or strips",
            found=f"{len(series.pages)} pages, blocks of {rows} x {cols} px",
            fix=CONVERT,
        )
    across = math.ceil(page.imagewidth / cols)
    return TiledImage(
        (page.imagelength, page.imagewidth),
        scale,
        tile=(rows, cols),
        read_tile=lambda i, j: _tiff_tile(path, tif.filehandle, page, i * across + j),
        levels=[
            Level(
                level.keyframe.imagelength,
                level.keyframe.imagewidth,
                functools.partial(_channels_last, level),
            )
            for level in series.levels[1:]
        ],
    )


def _tiff_tile(path: Path, file: Any, page: Any, index: int) -> NDArray[Any]:
    """One tile of a page, [rows, columns, samples]; one that isn't stored is zeros."""
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    n_tiles = len(page.dataoffsets) // planes
    parts = []
    for at in range(index, index + planes * n_tiles, n_tiles):
        file.seek(page.dataoffsets[at])
        data = file.read(page.databytecounts[at]) or None
        try:
            tile, _, shape = page.decode(data, at, jpegtables=page.jpegtables)
        except DAMAGED as error:
            raise damaged(path, error) from error
        parts.append(np.zeros(shape, page.dtype)[0] if tile is None else tile[0])
    return np.concatenate(parts, axis=-1)


def _channels_last(series: Any) -> NDArray[Any]:
    """A TIFF series as [H, W] or [H, W, samples]."""
    axes, pixels = series.axes, series.asarray()
    if axes in ("SYX", "CYX", "IYX", "QYX") and pixels.shape[0] in (3, 4):
        return np.moveaxis(pixels, 0, -1)
    if axes not in ("YX", "YXS"):
        raise SlideError(
            "the TIFF is not one RGB or greyscale image",
            expected="axes YX, YXS or CYX",
            found=f"axes {axes}, shape {series.shape}",
            fix=CONVERT,
        )
    return np.asarray(pixels)


def _require_complete(path: Path, tif: Any) -> None:
    """TIFF readers fill missing tiles with zeros; a truncated file must not pass as black."""
    size = path.stat().st_size
    for page in tif.series[0].pages:
        if page is not None and any(
            offset + count > size
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        ):
            raise SlideError(f"{path} is truncated", found=f"{size:,} bytes, more are referred to")
