"""`st-align annotate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align import keys, store
from st_align.annotate import Annotation, Labelled, Seen, annotate, reads_embeddings
from st_align.checkpoint import Run, load_run
from st_align.commands.output import print_warnings, require_not_source, require_suffix
from st_align.corpus import Corpus
from st_align.embedded import to_anndata
from st_align.errors import ConfigError, nearest
from st_align.infer import Embedder, SlideEmbeddings, training_slides
from st_align.io import ReadOptions
from st_align.metrics import ari, label_names, nmi
from st_align.slide import PreparedSlide
from st_align.sources import open_slide


def annotate_slide(
    slide: str,
    sources: Sequence[str],
    label_key: str,
    model: str,
    out: Path,
    options: ReadOptions,
) -> dict[str, Any]:
    """`st-align annotate`: labels of annotated slides on one slide, as AnnData in `out`; scored
    where the slide has labels of its own.
    """
    require_suffix(out, ".h5ad")
    for spec in (slide, *sources):
        require_not_source(out, spec)
    run = load_run(model)
    # All are opened before the first is embedded: what cannot be read is told at once.
    prepared, corpus = open_slide(slide, run.preprocess, options)
    opened = [_opened(run, spec, label_key, options) for spec in sources]
    if prepared.id in {one.id for one, _, _ in opened}:
        raise ConfigError(
            f"slide {prepared.id!r} is among the annotated slides",
            expected="slides other than the one that gets labels",
        )
    reader = Embedder(run, progress=True)
    needed = reads_embeddings([one for one, _, _ in opened], prepared)
    annotated = [
        Labelled(
            **vars(seen(run, one, reader.of(corpus).embed(one) if needed else None)), labels=labels
        )
        for one, corpus, labels in opened
    ]
    found = reader.of(corpus).embed(prepared)
    answer = annotate(annotated, seen(run, prepared, found))
    adata = to_anndata(run, prepared, found)
    adata.obs[keys.LABEL] = pd.Categorical(answer.labels)
    adata.obsm[keys.probability(keys.LABEL)] = probabilities(answer, adata.obs_names)
    result = {
        "slide": prepared.id,
        "from": [one.slide.id for one in annotated],
        "label_key": label_key,
        **summary(answer),
        "trained_on_slide": prepared.id in training_slides(run),
    }
    warnings = list(found.warnings)
    if answer.left_out:
        few = ", ".join(f"{name} ({n})" for name, n in answer.left_out.items())
        warnings.append(f"labels with too few spots to be carried over: {few}")
    if result["trained_on_slide"]:
        warnings.append("the model was trained on this slide: it is not new to it")
    if label_key in prepared.spots:
        result |= score(answer, labels_of(prepared.spots, label_key))
    store.note(adata, annotation=result)
    store.write_h5ad(adata, out)
    scores = f", ARI {result['ari']:.3f}" if "ari" in result else ""
    print(f"{prepared.id}: {len(answer.classes)} labels carried over{scores}; {out}")
    print(f"  {answer.folds} left out: {answer.cv_accuracy:.1%} right", end="")
    print(f"; {result['n_unknown']} spots unknown")
    print_warnings(warnings)
    return {**result, "warnings": warnings, "out": str(out)}


def seen(run: Run, slide: PreparedSlide, found: SlideEmbeddings | None) -> Seen:
    """A slide with the run's default embedding where it has that."""
    use = run.config.readout.use
    return Seen(slide=slide, embedding=None if found is None else found.readouts.get(use))


def labels_of(obs: pd.DataFrame, key: str) -> NDArray[np.str_]:
    """[N] labels of a column, `''` where there is none. A ConfigError without the column."""
    if key not in obs:
        raise ConfigError(f"there are no labels {key!r}", fix=nearest(key, map(str, obs)))
    return label_names(obs[key])


def probabilities(answer: Annotation, index: pd.Index) -> pd.DataFrame:
    """[N, C], a column for each label."""
    return pd.DataFrame(answer.probabilities, index=index, columns=list(answer.classes))


def summary(answer: Annotation) -> dict[str, Any]:
    """What a result says of an annotation."""
    return {
        "labels": list(answer.classes),
        "n_unknown": int((answer.labels == keys.UNKNOWN).sum()),
        "cv_accuracy": answer.cv_accuracy,
        "folds": answer.folds,
        "features": list(answer.features),
        "axes": answer.axes,
        "rings": answer.rings,
        "temperature": answer.temperature,
        "left_out": dict(answer.left_out),
    }


def score(answer: Annotation, labels: NDArray[np.str_]) -> dict[str, float]:
    """ARI and NMI of what is stored, accuracy and mean confidence of the nearest label, over the
    labelled spots; nothing where there is none.
    """
    known = labels != ""
    if not known.any():
        return {}
    return {
        "ari": ari(labels, answer.labels),
        "ari_without_unknown": ari(labels, answer.nearest),
        "nmi": nmi(labels, answer.labels),
        "accuracy": float((answer.nearest == labels)[known].mean()),
        "confidence": float(answer.probabilities.max(axis=1)[known].mean()),
        "n_labelled": int(known.sum()),
    }


def _opened(
    run: Run, spec: str, label_key: str, options: ReadOptions
) -> tuple[PreparedSlide, Corpus | None, NDArray[np.str_]]:
    """An annotated slide, its corpus and its labels; the image given for the slide that gets
    labels is not its own.
    """
    usual = ReadOptions(format=options.format, no_image=options.no_image)
    slide, corpus = open_slide(spec, run.preprocess, usual)
    return slide, corpus, labels_of(slide.spots, label_key)
