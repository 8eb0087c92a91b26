"""Tables and facts as the page shows them: plain dicts of text, numbers rounded for reading."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

_LESS_IS_BETTER = ("mse", "mae", "chaos", "pas")
_METRIC_TEXT = {
    "ari": "Adjusted Rand index of the domains against the labels: 1 agrees fully, 0 is chance",
    "nmi": "Normalised mutual information of the domains and the labels: 1 agrees fully",
    "mse": "Mean squared error of the predicted genes, log1p of counts per 10,000: less is better",
    "pcc": "Correlation of predicted and measured genes within a slide, mean over genes",
}


def text(value: Any) -> str:
    """A value for a reader: thousands separated, three decimals, lists joined."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value and not 1e-3 <= abs(value) < 1e6:
            return f"{value:.2e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value)) or "none"
    return str(value)


def facts(items: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Name -> text, without what is not known."""
    return {name: text(value) for name, value in items if value not in (None, "", [], ())}


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `section.key` -> text."""
    rows: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            rows |= flat(value, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = text(value)
    return rows


def plain_table(frame: pd.DataFrame, caption: str = "") -> dict[str, Any]:
    """A data frame as it is, without its index."""
    columns = [
        {"name": str(name), "text": not pd.api.types.is_numeric_dtype(frame[name])}
        for name in frame.columns
    ]
    rows = [[_cell(value) for value in row] for row in frame.astype(object).to_numpy().tolist()]
    return {"caption": caption, "columns": columns, "rows": rows}


def score_tables(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """One table per metric (and track): a row per method, a column per slide and their mean.

    A frame without the columns method, metric and mean is one plain table.
    """
    if not {"method", "metric", "mean"} <= set(scores.columns):
        return [plain_table(scores)]
    track = scores["track"].fillna("") if "track" in scores else pd.Series("", scores.index)
    return [
        _metric_table(str(metric), str(name), part)
        for (metric, name), part in scores.groupby([scores["metric"], track], sort=False)
    ]


def _metric_table(metric: str, track: str, part: pd.DataFrame) -> dict[str, Any]:
    name = metric.lower()
    caption = " · ".join(filter(None, [_METRIC_TEXT.get(name, metric), track]))
    slides = list(dict.fromkeys(part["slide"])) if "slide" in part else []
    headings = [str(slide) for slide in slides] or [metric]
    values, spreads = {}, {}
    for row in part.to_dict("records"):
        column = headings[slides.index(row["slide"])] if slides else metric
        values[str(row["method"]), column] = float(row["mean"])
        spreads[str(row["method"]), column] = row.get("std")
    methods = list(dict.fromkeys(part["method"].astype(str)))
    if len(headings) > 1:
        for method in methods:
            found = [values[method, h] for h in headings if (method, h) in values]
            values[method, "mean"] = sum(found) / len(found)
        headings.append("mean")
    best = {h: _best(name, [values.get((m, h)) for m in methods]) for h in headings}
    rows = [
        [
            _cell(method),
            *(
                _cell(values.get((method, h)), spreads.get((method, h)), best=best[h])
                for h in headings
            ),
        ]
        for method in methods
    ]
    columns = [{"name": "method", "text": True}, *({"name": h, "text": False} for h in headings)]
    return {"caption": caption, "columns": columns, "rows": rows}


def _best(metric: str, values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None and math.isfinite(v)]
    if len(known) < 2:
        return None
    return min(known) if metric.startswith(_LESS_IS_BETTER) else max(known)


def _cell(value: Any, spread: Any = None, *, best: float | None = None) -> dict[str, Any]:
    is_best = best is not None and isinstance(value, float) and value == best
    shown = "" if spread is None or math.isnan(float(spread)) else f"{float(spread):.3f}"
    return {"value": text(value), "spread": shown, "best": is_best}
