"""`st-align bench genes`: expression from the image, by patient, beside what it has to beat.

fold      whole patients are tested; panel and --min-reliability are chosen on the others
method    predicts the test slides from their images (genes_models.py)
cell      one method on one fold: scores by slide and gene, errors by spot; kept and resumed
report    Table 2, the two parts of the error, reliability (genes_report.py)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from st_align.benchmarks.audit import Contender, contenders, parse_model, require_no_leak, seen
from st_align.benchmarks.cells import Bench, Cell, Found
from st_align.benchmarks.genes_data import (
    NINE,
    Fold,
    narrowed,
    patient_folds,
    usable,
)
from st_align.benchmarks.genes_figure import draw
from st_align.benchmarks.genes_models import (
    HeadPredictor,
    MeanPredictor,
    Predictor,
    RidgePredictor,
    Task,
)
from st_align.benchmarks.genes_report import CEILING, Report
from st_align.benchmarks.genes_scores import score_slides
from st_align.benchmarks.image_rows import (
    PARTS,
    VIEWS,
    colours,
    frozen,
    image_encoders,
    run_parts,
)
from st_align.benchmarks.reliability import reliability
from st_align.benchmarks.table import Row, to_json, write_csv
from st_align.checkpoint import load_run
from st_align.corpus import Corpus
from st_align.errors import ConfigError, nearest
from st_align.files import replace_file
from st_align.infer import run_hash, without_counts
from st_align.predict import top_hvg
from st_align.provenance import json_hash
from st_align.slide import PreparedSlide
from st_align.targets import gene_panel


@dataclass(frozen=True, kw_only=True)
class GenesRequest:
    """Options of `st-align bench genes`; neither `genes` nor `top`: the paper's nine."""

    genes: Sequence[str] = ()
    top: int | None = None
    patients: Sequence[str] = ()
    test_patients: Sequence[str] = ()
    models: Sequence[str] = ()
    weights: Mapping[str, str] = field(default_factory=dict)
    """Paths of image encoders' weights by name."""
    min_reliability: float = 0.0
    niche: str | None = None
    seed: int = 0
    allow_leak: bool = False


@dataclass(frozen=True, kw_only=True)
class FoldPlan:
    """A fold with its slides and what is predicted on it."""

    fold: Fold
    task: Task
    scored: Sequence[PreparedSlide]
    """The test slides with their counts: read by scores alone."""
    dropped: Mapping[str, float]
    """Genes left out, with their reliability on the training slides."""
    key: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """How one method runs on test slides of a fold: on all, or on those one of its runs has not
    seen. Without a predictor `note` says why there is none.
    """

    method: str
    slides: Sequence[PreparedSlide]
    protocol: str
    predictor: Predictor | None = None
    note: str = ""


def bench_genes(corpus_path: Path, out: Path, request: GenesRequest) -> Found | None:
    """Write results.csv, results.md, genes.png and provenance into `out`; gives what `--json`
    holds and the cells that failed. Ranks share the cells; the first one has the result.

    Raises:
        ConfigError: unknown patients or genes, fewer than two patients.
        SlideError: no slide has both image and counts.
        ModelError: a model was trained on a slide that it would be tested on.

    """
    corpus = Corpus.open(corpus_path)
    slides, passed = usable(_of_patients(corpus, request.patients))
    niche, patients = _niche(corpus, request.niche), {s.id: s.patient for s in slides}
    rng = np.random.default_rng(request.seed)
    folds = patient_folds(patients, test_patients=request.test_patients, rng=rng)
    plans = [_plan(fold, slides, corpus, request) for fold in folds]
    models = contenders([(n, load_run(path)) for n, path in map(parse_model, request.models)])
    scored = [slide for plan in plans for slide in plan.scored]
    audit = require_no_leak(models, scored, allow=request.allow_leak)
    bench = Bench(out)

    def make_all() -> list[tuple[Fold, Cell]]:
        made = [(plan.fold, _ceiling(bench, plan, request.seed)) for plan in plans]
        for method in _methods(corpus, niche, models, request.weights):
            for plan in plans:
                for entry in method(plan):
                    made += [(plan.fold, cell) for cell in _cells(bench, plan, entry, request.seed)]
        return made

    made = bench.collect(make_all)
    if made is None:
        return None
    report = Report(folds=folds, genes={p.fold.name: p.task.panel.genes for p in plans}, made=made)
    text = report.markdown(audit, _remarks(plans, passed), np.random.default_rng(request.seed))
    rows = report.rows()
    write_csv(out / "results.csv", rows)
    replace_file(out / "results.md", text.encode())
    draw(out / "genes.png", report)
    bench.write_provenance(
        bench="genes",
        corpus=str(corpus.path),
        request=dataclasses.asdict(request),
        slides={s.id: {"patient": s.patient, "data": _data(corpus, s.id)} for s in slides},
        folds=[dataclasses.asdict(fold) for fold in folds],
        genes=report.genes,
        dropped={p.fold.name: p.dropped for p in plans if p.dropped},
        models={c.name: {str(r.path): run_hash(r) for r in c.runs} for c in models},
        audit=audit,
    )
    return to_json(rows, report.headline()), bench.failed


