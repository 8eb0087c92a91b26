"""`st-align bench hest`: HEST-bench's regression by name, on its folders and official splits.

Targets are ln(1 + raw count), not divided by the library: that is what upstream's loader gives
(hest/bench/st_dataset.py). PCC is taken per gene over all test spots of a split, then over genes,
then over splits, also as upstream; it mixes slides.

Shape letters: M spots with a patch, g genes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from st_align.benchmarks.audit import contenders, parse_model, require_no_leak
from st_align.benchmarks.cells import Bench, Cell, Found, join
from st_align.benchmarks.dots import Column, draw_dots
from st_align.benchmarks.genes_models import MEAN
from st_align.benchmarks.genes_scores import correlation
from st_align.benchmarks.hest_files import Sample, Split, Task, expression, image_slides, read_tasks
from st_align.benchmarks.hest_rows import PROTOCOLS, Fit, Method, Reader, Sections, methods
from st_align.benchmarks.table import Row, markdown, to_json, write_csv
from st_align.checkpoint import load_run
from st_align.corpus import sha256
from st_align.errors import ConfigError, nearest
from st_align.files import replace_file
from st_align.infer import run_hash
from st_align.io.hest import barcodes_of

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class HestRequest:
    """Options of `st-align bench hest`; `weights` are paths of image encoders' by name."""

    protocol: str = "hest-readme"
    models: Sequence[str] = ()
    weights: Mapping[str, str] = field(default_factory=dict)
    allow_leak: bool = False


def bench_hest(root: Path, out: Path, request: HestRequest) -> Found | None:
    """Write results.csv, results.md, hest.png and provenance into `out`; gives what `--json`
    holds and the cells that failed. Ranks share the cells; the first one has the result.

    `root` is the folder of a task, or of several. Raises ConfigError for an unknown protocol or
    no task in `root`, SlideError for files that are missing or do not fit, ModelError for a model
    that was trained on a sample that is tested.
    """
    protocol = request.protocol
    if protocol not in PROTOCOLS:
        raise ConfigError(f"--protocol {protocol} is unknown", fix=nearest(protocol, PROTOCOLS))
    tasks = read_tasks(root)
    models = contenders([(n, load_run(path)) for n, path in map(parse_model, request.models)])
    sections: Sections = {}
    for task in tasks.values() if models else ():
        sections = {**sections, **image_slides(task)}
    tested = {s.id for task in tasks.values() for split in task.splits for s in split.test}
    audit = require_no_leak(
        models, [sections[i] for i in sorted(tested & set(sections))], allow=request.allow_leak
    )
    bench, data = Bench(out), {name: _hashes(task) for name, task in tasks.items()}

    def make_all() -> list[Cell]:
        cells: list[Cell] = []
        for method in methods(sections, models, request.weights):
            for name, task in tasks.items():
                of = Row(slide=name, method=method.name, track=protocol)
                cells += _cells(bench, task, method, of, data[name])
        return cells

    cells = bench.collect(make_all)
    if cells is None:
        return None
    rows = join(cells)
    write_csv(out / "results.csv", rows)
    replace_file(out / "results.md", _page(rows, protocol, audit).encode())
    _draw(out / "hest.png", rows)
    bench.write_provenance(
        bench="hest",
        root=str(root),
        request=dataclasses.asdict(request),
        tasks=data,
        models={c.name: {str(r.path): run_hash(r) for r in c.runs} for c in models},
        audit=audit,
    )
    return to_json(rows, _headline(rows)), bench.failed


def _cells(
    bench: Bench, task: Task, method: Method, of: Row, data: Mapping[str, Sequence[str]]
) -> Iterator[Cell]:
    """The method's cells on a task, one a split; `data` are hashes of the samples' files."""
    if method.reader is None:
        yield Cell(rows=(dataclasses.replace(of, track="", note=method.note),))
        return
    fit = method.fit or PROTOCOLS[of.track]
    for split in task.splits:
        readers = {sample.id: method.reader(sample.id) for sample in split.test}
        row = dataclasses.replace(of, protocol=_worst(readers))
        key = {
            "bench": "hest",
            "train": {sample.id: data[sample.id] for sample in split.train},
            "test": {sample.id: data[sample.id] for sample in split.test},
            "genes": list(task.genes),
            "protocol": of.track,
            "identity": {id: reader.identity for id, reader in readers.items()},
            "held out": row.protocol,
        }

        def make(
            split: Split = split, readers: Mapping[str, Reader] = readers, row: Row = row
        ) -> Cell:
            return Cell(rows=tuple(_score(split, readers, fit, task.genes, row)))

        yield bench.cell(f"{of.slide} {of.method} {split.name} {of.track}", key, row, make)


