"""Verbs on many slides: prepare, inspect, features, train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_align.cli.app import app
from st_align.cli.options import Format, GeneMap, Image, Json, NoImage, emit


@app.command()
def prepare(
    sources: Annotated[list[Path], typer.Argument(metavar="SRC...", help="Slides or folders.")],
    out: Annotated[Path, typer.Option(help="Corpus folder; an existing one is continued.")],
    format: Format = "auto",
    patients: Annotated[Path | None, typer.Option(help="CSV with columns slide,patient.")] = None,
    obs: Annotated[Path | None, typer.Option(help="CSV with barcode and further columns.")] = None,
    image: Image = None,
    no_image: NoImage = False,
    meta: Annotated[Path | None, typer.Option(help="STimage-1K4M's index CSV.")] = None,
    species: Annotated[str | None, typer.Option(help="With --meta: keep this species.")] = None,
    technology: Annotated[
        str | None, typer.Option(help="Visium or ST; with --meta: keep this one.")
    ] = None,
    min_spots: Annotated[int, typer.Option(min=0, help="Leave out smaller slides.")] = 0,
    gene_map: GeneMap = None,
    niche: Annotated[
        list[str] | None,
        typer.Option(help="lattice, rings<N>, k3, k<N>; may repeat. Default: lattice."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Slides prepared at the same time.")] = 1,
    dask: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Prepare on this Dask scheduler's workers."),
    ] = None,
    json: Json = None,
) -> None:
    """Turn slides into a corpus; run again to resume or to add slides and niches."""
    from st_align.corpus_build import build_corpus
    from st_align.corpus_overview import corpus_overview, describe
    from st_align.io import ReadOptions
    from st_align.io.detect import find_slides

    options = ReadOptions(
        format=format, image=image, no_image=no_image, patients=patients, obs=obs, meta=meta,
        species=species, technology=technology, min_spots=min_spots, gene_map=gene_map,
        any_species=(species or "human").lower() != "human",
    )  # fmt: skip
    found = find_slides(sources, options)
    corpus = build_corpus(
        found.refs, out, absent=found.absent, niche_specs=tuple(niche or ["lattice"]), jobs=jobs,
        dask=dask,
    )  # fmt: skip
    result = corpus_overview(corpus)
    print(describe(result))
    emit(result, json)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="CORPUS|RUN|SLIDE")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every column's hash.")] = False,
    no_image: NoImage = False,
    diagnose: Annotated[
        Path | None, typer.Option(metavar="CORPUS", help="With a run: is it sound on these slides?")
    ] = None,
    json: Json = None,
) -> None:
    """What a corpus, a run or a slide is, its numbers and its problems."""
    from st_align.corpus_overview import describe
    from st_align.overview import overview

    result = overview(path, verify=verify, no_image=no_image, diagnosed=diagnose)
    print(describe(result))
    emit(result, json)
    if result.get("damaged"):
        raise typer.Exit(2)


@app.command()
def features(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS")],
    encoder: Annotated[str, typer.Option(help="Name of a frozen encoder; see `doctor`.")],
    weights: Annotated[Path | None, typer.Option(help="Its weights file or folder.")] = None,
    view: Annotated[
        str | None, typer.Option(help="spot or niche; default: niche of images, spot of genes.")
    ] = None,
    what: Annotated[
        str | None, typer.Option(help="image or gene; default: what the encoder reads.")
    ] = None,
    niche: Annotated[str, typer.Option(help="Of the niche view: lattice, k3, k<N>.")] = "lattice",
    patch_um: Annotated[
        float | None,
        typer.Option(help="Read the slides' own images again, in squares of this side in um."),
    ] = None,
    json: Json = None,
) -> None:
    """Run a frozen encoder once over a corpus and cache what it gives."""
    from st_align.commands.features import FeatureRequest, fill_features

    request = FeatureRequest(
        encoder=encoder, weights=weights, view=view, what=what, niche=niche, patch_um=patch_um
    )
    emit(fill_features(corpus, request), json)


@app.command()
def train(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS")],
    out: Annotated[Path, typer.Option(help="Run folder.")],
    preset: Annotated[str, typer.Option(help="tiny, open or paper.")] = "tiny",
    config: Annotated[Path | None, typer.Option(help="TOML put over the preset.")] = None,
    panel: Annotated[str | None, typer.Option(help="A file of genes, or how many.")] = None,
    hold_out_slide: Annotated[list[str] | None, typer.Option(help="May repeat.")] = None,
    hold_out_patient: Annotated[list[str] | None, typer.Option(help="May repeat.")] = None,
    init: Annotated[str | None, typer.Option(help="Go on from this model.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch: Annotated[int | None, typer.Option(min=2, help="Global batch size.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of everything drawn by chance.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    json: Json = None,
) -> None:
    """Pretrain on a corpus, or go on from a model on one's own slides."""
    from st_align.commands.train import TrainRequest, train_model

    request = TrainRequest(
        preset=preset, config=config, panel=panel, epochs=epochs, batch=batch, seed=seed,
        hold_out_slides=tuple(hold_out_slide or ()),
        hold_out_patients=tuple(hold_out_patient or ()), init=init, resume=resume,
    )  # fmt: skip
    emit(train_model(corpus, out, request), json)
