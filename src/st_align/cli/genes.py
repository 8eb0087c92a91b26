"""Expression from the image: genes fit, genes predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_align.cli.app import app
from st_align.cli.options import Format, H5ad, Image, Json, Model, SlideArg, emit, writable

genes_app = typer.Typer(
    help="Expression from the image alone: fit a head, then predict.", no_args_is_help=True
)
app.add_typer(genes_app, name="genes")


@genes_app.command("fit")
def genes_fit(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS")],
    model: Model,
    out: Annotated[Path, typer.Option(callback=writable, help="The head to write (.safetensors).")],
    genes: Annotated[str | None, typer.Option(help="Comma-separated symbols.")] = None,
    top_hvg: Annotated[int | None, typer.Option(min=1, help="The N most variable.")] = None,
    slides: Annotated[list[str] | None, typer.Option(help="Narrow; may repeat.")] = None,
    patients: Annotated[list[str] | None, typer.Option(help="Narrow; may repeat.")] = None,
    json: Json = None,
) -> None:
    """Fit expression to what the model sees in the images of its training slides."""
    from st_align.commands.genes import fit_genes

    names = [g.strip() for g in genes.split(",") if g.strip()] if genes else None
    result = fit_genes(
        corpus, model, out, genes=names, top=top_hvg, slides=slides, patients=patients
    )
    emit(result, json)


@genes_app.command("predict")
def genes_predict(
    slide: SlideArg,
    model: Model,
    head: Annotated[Path, typer.Option(help="Written by `genes fit`.")],
    out: H5ad,
    format: Format = "auto",
    image: Image = None,
    json: Json = None,
) -> None:
    """Predict expression from the image alone; scored when the slide has counts."""
    from st_align.commands.genes import predict_genes
    from st_align.io import ReadOptions

    emit(predict_genes(slide, model, head, out, ReadOptions(format=format, image=image)), json)