def _score(
    split: Split, readers: Mapping[str, Reader], fit: Fit, genes: Sequence[str], of: Row
) -> Iterator[Row]:
    """Rows of a split; test samples that are read alike share one fit."""
    taught = [_targets(sample, genes) for sample in split.train]
    true, guess = [], []
    for read in dict.fromkeys(reader.read for reader in readers.values()):
        own = [sample for sample in split.test if readers[sample.id].read is read]
        train = [np.asarray(read(sample), np.float64) for sample in split.train]
        test = np.concatenate([np.asarray(read(sample), np.float64) for sample in own])
        guess.append(fit(train, taught, test))
        true += [_targets(sample, genes) for sample in own]
    yield from _rows(of, split.name, genes, np.concatenate(true), np.concatenate(guess))


def _rows(of: Row, split: str, genes: Sequence[str], true: Floats, guess: Floats) -> Iterator[Row]:
    """Of every gene, then means over genes."""
    by_gene = {"pcc": correlation(true, guess), "mse": ((guess - true) ** 2).mean(axis=0)}
    for metric, values in by_gene.items():
        for gene, value in zip(genes, values.tolist(), strict=True):
            yield _row(of, f"{split}, {gene}", f"{metric} by gene", value)
        known = values[~np.isnan(values)]
        yield _row(of, split, metric, float(known.mean()) if len(known) else np.nan)


def _row(of: Row, item: str, metric: str, value: float) -> Row:
    known = None if np.isnan(value) else value
    return dataclasses.replace(of, item=item, metric=metric, value=known)


def _targets(sample: Sample, genes: Sequence[str]) -> Floats:
    return expression(sample.counts, barcodes_of(sample.patches), genes)


def _worst(readers: Mapping[str, Reader]) -> str:
    return ", ".join(sorted({reader.protocol for reader in readers.values()}))


def _hashes(task: Task) -> dict[str, list[str]]:
    """SHA-256 of patches and counts of each sample; files are large and read once."""
    samples = sorted(task.samples().values())
    return {sample.id: [sha256(sample.patches), sha256(sample.counts)] for sample in samples}


def _page(rows: Sequence[Row], protocol: str, audit: Sequence[str]) -> str:
    """PCC and MSE by task."""
    parts = [f"# HEST-bench, {protocol}\n", "## Leakage audit\n"]
    parts.append("".join(f"- {line}\n" for line in audit or ["no model was given"]))
    for metric, said in (("pcc", "PCC"), ("mse", "MSE of ln(1 + count)")):
        parts += [f"## {said}\n", "Mean ± sd over splits.\n"]
        parts.append(markdown(rows, metric=metric, track=protocol))
    return "\n".join(parts)


def _draw(path: Path, rows: Sequence[Row]) -> None:
    """Means over the splits of each task."""
    columns = []
    for metric, title in (("pcc", "PCC"), ("mse", "MSE of ln(1 + count)")):
        found = _by_task(rows, metric)
        mean = found.get(MEAN, {}).values()
        columns.append(
            Column(title=title, values={m: list(tasks.values()) for m, tasks in found.items()},
                   reference=float(np.mean(list(mean))) if mean else None)
        )  # fmt: skip
    draw_dots(path, columns, said="grey: a task; blue: mean of the tasks; orange: mean predictor")


def _by_task(rows: Sequence[Row], metric: str) -> dict[str, dict[str, float]]:
    """Method -> task -> mean over its splits."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.metric == metric and row.value is not None:
            found.setdefault(row.method, {}).setdefault(row.slide, []).append(row.value)
    return {
        method: {task: float(np.mean(values)) for task, values in tasks.items()}
        for method, tasks in found.items()
    }


def _headline(rows: Sequence[Row]) -> dict[str, float]:
    """Mean PCC of each method over its tasks."""
    found = _by_task(rows, "pcc")
    return {method: float(np.mean(list(tasks.values()))) for method, tasks in found.items()}
