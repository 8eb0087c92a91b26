"""The view: one self-contained HTML file in which a person looks around on one slide.

Bokeh draws it, embedded whole: it has circles with a radius in micrometres, so spots keep their
physical size while one zooms into the histology (other libraries fix their size in screen px),
draws them with WebGL and is a third of plotly's size. The page's policy for content lets only the
three scripts run that it names by their hashes, and loads nothing: even a name that slipped
through the escaping could not run. ('unsafe-eval' is for them: Bokeh compiles its WebGL calls.)
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import st_align
from st_align import figures, shown, store
from st_align.files import replace_file
from st_align.view.layers import GeneLayers, gene_layers, group_layers
from st_align.view.plot import plot_json

_SCRIPTS = ("bokeh", "bokeh-gl")


def build_view(
    file: Path, out: Path, *, genes: Sequence[str] | None = None, label_key: str | None = None
) -> dict[str, Any]:
    """Write the page of one .h5ad file to `out`, whole or not at all.

    Args:
        file: a file of ours, or any AnnData with coordinates in `obsm['spatial']`.
        out: the HTML file.
        genes: those to show; None takes the predicted ones and the most variable ones.
        label_key: obs column with labels, whose colours the domains take; None takes the one that
            the file's domains were scored against.

    Returns:
        What can be shown: `{"slide", "n_spots", "image", "groups", "genes", "out"}`.

    Raises:
        SlideError: the file is no AnnData, has no coordinates, or lacks a gene or column asked for.
        OutputError: `out` cannot be written.

    """
    adata = store.read_h5ad(file)
    with store.naming(file):
        notes = store.notes(adata)
        view = shown.slide_view(adata)
        label_key = label_key or shown.mapping(notes.get("domains")).get("label_key")
        groups = group_layers(adata.obs, label_key)
        values = gene_layers(adata, genes)
        slide = str(notes.get("slide", file.stem))
        data = {
            "barcodes": adata.obs_names.astype(str).tolist(),
            "groups": groups,
            "genes": values.genes,
            "ramps": values.ramps,
            "grey": figures.GREY,
            "image": view.image is not None,
        }
        plot = plot_json(view, shown.positive(notes.get("um_per_px")))
    page = _page(slide, _facts(notes, adata.n_obs), values, data, plot)
    replace_file(out, page.encode())
    return {
        "slide": slide,
        "n_spots": adata.n_obs,
        "image": view.image is not None,
        "groups": [layer["title"] for layer in groups],
        "genes": [gene["name"] for gene in values.genes],
        "out": str(out),
    }


def _facts(notes: dict[str, Any], n_spots: int) -> dict[str, str]:
    known = {name.title(): str(notes.get(name) or "") for name in ("patient", "tissue")}
    return {"Spots": f"{n_spots:,}"} | {name: text for name, text in known.items() if text}


def _page(
    slide: str, facts: dict[str, str], genes: GeneLayers, data: dict[str, Any], plot: dict[str, Any]
) -> str:
    import jinja2

    scripts = [*_bokeh_scripts(), _resource("view.js")]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {
        "sort_keys": False
    }  # Bokeh defines before it refers
    return environment.from_string(_resource("view.html")).render(
        slide=slide,
        facts=facts,
        unit=genes.unit,
        choice=genes.choice,
        data=data,
        plot=plot,
        scripts=scripts,
        hashes=" ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
        version=st_align.__version__,
    )


def _bokeh_scripts() -> list[str]:
    """Bokeh's own scripts; none of them may end the element that holds it."""
    folder = resources.files("bokeh").joinpath("server", "static", "js")
    scripts = [folder.joinpath(f"{name}.min.js").read_text(encoding="utf-8") for name in _SCRIPTS]
    return [script.replace("</script", "<\\/script") for script in scripts]


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