Method = Callable[[FoldPlan], Sequence[Entry]]


def _methods(
    corpus: Corpus, niche: str, models: Sequence[Contender], weights: Mapping[str, str]
) -> Iterator[Method]:
    """Every row of the table, one after another: what one has read is let go before the next."""
    yield _everywhere(MeanPredictor())
    yield _everywhere(RidgePredictor("colour statistics", colours, "colours-1"))
    for name, encoder in image_encoders(weights):
        if isinstance(encoder, str):
            yield _absent(name, encoder)
            continue
        for view in VIEWS:
            read = frozen(corpus, encoder, view, niche)
            identity = f"{encoder.fingerprint} {view} {niche}"
            yield _everywhere(RidgePredictor(f"{name}, {view}", read, identity))
    for model in models:
        yield from _model_methods(corpus, model)


def _model_methods(corpus: Corpus, model: Contender) -> Iterator[Method]:
    """r, e, r+e and the product's own head of a model; each fold by a run that did not see it."""
    hashes = {run.path: run_hash(run) for run in model.runs}
    parts = {run.path: run_parts(run, corpus) for run in model.runs}
    for part in PARTS:
        name = f"{model.name}, {part}"
        predictors: dict[Path, Predictor] = {
            path: RidgePredictor(name, parts[path][part], f"{digest} {part}")
            for path, digest in hashes.items()
        }
        yield _by_run(model, predictors)
    name = f"{model.name}, genes predict"
    yield _by_run(
        model,
        {
            run.path: HeadPredictor(name, run, corpus, f"{hashes[run.path]} head")
            for run in model.runs
        },
    )


def _everywhere(predictor: Predictor) -> Method:
    """A method that is fitted on a fold's training slides alone."""

    def entries(plan: FoldPlan) -> list[Entry]:
        trained = {s.id: s.patient for s in plan.task.train}
        found = {s.id: seen(trained, s).protocol for s in plan.scored}
        return [Entry(method=predictor.name, slides=plan.scored, protocol=_worst(found.values()),
                      predictor=predictor)]  # fmt: skip

    return entries


def _absent(name: str, why: str) -> Method:
    return lambda plan: [Entry(method=name, slides=plan.scored, protocol="", note=why)]


def _by_run(model: Contender, predictors: Mapping[Path, Predictor]) -> Method:
    """A method of several runs: each test slide by the run that is farthest from it."""

    def entries(plan: FoldPlan) -> list[Entry]:
        groups: dict[tuple[Path, str], list[PreparedSlide]] = {}
        for slide in plan.scored:
            run, found = model.for_slide(slide)
            groups.setdefault((run.path, found.protocol), []).append(slide)
        return [
            Entry(method=predictors[path].name, slides=slides, protocol=protocol,
                  predictor=predictors[path])
            for (path, protocol), slides in groups.items()
        ]  # fmt: skip

    return entries


def _cells(bench: Bench, plan: FoldPlan, entry: Entry, seed: int) -> Iterator[Cell]:
    """The entry's cells, one a track."""
    of = Row(slide=plan.fold.name, method=entry.method, protocol=entry.protocol, seed=seed)
    if entry.predictor is None:
        yield Cell(rows=(dataclasses.replace(of, protocol="", note=entry.note),))
        return
    predictor, ids = entry.predictor, [s.id for s in entry.slides]
    task = dataclasses.replace(plan.task, test=[without_counts(s) for s in entry.slides])
    for track in predictor.tracks:
        row = dataclasses.replace(of, track=track)

        def make(row: Row = row) -> Cell:
            predicted = predictor.predict(task, row.track)
            return score_slides(row, entry.slides, predicted, task.panel, task.means())

        key = {**plan.key, "method": row.method, "identity": predictor.identity, "track": track}
        name = f"{row.method} {track} {plan.fold.name}"
        yield bench.cell(name, {**key, "slides": ids, "protocol": row.protocol}, row, make)


