"""`metrics.jsonl`: one line of numbers per logged step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from st_align.files import replace_file, unwritable


def truncate(path: Path, step: int) -> None:
    """Keep the lines up to `step`: what a stopped run logged after the resume point, or wrote
    in half, is logged again.
    """
    if path.is_file():
        *whole, _ = path.read_bytes().split(b"\n")
        replace_file(path, b"".join(line + b"\n" for line in whole if _step(line) <= step))


def append(path: Path, values: Mapping[str, Any]) -> None:
    """Add one line."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        raise unwritable(path, error) from error


def readable(line: Mapping[str, Any], steps: int, epochs: int, batch: int) -> str:
    """One line for the eye: each loss term beside what guessing costs, and the time left."""
    terms = "  ".join(
        f"{name} {line[name]:.3f}/{line[f'ln_{name}']:.2f}" for name in ("spot", "niche", "cross")
    )
    left = (steps - line["step"]) * batch / line["spots_per_s"]
    return (
        f"step {line['step']}/{steps}  epoch {line['epoch']}/{epochs}  loss {line['loss']:.3f}  "
        f"{terms} (loss/chance)  lr {line['lr']:.1e}  wd {line['weight_decay']:.2f}  "
        f"{line['spots_per_s']:,.0f} spots/s  {left / 60:.1f} min left"
    )


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a run, in order. A last line without its end is one being written, or the one
    at which the run was killed: it is left out. Another that is no JSON is a ValueError.
    """
    *whole, _ = path.read_text().split("\n")
    return [json.loads(line) for line in whole]


def _step(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
