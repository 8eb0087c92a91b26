"""What works on this machine: versions, devices, and which encoders' weights are usable."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from st_align.config import Config, EncoderConfig, override, preset, read_toml
from st_align.encoders.base import FrozenEncoder, FrozenEntry, TrainedEntry, registered
from st_align.encoders.field import sees, with_field
from st_align.encoders.lookup import ENV, find_weights
from st_align.errors import ConfigError, StAlignError, nearest
from st_align.provenance import software


def check(weights: Sequence[str], config: Path | None) -> dict[str, Any]:
    """`weights` are `NAME=PATH`; `config` a TOML with `[encoders.NAME] weights`.

    Each frozen encoder is loaded for real, so `usable` is a fact and `reason` says why not.
    """
    settings = preset("tiny") if config is None else read_toml(config, preset("tiny"))
    settings = override(settings, {"encoders": _named(weights)}, "--weights")
    encoders = {name: _check(entry, settings) for name, entry in registered().items()}
    return {
        "software": software(),
        "machine": {"system": platform.system(), "cpus": os.cpu_count(), **_devices()},
        "encoders": encoders,
    }


def describe(result: dict[str, Any]) -> str:
    """The result of `check` as lines for a terminal."""
    lines = ["Software"]
    lines += [f"  {name:<18} {value}" for name, value in result["software"].items()]
    machine = result["machine"]
    gpus = ", ".join(machine["gpus"]) or "none: float32 on the CPU is used"
    lines += ["Machine", f"  {machine['system']}, {machine['cpus']} CPUs; GPUs: {gpus}", "Encoders"]
    for name, found in result["encoders"].items():
        mark = "ok" if found["usable"] else "--"
        gated = ", gated" if found["gated"] else ""
        what = f"{found['title']}; {found['modality']}, {found['licence']}{gated}"
        lines.append(f"  {mark} {name:<20} {what}")
        lines.append(f"     {'':<20} {found['reason']}")
        if found.get("sees"):
            lines.append(f"     {'':<20} sees {found['sees']}")
    if not all(found["usable"] for found in result["encoders"].values()):
        lines.append(f"Give weights with --weights NAME=PATH, in a config, or in the folder ${ENV}")
    return "\n".join(lines)


def _named(weights: Sequence[str]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for item in weights:
        name, found, path = item.partition("=")
        if not found or not path:
            raise ConfigError("--weights is NAME=PATH", expected="uni=weights.bin", found=item)
        if name not in registered():
            raise ConfigError(f"no encoder is called {name!r}", fix=nearest(name, registered()))
        named[name] = {"weights": path}
    return named


def _check(entry: TrainedEntry | FrozenEntry, settings: Config) -> dict[str, Any]:
    if isinstance(entry, TrainedEntry):
        return {
            "title": "part of the model",
            "modality": entry.modality,
            "usable": True,
            "gated": False,
            "licence": "BSD-3-Clause",
            "weights": None,
            "reason": "trained with the model; needs no weights",
        }
    path, encoder, reason = _try(entry, settings.encoders.get(entry.name, EncoderConfig()))
    return {
        "title": entry.info.title,
        "modality": entry.modality,
        "usable": encoder is not None,
        "gated": entry.info.gated,
        "licence": entry.info.licence,
        "weights": None if path is None else str(path),
        "source": entry.info.source,
        "reason": reason,
        "sees": sees(encoder) if encoder is not None and entry.modality == "image" else None,
    }


def _try(entry: FrozenEntry, given: EncoderConfig) -> tuple[Path | None, FrozenEncoder | None, str]:
    """Where the weights lie, the encoder if they load, and what to know."""
    path = None
    try:
        path = find_weights(entry, given.weights)
        if path is None and entry.info.files:
            said = f"no weights given: bring {entry.info.expected}; {entry.info.source}"
            return None, None, said
        encoder = with_field(entry.load(path), given.patch_um)
    except StAlignError as error:
        return path, None, error.one_line()
    except ImportError as error:
        missing = [name for name in entry.info.requires if not _importable(name)]
        return path, None, f"cannot import {', '.join(missing) or error.name}: {error}"
    return path, encoder, f"{entry.info.source}; fingerprint {encoder.fingerprint}"


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _devices() -> dict[str, Any]:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": names, "threads": torch.get_num_threads()}
