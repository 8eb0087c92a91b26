"""`st-align bench speed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_align.cli.bench import bench_app
from st_align.cli.options import Json, Seed, emit


@bench_app.command("speed")
def speed(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="training, features, patches, stimage, visium, prepare, neighbors, domains, "
            "epoch, memory or start.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for speed-WHAT.csv and speed-WHAT.md.")],
    corpus: Annotated[
        Path | None, typer.Option(help="Measured on this corpus, not on a simulated one.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Of `training`: tiny or open.")] = "tiny",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Speed and memory, each beside what it is compared with."""
    from st_align.benchmarks.speed_run import run_speed
    from st_align.job import require_one_process

    require_one_process("bench speed")
    emit(run_speed(what, out, corpus=corpus, preset=preset, seed=seed), json)
