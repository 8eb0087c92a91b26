"""The report's section on one .h5ad file: domains beside the histology, genes true and predicted.

Shape letters: N spots, g predicted genes.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from st_align import figures, keys, shown, store
from st_align.provenance import licence_words
from st_align.report import tables

if TYPE_CHECKING:
    from anndata import AnnData

SHOWN_GENES = 6
_METHODS = {
    "gmm": "a Gaussian mixture",
    "kmeans": "k-means",
    "consensus": "a consensus of mixtures",
    "joint consensus": "a consensus of mixtures over all its slides",
    "joint gmm": "one Gaussian mixture over all its slides",
}
_BARS_UM = (100, 200, 500, 1000, 2000, 5000)


def slide_section(path: Path, *, label_key: str | None = None) -> dict[str, Any]:
    """Everything the page shows of one file. A file without coordinates is a SlideError."""
    adata = store.read_h5ad(path)
    with store.naming(path):
        notes = store.notes(adata)
        view = shown.slide_view(adata)
        domains = shown.mapping(notes.get("domains"))
        carried = shown.mapping(notes.get("annotation"))
        label_key = label_key or domains.get("label_key")
        if label_key is None and carried.get("label_key") in adata.obs:
            label_key = carried["label_key"]
        return {
            "id": str(notes.get("slide", path.stem)),
            "facts": _facts(adata, notes),
            "warnings": list(notes.get("warnings") or []),
            "maps": _maps(adata, view, notes, label_key),
            "domain_note": _domain_note(domains, label_key),
            "provenance": tables.flat(shown.mapping(notes.get("provenance"))),
            "next": _next_steps(adata, path),
            **_genes(adata, view),
        }


def _next_steps(adata: AnnData, path: Path) -> list[dict[str, str]]:
    """What the page does not show yet, and the commands that make it."""
    name = shlex.quote(path.name)
    if keys.EMBEDDING not in adata.obsm:
        command = f"st-align embed {name} --model RUN --out {shlex.quote(path.stem)}-embedded.h5ad"
        return [{"what": "This slide is not embedded yet, so it has no domains", "run": command}]
    steps = []
    if keys.DOMAIN not in adata.obs:
        steps.append({"what": "Spatial domains", "run": f"st-align domains {name}"})
    if keys.PREDICTED not in adata.obsm and keys.embedding("image") in adata.obsm:
        command = "st-align genes predict SLIDE --model RUN --head HEAD --out FILE.h5ad"
        steps.append({"what": "Expression predicted from the image", "run": command})
    return steps


def _facts(adata: AnnData, notes: dict[str, Any]) -> dict[str, str]:
    share, size = notes.get("panel_measured"), notes.get("panel_size")
    terms = licence_words(notes.get("licences", {})) if notes else {}
    return tables.facts(
        [
            ("Spots", adata.n_obs),
            ("Genes measured", adata.n_vars or "none: image only"),
            ("Patient", notes.get("patient")),
            ("Tissue", notes.get("tissue")),
            ("Technology", notes.get("technology")),
            ("Model", _model_name(notes)),
            ("Embedding", notes.get("use")),
            ("Panel genes measured", f"{share:.0%} of {size:,}" if adata.n_vars and size else None),
            ("Spots without counts", notes.get("n_masked") or None),
            *((k.capitalize(), text) for k, text in terms.items()),
        ]
    )


def _model_name(notes: dict[str, Any]) -> str | None:
    return f"{notes['model']} ({notes['model_hash'][:12]})" if "model_hash" in notes else None


def _maps(
    adata: AnnData, view: figures.SlideView, notes: dict[str, Any], label_key: str | None
) -> list[dict[str, Any]]:
    maps: list[dict[str, Any]] = []
    if view.image is not None:
        bar = _scale_bar(view, notes.get("um_per_px"))
        uri = figures.histology(view)
        maps.append({"title": "Histology", "note": "", "uri": uri, "bar": bar, "legend": []})
    labels = shown.groups(adata.obs, label_key) if label_key else None
    if keys.DOMAIN in adata.obs:
        groups = shown.groups(adata.obs, keys.DOMAIN)
        colors = figures.matched_colors(groups, labels)
        note = "colours matched to the labels" if labels else ""
        maps.append(_group_map("Domains", note, view, groups, colors))
    if labels and label_key:
        colors = figures.matched_colors(labels, None)
        maps.append(_group_map("Labels", label_key, view, labels, colors))
    if keys.LABEL in adata.obs:
        carried = shown.groups(adata.obs, keys.LABEL)
        colors = figures.matched_colors(carried, labels)
        maps.append(_group_map("Labels carried over", "", view, carried, colors))
    return maps


def _group_map(
    title: str, note: str, view: figures.SlideView, groups: list[str], colors: dict[str, str]
) -> dict[str, Any]:
    counts = Counter(groups)
    legend = [
        {"name": name, "color": color, "share": f"{counts[name] / len(groups):.0%}"}
        for name, color in colors.items()
    ]
    if counts[""]:
        share = f"{counts[''] / len(groups):.0%}"
        legend.append({"name": "none", "color": figures.GREY, "share": share})
    uri = figures.groups_map(view, groups, colors)
    return {"title": title, "note": note, "uri": uri, "bar": None, "legend": legend}


def _scale_bar(view: figures.SlideView, um_per_px: float | None) -> dict[str, Any] | None:
    if not um_per_px:
        return None
    x0, x1, *_ = view.extent
    width = (x1 - x0) * um_per_px
    length = max((bar for bar in _BARS_UM if bar <= width / 4), default=_BARS_UM[0])
    label = f"{length // 1000} mm" if length >= 1000 else f"{length} µm"
    return {"percent": f"{100 * length / width:.2f}", "label": label}


def _domain_note(domains: Mapping[str, Any], label_key: str | None) -> str:
    if not {"method", "use", "n_domains"} <= set(domains):
        return ""
    method = _METHODS.get(domains["method"], domains["method"])
    said = f"{domains['n_domains']} domains by {method} of the {domains['use']} embedding."
    ari = domains.get("ari")
    if ari and label_key:
        spread = f" ± {ari['std']:.3f} over {n} runs" if (n := len(ari["runs"])) > 1 else ""
        said += f" Against {label_key}: ARI {ari['mean']:.3f}{spread}"
        said += f", NMI {domains['nmi']:.3f}." if "nmi" in domains else "."
    return said


def _genes(adata: AnnData, view: figures.SlideView) -> dict[str, Any]:
    """Maps of up to six genes and a table of all."""
    if keys.PREDICTED not in adata.obsm:
        return {"genes": [], "gene_note": "", "gene_table": None}
    predicted = shown.predicted(adata)
    measured = shown.measured(adata, list(predicted.columns))
    table = _agreement(predicted, measured)
    names, choice = _choose(table)
    note = f"The predictor saw the image only; values are log1p of counts per 10,000. {choice}"
    if len(measured.columns):
        note += " Measured and predicted share one colour scale per gene."
    return {
        "genes": [_gene_map(view, name, predicted, measured, table) for name in names],
        "gene_note": note,
        "gene_table": tables.plain_table(table.reset_index()) if len(measured.columns) else None,
    }


def _agreement(predicted: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """One row per gene: correlation and squared error within the slide, best first; NaN where
    the gene was not measured or does not vary.
    """
    rows = {}
    for gene in predicted:
        pcc = mse = np.nan
        if gene in measured:
            use = measured[gene].notna()
            true, guess = measured.loc[use, gene], predicted.loc[use, gene]
            mse = float(((true - guess) ** 2).mean()) if len(true) else np.nan
            if min(true.std(ddof=0), guess.std(ddof=0)) > 0:
                pcc = float(np.corrcoef(true, guess)[0, 1])
        rows[gene] = {"PCC": pcc, "MSE": mse}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["PCC", "MSE"], dtype=float)
    return table.rename_axis("gene").sort_values("PCC", ascending=False, kind="stable")


def _choose(table: pd.DataFrame) -> tuple[list[str], str]:
    """Genes to draw, and the sentence that says how they were chosen: not the winners alone."""
    names = list(table.index)
    if len(names) <= SHOWN_GENES:
        return names, ""
    ranked = list(table.index[table["PCC"].notna()])
    if len(ranked) < SHOWN_GENES:
        return names[:SHOWN_GENES], f"Shown: the first {SHOWN_GENES} of {len(names)} genes."
    middle = len(ranked) // 2 - 1
    chosen = [*ranked[:2], *ranked[middle : middle + 2], *ranked[-2:]]
    said = f"Shown of {len(names)} genes: the two best, two in the middle, the two worst by PCC."
    return chosen, said


def _gene_map(
    view: figures.SlideView,
    name: str,
    predicted: pd.DataFrame,
    measured: pd.DataFrame,
    table: pd.DataFrame,
) -> dict[str, Any]:
    parts = {"predicted": predicted[name].to_numpy(np.float64)}
    if name in measured:
        parts = {"measured": measured[name].to_numpy(np.float64), **parts}
    every = np.concatenate(list(parts.values()))
    low, high = map(float, np.nanpercentile(every, [1, 99]))
    pcc = float(table.loc[name, "PCC"])
    return {
        "name": name,
        "note": f"PCC {pcc:.2f}" if np.isfinite(pcc) else "",
        "parts": [
            {"title": title, "uri": figures.values_map(view, values, low, high)}
            for title, values in parts.items()
        ],
        "scale": {"low": f"{low:z.1f}", "high": f"{high:z.1f}", "colors": figures.color_ramp()},
    }
