"""Verbs on slides a model never saw: embed, domains, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_align.cli.app import app
from st_align.cli.options import (
    Format,
    GeneMap,
    Image,
    Json,
    Model,
    NoImage,
    Seed,
    SlideArg,
    emit,
    writable,
)


@app.command()
def embed(
    slide: SlideArg,
    model: Model,
    out: Annotated[
        Path, typer.Option(help="The .h5ad to write; of a whole CORPUS, a folder for them.")
    ],
    format: Format = "auto",
    image: Image = None,
    no_image: NoImage = False,
    gene_map: GeneMap = None,
    json: Json = None,
) -> None:
    """Embed a slide the model never saw, or every slide of a corpus."""
    from st_align.commands.embed import embed_corpus, embed_slide
    from st_align.corpus import is_corpus
    from st_align.io import ReadOptions

    options = ReadOptions(format=format, image=image, no_image=no_image, gene_map=gene_map)
    whole = out.suffix != ".h5ad" and is_corpus(Path(slide))
    emit((embed_corpus if whole else embed_slide)(slide, model, out, options), json)


@app.command()
def domains(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.h5ad...")],
    n_domains: Annotated[str, typer.Option(help="How many, or auto.")] = "auto",
    use: Annotated[
        str | None,
        typer.Option(help="One view alone: image, gene, spot, niche, spot+niche, linear."),
    ] = None,
    label_key: Annotated[str | None, typer.Option(help="obs column to score against.")] = None,
    method: Annotated[str | None, typer.Option(help="consensus (default), gmm or kmeans.")] = None,
    refine: Annotated[bool, typer.Option(help="Smooth over the lattice.")] = False,
    joint: Annotated[bool, typer.Option("--joint", help="One set of domains for all.")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Times the clusterer is seeded anew.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write here; default: into FILE.")] = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Spatial domains of embedded slides, scored where labels are given."""
    from st_align.commands.domains import DomainRequest, find_domains

    request = DomainRequest(
        n_domains=n_domains, use=use, label_key=label_key, method=method, refine=refine,
        runs=runs, seed=seed,
    )  # fmt: skip
    if joint:
        from st_align.commands.joint import find_joint_domains

        emit(find_joint_domains(files, request, out=out), json)
        return
    emit(find_domains(files, request, out=out), json)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(metavar="RUN|FILE.h5ad")],
    out: Annotated[Path, typer.Option(callback=writable, help="The .html to write.")] = Path(
        "report.html"
    ),
    json: Json = None,
) -> None:
    """One HTML page that opens offline."""
    from st_align.commands.embed import report_on

    emit(report_on(path, out), json)
