"""What `bench domains` writes: results.csv, differences.csv, results.md, a figure per slide."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st_align.benchmarks.audit import LEAK
from st_align.benchmarks.bootstrap import Interval
from st_align.benchmarks.cells import Cell
from st_align.benchmarks.domains_paper import printed_columns
from st_align.benchmarks.domains_score import (
    AGREEMENT,
    COHERENCE,
    draw,
    interval,
    resampled_ari,
    scores,
)
from st_align.benchmarks.figure import Map, draw_domains
from st_align.benchmarks.methods import BLIND, ORACLE, REFINED, Floats, Target
from st_align.benchmarks.table import Row, markdown, to_json, write_csv
from st_align.files import replace_file

_TRACKS = (
    (ORACLE, "number of labels known"),
    (ORACLE + REFINED, "number of labels known, smoothed once over the lattice"),
    (BLIND, "number of domains chosen without labels"),
    (BLIND + REFINED, "number of domains chosen without labels, smoothed"),
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the bench found. `cells` are by (slide, method)."""

    targets: Sequence[Target]
    methods: Sequence[str]
    models: Sequence[str]
    cells: Mapping[tuple[str, str], Cell]
    truth: Sequence[Row]
    audit: Sequence[str]
    reference: str
    seed: int

    @property
    def rows(self) -> list[Row]:
        """Of the truth, then method by method."""
        found = [
            row
            for method in self.methods
            for target in self.targets
            for row in self.cells[target.slide.id, method].rows
        ]
        return [*self.truth, *found]


@dataclass(frozen=True)
class Difference:
    """Mean ARI of a method less that of the reference, over the slides that both have."""

    method: str
    slides: tuple[str, ...]
    interval: Interval


def write_report(out: Path, report: Report) -> dict[str, Any]:
    """Write all files into `out`; gives the `--json` result."""
    found = differences(report)
    write_csv(out / "results.csv", report.rows)
    _write_differences(out / "differences.csv", report.reference, found)
    replace_file(out / "results.md", _page(report, found).encode())
    for target in report.targets:
        draw_domains(out / f"{target.slide.id}.png", target.slide, target.labels,
                     _maps(report, target))  # fmt: skip
    return to_json(report.rows, _headline(report, found))


def differences(report: Report) -> list[Difference]:
    """Every method against the reference: oracle K, not refined, paired bootstrap of spots, then
    slides. Methods without a slide in common with the reference are left out.
    """
    resampled: dict[tuple[str, str], Floats] = {}
    observed: dict[tuple[str, str], float] = {}
    for number, target in enumerate(report.targets):
        rng = np.random.default_rng((report.seed, number))
        weights = draw(int((target.labels != "").sum()), rng)
        for method in report.methods:
            runs = report.cells[target.slide.id, method].arrays.get(ORACLE)
            if runs is not None:
                key = (target.slide.id, method)
                resampled[key] = resampled_ari(target.labels, list(runs), weights)
                observed[key] = float(np.mean([_ari(target, run) for run in runs]))
    found = []
    for method in report.methods:
        both = [
            t.slide.id
            for t in report.targets
            if {(t.slide.id, method), (t.slide.id, report.reference)} <= observed.keys()
        ]
        if method != report.reference and both:
            apart = [resampled[s, method] - resampled[s, report.reference] for s in both]
            mean = [observed[s, method] - observed[s, report.reference] for s in both]
            rng = np.random.default_rng((report.seed, len(report.targets)))
            found.append(
                Difference(method, tuple(both), interval(apart, float(np.mean(mean)), rng))
            )
    return found


def _ari(target: Target, run: NDArray[Any]) -> float:
    xy = target.slide.spots[["x", "y"]].to_numpy(np.float64)
    return scores(target.labels, run, xy)["ari"]


