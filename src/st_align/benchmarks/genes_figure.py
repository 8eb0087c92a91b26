"""Figure of `bench genes`: error over the mean predictor's, and correlation under its ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from st_align.benchmarks.genes_models import BY_TRAINING
from st_align.benchmarks.genes_report import CEILING, Report
from st_align.files import replacing

_GENE, _MEAN, _CEILING = "#9aa0a6", "#0072b2", "#d55e00"
"""Apart under colour blindness (Okabe and Ito)."""


def draw(path: Path, report: Report) -> None:
    """Write a PNG: a line a method; grey a gene, blue the mean; the bar is the ceiling's range over
    genes (orange its mean). Methods without values are left out: the table lists them.
    """
    from matplotlib.figure import Figure

    every = dict.fromkeys((r.method, r.track) for r in report.rows() if r.metric == "mse")
    genes = list(dict.fromkeys(g for names in report.genes.values() for g in names))
    figure = Figure(figsize=(9, 1.4 + 0.32 * len(every)), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, (method, track) in enumerate(every):
        error = report.by_fold(method, track, [""], "mse_over_mean_predictor")
        left.plot(error, [place] * len(error), ".", color=_GENE)
        left.plot([np.mean(error)], [place], "o", color=_MEAN)
        found = [report.by_fold(method, track, [gene], "pcc") for gene in genes]
        known = [np.mean(values) for values in found if values]
        if known:
            right.plot(known, [place] * len(known), ".", color=_GENE)
            right.plot([np.mean(known)], [place], "o", color=_MEAN)
    left.set_yticks(range(len(every)), [_name(*pair) for pair in every])
    left.invert_yaxis()
    left.axvline(1, color="black", lw=0.8)
    left.set_xlabel("MSE over that of the mean predictor\n(grey: folds; blue: their mean)")
    right.axvline(0, color="black", lw=0.8)
    right.set_xlabel("PCC within a slide\n(grey: genes; orange: their ceilings)")
    reached = [np.sqrt(np.mean(v)) for v in _ceilings(report, genes)]
    if reached:
        right.axvspan(min(reached), max(reached), color=_CEILING, alpha=0.12, lw=0)
        right.axvline(float(np.mean(reached)), color=_CEILING, lw=1.2)
    with replacing(path) as part:
        figure.savefig(part, format="png")


def _ceilings(report: Report, genes: Sequence[str]) -> list[list[float]]:
    found = (report.by_fold(CEILING, "", [gene], CEILING) for gene in genes)
    return [values for values in found if values]


def _name(method: str, track: str) -> str:
    return f"{method} (plain)" if track == BY_TRAINING else method
