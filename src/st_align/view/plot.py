"""The view's plot as Bokeh's JSON: histology below, spots above, nothing coloured yet.

Lengths are micrometres where the scale is known, else pixels; y points up, so it is negated.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st_align import figures

MAX_SIDE = 4096
"""Longer images are shrunk: browsers hold no larger texture everywhere."""


def plot_json(view: figures.SlideView, um_per_px: float | None) -> dict[str, Any]:
    """What `Bokeh.embed.embed_item` reads. The page finds `spots`, `source`, `glyph` and `mapper`
    by these names, sets the colours and fits the ranges to the window.
    """
    from bokeh.embed import json_item
    from bokeh.models import (
        Circle,
        ColumnDataSource,
        HoverTool,
        LinearColorMapper,
        PanTool,
        Range1d,
        Rect,
        WheelZoomTool,
    )
    from bokeh.plotting import figure

    unit = um_per_px or 1.0
    x0, x1, y0, y1 = (unit * side for side in view.extent)
    pan, wheel = PanTool(), WheelZoomTool(zoom_on_axis=False)
    plot = figure(
        name="plot", output_backend="webgl", sizing_mode="stretch_both", min_border=0,
        x_range=Range1d(x0, x1), y_range=Range1d(-y1, -y0), tools=[pan, wheel],
        toolbar_location=None, background_fill_color=None, border_fill_color=None,
        outline_line_color=None, x_axis_type=None, y_axis_type=None, lod_threshold=None,
    )  # fmt: skip
    plot.toolbar.active_drag, plot.toolbar.active_scroll = pan, wheel
    plot.grid.visible = False
    if view.image is not None:
        height, width = (unit * side / view.scale for side in view.image.shape[:2])
        plot.image_url(url=[_image_uri(view.image)], x=0, y=0, w=width, h=height, anchor="top_left")
    source = ColumnDataSource(
        {
            "x": (unit * view.xy[:, 0]).astype(np.float32),
            "y": (-unit * view.xy[:, 1]).astype(np.float32),
            "value": np.full(len(view.xy), np.nan, np.float32),
        },
        name="source",
    )
    mapper = LinearColorMapper(
        palette=["#000000"], low=0, high=1, nan_color=figures.GREY, name="mapper"
    )
    side = unit * view.diameter
    look: dict[str, Any] = {"line_color": None, "fill_alpha": 0.9, "name": "glyph"}
    look["fill_color"] = {"field": "value", "transform": mapper}
    glyph = (
        Rect(x="x", y="y", width=side, height=side, **look)
        if view.is_square
        else Circle(x="x", y="y", radius=side / 2, **look)
    )
    spots = plot.add_glyph(source, glyph, name="spots", nonselection_glyph=None)
    plot.add_tools(HoverTool(renderers=[spots], tooltips=None))
    if um_per_px:
        plot.add_layout(_scale_bar(plot.x_range))
    return dict(json_item(plot))


def _scale_bar(span: Any) -> Any:
    from bokeh.models import MetricLength, ScaleBar

    return ScaleBar(
        range=span, unit="µm", dimensional=MetricLength(), location="bottom_left", bar_length=0.1,
        background_fill_alpha=0.85, border_line_color=None, label_text_color="#1d2127",
        bar_line_color="#1d2127",
    )  # fmt: skip


def _image_uri(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