def _ceiling(bench: Bench, plan: FoldPlan, seed: int) -> Cell:
    """Reliability of each gene on each test slide: what a score can reach."""
    of = Row(slide=plan.fold.name, method=CEILING, seed=seed)

    def make() -> Cell:
        rng = np.random.default_rng(seed)
        rows = []
        for slide in plan.scored:
            values = reliability(slide, plan.task.panel, rng)
            for gene, value in zip(plan.task.panel.genes, values, strict=True):
                if not np.isnan(value):
                    row = dataclasses.replace(of, slide=slide.id, item=gene, metric=CEILING)
                    rows.append(dataclasses.replace(row, value=float(value)))
        return Cell(rows=tuple(rows))

    return bench.cell(f"{CEILING} {plan.fold.name}", {**plan.key, "method": CEILING}, of, make)


def _plan(
    fold: Fold, slides: Sequence[PreparedSlide], corpus: Corpus, request: GenesRequest
) -> FoldPlan:
    """The fold's genes, chosen without a look at its test slides."""
    train = [s for s in slides if s.id in fold.train]
    scored = [s for s in slides if s.id in fold.test]
    names = list(dict.fromkeys(request.genes)) or list(NINE)
    panel = gene_panel(top_hvg(train, request.top) if request.top else names, train)
    dropped: dict[str, float] = {}
    if request.min_reliability > 0:
        rng = np.random.default_rng(request.seed)
        found = np.stack([reliability(slide, panel, rng) for slide in train])
        known = ~np.isnan(found)
        mean = np.where(known, found, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        dropped = {
            gene: round(float(value), 3)
            for gene, value in zip(panel.genes, mean, strict=True)
            if value < request.min_reliability
        }
        if len(dropped) == len(panel):
            raise ConfigError(
                f"no gene is as reliable as --min-reliability {request.min_reliability:g}",
                expected=f"at most {mean.max():.3f} on the training slides of {fold.name}",
            )
        panel = narrowed(panel, mean >= request.min_reliability)
    key = {
        "bench": "genes",
        "train": {s.id: _data(corpus, s.id) for s in train},
        "test": {s.id: _data(corpus, s.id) for s in scored},
        "panel": panel.hash,
        "seed": request.seed,
    }
    task = Task(train=train, test=[without_counts(s) for s in scored], panel=panel)
    return FoldPlan(fold=fold, task=task, scored=scored, dropped=dropped, key=key)


def _of_patients(corpus: Corpus, patients: Sequence[str]) -> list[PreparedSlide]:
    """The corpus's slides, of these patients where some are named."""
    known = {str(corpus.entry(id)["patient"]) for id in corpus.ids}
    for name in patients:
        if name not in known:
            raise ConfigError(f"no slide is of patient {name!r}", fix=nearest(name, known))
    ids = [i for i in corpus.ids if not patients or corpus.entry(i)["patient"] in patients]
    return corpus.slides(ids)


def _niche(corpus: Corpus, wanted: str | None) -> str:
    """The niche spec whose crops the encoders see: `lattice` where all slides have it."""
    shared = set.intersection(*(set(corpus.entry(id)["niches"]) for id in corpus.ids))
    if wanted is None and shared:
        return "lattice" if "lattice" in shared else min(shared)
    if wanted is None or wanted not in shared:
        raise ConfigError(
            f"not every slide was prepared with the niche {wanted or 'of another'!r}",
            expected=f"one of {', '.join(sorted(shared)) or 'none in common'}",
            fix="run: st-align prepare SRC --out CORPUS --niche SPEC",
        )
    return wanted


def _data(corpus: Corpus, slide: str) -> str:
    """12 hex digits of a slide's columns."""
    return json_hash(corpus.entry(slide)["sha256"])


def _worst(protocols: Iterable[str]) -> str:
    return ", ".join(sorted(set(protocols)))


def _remarks(plans: Sequence[FoldPlan], passed: Sequence[str]) -> list[str]:
    """What is left out."""
    remarks = []
    if passed:
        remarks.append(f"Without image or counts, not used: {', '.join(passed)}.")
    for plan in plans:
        if plan.dropped:
            genes = ", ".join(f"{gene} ({value:.2f})" for gene, value in plan.dropped.items())
            remarks.append(
                f"{plan.fold.name}: less reliable than asked on training slides: {genes}."
            )
    return remarks
