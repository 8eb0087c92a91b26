"""Tables of `bench genes`: Table 2, the two parts of the error, and what a gene can reach.

A value of a fold is the mean over its test slides; tables show the mean +- sd over folds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st_align.benchmarks.bootstrap import compare
from st_align.benchmarks.cells import Cell
from st_align.benchmarks.genes_data import CATEGORIES, NINE, Fold
from st_align.benchmarks.genes_models import BY_TRAINING, MEAN, PER_SLIDE
from st_align.benchmarks.genes_paper import PAPER
from st_align.benchmarks.genes_scores import POOLED
from st_align.benchmarks.table import Row

CEILING = "reliability"
"""The pseudo-method whose rows say what a gene's scores can reach, and their metric."""
_MOST_GENES = 12
"""Tables have a column for every gene up to here."""
_SUMMARY = {
    "MSE": "mse",
    "MSE / mean predictor's": "mse_over_mean_predictor",
    "MAE": "mae",
    "MAE / mean predictor's": "mae_over_mean_predictor",
    "R2": "r2",
    "PCC within a slide": "pcc",
    "PCC pooled": POOLED,
    "centred MSE / variance": "centred_mse_over_variance",
    "offset error": "offset_mse",
}
Key = tuple[str, str, str, str]
"""Method, track, gene ('' the mean over genes), metric."""


