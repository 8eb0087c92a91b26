"""`st-align bench`: the family, and `bench domains`; other files of verbs add to `bench_app`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_align.cli.app import app
from st_align.cli.bench_end import finish
from st_align.cli.options import Format, Json, NoImage, Seed

bench_app = typer.Typer(
    help="The paper's tables and the honest ones, each by one command.", no_args_is_help=True
)
app.add_typer(bench_app, name="bench")

AllowLeak = Annotated[
    bool, typer.Option("--allow-leak", help="Score a model on slides it saw; brands its rows.")
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="[NAME=]RUN", help="May repeat; one NAME: folds of a method."),
]

ImageWeights = Annotated[
    list[str] | None,
    typer.Option("--weights", metavar="NAME=PATH", help="Of an image encoder; may repeat."),
]


@bench_app.command()
def domains(
    sources: Annotated[list[Path], typer.Argument(metavar="SRC...|CORPUS")],
    out: Annotated[Path, typer.Option(help="Folder; one that holds cells is continued.")],
    label_key: Annotated[str, typer.Option(help="obs column with the true domains.")],
    slices: Annotated[list[str] | None, typer.Option(help="Score these; may repeat.")] = None,
    model: Models = None,
    protocol: Annotated[str, typer.Option(help="Fit baselines on others of: donor, section.")] = (
        "donor"
    ),
    weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Of an encoder; may repeat.")
    ] = None,
    rows: Annotated[list[str] | None, typer.Option(help="Only these rows; may repeat.")] = None,
    reference: Annotated[
        list[str] | None, typer.Option(help="Row that differences are to; may repeat.")
    ] = None,
    patients: Annotated[Path | None, typer.Option(help="CSV with columns slide,patient.")] = None,
    format: Format = "auto",
    no_image: NoImage = False,
    runs: Annotated[int, typer.Option(min=1, help="Times the clusterer is seeded anew.")] = 5,
    seed: Seed = 0,
    allow_leak: AllowLeak = False,
    json: Json = None,
) -> None:
    """Spatial domains of labelled slides by every method (the paper's Table 1 and Figure 2)."""
    from st_align.benchmarks.domains import DomainsRequest, bench_domains
    from st_align.benchmarks.rows import parse_weights
    from st_align.io import ReadOptions

    options = {"references": tuple(reference)} if reference else {}
    request = DomainsRequest(
        label_key=label_key, slices=tuple(slices or ()), models=tuple(model or ()),
        protocol=protocol, weights=parse_weights(weights or ()), only=tuple(rows or ()), runs=runs,
        seed=seed, allow_leak=allow_leak,
        read=ReadOptions(format=format, no_image=no_image, patients=patients), **options,
    )  # fmt: skip
    finish(bench_domains(sources, out, request), out, json)
