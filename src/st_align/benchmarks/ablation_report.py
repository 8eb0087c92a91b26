"""Tables of `bench ablation`: both metrics of every configuration, over slides, then seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from st_align.benchmarks.ablation_cells import FULL, PAPER, SENSITIVITY, TABLE_3
from st_align.benchmarks.dots import Column, draw_dots
from st_align.benchmarks.table import Row

_SHOWN = {
    "ARI": "ari",
    "ARI, smoothed": "ari refined",
    "NMI": "nmi",
    "MSE": "mse",
    "MSE / mean predictor's": "mse_over_mean_predictor",
    "PCC": "pcc",
}
_DRAWN = {"ARI (more is better)": "ari", "MSE (less is better)": "mse"}


def markdown(rows: Sequence[Row], setting: Sequence[str], failed: Sequence[str]) -> str:
    """The whole page; failed cells are named first."""
    parts = ["# Ablation\n", "".join(f"- {line}\n" for line in setting)]
    if failed:
        parts += ["Failed, to be tried again by the same command:\n"]
        parts += ["".join(f"- {line}\n" for line in failed)]
    parts += ["## Table 3\n", "Mean over slides, ± sd over seeds.\n", _table(rows, TABLE_3)]
    if any(row.track == SENSITIVITY for row in rows):
        parts += ["## Sensitivity\n", f"One setting of {FULL} changed at a time.\n"]
        parts += [_table(rows, SENSITIVITY)]
    return "\n".join(parts)


def headline(rows: Sequence[Row]) -> dict[str, Any]:
    """Mean ARI and MSE of every configuration."""
    methods = dict.fromkeys(row.method for row in rows)
    return {
        method: {name: _mean(_by_seed(rows, method, name)) for name in ("ari", "mse")}
        for method in methods
    }


def draw(out: Path, rows: Sequence[Row]) -> None:
    """Write `out`/table-3.png and, where there is one, sensitivity.png: both metrics of every
    configuration.
    """
    for track in (TABLE_3, SENSITIVITY):
        shown = _methods(rows, track)
        if not any(row.track == track for row in rows):
            continue
        columns = []
        for title, metric in _DRAWN.items():
            values = {method: _by_seed(rows, method, metric) for method in shown}
            columns.append(
                Column(title=title, values=values, reference=_mean(values.get(FULL, [])))
            )
        said = f"mean over held-out slides (grey: a seed; blue: their mean; orange: {FULL})"
        draw_dots(out / f"{track.lower().replace(' ', '-')}.png", columns, said=said)


def _methods(rows: Sequence[Row], track: str) -> list[str]:
    """Configurations of a table; of sensitivity the full one stands beside."""
    found = dict.fromkeys(row.method for row in rows if row.track == track)
    return [FULL, *found] if track == SENSITIVITY else list(found)


def _table(rows: Sequence[Row], track: str) -> str:
    paper = ["paper, ARI", "paper, MSE"] if track == TABLE_3 else []
    lines = [["configuration", *_SHOWN, *paper, ""]]
    lines.append(["---"] * len(lines[0]))
    for method in _methods(rows, track):
        own = [row for row in rows if row.method == method]
        cells = [_cell(_by_seed(rows, method, metric)) for metric in _SHOWN.values()]
        printed = PAPER.get(method.partition(" (")[0], PAPER.get(method, (None, None)))
        more = ["" if v is None else f"{v:.3f}" for v in printed] if paper else []
        notes = "; ".join(dict.fromkeys(row.note for row in own if row.note))
        lines.append([method, *cells, *more, notes])
    return (
        "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in lines) + "\n"
    )


def _by_seed(rows: Sequence[Row], method: str, metric: str) -> list[float]:
    """Mean over slides of each seed; only values of a slide as a whole."""
    found: dict[int | None, list[float]] = {}
    for row in rows:
        if (row.method, row.metric, row.item) == (method, metric, "") and row.value is not None:
            found.setdefault(row.seed, []).append(row.value)
    return [float(np.mean(values)) for values in found.values()]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {np.std(values):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"
