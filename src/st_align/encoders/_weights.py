"""Weights files of pretrained encoders: read without pickle, named by their content.

What users put in place of weights is named for what it is: a Git LFS pointer, a web page saved
as `.bin`, a file cut short, a pickle that holds code.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from st_align.errors import ModelError, require_file

_EXPECTED = "a state dict saved by torch or safetensors"
_AGAIN = "fetch the file again and compare its size with the published one"
_TRUNCATED = "the first part of a file that was cut short (truncated)"
_WRAPPERS = ("model", "state_dict")
_DEPTH = 3
_PARALLEL = "module."


def read_state_dict(path: Path, *, mapped: bool = False) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or torch file, unwrapped; see `read_checkpoint`."""
    return unwrap(read_checkpoint(path, mapped=mapped), path)


def unwrap(found: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds: out of `{"model": ...}` or `{"state_dict": ...}`, and
    without the `module.` that data-parallel training puts before every name.
    """
    for _ in range(_DEPTH):
        inner = [found[k] for k in _WRAPPERS if k in found] if isinstance(found, dict) else []
        if is_state_dict(found) or not inner:
            break
        found = inner[0]
    if not is_state_dict(found):
        held = f"a dict of {', '.join(map(str, found))[:80]}" if isinstance(found, dict) else ""
        raise ModelError(
            f"{path} is no state dict",
            expected="a dict of tensors",
            found=held or f"an object of type {type(found).__name__}",
        )
    if all(name.startswith(_PARALLEL) for name in found):
        return {name.removeprefix(_PARALLEL): tensor for name, tensor in found.items()}
    return found


def is_state_dict(found: Any) -> TypeGuard[dict[str, Tensor]]:
    """Whether what a file holds is a dict of tensors."""
    return isinstance(found, dict) and all(isinstance(v, Tensor) for v in found.values())


def read_checkpoint(path: Path, *, mapped: bool = False) -> Any:
    """What a `.safetensors` or torch file holds, on the CPU; no code in it is ever run.

    The format is told by the content, not by the name. `mapped`: tensors stay in the file until
    they are read, where its format allows it.
    """
    require_file(path, "the weights file", ModelError)
    try:
        head = _head(path)
        if head[8:9] == b"{":
            from safetensors.torch import load_file

            return load_file(path)
        mapped = mapped and zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error says more
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except ModelError:
        raise
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise _unreadable(path, error) from error


def fingerprint(weights: Path, preprocessing: str) -> str:
    """12 hex digits of the file's content and of how its input and output are made."""
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(preprocessing.encode())
    return digest.hexdigest()[:12]


def _head(path: Path) -> bytes:
    """The first bytes of the file; a ModelError where they show that it is no weights file."""
    with path.open("rb") as file:
        head = file.read(512)
    found, fix = "", "download the file itself; where access is gated, sign in and ask for it first"
    if not head:
        found, fix = "an empty file", _AGAIN
    elif head.startswith(b"version https://git-lfs"):
        found = "a Git LFS pointer: a few lines that stand for the real file"
        fix = "run `git lfs pull` in the folder it was cloned to, or download the file itself"
    elif head.lstrip().startswith(b"<"):
        found = "a web page (HTML) saved under this name"
    elif head.isascii() and (text := head.decode().split("\n")[0].strip()).isprintable() and text:
        found = f"text: {text[:80]}"
    elif head.startswith(b"PK") and not zipfile.is_zipfile(path):
        found, fix = _TRUNCATED, _AGAIN
    elif not head.startswith((b"PK", b"\x80")) and head[8:9] != b"{":
        found = f"another format: its first bytes are {head[:4].hex(' ')}"
    if found:
        raise ModelError(f"{path} holds no weights", expected=_EXPECTED, found=found, fix=fix)
    return head


def _unreadable(path: Path, error: Exception) -> ModelError:
    text = str(error)
    if isinstance(error, EOFError) or re.search("truncated|EOF|Incomplete|HeaderLength", text):
        return ModelError(
            f"{path} holds no weights",
            expected=_EXPECTED,
            found=_TRUNCATED,
            fix=_AGAIN,
        )
    if isinstance(error, pickle.UnpicklingError):
        code = re.search(r"GLOBAL (\S+)", text)
        return ModelError(
            f"{path} needs pickle, which can run any code; it is not loaded",
            expected=_EXPECTED,
            found=f"a pickle that calls {code[1]}" if code else "a pickle of more than tensors",
            fix=f"if you trust it: python -m st_align.encoders.convert {path} OUT.safetensors",
        )
    return ModelError(
        f"{path} cannot be read as weights",
        expected=_EXPECTED,
        found=text.splitlines()[0] if text else type(error).__name__,
        fix=_AGAIN,
    )
