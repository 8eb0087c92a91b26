"""`bench domains`: spatial domains of labelled slides by every method, one clusterer for all.

Each (slide, method) is a cell: embed, cluster `runs` times with the number of labels known
(`oracle K`) and without (`blind K`), with and without smoothing over the lattice, score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from st_align.benchmarks.audit import (
    DONOR,
    SECTION,
    UNKNOWN,
    Contender,
    contenders,
    fitting_slides,
    parse_model,
    require_no_leak,
)
from st_align.benchmarks.cells import Bench, Cell, Found, slide_hash
from st_align.benchmarks.clusterers import CONSENSUS
from st_align.benchmarks.domains_cells import Scoring, method_cell, row_name, truth_rows
from st_align.benchmarks.domains_report import Report, write_report
from st_align.benchmarks.methods import Method, Target
from st_align.benchmarks.peers import peers, versions
from st_align.benchmarks.rows import LINEAR, built_in, model_row
from st_align.checkpoint import load_run
from st_align.corpus import Corpus, is_corpus
from st_align.errors import ConfigError, CorpusError, nearest
from st_align.io import ReadOptions, find_slides
from st_align.job import is_first
from st_align.metrics import label_names
from st_align.prepare import prepare_slide
from st_align.slide import PreparedSlide, Slide


@dataclass(frozen=True, kw_only=True)
class DomainsRequest:
    """Options of `st-align bench domains`."""

    label_key: str
    slices: Sequence[str] = ()
    models: Sequence[str] = ()
    """`RUN` or `NAME=RUN`; runs of one name are folds of one method."""
    protocol: str = "donor"
    weights: Mapping[str, str] = field(default_factory=dict)
    only: Sequence[str] = ()
    """Names of rows; none: all."""
    references: Sequence[str] = (LINEAR, row_name(LINEAR, CONSENSUS.name))
    """Rows that all others are compared with; a row's own clusterer makes a row, too."""
    runs: int = 5
    seed: int = 0
    allow_leak: bool = False
    read: ReadOptions = field(default_factory=ReadOptions)


def bench_domains(sources: Sequence[Path], out: Path, request: DomainsRequest) -> Found | None:
    """Run the bench into the folder `out`; its `--json` result and the cells that failed.

    A folder that holds cells of the same data and options is continued. Ranks share the cells;
    the first one has the result.
    """
    bench = Bench(out)
    models = contenders((n, load_run(p)) for n, p in map(parse_model, request.models))
    corpus, read, slides = load_slides(sources, request.read)
    targets = find_targets(slides, request, corpus)
    audit = require_no_leak(models, [t.slide for t in targets], allow=request.allow_leak)
    methods = _chosen(models, read, request)
    scoring = Scoring(request.label_key, request.runs, request.seed)
    cells = bench.collect(lambda: _cells(bench, methods, targets, scoring))
    if cells is None:
        return None
    report = Report(
        targets=targets,
        methods=methods,
        models=[model.name for model in models],
        cells=cells,
        truth=[row for target in targets for row in truth_rows(target)],
        audit=audit,
        references=request.references,
        seed=request.seed,
    )
    result = write_report(out, report)
    bench.write_provenance(**_facts(slides, targets, models, request), audit=audit)
    return result, bench.failed


def _cells(
    bench: Bench, methods: Sequence[Method], targets: Sequence[Target], scoring: Scoring
) -> dict[tuple[str, str], Cell]:
    """By slide and method."""
    cells: dict[tuple[str, str], Cell] = {}
    n = len(methods) * len(targets)
    with tqdm(total=n, desc="bench domains", unit="cell", disable=not bench.progress) as bar:
        for method in methods:
            for target in targets:
                bar.set_postfix_str(f"{target.slide.id}, {method.name}"[:50])
                cells[target.slide.id, method.name] = method_cell(bench, method, target, scoring)
                bar.update()
    return cells


def load_slides(
    sources: Sequence[Path], options: ReadOptions
) -> tuple[Corpus | None, dict[str, Slide | PreparedSlide], list[PreparedSlide]]:
    """The corpus where the one source is one, what each slide was read as, and all slides with
    their lattice rings.
    """
    if len(sources) == 1 and is_corpus(sources[0]):
        corpus = Corpus.open(sources[0])
        slides = list(corpus.slides())
        for slide in slides:
            if "lattice" not in slide.niches:
                raise CorpusError(
                    f"slide {slide.id!r} was not prepared with the niche 'lattice'",
                    fix=f"run: st-align prepare SRC --out {corpus.path} --niche lattice",
                )
        return corpus, {slide.id: slide for slide in slides}, slides
    read: dict[str, Slide | PreparedSlide] = {}
    slides = []
    for ref in tqdm(
        find_slides(sources, options).refs, desc="read", unit="slide", disable=not is_first()
    ):
        slide = ref.read()
        read[slide.id] = slide
        slides.append(prepare_slide(slide, ("lattice",)))
    return None, read, slides


