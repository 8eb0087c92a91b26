"""`st-align bench retrieval`: image finds gene and gene finds image, on slides never seen.

    slides    those of the corpus that the model did not see; each by the run farthest from it
    spaces    r with u (spot), e with t (niche), both; and ridge regression's (retrieval_ridge.py)
    galleries all spots of the slide; all spots of all slides a run is tested on
    cell      a run, or its ridge: scores by slide, the rank of every spot; kept and resumed

Shape letters: N spots of a slide with counts, Q spots of a gallery, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from st_align.benchmarks.audit import (
    LEAK,
    Contender,
    contenders,
    parse_model,
    require_no_leak,
)
from st_align.benchmarks.cells import Bench, Cell, Found
from st_align.benchmarks.genes_data import usable
from st_align.benchmarks.image_rows import VIEWS, Read, colours, frozen
from st_align.benchmarks.retrieval_report import CHANCE, Report
from st_align.benchmarks.retrieval_ridge import SCALES, fit_ridge_retriever
from st_align.benchmarks.retrieval_scores import chance_scores, ranks, retrieval_scores
from st_align.benchmarks.table import Row, to_json, write_csv
from st_align.checkpoint import Run, load_run
from st_align.corpus import Corpus
from st_align.encoders.base import FrozenEncoder, FrozenEntry, find
from st_align.encoders.lookup import load_frozen
from st_align.errors import ConfigError
from st_align.files import replace_file
from st_align.infer import Embedder, run_hash, training_slides
from st_align.job import is_first
from st_align.provenance import json_hash
from st_align.slide import PreparedSlide

RING = "lattice"
Pair = tuple[NDArray[np.floating], NDArray[np.floating]]
"""Image and gene vectors [N, D] of one space."""
Spaces = Mapping[str, Callable[[], Pair]]
"""By method; joined and centred when asked for, so that a cohort's are never all in memory."""
DIRECTIONS = ("image → gene", "gene → image")
OWN, POOLED = "own slide", "pooled"
_UNGATED = "efficientnet-lite0"


@dataclass(frozen=True, kw_only=True)
class RetrievalRequest:
    """Options of `st-align bench retrieval`; no `slides`: all that the models did not see."""

    models: Sequence[str]
    slides: Sequence[str] = ()
    seed: int = 0
    allow_leak: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """The slides that one run of a model is tested on."""

    model: Contender
    run: Run
    slides: Sequence[PreparedSlide]
    protocols: Mapping[str, str]


def bench_retrieval(corpus_path: Path, out: Path, request: RetrievalRequest) -> Found | None:
    """Write results.csv, results.md, retrieval.png and provenance into `out`; gives what `--json`
    holds and the cells that failed. Ranks share the cells; the first one has the result.

    Raises:
        ConfigError: no model, an unknown slide, or no slide that the models did not see.
        CorpusError: a slide was not prepared with the lattice niche.
        ModelError: a model was trained on a slide named.

    """
    corpus = Corpus.open(corpus_path)
    models = contenders([(n, load_run(path)) for n, path in map(parse_model, request.models)])
    slides, _ = usable(corpus.slides(request.slides or None))
    if not request.slides and not request.allow_leak:
        slides = [s for s in slides if all(m.for_slide(s)[1].protocol != LEAK for m in models)]
    _require_slides(slides, models, corpus)
    audit = require_no_leak(models, slides, allow=request.allow_leak)
    bench = Bench(out)
    parts = [part for model in models for part in _parts(model, slides)]
    cells = bench.collect(
        lambda: [
            cell(bench, corpus, part, request.seed)
            for part in parts
            for cell in (_model_cell, _ridge_cell)
        ]
    )
    if cells is None:
        return None
    report = Report(cells=cells)
    text = report.markdown(audit, np.random.default_rng(request.seed))
    rows = report.rows()
    write_csv(out / "results.csv", rows)
    replace_file(out / "results.md", text.encode())
    report.draw(out / "retrieval.png")
    bench.write_provenance(
        bench="retrieval",
        corpus=str(corpus.path),
        request=dataclasses.asdict(request),
        slides={s.id: {"patient": s.patient, "data": _data(corpus, s.id)} for s in slides},
        models={c.name: {str(r.path): run_hash(r) for r in c.runs} for c in models},
        audit=audit,
    )
    return to_json(rows, report.headline(np.random.default_rng(request.seed))), bench.failed


