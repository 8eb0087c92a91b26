"""HEST-bench by name: bench hest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_align.cli.bench import AllowLeak, ImageWeights, Models, bench_app
from st_align.cli.bench_end import finish
from st_align.cli.options import Json


@bench_app.command("hest")
def bench_hest(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="A task's folder, or several's.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; a killed bench goes on there.")],
    protocol: Annotated[
        str, typer.Option(help="hest-readme, hest-a13 or cv-alpha.")
    ] = "hest-readme",
    model: Models = None,
    weights: ImageWeights = None,
    allow_leak: AllowLeak = False,
    json: Json = None,
) -> None:
    """HEST-bench's regression on its own folders and official splits."""
    from st_align.benchmarks.hest import HestRequest, bench_hest
    from st_align.benchmarks.image_rows import parse_image_weights

    request = HestRequest(
        protocol=protocol,
        models=model or (),
        weights=parse_image_weights(weights or ()),
        allow_leak=allow_leak,
    )
    finish(bench_hest(root, out, request), out, json)
