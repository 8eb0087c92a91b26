"""AnnData files in squidpy's convention: obsm['spatial'], the image in uns['spatial'][library]."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align import hdf5
from st_align.errors import SlideError
from st_align.image import ArrayImage, ImageSource, open_image, rgb_array
from st_align.io.anndata_table import element, read_obs, read_spots
from st_align.io.check import image_scale
from st_align.io.refs import Found, ReadOptions, SlideRef
from st_align.slide import Slide

LOOKS_FOR = "AnnData: a file NAME.h5ad"
_LIBRARY_COLUMNS = ("library_id", "sample", "batch", "section", "slide")
_LICENCE = ("licence", "license")
_NO_IMAGE = "give the image with --image, or read without one with --no-image"


def recognise(path: Path) -> str | None:
    """Why `path` is an h5ad file; None when it isn't."""
    return "the name ends in .h5ad" if path.suffix == ".h5ad" and path.is_file() else None


def find(path: Path, options: ReadOptions) -> Found:
    """The slide of an h5ad file; its id is the name of the file."""
    return Found((_ref(path, path.stem, None, options),))


def find_library(path: Path, library: str, options: ReadOptions) -> SlideRef | None:
    """One library of a file that holds several; its id is the library's."""
    with _opened(path) as file:
        if library not in libraries(file):
            return None
    return _ref(path, library, library, options)


def _ref(path: Path, id: str, library: str | None, options: ReadOptions) -> SlideRef:
    return SlideRef(
        id,
        "h5ad",
        path,
        functools.partial(_read, path, id, library, options),
        why="the name ends in .h5ad",
        files=(path,),
    )


def _read(path: Path, id: str, library: str | None, options: ReadOptions) -> Slide:
    with _opened(path) as file:
        return read_library(file, path, id, library, options)


def read_library(
    group: Any,
    path: Path,
    id: str,
    library: str | None,
    options: ReadOptions,
    *,
    kept: NDArray[np.bool_] | None = None,
    xy: NDArray[np.float64] | None = None,
) -> Slide:
    """One slide of an AnnData group; `kept` [N] are its rows and `xy` [N, 2] its coordinates
    where the caller knows them.

    `path` names the group in messages, and paths inside it are relative to its folder.
    """
    obs, found = read_obs(group, str(path)), libraries(group)
    if library is None and len(found) > 1:
        raise SlideError(
            f"{path} holds {len(found)} slides",
            expected="one library in uns['spatial']",
            found=", ".join(found),
            fix=f"pick one: {path}::{found[0]}",
        )
    if kept is None:
        kept = np.ones(len(obs), bool)
        if len(found) > 1:
            kept = library_rows(obs, str(library), found, str(path))
    spots = read_spots(group, str(path), obs, kept, xy)
    library = library or next(iter(found), None)
    image = None if options.no_image else _image(group, library, path, options.image)
    slide = spots.slide(id=id, source=str(path), given=options.tech, image=image)
    return replace(slide, licence=_licence(group, path))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = hdf5.open_file(path)
    except OSError as error:
        raise SlideError(
            f"{path} is truncated or not an h5ad file",
            expected="HDF5 as written by anndata",
            found=str(error),
            fix="copy or download it again",
        ) from error
    with file:
        yield file


def libraries(file: Any) -> list[str]:
    """Library ids of uns['spatial'], sorted."""
    spatial = file.get("uns/spatial")
    if not hasattr(spatial, "items"):
        return []
    return sorted(
        name
        for name, entry in spatial.items()
        if hasattr(entry, "keys") and {"images", "scalefactors", "metadata"} & set(entry)
    )


def _licence(group: Any, path: Path) -> str:
    """What the file says in uns['licence'], in either spelling."""
    said = next((key for name in _LICENCE if (key := f"uns/{name}") in group), None)
    found = "" if said is None else element(group, said, str(path))
    return found.strip() if isinstance(found, str) else ""


def library_rows(
    obs: pd.DataFrame, library: str, libraries: list[str], path: str
) -> NDArray[np.bool_]:
    """Spots of one library: those that a column with the libraries' names gives to it."""
    for column in sorted(obs, key=lambda name: name not in _LIBRARY_COLUMNS):
        values = obs[column].astype(str)
        if set(values) == set(libraries):
            return np.asarray(values == library)
    raise SlideError(
        f"{path} does not tell which spots belong to {library!r}",
        expected=f"an obs column with the values {', '.join(libraries)}",
        found=f"columns {', '.join(map(str, obs))}",
    )


def _image(file: Any, library: str | None, path: Path, given: Path | None) -> ImageSource:
    """The given image, else the largest that the file holds, else the path that it names."""
    if given is not None:
        return open_image(given)
    if library is None:
        raise SlideError(f"{path} holds no image", expected="uns['spatial']", fix=_NO_IMAGE)
    at = f"uns/spatial/{library}"
    images = file.get(f"{at}/images", {})
    for name in ("fullres", "hires", "lowres"):
        if name in images:
            key = f"{at}/scalefactors/tissue_{name}_scalef"
            scale = 1.0
            if name != "fullres":
                scale = image_scale(element(file, key, str(path)), f"{path}: {key}")
            stored = element(file, f"{at}/images/{name}", str(path))
            if isinstance(stored, str):
                return open_image(_beside(path, stored), scale)
            return ArrayImage(rgb_array(np.asarray(stored)), scale)
    named = f"{at}/metadata/source_image_path"
    if named in file:
        return open_image(_beside(path, str(element(file, named, str(path)))))
    raise SlideError(
        f"{path} holds no image for {library!r}",
        expected="images hires or lowres, or a metadata source_image_path",
        found=", ".join(images) or "none",
        fix=_NO_IMAGE,
    )


def _beside(path: Path, named: str) -> Path:
    """The image that a file names, in the file's own folder or below: one that somebody else wrote
    does not choose what is read elsewhere.
    """
    image = path.parent / named
    if not image.resolve().is_relative_to(path.parent.resolve()):
        raise SlideError(
            f"{path} names an image outside its folder",
            expected=f"an image below {path.parent}",
            found=named,
            fix=_NO_IMAGE,
        )
    return image
