"""Verbs that need nothing yet: demo, doctor, simulate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_align.cli.app import app
from st_align.cli.options import Json, Seed, emit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")] = Path(
        "demo-out"
    ),
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """The whole way on a small simulated cohort: prepare, train, embed, domains, genes, report."""
    from st_align.demo import run_demo

    emit(run_demo(out, seed=seed), json)


@app.command()
def doctor(
    weights: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH of an encoder's weights; may repeat.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML with [encoders.NAME] weights.")] = None,
    json: Json = None,
) -> None:
    """Versions, devices, and which encoders' weights are usable."""
    from st_align.doctor import check, describe

    result = check(weights or [], config)
    print(describe(result))
    emit(result, json)


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")],
    layout: Annotated[str, typer.Option("--as", help="spaceranger, stimage or corpus.")] = (
        "spaceranger"
    ),
    slides: Annotated[int, typer.Option(min=1, help="Slides, two a patient.")] = 8,
    spots: Annotated[int, typer.Option(min=50, help="Spots of a slide, about.")] = 400,
    sparse: Annotated[
        bool,
        typer.Option(
            "--sparse", help="A corpus of little room: few genes, patches without content."
        ),
    ] = False,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Write a cohort with known truth."""
    from st_align.simulate import simulate_cohort

    result = simulate_cohort(
        out, slides=slides, spots=spots, seed=seed, layout=layout, sparse=sparse
    )
    truth = out / result["obs"] if "obs" in result else "columns domain, programme of its spots"
    print(f"{result['n_spots']:,} spots on {slides} slides: {out}; truth: {truth}")
    emit(result, json)
