"""Our AnnData files: notes kept in `uns['stalign']`, and reading and writing that never leaves
half a file.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from st_align import keys
from st_align.errors import SlideError, require_file
from st_align.files import sync_folder, unwritable

if TYPE_CHECKING:
    from anndata import AnnData

_JSON = "_json"


def note(adata: AnnData, **items: Any) -> None:
    """Keep `items` in `uns['stalign']`: text and numbers as they are, the rest as JSON text
    under `NAME_json`, because h5ad has no lists of dicts and no None.
    """
    kept = adata.uns.setdefault(keys.UNS, {})
    for name, value in items.items():
        for old in (name, name + _JSON):
            kept.pop(old, None)
        plain = isinstance(value, str | int | float) and not isinstance(value, bool)
        kept[name if plain else name + _JSON] = value if plain else json.dumps(value)


def notes(adata: AnnData) -> dict[str, Any]:
    """What `note` kept, decoded; {} for a file of another origin."""
    kept = adata.uns.get(keys.UNS, {})
    if not hasattr(kept, "items"):
        return {}
    found: dict[str, Any] = {}
    for name, value in kept.items():
        if str(name).endswith(_JSON):
            found[str(name).removesuffix(_JSON)] = json.loads(str(value))
        else:
            found[str(name)] = value.item() if isinstance(value, np.generic) else value
    return found


def read_h5ad(path: Path) -> AnnData:
    """The AnnData in a file; a SlideError when it is none."""
    import anndata

    require_file(path, "the .h5ad file")
    try:
        return anndata.read_h5ad(path)
    except Exception as error:  # a damaged file makes h5py and anndata raise any class
        raise SlideError(
            f"{path} cannot be read as AnnData",
            expected="an .h5ad file",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
        ) from error


def write_h5ad(adata: AnnData, path: Path) -> Path:
    """Write whole or not at all, and return `path`; an OutputError when it cannot be written."""
    part = path.with_name(f".{path.name}.part")
    try:
        adata.write_h5ad(part, compression="gzip")
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink()
    return path
