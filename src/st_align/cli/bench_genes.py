"""Expression benches: bench genes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_align.cli.bench import ImageWeights, bench_app
from st_align.cli.bench_end import finish
from st_align.cli.options import Json, Seed


@bench_app.command("genes")
def bench_genes(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS")],
    out: Annotated[Path, typer.Option(help="Folder of the results; a killed bench goes on there.")],
    genes: Annotated[str | None, typer.Option(help="Comma-separated; default: the nine.")] = None,
    top_hvg: Annotated[
        int | None, typer.Option(min=1, help="The N most variable of the training slides.")
    ] = None,
    min_reliability: Annotated[
        float, typer.Option(min=0, max=1, help="Leave out genes below, on the training slides.")
    ] = 0.0,
    patients: Annotated[list[str] | None, typer.Option(help="Use these only; may repeat.")] = None,
    test_patients: Annotated[
        list[str] | None, typer.Option(help="Test these, train on the others; may repeat.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="RUN or NAME=RUN; may repeat: each slide by a run that did not see it."),
    ] = None,
    weights: ImageWeights = None,
    niche: Annotated[str | None, typer.Option(help="Niche whose crops encoders see.")] = None,
    allow_leak: Annotated[bool, typer.Option(help="Score a model on slides it saw.")] = False,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Expression from the image alone, by patient (the paper's Table 2), beside the mean."""
    from st_align.benchmarks.genes import GenesRequest, bench_genes
    from st_align.benchmarks.image_rows import parse_image_weights
    from st_align.errors import ConfigError

    if genes and top_hvg:
        raise ConfigError("say which genes", expected="either --genes or --top-hvg", found="both")
    request = GenesRequest(
        genes=[g.strip() for g in (genes or "").split(",") if g.strip()],
        top=top_hvg,
        patients=patients or (),
        test_patients=test_patients or (),
        models=model or (),
        weights=parse_image_weights(weights or ()),
        min_reliability=min_reliability,
        niche=niche,
        seed=seed,
        allow_leak=allow_leak,
    )
    finish(bench_genes(corpus, out, request), out, json)
