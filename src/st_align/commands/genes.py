"""`st-align genes fit` and `st-align genes predict`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from st_align import keys, store
from st_align.batch import Role
from st_align.checkpoint import load_run
from st_align.commands.output import print_warnings, require_not_source, require_suffix
from st_align.corpus import Corpus
from st_align.embedded import to_anndata
from st_align.errors import ConfigError, CorpusError, ModelError, nearest
from st_align.features import Features
from st_align.infer import Embedder, SlideEmbeddings, training_slides, without_counts
from st_align.io import ReadOptions
from st_align.predict import Head, fit_head, predict, score, top_hvg
from st_align.slide import PreparedSlide
from st_align.sources import open_slide

_SCORES = ("mse", "mse_mean_predictor", "pcc")


def fit_genes(
    corpus_path: Path,
    model: str,
    out: Path,
    *,
    genes: Sequence[str] | None,
    top: int | None,
    slides: Sequence[str] | None,
    patients: Sequence[str] | None,
) -> dict[str, Any]:
    """`st-align genes fit`: a head on the run's training slides, narrowed where asked."""
    require_suffix(out, ".safetensors")
    if (genes is None) == (top is None):
        raise ConfigError("say which genes", expected="either --genes or --top-hvg")
    run, corpus = load_run(model), Corpus.open(corpus_path)
    chosen = corpus.slides(_narrow(corpus, training_slides(run), slides, patients))
    names = list(genes) if genes is not None else top_hvg(chosen, top or 0)
    head = fit_head(run, chosen, names, corpus=corpus, progress=True)
    head.save(out)
    print(
        f"{len(head.panel)} genes fitted on {len(head.slides)} slides, {head.n_spots:,} spots; "
        f"error over variance with {head.folds} left out: {head.cv_error:.3f}; {out}"
    )
    return {
        "genes": list(head.panel.genes),
        "slides": sorted(head.slides),
        "n_spots": head.n_spots,
        "alpha": head.alpha,
        "cv_error": head.cv_error,
        "folds": head.folds,
        "out": str(out),
    }


def predict_genes(
    slide: str, model: str, head_path: Path, out: Path, options: ReadOptions
) -> dict[str, Any]:
    """`st-align genes predict`: expression from the image; scored when there are counts."""
    require_suffix(out, ".h5ad")
    require_not_source(out, slide)
    run, head = load_run(model), Head.load(head_path)
    head.require_run(run)
    prepared, corpus = open_slide(slide, run.preprocess, options)
    reader = Embedder(run, corpus=corpus, progress=True)
    features = reader.image_features(prepared)
    predicted = predict(head, reader, prepared, features=features)
    found = _embedded(reader, prepared, features)
    adata = to_anndata(run, prepared, found)
    adata.obsm[keys.PREDICTED] = predicted
    warnings = list(found.warnings)
    result: dict[str, Any] = {"slide": prepared.id, "out": str(out)}
    if prepared.counts is not None:
        result |= score(predicted, prepared, head)
        store.note(adata, genes={name: result[name] for name in _SCORES})
        if not result["genes"]:
            warnings.append("no gene of the head was measured on this slide: nothing to score")
    result["fitted_on_slide"] = prepared.id in head.slides
    result["fitted_on_patient"] = prepared.patient in head.slides.values()
    if result["fitted_on_slide"]:
        warnings.append("the head was fitted on this slide: the scores are not honest")
    if (trust := head.trust(prepared.patient)) < 1:
        warnings.append(
            f"the head knows one patient, this slide is of another ({prepared.patient}): what it "
            f"says beyond the mean is scaled by {trust:g}"
        )
    store.write_h5ad(adata, out)
    print(f"{prepared.id}: {len(head.panel)} genes predicted, {out}")
    if "genes" in result:
        scores = (result[name] for name in _SCORES)
        shown = ("none" if value is None else f"{value:.4f}" for value in scores)
        print("  MSE {}, mean predictor {}, PCC {}".format(*shown))
    print_warnings(warnings)
    return {**result, "warnings": warnings}


def _embedded(
    reader: Embedder, slide: PreparedSlide, features: Mapping[Role, Features | None]
) -> SlideEmbeddings:
    """Embeddings of a slide whose image is known to fit; of the image alone where the counts do
    not fit the model.
    """
    try:
        return reader.embed(slide, features=features)
    except ModelError as error:
        found = reader.embed(without_counts(slide), features=features)
        said = f"the counts are left out of the embeddings: {error.problem}"
        return dataclasses.replace(found, warnings=(*found.warnings, said))


def _narrow(
    corpus: Corpus,
    trained: dict[str, str],
    slides: Sequence[str] | None,
    patients: Sequence[str] | None,
) -> list[str]:
    """Training slides of the run that the corpus holds, those asked for."""
    known = [id for id in corpus.ids if id in trained]
    for id in slides or ():
        if id not in known:
            raise ConfigError(f"the run was not trained on slide {id!r}", fix=nearest(id, known))
    owners = {trained[id] for id in known}
    for patient in patients or ():
        if patient not in owners:
            raise ConfigError(
                f"the run was not trained on patient {patient!r}", fix=nearest(patient, owners)
            )
    chosen = [
        id
        for id in known
        if (not slides or id in slides) and (not patients or trained[id] in patients)
    ]
    if not chosen:
        raise CorpusError(
            f"{corpus.path} holds none of the slides asked for",
            expected=f"training slides of the run: {', '.join(sorted(trained)[:10])}",
        )
    return chosen
