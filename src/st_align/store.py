"""Our AnnData files: notes kept in `uns['stalign']`, coordinates, and reading and writing that
never leaves half a file.

Files of other tools and edited ones are read as well: what they hold is checked here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from st_align import hdf5, keys
from st_align.errors import SlideError, StAlignError, require_file
from st_align.files import replacing
from st_align.inflation import require_plausible_arrays

if TYPE_CHECKING:
    from anndata import AnnData

_JSON = "_json"


def note(adata: AnnData, **items: Any) -> None:
    """Keep `items` in `uns['stalign']`: text and numbers as they are, the rest as JSON text
    under `NAME_json`, because h5ad has no lists of dicts and no None. What another tool keeps
    there is a SlideError.
    """
    kept = adata.uns.setdefault(keys.UNS, {})
    if not isinstance(kept, MutableMapping):
        raise SlideError(
            f"uns[{keys.UNS!r}] was not written by ST-Align",
            expected="a mapping, or nothing",
            found=type(kept).__name__,
            fix="give it another name: notes on the embedding are kept there",
        )
    for name, value in items.items():
        for old in (name, name + _JSON):
            kept.pop(old, None)
        plain = isinstance(value, str | int | float) and not isinstance(value, bool)
        kept[name if plain else name + _JSON] = value if plain else json.dumps(value)


def notes(adata: AnnData) -> dict[str, Any]:
    """What `note` kept, decoded; {} for a file of another origin. Damaged: SlideError."""
    return _all_decoded(adata.uns.get(keys.UNS))


def _all_decoded(kept: Any) -> dict[str, Any]:
    if not isinstance(kept, Mapping):
        return {}
    return dict(_decoded(str(name), value) for name, value in kept.items())


def _decoded(name: str, value: Any) -> tuple[str, Any]:
    if not name.endswith(_JSON):
        return name, value.item() if isinstance(value, np.generic) else value
    try:
        return name.removesuffix(_JSON), json.loads(str(value))
    except ValueError as error:
        raise SlideError(
            f"uns[{keys.UNS!r}][{name!r}] is damaged", expected="JSON", found=str(error)
        ) from error


def read_notes(path: Path) -> dict[str, Any]:
    """`notes` of a file, of which nothing else is read; a SlideError where it is no .h5ad file."""
    from anndata.io import read_elem

    with _opened(path) as file:
        kept = file.get(f"uns/{keys.UNS}")
        found = read_elem(kept) if kept is not None else {}
    return _all_decoded(found)


def holds(path: Path, name: str) -> bool:
    """Whether a file has `obsm[name]`, of which nothing is read."""
    with _opened(path) as file:
        return f"obsm/{name}" in file


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The HDF5 file; a SlideError where it is damaged or none."""
    require_file(path, "the .h5ad file")
    try:
        with hdf5.open_file(path) as file:
            yield file
    except StAlignError:
        raise
    except Exception as error:  # a damaged file makes h5py and anndata raise any class
        raise SlideError(
            f"{path} cannot be read as AnnData",
            expected="an .h5ad file",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
        ) from error


def coordinates(adata: AnnData) -> NDArray[np.float64]:
    """[N, 2] of `obsm['spatial']`; a SlideError where there are none."""
    kept, found = adata.obsm.get(keys.SPATIAL), f"obsm keys: {', '.join(adata.obsm) or 'none'}"
    if kept is not None:
        try:
            xy = np.asarray(kept, np.float64)
        except (TypeError, ValueError):
            found = "values that are not numbers"
        else:
            if len(xy) and xy.ndim == 2 and xy.shape[1] >= 2 and np.isfinite(xy[:, :2]).all():
                return xy[:, :2]
            found = f"shape {xy.shape}, {(~np.isfinite(xy)).sum()} values not finite"
    raise SlideError(
        "there are no coordinates",
        expected=f"obsm[{keys.SPATIAL!r}] with x and y, finite, of at least one spot",
        found=found,
    )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors about the content of a file, raised inside, name the file."""
    try:
        yield
    except StAlignError as error:
        raise type(error)(
            f"{path}: {error.problem}", expected=error.expected, found=error.found, fix=error.fix
        ) from error


def read_h5ad(path: Path) -> AnnData:
    """The AnnData in a file; a SlideError when it is none."""
    import anndata

    with _opened(path) as file:
        require_plausible_arrays(file, str(path))
        return anndata.read_h5ad(path)


def write_h5ad(adata: AnnData, path: Path) -> Path:
    """Write whole or not at all, and return `path`; an OutputError when it cannot be written."""
    with writing(adata, path):
        pass
    return path


@contextmanager
def writing(adata: AnnData, path: Path) -> Iterator[None]:
    """Written beside `path` on entering, in its place when the block ends well."""
    with replacing(path) as part:
        adata.write_h5ad(part, compression="gzip")
        yield
