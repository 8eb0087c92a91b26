"""SpatialData stores as `spatialdata_io.visium` writes them, read with zarr and anndata alone.

Spot centres are the points of the shapes element that the table annotates, in its own pixels
(those of the full-resolution image); an image's scale follows from the transformations of both
to a coordinate system that they share.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align import raster
from st_align.errors import SlideError
from st_align.image import ArrayImage, ImageSource, open_image, rgb_array
from st_align.inflation import require_plausible_arrays, require_plausible_parquet
from st_align.io.anndata_table import element, read_obs, read_spots
from st_align.io.check import check_id
from st_align.io.refs import Found, ReadOptions, SlideRef
from st_align.raster import Level, TiledImage
from st_align.slide import Slide

LOOKS_FOR = "SpatialData: a zarr folder with tables/, shapes/ and images/"
_POINT = np.dtype([("order", "u1"), ("type", "<u4"), ("x", "<f8"), ("y", "<f8")])
_UNREADABLE = (OSError, KeyError, ValueError, TypeError, RuntimeError, IndexError)


def recognise(path: Path) -> str | None:
    """Why `path` is a zarr store; None when it isn't."""
    marks = ("zarr.json", ".zgroup", ".zmetadata")
    return next((f"{mark} of a zarr store" for mark in marks if (path / mark).is_file()), None)


def find(path: Path, options: ReadOptions) -> Found:
    """The slide of a store; its id is the name of the folder without .zarr."""
    return Found((_ref(path, path.resolve().name.removesuffix(".zarr"), None, options),))


def find_library(path: Path, library: str, options: ReadOptions) -> SlideRef | None:
    """One region of a store that holds several; its id is the region's."""
    regions = _regions(_table(_opened(path), path), path)
    return _ref(path, library, library, options) if library in regions else None


def _ref(path: Path, id: str, region: str | None, options: ReadOptions) -> SlideRef:
    return SlideRef(
        id,
        "spatialdata",
        path,
        functools.partial(_read, path, id, region, options),
        why=recognise(path) or "",
        files=_files(path),
    )


def _files(path: Path) -> tuple[Path, ...]:
    """Spots and tables whole, and the metadata of all: an image is a file per chunk, too many to
    look at, but its metadata are written anew with it.
    """
    patterns = (
        "*",
        "t*/**/*",
        "shapes/**/*",
        "images/*/*",
        "images/*/*/.z*",
        "images/*/*/zarr.json",
    )
    return tuple(sorted({p for name in patterns for p in path.glob(name) if p.is_file()}))


def _read(path: Path, id: str, region: str | None, options: ReadOptions) -> Slide:
    store = _opened(path)
    table = _table(store, path)
    regions = _regions(table, path)
    if region is None and len(regions) != 1:
        raise SlideError(
            f"{path} holds {len(regions)} slides",
            expected="a table of one region",
            found=", ".join(regions),
            fix=f"pick one: {path}::{regions[0]}" if regions else None,
        )
    region = region or regions[0]
    attributes = element(table, "uns/spatialdata_attrs", str(path))
    obs = read_obs(table, str(path))
    kept = obs[attributes["region_key"]].astype(str).to_numpy() == region
    xy = np.full((len(obs), 2), np.nan)
    xy[kept] = _centres(path, region, obs[attributes["instance_key"]][kept])
    spots = read_spots(table, str(path), obs, kept, xy)
    image = None if options.no_image else _image(store, region, path, options.image)
    slide = spots.slide(id=id, source=str(path), given=options.tech, image=image)
    internal = [attributes["region_key"], attributes["instance_key"]]
    return replace(slide, obs=slide.obs.drop(columns=internal))


def _opened(path: Path) -> Any:
    import zarr

    try:
        return zarr.open_group(path, mode="r")
    except _UNREADABLE as error:
        raise SlideError(
            f"{path} is not a readable zarr store", expected=LOOKS_FOR, found=str(error)
        ) from error


def _table(store: Any, path: Path) -> Any:
    """The one table that annotates regions."""
    tables = store.get("tables", store.get("table", {}))
    names = sorted(tables)
    name = "table" if "table" in names else (names[0] if len(names) == 1 else None)
    if name is None or "uns/spatialdata_attrs" not in tables[name]:
        raise SlideError(
            f"{path} has no table of spots",
            expected="tables/table, annotating a shapes element",
            found=f"tables: {', '.join(names) or 'none'}; groups: {', '.join(sorted(store))}",
        )
    return tables[name]


def _regions(table: Any, path: Path) -> list[str]:
    region = element(table, "uns/spatialdata_attrs", str(path))["region"]
    return sorted(check_id(str(name), path) for name in np.atleast_1d(region))


