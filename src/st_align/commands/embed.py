"""`st-align embed` and `st-align report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from st_align import store
from st_align.checkpoint import is_run, load_run
from st_align.commands.output import print_warnings, require_not_source, require_suffix
from st_align.errors import ConfigError
from st_align.infer import Embedder, to_anndata, training_slides
from st_align.io import ReadOptions
from st_align.report import build_report
from st_align.sources import open_slide


def embed_slide(slide: str, model: str, out: Path, options: ReadOptions) -> dict[str, Any]:
    """`st-align embed`: the embeddings of one slide as AnnData in `out`."""
    require_suffix(out, ".h5ad")
    require_not_source(out, slide)
    run = load_run(model)
    prepared, corpus = open_slide(slide, run.preprocess, options)
    found = Embedder(run, corpus=corpus, progress=True).embed(prepared)
    adata = to_anndata(run, prepared, found)
    store.write_h5ad(adata, out)
    seen = training_slides(run)
    result = {
        "slide": prepared.id,
        "n_spots": prepared.n_spots,
        "n_masked": store.notes(adata)["n_masked"],
        "panel_measured": found.panel_measured,
        "embeddings": {name: adata.obsm[name].shape[1] for name in adata.obsm if "X_" in name},
        "trained_on_slide": prepared.id in seen,
        "trained_on_patient": prepared.patient in seen.values(),
        "warnings": list(found.warnings),
        "out": str(out),
    }
    if result["trained_on_slide"]:
        result["warnings"].append("the model was trained on this slide: it is not new to it")
    print(f"{prepared.id}: {prepared.n_spots:,} spots embedded, {out}")
    print_warnings(result["warnings"])
    return result


def report_on(path: Path, out: Path) -> dict[str, Any]:
    """`st-align report` of a run folder or of a file of ours."""
    require_suffix(out, ".html")
    if is_run(path):
        build_report(out, run=path)
    elif path.suffix == ".h5ad":
        build_report(out, files=[path])
    else:
        raise ConfigError(
            f"{path} is neither a run folder nor an .h5ad file",
            fix="give what st-align train or st-align embed wrote",
        )
    print(f"report: {out}")
    return {"out": str(out)}
