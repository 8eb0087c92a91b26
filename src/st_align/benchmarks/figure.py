"""A slide as a row of maps: histology, truth, and what each method found.

Shape letters: N spots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from st_align.figures import GREY, SlideView, matched_colors
from st_align.files import replacing
from st_align.mosaic import mosaic
from st_align.slide import SPOT_UM, PreparedSlide

_COLUMNS = 5
"""At most; rows are filled evenly."""
_WIDTH = 2.6
_SPOT_PER_PITCH = 0.55


class Map(NamedTuple):
    """Domains [N] of one method and the line under its name."""

    name: str
    found: NDArray[Any]
    said: str = ""


def draw_domains(
    path: Path, slide: PreparedSlide, labels: NDArray[Any], maps: Sequence[Map]
) -> None:
    """Write a PNG: histology where there is an image, the `labels` [N] ('' is grey), each map.

    A domain has the colour of the label that it is matched with (Hungarian, by shared spots), so
    that a colour means the same tissue in every panel. Colours stay apart under colour blindness.
    """
    from matplotlib.figure import Figure

    view = _view(slide)
    x0, x1, y0, y1 = view.extent
    panels = len(maps) + 1 + (view.image is not None)
    rows = -(-panels // _COLUMNS)
    columns = -(-panels // rows)
    aspect = min(max((y1 - y0) / (x1 - x0), 0.3), 3.0)
    size = (_WIDTH * columns, (_WIDTH * aspect + 0.5) * rows + 0.5)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    names = matched_colors(labels.tolist(), None)
    free = iter(grid)
    if view.image is not None:
        _histology(_panel(next(free), "histology", view), view)
    _spots(_panel(next(free), "truth", view), view, labels.tolist(), names)
    for one in maps:
        found = [str(domain) for domain in one.found]
        title = f"{one.name}\n{one.said}" if one.said else one.name
        _spots(_panel(next(free), title, view), view, found, matched_colors(found, labels.tolist()))
    _legend(figure, names, bool((labels == "").any()), columns + 1)
    with replacing(path) as part:
        figure.savefig(part, format="png", facecolor="white")


def _view(slide: PreparedSlide) -> SlideView:
    from scipy.spatial import cKDTree

    xy = slide.spots[["x", "y"]].to_numpy(np.float64)
    if slide.um_per_px is not None:
        diameter = SPOT_UM[slide.technology] / slide.um_per_px
    else:
        diameter = _SPOT_PER_PITCH * float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))
    if not slide.has_image:
        return SlideView(xy=xy, diameter=diameter)
    image, scale = mosaic(slide.niches["lattice"])
    return SlideView(xy=xy, diameter=diameter, image=image, scale=scale)


def _panel(axes: Any, title: str, view: SlideView) -> Any:
    x0, x1, y0, y1 = view.extent
    axes.set_title(title, fontsize=8)
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.set_xlim(x0, x1)
    axes.set_ylim(y1, y0)
    return axes


def _histology(axes: Any, view: SlideView) -> None:
    if view.image is None:
        raise ValueError("a slide without an image has no histology")
    height, width = (side / view.scale for side in view.image.shape[:2])
    x0, x1, y0, y1 = view.extent
    axes.imshow(view.image, extent=(0, width, height, 0), interpolation="antialiased")
    axes.set_xlim(x0, x1)
    axes.set_ylim(y1, y0)


def _spots(axes: Any, view: SlideView, groups: Sequence[str], colors: Mapping[str, str]) -> None:
    """Circles a little larger than the spots: at this size gaps would be all there is to see."""
    from matplotlib.collections import EllipseCollection

    sizes = np.full(len(view.xy), 1.5 * view.diameter)
    axes.add_collection(
        EllipseCollection(
            sizes, sizes, np.zeros(len(sizes)), units="xy", offsets=view.xy,
            offset_transform=axes.transData, linewidths=0,
            facecolors=[colors.get(str(group), GREY) for group in groups],
        )
    )  # fmt: skip


def _legend(figure: Any, colors: Mapping[str, str], unlabelled: bool, columns: int) -> None:
    from matplotlib.lines import Line2D

    shown = dict(colors) | ({"no label": GREY} if unlabelled else {})
    handles = [
        Line2D([], [], marker="o", linestyle="", color=color, label=name)
        for name, color in shown.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
