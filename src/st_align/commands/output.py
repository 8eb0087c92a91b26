"""Where verbs write, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from st_align.errors import OutputError
from st_align.io.detect import split_spec


def require_suffix(out: Path, suffix: str) -> None:
    """OutputError unless `--out` ends in `suffix`: found before minutes of work, not after."""
    if out.suffix != suffix:
        raise OutputError(f"--out {out} is to end in {suffix}", found=out.suffix or "no ending")


def require_not_source(out: Path, slide: str) -> None:
    """OutputError when writing `out` would replace what `slide` is read from: the file itself, or
    a file that lies right in a folder of slides.
    """
    source, _ = split_spec(slide)
    if not out.exists() or not source.exists():
        return
    if out.samefile(source) or out.parent.samefile(source):
        raise OutputError(
            f"--out {out} would overwrite a file of the source",
            expected="a file that is not read",
            found=f"the slide is read from {source}",
            fix="choose another --out, or remove that file if it is an earlier output",
        )


def print_warnings(warnings: Sequence[str]) -> None:
    """One line each."""
    for text in warnings:
        print(f"  warning: {text}")
