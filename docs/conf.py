"""Sphinx settings: `make docs` builds these pages and serves them."""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from st_align import __version__

project = "ST-Align"
author = "The ST-Align developers"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

# Docstrings are written with single backticks for code and Google's section names.
default_role = "code"
# `STAlign` in a signature: the network, and the class that users load, which has its name.
suppress_warnings = ["ref.python"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "ST-Align"
html_static_path = ["_static"]
html_css_files = ["st-align.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "outlines"
copybutton_exclude = ".linenos, .gp, .go"


def _outlines(tex: str) -> str:
    """An equation as one SVG shape: it needs no script, no network and no mathematical font."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import TextPath

    size = 10.0
    outline = TextPath((0, 0), f"${tex}$", size=size, prop=FontProperties(math_fontfamily="cm"))
    letters = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}
    shape = "".join(
        letters[code] + " ".join(f"{x:.2f} {-y:.2f}" for x, y in points.reshape(-1, 2))
        if code in letters
        else "Z"
        for points, code in outline.iter_segments()
    )
    (left, below), (right, above) = outline.get_extents().get_points()
    width, height = right - left, above - below
    return (
        f'<svg class="math" role="img" aria-label="{escape(tex, quote=True)}" '
        f'viewBox="{left:.2f} {-above:.2f} {width:.2f} {height:.2f}" style="'
        f"width:{width / size:.3f}em;height:{height / size:.3f}em;"
        f'vertical-align:{below / size:.3f}em"><path d="{shape}"/></svg>'
    )


def _inline(self: Any, node: nodes.Element) -> None:
    self.body.append(_outlines(node.astext()))
    raise nodes.SkipNode


def _display(self: Any, node: nodes.Element) -> None:
    tex, _, number = node.astext().partition(r"\tag")
    number = f'<span class="number">({number.strip()[1:-1]})</span>' if number else ""
    self.body.append(f'<div class="equation">{_outlines(tex.strip())}{number}</div>')
    raise nodes.SkipNode


def _as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: sketches in them become literal blocks, bars stay bars."""
    # A blank first line keeps napoleon from taking "[N] by run: ..." for a type.
    text: list[str] = [""] if what == "attribute" else []
    sketch = False
    for i, line in enumerate(lines):
        before = lines[i - 1] if i else ""
        if line.strip() and not line.startswith(" "):
            text += [""] * sketch
            sketch = False
        elif line.strip() and not before.startswith(" ") and not before.endswith(":"):
            text += [] if sketch else ["", "::", ""]
            sketch = True
        text.append(line if sketch else re.sub(r"(?<!`)\|(?!`)", r"\\|", line))
    lines[:] = text


def setup(app: Any) -> None:
    """Register the renderer of equations, and the reader of docstrings before napoleon's."""
    app.connect("autodoc-process-docstring", _as_rst, priority=400)
    app.add_html_math_renderer("outlines", (_inline, None), (_display, None))
