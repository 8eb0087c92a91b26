"""Tables of `bench retrieval`: recall and median rank, and every method against the ridge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st_align.benchmarks.bootstrap import Comparison, compare
from st_align.benchmarks.cells import Cell
from st_align.benchmarks.dots import Column, draw_dots
from st_align.benchmarks.retrieval_scores import KS, NEAR
from st_align.benchmarks.table import Row

CHANCE, RIDGE = "chance", "ridge"
_AT = 10
AIM = 1.2
"""recall@10 over the ridge's that would be worth having."""
_SHOWN = (*(f"recall@{k}" for k in KS), "median rank", f"recall@1 {NEAR}", f"recall@{_AT} {NEAR}")


@dataclass(frozen=True)
class Report:
    """Cells of all models and their ridges."""

    cells: Sequence[Cell]

    def rows(self) -> list[Row]:
        """Of all cells, chance once."""
        return list(dict.fromkeys(row for cell in self.cells for row in cell.rows))

    @cached_property
    def hits(self) -> dict[tuple[str, str], dict[str, NDArray[np.float64]]]:
        """(method, track) -> slide -> 1 where the own spot is among the first ten [N]. Sorted: a
        cell that was read again must draw the same intervals.
        """
        found: dict[tuple[str, str], dict[str, NDArray[np.float64]]] = {}
        for cell in self.cells:
            for name, rank in sorted(cell.arrays.items()):
                method, track, slide = name.split("|", 2)
                hit = (rank <= _AT).astype(np.float64)
                found.setdefault((method, track), {})[slide] = hit
        return found

    def tracks(self) -> list[str]:
        """Direction and gallery, as they come."""
        return list(dict.fromkeys(row.track for row in self.rows() if row.track))

    def markdown(self, audit: Sequence[str], rng: np.random.Generator) -> str:
        """The whole page."""
        parts = ["# Retrieval across modalities\n", "## Leakage audit\n"]
        parts.append("".join(f"- {line}\n" for line in audit))
        failed = dict.fromkeys(f"- {r.method}: {r.note}\n" for r in self.rows() if r.note)
        parts += [*failed]
        for track in self.tracks():
            parts += [f"## {track}\n", self._recall(track), self._against_ridge(track, rng)]
        return "\n".join(parts)

    def headline(self, rng: np.random.Generator) -> dict[str, Any]:
        """recall@10 of the best method of each track over the best ridge's, with its interval."""
        found = {}
        for track in self.tracks():
            ridge = self._best_ridge(track)
            others = [m for m in self._methods(track) if not _is_ridge(m)]
            if ridge is None or not others:
                continue
            best = max(others, key=lambda m: self._mean(m, track))
            ratio = self._compare(best, ridge, track, rng).ratio
            found[track] = {
                "best": best,
                "recall@10": self._mean(best, track),
                "ridge": ridge,
                "ridge_recall@10": self._mean(ridge, track),
                "ratio": None if np.isnan(ratio.value) else ratio.value,
                "ratio_95": None if np.isnan(ratio.low) else [ratio.low, ratio.high],
                "aim_met": bool(ratio.value >= AIM and ratio.low > 1),
            }
        return found

    def draw(self, path: Path) -> None:
        """Write a PNG: recall@10 of every method, a column a track."""
        columns = []
        for track in self.tracks():
            own = [r for r in self.rows() if (r.track, r.metric) == (track, f"recall@{_AT}")]
            values = {
                method: [r.value for r in own if r.method == method and r.value is not None]
                for method in dict.fromkeys(r.method for r in own)
            }
            chance = values.pop(CHANCE, [])
            reference = float(np.mean(chance)) if chance else None
            columns.append(Column(title=track, values=values, reference=reference))
        said = f"recall@{_AT} (grey: a slide; blue: their mean; orange: chance)"
        draw_dots(path, columns, said=said)

    def _recall(self, track: str) -> str:
        lines = []
        for method in dict.fromkeys(r.method for r in self.rows() if r.track == track):
            own = [r for r in self.rows() if (r.method, r.track) == (method, track)]
            cells = [_cell([r.value for r in own if r.metric == name]) for name in _SHOWN]
            protocol = ", ".join(dict.fromkeys(r.protocol for r in own if r.protocol))
            lines.append([method, *cells, protocol])
        return _table(["method", *_SHOWN, "protocol"], lines)

    def _against_ridge(self, track: str, rng: np.random.Generator) -> str:
        ridge = self._best_ridge(track)
        if ridge is None:
            return "No ridge retriever to compare with.\n"
        lines = []
        for method in self._methods(track):
            if not _is_ridge(method):
                difference, ratio = self._compare(method, ridge, track, rng)
                met = "yes" if ratio.value >= AIM and ratio.low > 1 else "no"
                lines.append([method, str(difference), str(ratio), met])
        head = [
            f"recall@{_AT} against {ridge}",
            "difference, 95 %",
            "ratio, 95 %",
            f"{AIM} and > 1",
        ]
        return _table(head, lines)

    def _best_ridge(self, track: str) -> str | None:
        """The ridge with the best recall@10 on these very slides: the comparison favours it."""
        known = [m for m in self._methods(track) if _is_ridge(m)]
        return max(known, key=lambda m: self._mean(m, track)) if known else None

    def _methods(self, track: str) -> list[str]:
        return [method for method, of in self.hits if of == track]

    def _mean(self, method: str, track: str) -> float:
        return float(np.mean([hit.mean() for hit in self.hits[method, track].values()]))

    def _compare(self, method: str, ridge: str, track: str, rng: np.random.Generator) -> Comparison:
        mine, other = self.hits[method, track], self.hits[ridge, track]
        shared = sorted(set(mine) & set(other))
        return compare([mine[s] for s in shared], [other[s] for s in shared], rng)


def _is_ridge(method: str) -> bool:
    return method.partition(",")[0] == RIDGE


def _cell(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return ""
    shown = f"{np.mean(known):.3f}"
    return f"{shown} ± {np.std(known):.3f}" if len(known) > 1 else shown


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    every = [head, ["---"] * len(head), *lines]
    rows = (" | ".join(cell.replace("|", "/") for cell in line) for line in every)
    return "\n".join(f"| {row} |" for row in rows) + "\n"