def find_targets(
    slides: Sequence[PreparedSlide], request: DomainsRequest, corpus: Corpus | None
) -> list[Target]:
    """The labelled slides that are scored: those asked for, or all; none is a ConfigError."""
    ids = [slide.id for slide in slides]
    for name in request.slices:
        if name not in ids:
            raise ConfigError(f"no slide is called {name!r}", fix=nearest(name, ids))
    hashes = {slide.id: slide_hash(slide) for slide in slides}
    targets = []
    for slide in slides:
        if request.slices and slide.id not in request.slices:
            continue
        labels = _labels(slide, request.label_key)
        if len(set(labels.tolist()) - {""}) > 1:
            fit = fitting_slides(slide, slides, request.protocol)
            targets.append(
                Target(slide=slide, labels=labels, fit=fit, corpus=corpus, hashes=hashes,
                       protocol=_relation(slide, fit))
            )  # fmt: skip
        elif request.slices:
            raise ConfigError(
                f"slide {slide.id!r} has no two labels in {request.label_key!r}",
                found=f"columns {', '.join(map(str, slide.spots))}",
            )
    if not targets:
        columns = sorted({str(name) for slide in slides for name in slide.spots})
        raise ConfigError(
            f"no slide has labels in {request.label_key!r}", fix=nearest(request.label_key, columns)
        )
    return targets


def _labels(slide: PreparedSlide, key: str) -> NDArray[Any]:
    if key not in slide.spots:
        return np.full(slide.n_spots, "")
    return label_names(slide.spots[key])


def _relation(slide: PreparedSlide, fit: Sequence[PreparedSlide]) -> str:
    if any(other.patient == slide.patient for other in fit):
        return SECTION
    return UNKNOWN if slide.patient_origin == "slide" else DONOR


def _chosen(
    models: Sequence[Contender],
    read: Mapping[str, Slide | PreparedSlide],
    request: DomainsRequest,
) -> list[Method]:
    """The rows asked for, models first; an unknown name is a ConfigError."""
    rows = [*built_in(request.weights), *peers(request.weights)]
    names = [row.name for row in rows]
    for model in models:
        if model.name in names:
            raise ConfigError(f"a model cannot be called {model.name!r}: a row is called so")
    rows = [*(model_row(model, read) for model in models), *rows]
    names = [row.name for row in rows]
    of = {row_name(row.name, own): row.name for row in rows for own in row.read_by}
    for name in request.only:
        if name not in names:
            raise ConfigError(f"no row is called {name!r}", fix=nearest(name, names))
    for name in request.references:
        if name not in of:
            raise ConfigError(f"no row is called {name!r}", fix=nearest(name, list(of)))
    wanted = {*request.only, *(model.name for model in models)}
    wanted |= {of[name] for name in request.references}
    return [row for row in rows if row.name in wanted or not request.only]


def _facts(
    slides: Sequence[PreparedSlide],
    targets: Sequence[Target],
    models: Sequence[Contender],
    request: DomainsRequest,
) -> dict[str, Any]:
    """Data, splits, models and options for `provenance.json`."""
    return {
        "bench": "domains",
        "packages": versions(),
        "label_key": request.label_key,
        "protocol": request.protocol,
        "references": list(request.references),
        "seeds": list(range(request.seed, request.seed + request.runs)),
        "slides": {
            s.id: {
                "hash": targets[0].hashes[s.id],
                "patient": s.patient,
                "patient_from": s.patient_origin,
                "n_spots": s.n_spots,
                "source": Path(s.source).name,
            }
            for s in slides
        },
        "targets": {
            t.slide.id: {
                "n_labelled": int((t.labels != "").sum()),
                "n_labels": t.n_labels,
                "axes_fitted_on": [s.id for s in t.fit],
                "protocol": t.protocol,
            }
            for t in targets
        },
        "models": {
            model.name: [
                {"run": run.path.name, "provenance": dict(run.provenance)} for run in model.runs
            ]
            for model in models
        },
    }