def _require_slides(
    slides: Sequence[PreparedSlide], models: Sequence[Contender], corpus: Corpus
) -> None:
    if not models:
        raise ConfigError("no model to retrieve with", fix="give one: --model RUN")
    if not slides:
        raise ConfigError(
            "the models have seen every slide of the corpus",
            expected="a slide with image and counts that was held out",
            fix="train with --hold-out-patient, or prepare other slides",
        )
    for slide in slides:
        if RING not in slide.niches:
            raise ConfigError(
                f"slide {slide.id!r} was not prepared with the niche {RING!r}",
                found=", ".join(slide.niches),
                fix=f"run: st-align prepare SRC --out {corpus.path} --niche {RING}",
            )


def _parts(model: Contender, slides: Sequence[PreparedSlide]) -> list[Part]:
    groups: dict[Path, list[PreparedSlide]] = {}
    runs, protocols = {}, {}
    for slide in slides:
        run, found = model.for_slide(slide)
        groups.setdefault(run.path, []).append(slide)
        runs[run.path], protocols[slide.id] = run, found.protocol
    return [
        Part(model=model, run=runs[path], slides=group, protocols=protocols)
        for path, group in groups.items()
    ]


def _model_cell(bench: Bench, corpus: Corpus, part: Part, seed: int) -> Cell:
    """The run's own spaces, as trained and centred on the slide; chance beside them."""
    name = part.model.name

    def make() -> Cell:
        reader = Embedder(part.run, corpus=corpus, progress=is_first())

        def spaces(slide: PreparedSlide) -> Spaces:
            found, use = reader.embed(slide), slide.total_umi > 0
            r, u, e, t = (v[use] for v in (found.r, found.u, found.e, found.t))
            names = [f"{name}, {what}" for what in ("spot (r, u)", "niche (e, t)", "both")]
            raw = _three(names, (r, u), (e, t))
            return {**raw, **{f"{k}, centred": _centred(pair) for k, pair in raw.items()}}

        chance = [
            _row(part, CHANCE, slide, gallery, metric, value, seed)
            for slide in part.slides
            for gallery, rings in _chance_rings(part.slides, slide)
            for metric, value in chance_scores(rings).items()
        ]
        cell = _score(part, spaces, seed)
        return Cell(rows=(*cell.rows, *chance), arrays=cell.arrays)

    of = Row(slide="", method=name, seed=seed)
    return bench.cell(f"{name} {part.run.path.name}", _key(corpus, part, "model", seed), of, make)


def _ridge_cell(bench: Bench, corpus: Corpus, part: Part, seed: int) -> Cell:
    """Ridge regression fitted on the training slides of the run, on the encoder of its niches."""
    of = Row(slide="", method="ridge", seed=seed)

    def make() -> Cell:
        trained = [i for i in corpus.ids if i in training_slides(part.run)]
        train = [
            s
            for s in corpus.slides(trained)
            if s.has_image and s.counts is not None and (s.total_umi > 0).any()
        ]
        spec, encoder = part.run.config.data.niche, _encoder(part.run)
        reads: dict[str, tuple[Read, ...]] = {
            scale: (frozen(corpus, encoder, scale, spec), colours) for scale in VIEWS
        }
        ridge = fit_ridge_retriever(train, spec, reads)

        def spaces(slide: PreparedSlide) -> Spaces:
            use = slide.total_umi > 0
            found: dict[str, Callable[[], Pair]] = {}
            for whiten in (False, True):
                title = "ridge, whitened" if whiten else "ridge"
                spot, niche = (
                    (ridge.from_image(slide, scale, whiten=whiten)[use],
                     ridge.from_counts(slide, scale, whiten=whiten)[use])
                    for scale in SCALES
                )  # fmt: skip
                names = [f"{title}, {what}" for what in ("spot", "niche", "both")]
                found |= _three(names, spot, niche)
            return found

        return _score(part, spaces, seed)

    key = _key(corpus, part, "ridge", seed)
    return bench.cell(f"ridge beside {part.model.name} {part.run.path.name}", key, of, make)


