"""A figure of any bench: a line a method, a column a metric; grey values, blue their mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from st_align.files import replacing

GREY, BLUE, ORANGE = "#9aa0a6", "#0072b2", "#d55e00"
"""Apart under colour blindness (Okabe and Ito)."""
_LINE, _MARGIN = 0.24, 1.2
_COLUMN, _NAMES = 2.6, 2.8


@dataclass(frozen=True, kw_only=True)
class Column:
    """One metric: values by method (slides, seeds or splits), none where it did not run."""

    title: str
    values: Mapping[str, Sequence[float]]
    reference: float | None = None
    """An orange line: chance, or what the others are compared with."""


def draw_dots(path: Path, columns: Sequence[Column], *, said: str) -> None:
    """Write a PNG of `columns` side by side; `said` under it tells what the dots and the line are.

    Methods stand in the order in which they come; those without any value are left out.
    """
    from matplotlib.figure import Figure

    names = [m for m in dict.fromkeys(m for c in columns for m in c.values)
             if any(len(c.values.get(m, ())) for c in columns)]  # fmt: skip
    size = (_NAMES + _COLUMN * len(columns), _MARGIN + _LINE * len(names))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(grid, columns, strict=True):
        for place, name in enumerate(names):
            values = column.values.get(name, ())
            if len(values):
                axes.plot(values, [place] * len(values), ".", color=GREY)
                axes.plot([np.mean(values)], [place], "o", color=BLUE)
        if column.reference is not None:
            axes.axvline(column.reference, color=ORANGE, lw=1.2)
        axes.set_title(column.title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="#e6e8ea", lw=0.6)
        axes.set_axisbelow(True)
    grid[0].set_yticks(range(len(names)), names)
    grid[0].invert_yaxis()
    figure.supxlabel(said, fontsize=8)
    with replacing(path) as part:
        figure.savefig(part, format="png", facecolor="white")
