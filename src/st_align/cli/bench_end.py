"""How a verb of the bench family ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from st_align.cli.options import emit


def finish(
    found: tuple[dict[str, Any], Sequence[str]] | None, out: Path, json: Path | None
) -> None:
    """Hand over the result and show the page; exit 1 where cells failed. Ranks other than the
    first have nothing to tell.
    """
    if found is None:
        return
    result, failed = found
    emit(result, json)
    print((out / "results.md").read_text(encoding="utf-8"))
    print(f"written: {out}")
    if failed:
        typer.echo(f"{len(failed)} cells failed; the same command tries them again", err=True)
        raise typer.Exit(1)