@dataclass(frozen=True)
class Report:
    """Cells of all methods and folds, and the folds' genes."""

    folds: Sequence[Fold]
    genes: Mapping[str, tuple[str, ...]]
    made: Sequence[tuple[Fold, Cell]]

    def rows(self) -> list[Row]:
        """Of all cells."""
        return [row for _, cell in self.made for row in cell.rows]

    @cached_property
    def values(self) -> dict[Key, dict[str, list[float]]]:
        """Key -> fold -> values of its slides."""
        found: dict[Key, dict[str, list[float]]] = {}
        for fold, cell in self.made:
            for row in cell.rows:
                if row.value is not None:
                    key = (row.method, row.track, row.item, row.metric)
                    found.setdefault(key, {}).setdefault(fold.name, []).append(row.value)
        return found

    def by_fold(self, method: str, track: str, items: Sequence[str], metric: str) -> list[float]:
        """A value per fold that has one: the mean over slides, then over `items`."""
        folds = []
        for fold in self.folds:
            found = [
                float(np.mean(self.values[key][fold.name]))
                for key in ((method, track, item, metric) for item in items)
                if fold.name in self.values.get(key, {})
            ]
            if found:
                folds.append(float(np.mean(found)))
        return folds

    def methods(self, track: str) -> list[tuple[str, str]]:
        """(method, its track) of a table: those of this track and those of none."""
        pairs = dict.fromkeys((row.method, row.track) for row in self.rows())
        return [(m, t) for m, t in pairs if m != CEILING and t in (track, "")]

    def markdown(
        self, audit: Sequence[str], remarks: Sequence[str], rng: np.random.Generator
    ) -> str:
        """The whole page."""
        genes = list(dict.fromkeys(gene for names in self.genes.values() for gene in names))
        parts = ["# Expression from the image alone\n", _list(self._what())]
        parts += [
            "## Leakage audit\n",
            _list(audit or ["no model was given"]),
            *map(_line, remarks),
        ]
        for track in (PER_SLIDE, BY_TRAINING):
            parts.append(f"## Ridge features {track}\n")
            if len(genes) <= _MOST_GENES:
                parts += ["MSE (log1p CP10k), mean ± sd over folds:\n", self._by_gene(track, genes)]
            parts += ["Mean over genes, then slides, then folds:\n", self._summary(track, rng)]
        if set(genes) == set(NINE):
            lines = [[method, *printed] for method, printed in PAPER.items()]
            parts += [
                f"## The paper's Table 2\n\n{_PRINTED}",
                _table(["method", *NINE, "overall"], lines),
            ]
        parts += ["## What a gene can reach\n", _REACH]
        if len(genes) <= _MOST_GENES:
            parts.append(self._reach(genes))
        else:
            means = [self._reliability(gene) for gene in genes]
            parts.append(
                f"Mean over {len(genes)} genes: {_mean_of(means)}; by gene in results.csv.\n"
            )
        return "\n".join(parts)

    def headline(self) -> dict[str, Any]:
        """Overall MSE by method and track, and the least."""
        found: dict[str, dict[str, Any]] = {}
        for method, track in dict.fromkeys((r.method, r.track) for r in self.rows()):
            mse = self.by_fold(method, track, [""], "mse")
            if mse:
                pcc = self.by_fold(method, track, [""], "pcc")
                name = f"{method} ({track})" if track else method
                found[name] = {
                    "mse": float(np.mean(mse)),
                    "mse_sd_over_folds": float(np.std(mse)),
                    "mse_over_mean_predictor": _mean(
                        self.by_fold(method, track, [""], "mse_over_mean_predictor")
                    ),
                    "pcc": _mean(pcc),
                }
        least = min(found, key=lambda name: found[name]["mse"]) if found else None
        return {"least_mse": least, "methods": found}

    def _what(self) -> list[str]:
        lines = []
        for fold in self.folds:
            n = len(self.genes[fold.name])
            slides = f"trained on {', '.join(fold.train)}; tested on {', '.join(fold.test)}"
            lines.append(f"{fold.name}: {slides}; {n} genes")
        return lines

    def _by_gene(self, track: str, genes: Sequence[str]) -> str:
        """Table 2: a column a gene and category, then overall."""
        groups: dict[str, Sequence[str]] = {gene: (gene,) for gene in genes}
        if set(genes) == set(NINE):
            groups = {gene: (gene,) for gene in NINE} | dict(CATEGORIES)
        groups |= {"overall": ("",)}
        head = ["method", *groups]
        lines = []
        for method, own in self.methods(track):
            cells = [_cell(self.by_fold(method, own, items, "mse")) for items in groups.values()]
            lines.append([method, *cells])
        return _table(head, lines)

    def _summary(self, track: str, rng: np.random.Generator) -> str:
        head = ["method", *_SUMMARY, "MSE less mean predictor's, 95 %", "protocol"]
        lines = []
        for method, own in self.methods(track):
            cells = [_cell(self.by_fold(method, own, [""], metric)) for metric in _SUMMARY.values()]
            lines.append(
                [method, *cells, self._versus_mean(method, own, rng), self._said(method, own)]
            )
        return _table(head, lines)

    def _versus_mean(self, method: str, track: str, rng: np.random.Generator) -> str:
        mine, other = self._errors(method, track), self._errors(MEAN, "")
        shared = sorted(set(mine) & set(other))
        if not shared or method == MEAN:
            return ""
        return str(compare([mine[s] for s in shared], [other[s] for s in shared], rng).difference)

    def _errors(self, method: str, track: str) -> dict[str, NDArray[np.float64]]:
        """[N] squared error of every spot, mean over genes, by slide."""
        return {
            slide: values
            for _, cell in self.made
            if cell.rows and (cell.rows[0].method, cell.rows[0].track) == (method, track)
            for slide, values in cell.arrays.items()
        }

    def _said(self, method: str, track: str) -> str:
        own = [r for r in self.rows() if (r.method, r.track) == (method, track)]
        return "; ".join(dict.fromkeys(t for r in own for t in (r.protocol, r.note) if t))

    def _reach(self, genes: Sequence[str]) -> str:
        """Ceilings, then the PCC of every method, gene by gene."""
        ceilings = [self._reliability(gene) for gene in genes]
        rows: list[tuple[str, Callable[[float], float]]] = [
            ("reliability", lambda r: r),
            ("PCC at most", lambda r: float(np.sqrt(r))),
            ("centred MSE / variance at least", lambda r: 1 - r),
        ]
        lines = [
            [f"*{name}*", *(_plain(None if r is None else of(r)) for r in ceilings)]
            for name, of in rows
        ]
        for track in (PER_SLIDE, BY_TRAINING):
            for method, own in self.methods(track):
                if own != track and track == BY_TRAINING:
                    continue
                found = [_mean(self.by_fold(method, own, [gene], "pcc")) for gene in genes]
                title = f"PCC, {method}" + (f", {own}" if own else "")
                if any(value is not None for value in found):
                    lines.append([title, *map(_plain, found)])
        return _table(["", *genes], lines)

    def _reliability(self, gene: str) -> float | None:
        return _mean(self.by_fold(CEILING, "", [gene], CEILING))


_PRINTED = (
    "MSE as printed there, on its own patients and slides: levels cannot be compared with those "
    "above.\n"
)
_REACH = (
    "Reliability by count splitting on the test slides: the share of a gene's variance that is not "
    "counting noise. A perfect predictor would have about the PCC and the error that follow from "
    "it.\n"
)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _mean_of(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "no reliability"
    at_most = np.mean(np.sqrt(known))
    return f"reliability {np.mean(known):.3f}, PCC at most {at_most:.3f}"


def _cell(folds: Sequence[float]) -> str:
    if not folds:
        return ""
    spread = f" ± {np.std(folds):.3f}" if len(folds) > 1 else ""
    return f"{np.mean(folds):.3f}{spread}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    every = [head, ["---"] * len(head), *lines]
    return (
        "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in every)
        + "\n"
    )


def _list(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def _line(text: str) -> str:
    return f"{text}\n"
