"""What `bench domains` writes: results.csv, differences.csv, results.md, a figure per slide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st_align.benchmarks.audit import LEAK
from st_align.benchmarks.cells import Cell, Cost
from st_align.benchmarks.domains_cells import TRACKS, labels_key, row_name
from st_align.benchmarks.domains_differences import (
    Difference,
    differences,
    differences_table,
    write_differences,
)
from st_align.benchmarks.domains_paper import printed_columns
from st_align.benchmarks.domains_score import AGREEMENT, COHERENCE, resampled_ari
from st_align.benchmarks.figure import Map, draw_domains
from st_align.benchmarks.methods import BLIND, ORACLE, REFINED, Method, Target
from st_align.benchmarks.table import Row, markdown, to_json, write_csv
from st_align.files import replace_file

_SAID = (
    (ORACLE, "number of labels known"),
    (ORACLE + REFINED, "number of labels known, smoothed once over the lattice"),
    (BLIND, "number of domains chosen without labels"),
    (BLIND + REFINED, "number of domains chosen without labels, smoothed"),
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the bench found. `cells` are by (slide, method)."""

    targets: Sequence[Target]
    methods: Sequence[Method]
    models: Sequence[str]
    cells: Mapping[tuple[str, str], Cell]
    truth: Sequence[Row]
    audit: Sequence[str]
    references: Sequence[str]
    """The first is the one of the headline."""
    seed: int

    @property
    def rows(self) -> list[Row]:
        """Of the truth, then method by method."""
        found = [
            row
            for method in self.methods
            for target in self.targets
            for row in self.cells[target.slide.id, method.name].rows
        ]
        return [*self.truth, *found]

    @property
    def shown(self) -> list[tuple[str, str, str]]:
        """Rows with their method and clusterer, in order."""
        return [
            (row_name(method.name, own), method.name, own)
            for method in self.methods
            for own in method.read_by
        ]

    def found(self) -> dict[tuple[str, str, str], NDArray[Any]]:
        """(slide, row, track) -> labels [R, N]."""
        return {
            (target.slide.id, row, track): arrays[labels_key(own, track)]
            for row, method, own in self.shown
            for target in self.targets
            if (arrays := self.cells[target.slide.id, method].arrays)
            for track in TRACKS
        }


def write_report(out: Path, report: Report) -> dict[str, Any]:
    """Write all files into `out`; gives the `--json` result."""
    found = differences(report.targets, report.found(), report.references, report.seed)
    write_csv(out / "results.csv", report.rows)
    write_differences(out / "differences.csv", found)
    replace_file(out / "results.md", _page(report, found).encode())
    for target in report.targets:
        draw_domains(out / f"{target.slide.id}.png", target.slide, target.labels,
                     _maps(report, target))  # fmt: skip
    return to_json(report.rows, _headline(report, found))


def _headline(report: Report, found: Sequence[Difference]) -> dict[str, Any]:
    means: dict[str, list[float]] = {}
    for row in report.rows:
        if row.metric == "ari" and row.track == ORACLE and row.value is not None:
            means.setdefault(row.method, []).append(row.value)
    return {
        "metric": "ari",
        "track": ORACLE,
        "mean": {method: float(np.mean(values)) for method, values in means.items()},
        "reference": report.references[0],
        "differences": {
            d.method: {"mean": d.interval.value, "low": d.interval.low,
                       "high": d.interval.high, "slides": list(d.slides)}
            for d in found
            if (d.reference, d.track) == (report.references[0], ORACLE)
        },
        "audit": list(report.audit),
    }  # fmt: skip


