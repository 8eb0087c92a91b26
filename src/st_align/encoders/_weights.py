"""Weights files of pretrained encoders: read without pickle, named by their content."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_align.errors import ModelError, require_file


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or torch file, on the CPU; no code in it is ever run."""
    require_file(path, "the weights file", ModelError)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than tensors, or is no weights file",
            expected="a state dict saved by torch or safetensors",
            found=str(error).splitlines()[0],
            fix="save its state_dict alone, on a machine where you trust the file",
        ) from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise ModelError(
            f"{path} cannot be read as weights",
            expected="a state dict saved by torch or safetensors",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="fetch the file again",
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ModelError(f"{path} is no state dict", expected="a dict of tensors")
    return found


def fingerprint(weights: Path, preprocessing: str) -> str:
    """12 hex digits of the file's content and of how its input and output are made."""
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(preprocessing.encode())
    return digest.hexdigest()[:12]


def place_by_order(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """`tensors` of the file under the names of `own`: by name where all names agree, else by
    position, for files of the same network under other names. Every shape must agree.
    """
    if len(tensors) != len(own):
        raise ModelError(
            f"{path} is a checkpoint of another network",
            expected=f"{len(own)} tensors",
            found=f"{len(tensors)}",
        )
    if tensors.keys() == own.keys():
        tensors = {name: tensors[name] for name in own}
    for (name, mine), (found, theirs) in zip(own.items(), tensors.items(), strict=True):
        if mine.shape != theirs.shape:
            raise ModelError(
                f"{path} is a checkpoint of another network",
                expected=f"{name} of shape {tuple(mine.shape)}",
                found=f"{found} of shape {tuple(theirs.shape)}",
            )
    return dict(zip(own, tensors.values(), strict=True))
