"""The paper's Table 3 and the settings it leaves open: bench ablation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_align.cli.bench import bench_app
from st_align.cli.bench_end import finish
from st_align.cli.options import Json


@bench_app.command("ablation")
def bench_ablation(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS")],
    out: Annotated[Path, typer.Option(help="Folder of runs and results; the same goes on there.")],
    label_key: Annotated[str, typer.Option(help="Column of the labels of held-out slides.")],
    hold_out_slide: Annotated[list[str] | None, typer.Option(help="Score it; may repeat.")] = None,
    hold_out_patient: Annotated[
        list[str] | None, typer.Option(help="Score all of its slides; may repeat.")
    ] = None,
    preset: Annotated[str, typer.Option(help="tiny, open or paper.")] = "tiny",
    config: Annotated[Path | None, typer.Option(help="TOML over the preset.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of every run.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each configuration.")] = 3,
    sensitivity: Annotated[
        bool, typer.Option(help="Also K, the loss weights, fusion, mask and centre.")
    ] = False,
    genes: Annotated[str | None, typer.Option(help="Comma-separated; default: the nine.")] = None,
    top_hvg: Annotated[
        int | None, typer.Option(min=1, help="The N most variable of the training slides.")
    ] = None,
    json: Json = None,
) -> None:
    """Train and score the configurations of Table 3: domains and genes of held-out slides."""
    from st_align.benchmarks.ablation import AblationRequest, bench_ablation
    from st_align.commands.train import TrainRequest
    from st_align.errors import ConfigError

    if genes and top_hvg:
        raise ConfigError("say which genes", expected="either --genes or --top-hvg", found="both")
    base, _ = TrainRequest(preset=preset, config=config, epochs=epochs).settings()
    request = AblationRequest(
        config=base,
        hold_out_slides=hold_out_slide or (),
        hold_out_patients=hold_out_patient or (),
        label_key=label_key,
        genes=[g.strip() for g in (genes or "").split(",") if g.strip()],
        top=top_hvg,
        n_seeds=seeds,
        sensitivity=sensitivity,
    )
    finish(bench_ablation(corpus, out, request), out, json)
