"""The command `st-align`: verbs only. Each parses its options, calls the core and prints.

Nothing heavy is imported before a verb runs: `st-align --help` stays fast.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="st-align",
    help="Spot-niche pretraining of image and genes for 10x Visium.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
genes_app = typer.Typer(
    help="Expression from the image alone: fit a head, then predict.", no_args_is_help=True
)
app.add_typer(genes_app, name="genes")


def _writable(path: Path | None) -> Path | None:
    """Whether a file can be written there is found before the work, not after."""
    if path is not None:
        from st_align.files import require_writable

        require_writable(path)
    return path


Json = Annotated[
    Path | None,
    typer.Option("--json", callback=_writable, help="Write the result to this JSON file."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything drawn by chance.")]
H5ad = Annotated[Path, typer.Option("--out", callback=_writable, help="The .h5ad to write.")]
Model = Annotated[str, typer.Option("--model", help="A run folder, or a shipped checkpoint.")]
SlideArg = Annotated[
    str, typer.Argument(metavar="SLIDE", help="A path that holds one slide, or PATH::ID.")
]
NoImage = Annotated[bool, typer.Option("--no-image", help="Take slides without their image.")]
Image = Annotated[
    Path | None, typer.Option("--image", help="Full-resolution image of the one slide given.")
]
Format = Annotated[
    str, typer.Option("--format", help="auto, visium, stimage, h5ad or spatialdata.")
]


def main() -> None:
    """Entry point: user errors end with one message and exit 2, never with a traceback."""
    try:
        app()
    except Exception as error:
        if os.environ.get("ST_ALIGN_DEBUG"):
            raise
        sys.exit(_fail(error))


def _fail(error: Exception) -> int:
    from st_align.errors import StAlignError

    if isinstance(error, StAlignError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _DISK):
        print(f"error: {error.strerror}: {error.filename or 'the output'}", file=sys.stderr)
        return 2
    print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
    print(
        "  to do:    this was not expected; ST_ALIGN_DEBUG=1 shows where it happened",
        file=sys.stderr,
    )
    return 1


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors that a write raises without the name of its file."""


def _emit(result: dict[str, Any] | None, json_path: Path | None) -> None:
    if result is not None and json_path is not None:
        import json

        from st_align.files import replace_file

        replace_file(json_path, f"{json.dumps(result, indent=1)}\n".encode())


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Spot-niche pretraining of image and genes for 10x Visium."""
    if version:
        from st_align import __version__

        print(f"st-align {__version__}")
        raise typer.Exit


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

    _emit(run_demo(out, seed=seed), json)


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
    _emit(result, json)


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
    niche: Annotated[
        list[str] | None, typer.Option(help="lattice, k3, k<N>; may repeat. Default: lattice.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Slides prepared at the same time.")] = 1,
    json: Json = None,
) -> None:
    """Turn slides into a corpus; run again to resume or to add slides and niches."""
    from st_align.corpus_build import build_corpus
    from st_align.io import ReadOptions
    from st_align.io.detect import find_slides
    from st_align.overview import corpus_overview, describe

    options = ReadOptions(
        format=format, image=image, no_image=no_image, patients=patients, obs=obs, meta=meta,
        species=species, technology=technology, min_spots=min_spots,
    )  # fmt: skip
    found = find_slides(sources, options)
    corpus = build_corpus(
        found.refs, out, absent=found.absent, niche_specs=tuple(niche or ["lattice"]), jobs=jobs
    )
    result = corpus_overview(corpus)
    print(describe(result))
    _emit(result, json)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="CORPUS|RUN|SLIDE")],
    verify: Annotated[bool, typer.Option("--verify", help="Check every column's hash.")] = False,
    no_image: NoImage = False,
    json: Json = None,
) -> None:
    """What a corpus, a run or a slide is, its numbers and its problems."""
    from st_align.overview import describe, overview

    result = overview(path, verify=verify, no_image=no_image)
    print(describe(result))
    _emit(result, json)
    if result.get("damaged"):
        raise typer.Exit(2)


@app.command()
def features(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS")],
    encoder: Annotated[str, typer.Option(help="Name of a frozen encoder; see `doctor`.")],
    weights: Annotated[Path | None, typer.Option(help="Its weights file or folder.")] = None,
    view: Annotated[str, typer.Option(help="spot or niche.")] = "niche",
    niche: Annotated[str, typer.Option(help="Of the niche view: lattice, k3, k<N>.")] = "lattice",
    json: Json = None,
) -> None:
    """Run a frozen encoder once over a corpus and cache what it gives."""
    from st_align.commands.train import fill_features

    _emit(fill_features(corpus, encoder, weights, view, niche), json)


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
    _emit(train_model(corpus, out, request), json)


@app.command()
def embed(
    slide: SlideArg,
    model: Model,
    out: H5ad,
    format: Format = "auto",
    image: Image = None,
    no_image: NoImage = False,
    json: Json = None,
) -> None:
    """Embed a slide the model never saw."""
    from st_align.commands.embed import embed_slide
    from st_align.io import ReadOptions

    options = ReadOptions(format=format, image=image, no_image=no_image)
    _emit(embed_slide(slide, model, out, options), json)


@app.command()
def domains(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.h5ad...")],
    n_domains: Annotated[str, typer.Option(help="How many, or auto.")] = "auto",
    use: Annotated[str | None, typer.Option(help="image, gene, spot, niche or spot+niche.")] = None,
    label_key: Annotated[str | None, typer.Option(help="obs column to score against.")] = None,
    method: Annotated[str, typer.Option(help="gmm, kmeans or consensus.")] = "gmm",
    refine: Annotated[bool, typer.Option(help="Smooth over the lattice.")] = False,
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
    _emit(find_domains(files, request, out=out), json)


@genes_app.command("fit")
def genes_fit(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS")],
    model: Model,
    out: Annotated[
        Path, typer.Option(callback=_writable, help="The head to write (.safetensors).")
    ],
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
    _emit(result, json)


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

    _emit(predict_genes(slide, model, head, out, ReadOptions(format=format, image=image)), json)


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")],
    layout: Annotated[str, typer.Option("--as", help="spaceranger or stimage.")] = "spaceranger",
    slides: Annotated[int, typer.Option(min=1, help="Slides, two a patient.")] = 8,
    spots: Annotated[int, typer.Option(min=50, help="Spots of a slide, about.")] = 400,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Write a cohort with known truth."""
    from st_align.simulate import simulate_cohort

    result = simulate_cohort(out, slides=slides, spots=spots, seed=seed, layout=layout)
    print(f"{result['n_spots']:,} spots on {slides} slides: {out}; truth: {out / result['obs']}")
    _emit(result, json)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(metavar="RUN|FILE.h5ad")],
    out: Annotated[Path, typer.Option(callback=_writable, help="The .html to write.")] = Path(
        "report.html"
    ),
    json: Json = None,
) -> None:
    """One HTML page that opens offline."""
    from st_align.commands.embed import report_on

    _emit(report_on(path, out), json)


if __name__ == "__main__":
    main()
