"""Pictures for the report: spots of their physical size and shape, histology, loss curves.

Every function returns a `data:` URI, so that a page can hold the picture without a file beside
it. Maps carry no text and no background: titles, legends and scales are set by the page.

Shape letters: N spots, H and W pixels of an image.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st_align.keys import UNKNOWN

MAP_PX = 720
"""Width of a map of groups or of the histology; pages show it at half of that."""
SMALL_PX = 520
"""Width of a map of values, of which pages show four in a row."""
GREY = "#b4b8bf"
"""Spots without a value."""
UNKNOWN_COLOR = "#5f6670"
"""Spots unlike all that were labelled: no label, but an answer."""
SEQUENTIAL = "viridis"

_OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_INK = {"light": "#3a3f47", "dark": "#c9ced6"}
_LINE = {"light": "#0072B2", "dark": "#56B4E9"}


@dataclass(frozen=True, kw_only=True)
class SlideView:
    """What a picture of a slide needs: `xy` [N, 2] and `diameter` in full-resolution px, the
    `image` uint8 [H, W, 3] at `scale` image px per full-resolution px, or None. Bins of Visium HD
    are squares, `diameter` wide.
    """

    xy: NDArray[np.float64]
    diameter: float
    image: NDArray[np.uint8] | None = None
    scale: float = 1.0
    is_square: bool = False

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """x0, x1, y0, y1 of the spots with a margin, in full-resolution px."""
        low, high = self.xy.min(axis=0), self.xy.max(axis=0)
        margin = 1.2 * self.diameter + 0.01 * float((high - low).max())
        (x0, y0), (x1, y1) = low - margin, high + margin
        return float(x0), float(x1), float(y0), float(y1)


def palette(n: int) -> list[str]:
    """`n` colours that stay apart under colour blindness: Okabe and Ito's, then the same
    darkened, then lightened; repeated beyond 21.
    """
    base = np.array([_rgb(colour) for colour in _OKABE_ITO])
    shades = np.concatenate([base, 0.55 * base, 0.5 + 0.5 * base])
    hexes = ["#" + "".join(f"{round(255 * c):02x}" for c in shade) for shade in shades]
    return [hexes[i % len(hexes)] for i in range(n)]


def matched_colors(groups: Sequence[str], reference: Sequence[str] | None) -> dict[str, str]:
    """A colour per group; groups take the colours of the `reference` names they overlap most
    (Hungarian matching), so that a domain and its label look the same.

    Both are [N]; '' in either means 'none' and gets no colour. `unknown` is grey: it overlaps with
    nothing.
    """
    found, other = np.asarray(groups), np.asarray(groups if reference is None else reference)
    names, targets = _names(found), _names(other)
    if UNKNOWN in names:
        known = ["" if name == UNKNOWN else name for name in groups]
        return {**matched_colors(known, reference or known), UNKNOWN: UNKNOWN_COLOR}
    colors = palette(max(len(names), len(targets)))
    if reference is None:
        return dict(zip(names, colors, strict=False))
    from scipy.optimize import linear_sum_assignment

    overlap = np.array([[np.sum((found == a) & (other == b)) for b in targets] for a in names])
    rows, columns = linear_sum_assignment(-overlap.reshape(len(names), len(targets)))
    chosen = {names[r]: colors[c] for r, c in zip(rows, columns, strict=True)}
    free = iter(c for c in colors if c not in chosen.values())
    return {name: chosen.get(name) or next(free) for name in names}


def histology(view: SlideView) -> str:
    """The image under the spots, cropped to them; JPEG."""
    figure, axes = _map_figure(view.extent)
    if view.image is not None:
        height, width = (side / view.scale for side in view.image.shape[:2])
        axes.imshow(view.image, extent=(0, width, height, 0), interpolation="antialiased")
        _fit(axes, view.extent)
    return _uri(figure, "jpeg", facecolor="white", pil_kwargs={"quality": 88})


def groups_map(view: SlideView, groups: Sequence[str], colors: Mapping[str, str]) -> str:
    """Spots coloured by group [N]; a group without a colour is grey."""
    figure, axes = _map_figure(view.extent)
    draw_spots(axes, view, facecolors=[colors.get(group, GREY) for group in groups])
    return _map_uri(figure)


def values_map(view: SlideView, values: NDArray[np.floating], low: float, high: float) -> str:
    """Spots coloured by `values` [N] from `low` to `high`; NaN is grey."""
    from matplotlib import colormaps

    span = max(high - low, 1e-12)
    rgba = colormaps[SEQUENTIAL](np.clip((np.nan_to_num(values) - low) / span, 0, 1))
    rgba[~np.isfinite(values)] = (*_rgb(GREY), 1.0)
    figure, axes = _map_figure(view.extent, SMALL_PX)
    draw_spots(axes, view, facecolors=rgba)
    return _map_uri(figure)


def draw_spots(axes: Any, view: SlideView, **colors: Any) -> Any:
    """Spots in data units: they keep their physical size at any zoom and any density. `colors` are
    those of a matplotlib collection; gives that collection.
    """
    from matplotlib.collections import EllipseCollection, PolyCollection

    if view.is_square:
        corners = view.diameter / 2 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
        return axes.add_collection(
            PolyCollection(
                list(view.xy[:, None] + corners), linewidths=0, antialiased=False, **colors
            )
        )
    sizes = np.full(len(view.xy), view.diameter)
    circles = EllipseCollection(
        sizes, sizes, np.zeros(len(sizes)), units="xy", offsets=view.xy,
        offset_transform=axes.transData, linewidths=0, **colors,
    )  # fmt: skip
    return axes.add_collection(circles)


def color_ramp(steps: int = 9) -> list[str]:
    """Colours of the sequential scale, low to high, for a bar drawn by the page."""
    from matplotlib import colormaps, colors

    return [colors.to_hex(colormaps[SEQUENTIAL](x)) for x in np.linspace(0, 1, steps)]


def loss_curves(
    steps: NDArray[np.floating],
    terms: Mapping[str, NDArray[np.floating]],
    chance: Mapping[str, NDArray[np.floating]],
    theme: str,
) -> str:
    """One panel per loss term against the step, beside what guessing costs (ln B, dashed).

    `theme` is 'light' or 'dark': the ink that a page of that kind needs.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.8, 2.9), dpi=180, layout="constrained")
    ink = _INK[theme]
    highest = [max(float(np.nanmax(chance[n])), float(np.nanmax(v))) for n, v in terms.items()]
    for position, (name, values) in enumerate(terms.items(), start=1):
        axes = figure.add_subplot(1, len(terms), position)
        axes.plot(steps, values, color=_LINE[theme], linewidth=0.7, alpha=0.35)
        axes.plot(steps, _running_median(values), color=_LINE[theme], linewidth=1.8)
        axes.plot(steps, chance[name], color=ink, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.annotate(
            "ln B", (1, float(chance[name][-1])), xycoords=("axes fraction", "data"),
            xytext=(-2, 3), textcoords="offset points", ha="right", color=ink, fontsize=9,
        )  # fmt: skip
        axes.set_title(name, loc="left", fontsize=11, color=ink)
        axes.set_ylim(0, 1.1 * max(highest))
        axes.set_xlabel("step", color=ink, fontsize=9)
        axes.tick_params(colors=ink, labelsize=9, length=3)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(ink)
    return _uri(figure, "png", transparent=True)


def _names(groups: NDArray[Any]) -> list[str]:
    """Distinct names; numbers in numerical order."""
    names = {str(g) for g in groups} - {""}
    return sorted(names, key=lambda g: (not g.isdecimal(), int(g) if g.isdecimal() else 0, g))


def _running_median(values: NDArray[np.floating]) -> NDArray[np.floating]:
    from scipy.ndimage import median_filter

    return np.asarray(median_filter(values, size=max(1, len(values) // 40), mode="nearest"))


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _map_figure(extent: tuple[float, float, float, float], width: int = MAP_PX) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    x0, x1, y0, y1 = extent
    aspect = min(max((y1 - y0) / (x1 - x0), 0.2), 4.0)
    figure = Figure(figsize=(width / 100, aspect * width / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_aspect("equal")
    _fit(axes, extent)
    return figure, axes


def _fit(axes: Any, extent: tuple[float, float, float, float]) -> None:
    x0, x1, y0, y1 = extent
    axes.set_xlim(x0, x1)
    axes.set_ylim(y1, y0)


def _map_uri(figure: Any) -> str:
    """A map as PNG with 256 colours, a quarter of the size that all colours need."""
    from PIL import Image

    full, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", transparent=True)
    picture = Image.open(full).quantize(256, method=Image.Quantize.FASTOCTREE)
    picture.save(buffer, "png", optimize=True)
    return _data_uri(buffer, "png")


def _uri(figure: Any, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, **options)
    return _data_uri(buffer, kind)


def _data_uri(buffer: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
