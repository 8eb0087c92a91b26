"""Where verbs write, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from st_align.errors import OutputError


def require_suffix(out: Path, suffix: str) -> None:
    """OutputError unless `--out` ends in `suffix`: found before minutes of work, not after."""
    if out.suffix != suffix:
        raise OutputError(f"--out {out} is to end in {suffix}", found=out.suffix or "no ending")


def print_warnings(warnings: Sequence[str]) -> None:
    """One line each."""
    for text in warnings:
        print(f"  warning: {text}")
