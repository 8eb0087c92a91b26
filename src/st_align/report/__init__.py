"""The report: one self-contained HTML file about a run, embedded slides and their scores.

It reads files only (a run folder's JSON, our .h5ad files), draws with matplotlib and fills
`report.html`; the template engine escapes every name, and the page loads nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

import st_align
from st_align.errors import ConfigError
from st_align.files import replace_file
from st_align.report.run import run_section
from st_align.report.slide import slide_section
from st_align.report.tables import score_tables


def build_report(
    out: Path,
    *,
    run: Path | None = None,
    files: Sequence[Path] = (),
    scores: pd.DataFrame | None = None,
    title: str = "ST-Align report",
    label_key: str | None = None,
) -> Path:
    """Write the report to `out` and return that path.

    Args:
        out: the HTML file; written whole or not at all.
        run: a run folder: what was trained, on what, its loss curves.
        files: .h5ad files of ours: domains beside the histology, predicted genes.
        scores: a table. With the columns method, metric and mean (slide, track and std if there
            are) it becomes one table per metric; any other is shown as it is.
        title: the heading.
        label_key: obs column with labels to draw beside the domains; None takes the one that
            the file's domains were scored against.

    Raises:
        ConfigError: nothing to report on.
        SlideError, ModelError: a file or the run folder cannot be read.
        OutputError: `out` cannot be written.

    """
    if run is None and not files and scores is None:
        raise ConfigError("nothing to report on", expected="a run folder, .h5ad files or scores")
    page = _template().render(
        title=title,
        subtitle=_subtitle(run, files),
        scores=[] if scores is None else score_tables(scores),
        slides=[slide_section(path, label_key=label_key) for path in files],
        run=None if run is None else run_section(run),
        version=st_align.__version__,
    )
    replace_file(out, page.encode())
    return out


def _template() -> Any:
    import jinja2

    source = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)


def _subtitle(run: Path | None, files: Sequence[Path]) -> str:
    today = datetime.date.today()
    parts = [f"{today.day} {today:%B %Y}"]
    if run is not None:
        parts.append(f"run {run.resolve().name}")
    if files:
        parts.append(f"{len(files)} slide{'s' if len(files) > 1 else ''}")
    return " · ".join(parts)
