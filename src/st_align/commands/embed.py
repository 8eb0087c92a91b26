"""`st-align embed` and `st-align report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from st_align import keys, store
from st_align.checkpoint import Run, is_run, load_run
from st_align.commands.output import print_warnings, require_not_source, require_suffix
from st_align.corpus import Corpus
from st_align.embedded import to_anndata
from st_align.errors import ConfigError, OutputError
from st_align.files import require_writable
from st_align.infer import Embedder, run_hash, training_slides
from st_align.io import ReadOptions
from st_align.job import launch, share, total
from st_align.report import build_report
from st_align.slide import PreparedSlide
from st_align.sources import corpus_slide, open_slide


def embed_slide(slide: str, model: str, out: Path, options: ReadOptions) -> dict[str, Any]:
    """`st-align embed`: the embeddings of one slide as AnnData in `out`."""
    require_suffix(out, ".h5ad")
    require_writable(out)
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


def embed_corpus(path: str, model: str, out: Path, options: ReadOptions) -> dict[str, Any] | None:
    """`st-align embed` of a whole corpus: OUT/ID.h5ad for every slide. What this model made of a
    slide before is kept. Ranks share the slides; the first one has the result.
    """
    if out.suffix == ".h5ad" or out.is_file():
        raise OutputError(
            f"--out {out} is one file, and {path} holds several slides",
            expected="a folder, or one slide",
            fix=f"give a folder, or {path}::ID",
        )
    corpus, run, fabric = Corpus.open(path), load_run(model), launch()
    first = fabric.is_global_zero
    reader, embedded, kept = Embedder(run, corpus=corpus, progress=first), 0, 0
    mine = share(fabric, {id: corpus.entry(id)["n_spots"] for id in corpus.ids})
    for id in tqdm(mine, desc="embed", unit="slide", disable=not first):
        place, slide = out / f"{id}.h5ad", corpus_slide(corpus, id, options)
        if _is_made(place, run, slide):
            kept += 1
            continue
        store.write_h5ad(to_anndata(run, slide, reader.embed(slide)), place)
        embedded += 1
    embedded, kept = total(fabric, embedded, kept)
    if not first:
        return None
    print(f"{embedded} slides embedded, {kept} there already: {out}")
    seen = training_slides(run)
    return {
        "embedded": embedded,
        "kept": kept,
        "trained_on": sorted(set(corpus.ids) & set(seen)),
        "out": str(out),
    }


def _is_made(file: Path, run: Run, slide: PreparedSlide) -> bool:
    """Whether a file holds what this model makes of the slide, with or without its image."""
    if not file.is_file():
        return False
    same_model = store.read_notes(file).get("model_hash") == run_hash(run)
    return same_model and store.holds(file, keys.embedding("image")) == slide.has_image


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
