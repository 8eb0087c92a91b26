"""Labels carried over: annotate."""

from __future__ import annotations

from typing import Annotated

import typer

from st_align.cli.app import app
from st_align.cli.options import Format, H5ad, Image, Json, Model, NoImage, emit


@app.command()
def annotate(
    slide: Annotated[
        list[str], typer.Argument(metavar="SLIDE", help="A path that holds one slide, or PATH::ID.")
    ],
    sources: Annotated[
        list[str], typer.Option("--from", metavar="LABELLED...", help="Annotated slides.")
    ],
    label_key: Annotated[str, typer.Option(help="obs column with their labels.")],
    model: Model,
    out: H5ad,
    format: Format = "auto",
    image: Image = None,
    no_image: NoImage = False,
    json: Json = None,
) -> None:
    """Carry the labels of annotated slides over to a new one; scored when it has labels."""
    from st_align.commands.annotate import annotate_slide
    from st_align.io import ReadOptions

    # `SLIDE --from A B`: what follows the first name of --from arrives behind the slide.
    first, *more = slide
    options = ReadOptions(format=format, image=image, no_image=no_image)
    emit(annotate_slide(first, [*sources, *more], label_key, model, out, options), json)
