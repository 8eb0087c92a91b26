"""Spots most like one spot: retrieve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_align.cli.app import app
from st_align.cli.options import Json, emit, writable


@app.command()
def retrieve(
    query: Annotated[
        list[str], typer.Argument(metavar="QUERY.h5ad::BARCODE", help="The spot asked for.")
    ],
    files: Annotated[
        list[Path], typer.Option("--in", metavar="FILE.h5ad...", help="Embedded slides.")
    ],
    out: Annotated[Path, typer.Option(callback=writable, help="A .csv, or an .html page.")],
    by: Annotated[
        str, typer.Option(help="What of the query is compared: image or gene.")
    ] = "image",
    find: Annotated[str | None, typer.Option(help="With what: image or gene.")] = None,
    model: Annotated[str | None, typer.Option(help="For image to gene and back: the run.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many spots.")] = 10,
    json: Json = None,
) -> None:
    """The most similar spots over many slides, by image, by genes, or from one to the other."""
    from st_align.commands.retrieve import RetrieveRequest, find_spots

    # `QUERY --in A B`: what follows the first name of --in arrives behind the query.
    first, *more = query
    request = RetrieveRequest(by=by, find=find, model=model, n=n)
    emit(find_spots(first, [*files, *map(Path, more)], request, out), json)
