"""Stand-in weights of the parity fixtures, written as the published files are."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch


def layout_of(folder: Path) -> dict[str, Any]:
    """`{key: [shape, dtype]}` of a fixture."""
    layout: dict[str, Any] = json.loads((folder / "state_dict_layout.json").read_text())
    return layout


def stand_in(folder: Path, *, unneeded: str = "^$") -> dict[str, torch.Tensor]:
    """The tensors of a fixture; of those that match `unneeded` the names alone, to save time."""
    spec = importlib.util.spec_from_file_location("fill", folder.parent / "fill.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    return {
        key: torch.from_numpy(
            np.zeros(1, dtype)
            if re.match(unneeded, key)
            else np.asarray(fill.fill_tensor(key, shape, dtype))
        )
        for key, (shape, dtype) in layout_of(folder).items()
    }


def write(tensors: dict[str, torch.Tensor], path: Path, *, wrapper: str | None = None) -> Path:
    """A `.safetensors` file, or a torch file of the tensors or of `{wrapper: tensors}`."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({wrapper: tensors} if wrapper else tensors, path)
    return path
