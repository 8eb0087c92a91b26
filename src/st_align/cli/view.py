"""The verb that opens a slide in the browser: view."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_align.cli.app import app
from st_align.cli.options import Json, emit, writable


@app.command()
def view(
    path: Annotated[Path, typer.Argument(metavar="FILE.h5ad")],
    out: Annotated[Path, typer.Option(callback=writable, help="The .html to write.")] = Path(
        "view.html"
    ),
    genes: Annotated[
        str | None,
        typer.Option(help="Genes to show, G1,G2,...; default: predicted and most variable."),
    ] = None,
    label_key: Annotated[
        str | None, typer.Option(help="obs column whose colours the domains take.")
    ] = None,
    json: Json = None,
) -> None:
    """One interactive HTML page of a slide: histology, domains, labels, genes; opens offline."""
    from st_align.commands.view import view_file

    emit(view_file(path, out, genes=genes, label_key=label_key), json)