def _headline(report: Report, found: Sequence[Difference]) -> dict[str, Any]:
    means: dict[str, list[float]] = {}
    for row in report.rows:
        if row.metric == "ari" and row.track == ORACLE and row.value is not None:
            means.setdefault(row.method, []).append(row.value)
    return {
        "metric": "ari",
        "track": ORACLE,
        "mean": {method: float(np.mean(values)) for method, values in means.items()},
        "reference": report.reference,
        "differences": {
            d.method: {"mean": d.interval.value, "low": d.interval.low,
                       "high": d.interval.high, "slides": list(d.slides)}
            for d in found
        },
        "audit": list(report.audit),
    }  # fmt: skip


def _page(report: Report, found: Sequence[Difference]) -> str:
    """The Markdown: audit, protocol, tables, differences."""
    slides = [target.slide.id for target in report.targets]
    parts = ["# Spatial domains", "## Leakage audit", _audit(report), "## Protocol"]
    parts.append(_protocol(report))
    printed = printed_columns(slides, report.models)
    for track, said in _TRACKS:
        parts.append(f"## ARI, {said}")
        extra = printed if track == ORACLE else None
        parts.append(markdown(report.rows, metric="ari", track=track, columns=slides, extra=extra))
        if track == ORACLE:
            parts.append(_paper(report, printed))
            parts += ["### Differences", _differences(report.reference, found)]
    for metric in (*AGREEMENT[1:], *COHERENCE):
        for track in (ORACLE, ORACLE + REFINED) if metric in COHERENCE else (ORACLE,):
            title = metric.upper() if metric in ("nmi", *COHERENCE) else metric
            parts.append(f"## {title}, {track}")
            parts.append(markdown(_made(report.rows), metric=metric, track=track, columns=slides))
    parts.append("## Number of domains, blind K")
    parts.append(markdown(_made(report.rows), metric="n_domains", track=BLIND, columns=slides))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _made(rows: Sequence[Row]) -> list[Row]:
    """Rows with a value: those without are in the ARI tables, once a track."""
    return [row for row in rows if row.value is not None]


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
        "principal axes; ± is the standard deviation over runs that seed it anew. A row with a "
        "second clusterer in its name is the one its authors use. Unlabelled spots are clustered "
        "but not scored. CHAOS and PAS: lower is more coherent; compare with the truth's own."
    )
    return "\n".join(lines)


def _paper(report: Report, printed: Mapping[str, Any]) -> str:
    if printed:
        return (
            "The columns *paper* are what the paper prints in Table 1 (its data, splits and runs), "
            "not results of ours."
        )
    return "The paper's Table 1 has none of these slides."


def _differences(reference: str, found: Sequence[Difference]) -> str:
    if not found:
        return f"No row has a slide in common with the reference, {reference}."
    lines = [f"| ARI less that of {reference} | difference | 95 % interval | slides |"]
    lines.append("| --- | --- | --- | --- |")
    for one in sorted(found, key=lambda d: -d.interval.value):
        mean, low, high = one.interval
        lines.append(f"| {one.method} | {mean:+.3f} | {low:+.3f} to {high:+.3f} | "
                     f"{len(one.slides)} |")  # fmt: skip
    lines.append(
        "\nPaired bootstrap: the same spots are drawn for both rows, then slides. Neighbouring "
        "spots are not independent and slides are few, so the true intervals are wider; on one "
        "slide they say nothing about other slides."
    )
    return "\n".join(lines)


def _write_differences(path: Path, reference: str, found: Sequence[Difference]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "reference", "metric", "track", "difference", "low", "high",
                     "slides"])  # fmt: skip
    for one in found:
        writer.writerow([one.method, reference, "ari", ORACLE, *one.interval, " ".join(one.slides)])
    replace_file(path, text.getvalue().encode())


def _maps(report: Report, target: Target) -> list[Map]:
    maps = []
    for method in report.methods:
        cell = report.cells[target.slide.id, method]
        if ORACLE in cell.arrays:
            best = cell.arrays[ORACLE][int(cell.arrays[f"{ORACLE} best"])]
            leak = any(row.protocol == LEAK for row in cell.rows)
            said = f"ARI {_ari(target, best):.2f}" + (" (LEAK)" if leak else "")
            maps.append(Map(method, best, said))
    return maps
