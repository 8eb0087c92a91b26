"""Retrieval across modalities: bench retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_align.cli.bench import bench_app
from st_align.cli.bench_end import finish
from st_align.cli.options import Json, Seed


@bench_app.command("retrieval")
def bench_retrieval(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS")],
    out: Annotated[Path, typer.Option(help="Folder of the results; a killed bench goes on there.")],
    model: Annotated[
        list[str],
        typer.Option(help="RUN or NAME=RUN; may repeat: each slide by a run that did not see it."),
    ],
    slides: Annotated[
        list[str] | None, typer.Option(help="Only these; default: all that no model saw.")
    ] = None,
    allow_leak: Annotated[bool, typer.Option(help="Score a model on slides it saw.")] = False,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Image finds gene and gene finds image, beside chance and a ridge regression."""
    from st_align.benchmarks.retrieval import RetrievalRequest, bench_retrieval

    request = RetrievalRequest(models=model, slides=slides or (), seed=seed, allow_leak=allow_leak)
    finish(bench_retrieval(corpus, out, request), out, json)
