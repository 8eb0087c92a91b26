"""Files of a run: tensors and JSON with a schema version, written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_align.errors import ModelError, OutputError, require_file

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
_META = "st-align"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Safetensors with a checksum over all values, atomically. Equal tensors, equal bytes."""
    from safetensors.torch import save

    ready = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    # One key only: safetensors writes several in no fixed order.
    meta = json.dumps({"schema_version": SCHEMA_VERSION, "sha256": _digest(ready)})
    replace_file(path, save(ready, metadata={_META: meta}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of `write_tensors`; missing, damaged or foreign: ModelError."""
    from safetensors import SafetensorError, safe_open

    require_file(path, path.name, ModelError)
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get(_META, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged", found=str(error)) from error
    _require_schema(path, meta)
    if meta.get("sha256") != _digest(tensors):
        raise ModelError(
            f"{path} is damaged", expected="the values its checksum was taken of", found="others"
        )
    return tensors


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Values with the schema version, atomically; keys sorted."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **values}, indent=1, sort_keys=True)
    replace_file(path, f"{text}\n".encode())


def read_json(path: Path) -> dict[str, Any]:
    """The values of `write_json`; missing, damaged or of another schema version: ModelError."""
    require_file(path, path.name, ModelError)
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged", expected="JSON", found=str(error)) from error
    if not isinstance(values, dict):
        raise ModelError(
            f"{path} is damaged", expected="a JSON object", found=type(values).__name__
        )
    _require_schema(path, values)
    return {key: value for key, value in values.items() if key != "schema_version"}


def _require_schema(path: Path, values: Mapping[str, Any]) -> None:
    if values.get("schema_version") != SCHEMA_VERSION:
        raise ModelError(
            f"{path} was not written for this version of ST-Align",
            expected=f"schema version {SCHEMA_VERSION}",
            found=str(values.get("schema_version")),
            fix="use the version that wrote it (provenance.json names it), or train again",
        )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """`content` in place of what `path` holds, whole or not at all."""
    with replacing(path) as part:
        part.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write beside `path`, renamed to it when the block ends well: a reader sees the
    old file or the new one. Missing folders are made; an OSError becomes an OutputError.
    """
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink()


def require_writable(path: Path) -> None:
    """OutputError where a file cannot be written; touches nothing. For the start of long work."""
    try:
        if path.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        with suppress(FileNotFoundError):
            os.lstat(_part(path))  # what cannot be a path at all raises
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise unwritable(path, error) from error


def _part(path: Path) -> Path:
    return path.parent / f".{path.name}.part"


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritable(path: Path, error: OSError) -> OutputError:
    """What a person is told when the disk refuses (full, read-only, no permission)."""
    return OutputError(f"cannot write {path}", found=error.strerror or str(error))
