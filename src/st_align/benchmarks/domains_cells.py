"""A cell of `bench domains`: what a method makes of a slide, clustered and scored.

Two files: the embedding, which may have taken an hour of training, is kept by itself, so that
other labels, seeds or numbers of runs do not make it anew.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from st_align.agreement import View
from st_align.benchmarks.cells import Bench, Cell, Cost
from st_align.benchmarks.clusterers import MIXTURE, on_axes
from st_align.benchmarks.domains_score import COHERENCE, coherence, scores
from st_align.benchmarks.methods import (
    BLIND,
    ORACLE,
    REFINED,
    TRUTH,
    Clusterer,
    Embedded,
    Method,
    Target,
)
from st_align.benchmarks.table import Row
from st_align.domains import Clustering, choose_n_domains, refine_labels

TRACKS = (ORACLE, ORACLE + REFINED, BLIND, BLIND + REFINED)
_VIEW, _TRAINING = "view {}", "training {}"


class Scoring(NamedTuple):
    """How embeddings are clustered and scored."""

    label_key: str
    runs: int
    seed: int


def method_cell(bench: Bench, method: Method, target: Target, scoring: Scoring) -> Cell:
    """Rows of a method and of its own clusterer, labels of each run by `labels_key`."""
    of = Row(slide=target.slide.id, method=method.name, protocol=method.protocol(target))
    reason = method.missing(target)
    if reason:
        return Cell(rows=(replace(of, note=reason),))
    key = {
        "bench": "domains",
        "slide": target.hashes[target.slide.id],
        "method": method.name,
        "seed": scoring.seed,
        **method.key(target),
    }
    name = f"{of.slide} {of.method}"
    embedding = bench.cell(f"{name} embedding", key | {"part": "embedding"}, of,
                           lambda: _embedding(method, target, scoring.seed))  # fmt: skip
    if not embedding.arrays:
        return embedding
    clusterers = [MIXTURE, *([method.own] if method.own else [])]
    key |= {
        "part": "domains",
        "label_key": scoring.label_key,
        "protocol": of.protocol,
        "runs": scoring.runs,
        "clusterers": [clusterer.name for clusterer in clusterers],
    }
    found = _embedded(embedding)
    scored = bench.cell(name, key, of, lambda: _scored(found, clusterers, of, target, scoring))
    return replace(scored, costs={"embed": embedding.cost, **scored.costs})


def labels_key(clusterer: str, track: str) -> str:
    """Under which a cell's `arrays` hold labels [R, N]; `best` in place of a track: the run of
    `oracle K` that fits best.
    """
    return f"{clusterer}, {track}" if clusterer else track


def row_name(method: str, clusterer: str) -> str:
    """Of a method read with a clusterer."""
    return f"{method}, {clusterer}" if clusterer else method


def truth_rows(target: Target) -> list[Row]:
    """How coherent the labels themselves are: what CHAOS and PAS are to be compared with."""
    kept = target.labels != ""
    xy = target.slide.spots[["x", "y"]].to_numpy(np.float64)
    found = coherence(target.labels[kept], xy[kept])
    of = Row(slide=target.slide.id, method=TRUTH, note="the labels themselves")
    return [
        replace(of, track=track, metric=metric, value=found[metric])
        for track in TRACKS
        for metric in COHERENCE
    ]


def _embedding(method: Method, target: Target, seed: int) -> Cell:
    with _quiet():
        found = method.embed(target, seed)
    arrays: dict[str, NDArray[Any]] = {"x": on_axes(found.x)}
    for i, view in enumerate(found.views):
        arrays[_VIEW.format(i)] = view.x
        if view.training is not None:
            arrays[_TRAINING.format(i)] = view.training
    if found.counted is not None:
        arrays["counted"] = found.counted
    note = Row(slide=target.slide.id, method=method.name, note=found.note)
    return Cell(rows=(note,), arrays=arrays)


def _embedded(cell: Cell) -> Embedded:
    arrays = cell.arrays
    views = [
        View(arrays[_VIEW.format(i)], arrays.get(_TRAINING.format(i)))
        for i in range(len(arrays))
        if _VIEW.format(i) in arrays
    ]
    return Embedded(
        x=arrays["x"],
        views=tuple(views),
        counted=arrays.get("counted"),
        note=cell.rows[0].note,
    )


def _scored(
    found: Embedded, clusterers: Sequence[Clusterer], of: Row, target: Target, scoring: Scoring
) -> Cell:
    """Cluster and score one embedding in every track, with every clusterer."""
    blind = choose_n_domains(found.x, seed=scoring.seed)
    rows: list[Row] = []
    arrays: dict[str, NDArray[Any]] = {}
    costs: dict[str, Cost] = {}
    for clusterer in clusterers:
        own = replace(of, method=row_name(of.method, clusterer.name), note=found.note)
        if clusterer.name:
            own = replace(own, note="; ".join(filter(None, (found.note, "its own clusterer"))))
            if found.counted is not None:
                blind = choose_n_domains(found.counted, seed=scoring.seed)
        counts = {ORACLE: target.n_labels, BLIND: blind}
        runs, costs[clusterer.name] = _runs(found, clusterer, counts, scoring)
        for track, count in counts.items():
            rough = [run.labels for run in runs[count]]
            smooth = [refine_labels(labels, target.neighbors) for labels in rough]
            for refined, labels in (("", rough), (REFINED, smooth)):
                rows += _rows(own, track + refined, labels, target, scoring.seed)
                arrays[labels_key(clusterer.name, track + refined)] = np.stack(labels)
            rows.append(replace(own, track=track, seed=scoring.seed, metric="n_domains",
                                value=float(count)))  # fmt: skip
        best = int(np.argmax([run.fit for run in runs[target.n_labels]]))
        arrays[labels_key(clusterer.name, "best")] = np.array(best)
    return Cell(rows=tuple(rows), arrays=arrays, costs=costs)


def _runs(
    found: Embedded, clusterer: Clusterer, counts: Mapping[str, int], scoring: Scoring
) -> tuple[dict[int, list[Clustering]], Cost]:
    """Runs by number of domains, labels as 0, 1, ...; and what one run costs."""
    started, runs = Cost.now(), {}
    for count in set(counts.values()):
        with _quiet():
            made = clusterer.find(found, count, scoring.runs, scoring.seed)
        runs[count] = [Clustering(np.unique(m.labels, return_inverse=True)[1], m.fit) for m in made]
    return runs, Cost.since(started, len(runs) * scoring.runs)


def _rows(
    of: Row, track: str, runs: Sequence[NDArray[Any]], target: Target, seed: int
) -> list[Row]:
    xy = target.slide.spots[["x", "y"]].to_numpy(np.float64)
    return [
        replace(of, track=track, seed=seed + run, metric=metric, value=value)
        for run, labels in enumerate(runs)
        for metric, value in scores(target.labels, labels, xy).items()
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What foreign libraries print and warn of stays out of the bench's output."""
    import warnings

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
