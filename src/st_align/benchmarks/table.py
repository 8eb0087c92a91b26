"""What every bench writes: tidy CSV, Markdown tables, and rows as JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from st_align.files import replace_file


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number: a method on a slide, with one seed, by one metric.

    A row without a value says in `note` why there is none (`no weights`, `not installed`, a
    failure); it stays in every table.
    """

    slide: str
    method: str
    track: str = ""
    """What the numbers of one table have in common: `oracle K`, `blind K, refined`, a head."""
    item: str = ""
    """What within the slide the value is of: a gene; '' is the slide as a whole."""
    protocol: str = ""
    """How far the method is from the slide: `donor-held-out`, `trained on the slide`, ..."""
    seed: int | None = None
    metric: str = ""
    value: float | None = None
    note: str = ""


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


@dataclass(frozen=True)
class Summary:
    """Values of one slide, method, track, item and metric over seeds; none where it did not run."""

    runs: tuple[float, ...]
    note: str = ""

    @property
    def mean(self) -> float | None:
        """Over the seeds; None without a value."""
        return float(np.mean(self.runs)) if self.runs else None

    @property
    def std(self) -> float | None:
        """Of the seeds (population, as the paper's)."""
        return float(np.std(self.runs)) if self.runs else None


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Tidy table, one row per slide, method, seed and metric; whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        values = (getattr(row, name) for name in COLUMNS)
        writer.writerow(["" if value is None else value for value in values])
    replace_file(path, text.getvalue().encode())


def summarise(rows: Iterable[Row]) -> dict[tuple[str, str, str, str, str], Summary]:
    """(slide, method, track, item, metric) -> its values, in order of first appearance."""
    found: dict[tuple[str, str, str, str, str], list[Row]] = {}
    for row in rows:
        key = (row.slide, row.method, row.track, row.item, row.metric)
        found.setdefault(key, []).append(row)
    return {
        key: Summary(
            tuple(row.value for row in group if row.value is not None),
            next((row.note for row in group if row.note), ""),
        )
        for key, group in found.items()
    }


def to_json(rows: Iterable[Row], headline: Any) -> dict[str, Any]:
    """`--json` of a bench: `rows` with mean, std and runs, and what to quote of them."""
    entries = []
    for (slide, method, track, item, metric), found in summarise(rows).items():
        entry = {
            "slide": slide,
            "method": method,
            "track": track,
            "metric": metric,
            "mean": found.mean,
            "std": found.std,
            "runs": list(found.runs),
        }
        entries.append(entry | {k: v for k, v in (("item", item), ("note", found.note)) if v})
    return {"rows": entries, "headline": headline}


def markdown(
    rows: Sequence[Row],
    *,
    metric: str,
    track: str,
    columns: Sequence[str] | None = None,
    column: Callable[[Row], str] = lambda row: row.slide,
    extra: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """A Markdown table of one metric and track: a line a method, mean +- sd over seeds for each
    slide (or what `column` says), and last the mean over the columns.

    Args:
        rows: of any metric and track; a method whose rows have no value is listed with its note.
        metric: the one shown.
        track: the one shown.
        columns: which, in this order; by default all, as they come.
        column: the column of a row.
        extra: further columns by title: method -> text.

    """
    shown = [r for r in rows if r.track in (track, "") and r.metric in (metric, "")]
    columns = columns or list(dict.fromkeys(column(r) for r in shown if r.value is not None))
    extra = extra or {}
    lines = [["method", *columns, "mean", "protocol", *extra]]
    for method in dict.fromkeys(row.method for row in shown):
        own = [row for row in shown if row.method == method]
        cells = [Summary(_values(r for r in own if column(r) == name)) for name in columns]
        means = [cell.mean for cell in cells if cell.mean is not None]
        overall = f"{np.mean(means):.3f}" if len(means) == len(columns) and means else ""
        notes = dict.fromkeys(row.note for row in own if row.note)
        protocol = ", ".join(dict.fromkeys(row.protocol for row in own if row.protocol))
        said = "; ".join(filter(None, (protocol, *notes)))
        more = [texts.get(method, "") for texts in extra.values()]
        lines.append([method, *map(_cell, cells), overall, said, *more])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(_plain(text) for text in line)} |" for line in lines) + "\n"


def _values(rows: Iterable[Row]) -> tuple[float, ...]:
    return tuple(row.value for row in rows if row.value is not None)


def _cell(summary: Summary) -> str:
    if summary.mean is None:
        return ""
    spread = f" ± {summary.std:.3f}" if len(summary.runs) > 1 else ""
    return f"{summary.mean:.3f}{spread}"


def _plain(text: str) -> str:
    """Text that cannot break a cell."""
    return text.replace("|", "\\|").replace("\n", " ")