def _score(part: Part, spaces_of: Callable[[PreparedSlide], Spaces], seed: int) -> Cell:
    """Rows by slide, and arrays `method|gallery|direction|slide` of every spot's rank, in the
    order of the slide's rows.
    """
    found = {slide.id: spaces_of(slide) for slide in part.slides}
    rows: list[Row] = []
    arrays: dict[str, NDArray[Any]] = {}
    methods = next(iter(found.values()))
    for method in tqdm(methods, desc="rank", unit="space", disable=not is_first()):
        pairs = {id: spaces[method]() for id, spaces in found.items()}
        for gallery, group in _galleries(part.slides):
            rings, starts = _pooled_rings(group)
            image, gene = (
                np.concatenate(v) for v in zip(*(pairs[s.id] for s in group), strict=True)
            )
            for direction, sides in zip(DIRECTIONS, ((image, gene), (gene, image)), strict=True):
                ranked = ranks(*sides, rings)
                for slide, start, stop in zip(group, starts[:-1], starts[1:], strict=True):
                    own = dataclasses.replace(
                        ranked, own=ranked.own[start:stop], near=ranked.near[start:stop]
                    )
                    track = f"{direction}, {gallery}"
                    rows += [
                        _row(part, method, slide, track, metric, value, seed)
                        for metric, value in retrieval_scores(own).items()
                    ]
                    arrays[f"{method}|{track}|{slide.id}"] = own.own.astype(np.float32)
    return Cell(rows=tuple(rows), arrays=arrays)


def _galleries(
    slides: Sequence[PreparedSlide],
) -> list[tuple[str, Sequence[PreparedSlide]]]:
    pooled = [(POOLED, slides)] if len(slides) > 1 else []
    return [*((OWN, [slide]) for slide in slides), *pooled]


def _chance_rings(
    slides: Sequence[PreparedSlide], slide: PreparedSlide
) -> list[tuple[str, NDArray[np.intp]]]:
    """By track: the slide's own gallery, and its share of the pooled one."""
    found = []
    for gallery, group in _galleries(slides):
        if slide in group:
            rings, _ = _pooled_rings(group)
            found += [(f"{direction}, {gallery}", rings) for direction in DIRECTIONS]
    return found


def _pooled_rings(
    slides: Sequence[PreparedSlide],
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """[Q, K+1] rows of each spot with counts and its ring among all such spots, -1 where absent;
    and where each slide's rows begin, and the last end.
    """
    blocks, starts = [], [0]
    width = max(s.niches[RING].neighbors.shape[1] for s in slides)
    for slide in slides:
        use = slide.total_umi > 0
        place = np.where(use, starts[-1] + np.cumsum(use) - 1, -1)
        members = slide.niches[RING].neighbors[use]
        block = np.full((len(members), width), -1, np.intp)
        block[:, : members.shape[1]] = np.where(members >= 0, place[members], -1)
        blocks.append(block)
        starts.append(starts[-1] + len(block))
    return np.concatenate(blocks), np.array(starts)


def _row(
    part: Part,
    method: str,
    slide: PreparedSlide,
    track: str,
    metric: str,
    value: float,
    seed: int,
) -> Row:
    return Row(
        slide=slide.id,
        method=method,
        track=track,
        protocol="" if method == CHANCE else part.protocols[slide.id],
        seed=seed,
        metric=metric,
        value=float(value),
    )


def _key(corpus: Corpus, part: Part, what: str, seed: int) -> dict[str, Any]:
    trained = [i for i in corpus.ids if i in training_slides(part.run)]
    return {
        "bench": "retrieval",
        "what": what,
        "model": part.model.name,
        "run": run_hash(part.run),
        "slides": {s.id: _data(corpus, s.id) for s in part.slides},
        "protocols": dict(part.protocols),
        "train": {i: _data(corpus, i) for i in trained},
        "seed": seed,
    }


def _data(corpus: Corpus, slide: str) -> str:
    return json_hash(corpus.entry(slide)["sha256"])


def _encoder(run: Run) -> FrozenEncoder:
    """The frozen encoder that the run reads niches with; the ungated one where it has none."""
    found = Embedder(run).encoders.get("niche_image")
    if found is not None:
        return found
    entry = find(_UNGATED)
    if not isinstance(entry, FrozenEntry):
        raise TypeError(f"{_UNGATED} is not a frozen encoder")
    return load_frozen(entry, None)


def _three(names: Sequence[str], spot: Pair, niche: Pair) -> Spaces:
    """The space of spots, that of niches, and both."""
    spaces = (
        lambda: spot,
        lambda: niche,
        lambda: (_joined(spot[0], niche[0]), _joined(spot[1], niche[1])),
    )
    return dict(zip(names, spaces, strict=True))


def _centred(pair: Callable[[], Pair]) -> Callable[[], Pair]:
    """Both sides less their mean on the slide."""

    def centred() -> Pair:
        image, gene = pair()
        return image - image.mean(axis=0), gene - gene.mean(axis=0)

    return centred


def _joined(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    """Unit vectors side by side: their cosine is the mean of both cosines."""
    halves = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-30) for v in (a, b)]
    return np.concatenate(halves, axis=1)