def _page(report: Report, found: Sequence[Difference]) -> str:
    """The Markdown: audit, protocol, tables, differences."""
    slides = [target.slide.id for target in report.targets]
    parts = ["# Spatial domains", "## Leakage audit", _audit(report), "## Protocol"]
    parts.append(_protocol(report))
    printed = printed_columns(slides, report.models)
    for track, said in _SAID:
        parts.append(f"## ARI, {said}")
        shown = report.rows if track == ORACLE else _brief(report.rows)
        extra = printed if track == ORACLE else None
        parts.append(markdown(shown, metric="ari", track=track, columns=slides, extra=extra))
        if track == ORACLE:
            parts.append(_paper(printed))
        parts += [f"### Differences, {track}", differences_table(found, track)]
        if track == ORACLE:
            parts.append(_INTERVALS)
    for metric in (*AGREEMENT[1:], *COHERENCE):
        for track in (ORACLE, ORACLE + REFINED) if metric in COHERENCE else (ORACLE,):
            title = metric.upper() if metric in ("nmi", *COHERENCE) else metric
            parts.append(f"## {title}, {track}")
            parts.append(markdown(_brief(report.rows), metric=metric, track=track, columns=slides))
    parts.append("## Number of domains, blind K")
    parts.append(markdown(_brief(report.rows), metric="n_domains", track=BLIND, columns=slides))
    parts += ["## Time", _times(report)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _brief(rows: Sequence[Row]) -> list[Row]:
    """Rows with a value and without their notes: the first table has those."""
    return [replace(row, note="") for row in rows if row.value is not None]


def _audit(report: Report) -> str:
    if not report.audit:
        return "No trained model was given: nothing to audit."
    lines = [f"- {line}" for line in report.audit]
    if any(LEAK in line for line in report.audit):
        lines.insert(0, f"**{LEAK}: rows that say so are no result** (`--allow-leak` was given).\n")
    return "\n".join(lines)


def _protocol(report: Report) -> str:
    lines = []
    for target in report.targets:
        slide, labelled = target.slide, int((target.labels != "").sum())
        fit = ", ".join(s.id for s in target.fit) or "none"
        lines.append(
            f"- **{slide.id}** (patient {slide.patient}): {slide.n_spots:,} spots, {labelled:,} "
            f"labelled, {target.n_labels} labels. Axes of rows fitted elsewhere ({target.protocol})"
            f" come from: {fit}."
        )
    lines.append(
        "\nOne clusterer for every row: a Gaussian mixture with one covariance, on at most 30 "
        "principal axes; ± is the standard deviation over runs that seed it anew. A clusterer in a "
        "row's name is the one that the method's authors use. A method that is trained on the "
        "slide is trained once. Unlabelled spots are clustered but not scored. CHAOS and PAS: "
        "lower is more coherent; compare with the truth's own."
    )
    return "\n".join(lines)


def _paper(printed: Mapping[str, Any]) -> str:
    if printed:
        return (
            "The columns *paper* are what the paper prints in Table 1 (its data, splits and runs), "
            "not results of ours."
        )
    return "The paper's Table 1 has none of these slides."


_INTERVALS = (
    "In brackets the 95 % interval of a paired bootstrap: the same spots are drawn for both rows, "
    "then slides. Neighbouring spots are not independent and slides are few, so the true intervals "
    "are wider; on one slide they say nothing about other slides."
)


def _times(report: Report) -> str:
    """Seconds of each row: the embedding, training included, and one run of its clusterer."""
    lines = ["| row | embedding | one run of the clusterer | both, processor time | slides |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for row, method, own in report.shown:
        cells = [report.cells[target.slide.id, method] for target in report.targets]
        costs = [(cell.costs["embed"], cell.costs[own]) for cell in cells if cell.costs]
        if costs:
            embed, once = (Cost(*np.mean(of, axis=0)) for of in zip(*costs, strict=True))
            lines.append(f"| {row} | {embed.wall:.1f} | {once.wall:.1f} | "
                         f"{embed.cpu + once.cpu:.1f} | {len(costs)} |")  # fmt: skip
    lines.append(
        "\nSeconds a slide, mean over slides, on the machine and on the day a cell was made."
    )
    return "\n".join(lines)


def _maps(report: Report, target: Target) -> list[Map]:
    maps = []
    for row, method, own in report.shown:
        cell = report.cells[target.slide.id, method]
        if cell.arrays:
            best = cell.arrays[labels_key(own, ORACLE)][int(cell.arrays[labels_key(own, "best")])]
            ari = resampled_ari(target.labels, [best], np.ones((1, (target.labels != "").sum())))
            leak = any(r.protocol == LEAK for r in cell.rows)
            maps.append(Map(row, best, f"ARI {ari[0]:.2f}" + (" (LEAK)" if leak else "")))
    return maps
