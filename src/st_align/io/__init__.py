"""Readers: one module per source format, each gives validated slides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from st_align.io.check import check_slide
from st_align.io.detect import find_slides, read_one
from st_align.io.refs import Found, ReadOptions, SlideRef

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Found", "ReadOptions", "SlideRef", "check_slide", "find_slides", "read", "read_one"]


def read(path: str | Path, *, image: str | Path | None = None, no_image: bool = False) -> AnnData:
    """The slide of a path as AnnData: a Space Ranger folder, an .h5ad, a SpatialData .zarr, an
    STimage-1K4M slide; `PATH::ID` for one of several.

    Raw counts in X, `obsm["spatial"]` in full-resolution pixels, the image (at most 2,000 px a
    side) in `uns["spatial"]` as squidpy and scanpy keep it. Raises SlideError.
    """
    from st_align.io.objects import to_anndata

    options = ReadOptions(image=None if image is None else Path(image), no_image=no_image)
    return to_anndata(read_one(path, options))