def _centres(path: Path, region: str, instances: pd.Series) -> NDArray[np.float64]:
    """[N, 2] points of a shapes element, in the order of the table's instances."""
    file = path / "shapes" / region / "shapes.parquet"
    try:
        require_plausible_parquet(file)
        shapes = pd.read_parquet(file)
        rows = shapes.index.get_indexer(pd.Index(instances))
        encoded = [shapes["geometry"].iloc[row] for row in rows if row >= 0]
    except _UNREADABLE as error:
        raise SlideError(
            f"{file} is not a shapes element", expected="points (circles)", found=str(error)
        ) from error
    if (rows < 0).any():
        raise SlideError(
            f"{path}: spots of the table have no shape in {region!r}",
            expected=f"a shape for each of {len(rows)} spots",
            found=f"{int((rows < 0).sum())} without one",
        )
    if any(len(point) != _POINT.itemsize or point[0] != 1 for point in encoded):
        raise SlideError(
            f"{file} holds shapes other than points",
            expected="spots as circles (Visium v1 or v2)",
            fix="Visium HD and segmented cells are not supported",
        )
    points = np.frombuffer(b"".join(encoded), _POINT)
    return np.stack([points["x"], points["y"]], axis=1)


def _image(store: Any, region: str, path: Path, given: Path | None) -> ImageSource:
    """The given image, else the finest one that shares a coordinate system with the spots."""
    if given is not None:
        return open_image(given)
    spots = _scales(store["shapes"][region].attrs.asdict().get("coordinateTransformations", []))
    images = store.get("images", {})
    pixels = {
        name: _scales(_multiscale(images[name]).get("coordinateTransformations", []))
        for name in images
    }
    name, scale = finest_image(
        spots,
        pixels,
        what=f"{path} holds no image for {region!r}",
        fix="give the image with --image, or read without one with --no-image",
    )
    return _open_element(images[name], scale, f"{path}: image {name}")


def finest_image(
    spots: Mapping[str, float], images: Mapping[str, Mapping[str, float]], *, what: str, fix: str
) -> tuple[str, float]:
    """The image with most pixels a unit of the spots' coordinates, and its px per unit.

    `spots` and each of `images` say their scale in every coordinate system they lie in. Without an
    image that shares one with the spots, `what` and `fix` make a SlideError.
    """
    scales = {}
    for name, pixels in images.items():
        shared = sorted(set(pixels) & set(spots))
        if shared:
            scales[name] = spots[shared[0]] / pixels[shared[0]]
    if not scales:
        raise SlideError(
            what,
            expected="an image that shares a coordinate system with the spots by scaling only",
            found=f"images: {', '.join(sorted(images)) or 'none'}",
            fix=fix,
        )
    name = max(scales, key=lambda n: (scales[n], n))
    return name, scales[name]


def _multiscale(group: Any) -> Mapping[str, Any]:
    attributes = group.attrs.asdict()
    found: Mapping[str, Any] = attributes.get("ome", attributes).get("multiscales", [{}])[0]
    return found


def _scales(transformations: list[dict[str, Any]]) -> dict[str, float]:
    """Coordinate system -> uniform scale in x and y, of identities and scalings."""
    scales = {}
    for transformation in transformations:
        system = transformation.get("output", {}).get("name")
        x_y = {"identity": [1.0], "scale": transformation.get("scale", [])[-2:]}.get(
            transformation.get("type", ""), []
        )
        if system and x_y and np.allclose(x_y, x_y[0], rtol=0.01):
            scales[system] = float(np.mean(x_y))
    return scales


def _open_element(group: Any, scale: float, what: str) -> ImageSource:
    """An image element [channels, H, W] of one or several levels."""
    return open_levels(
        [group[entry["path"]] for entry in _multiscale(group)["datasets"]], scale, what
    )


def open_levels(levels: Sequence[Any], scale: float, what: str) -> ImageSource:
    """An image of arrays [channels, H, W], the finest first: zarr's, or dask's in memory."""
    finest = levels[0]
    if finest.ndim != 3:
        raise SlideError(f"{what} is not c, y, x", found=f"shape {finest.shape}")

    def read(array: Any, rows: slice = slice(None), cols: slice = slice(None)) -> NDArray[Any]:
        try:
            return np.moveaxis(np.asarray(array[:, rows, cols]), 0, -1)
        except _UNREADABLE as error:
            raise SlideError(f"{what} is damaged", found=str(error)) from error

    if finest.nbytes <= raster.WHOLE_BYTES:
        if hasattr(finest, "nbytes_stored"):  # dask arrays are in memory, or lead to such files
            require_plausible_arrays(finest, what)
        return ArrayImage(rgb_array(read(finest)), scale)
    height, width = finest.shape[1:]
    rows, cols = (np.max(side).item() for side in finest.chunks[1:])
    if finest.shape[0] * rows * cols * finest.dtype.itemsize > raster.WHOLE_BYTES:
        raise SlideError(
            f"{what} cannot be read by region",
            expected="chunks of a few thousand px",
            found=f"{rows} x {cols} px",
        )
    return TiledImage(
        (height, width),
        scale,
        tile=(rows, cols),
        read_tile=lambda i, j: read(
            finest, slice(i * rows, (i + 1) * rows), slice(j * cols, (j + 1) * cols)
        ),
        levels=[Level(a.shape[1], a.shape[2], functools.partial(read, a)) for a in levels[1:]],
    )
