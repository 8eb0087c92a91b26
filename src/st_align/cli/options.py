"""Options that several verbs share, and how a verb hands over its result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def writable(path: Path | None) -> Path | None:
    """Whether a file can be written there is found before the work, not after."""
    if path is not None:
        from st_align.files import require_writable

        require_writable(path)
    return path


Json = Annotated[
    Path | None,
    typer.Option("--json", callback=writable, help="Write the result to this JSON file."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything drawn by chance.")]
H5ad = Annotated[Path, typer.Option("--out", callback=writable, help="The .h5ad to write.")]
Model = Annotated[str, typer.Option("--model", help="A run folder, or a shipped checkpoint.")]
SlideArg = Annotated[
    str, typer.Argument(metavar="SLIDE", help="A path that holds one slide, or PATH::ID.")
]
NoImage = Annotated[bool, typer.Option("--no-image", help="Take slides without their image.")]
Image = Annotated[
    Path | None, typer.Option("--image", help="Full-resolution image of the one slide given.")
]
GeneMap = Annotated[
    Path | None,
    typer.Option("--gene-map", help="CSV with columns from,to: orthologues to rename by."),
]
Format = Annotated[
    str, typer.Option("--format", help="auto, visium, stimage, hest, h5ad or spatialdata.")
]


def emit(result: dict[str, Any] | None, json_path: Path | None) -> None:
    """Write a verb's result where `--json` says, whole or not at all."""
    if result is not None and json_path is not None:
        import json

        from st_align.files import replace_file

        replace_file(json_path, f"{json.dumps(result, indent=1)}\n".encode())
