"""What a corpus, a run or a slide is, in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from st_align import store
from st_align.checkpoint import Run, is_run, load_run, shipped
from st_align.corpus import Corpus, is_corpus
from st_align.corpus_overview import corpus_overview
from st_align.diagnose import diagnose
from st_align.errors import ConfigError
from st_align.infer import without_counts
from st_align.io import ReadOptions
from st_align.io.detect import read_one, split_spec
from st_align.predict import Head
from st_align.prepare import slide_warnings, um_per_px
from st_align.provenance import licence_words, licences
from st_align.slide import PreparedSlide, Slide
from st_align.sources import corpus_slide


def overview(
    spec: str, *, verify: bool, no_image: bool, diagnosed: Path | None = None
) -> dict[str, Any]:
    """Look at whatever `spec` names; what is neither corpus, run nor slide is an error.

    With a run, or the name of a checkpoint that ships, `diagnosed` is a corpus it is tried on.
    """
    path, id = split_spec(spec)
    if diagnosed is not None:
        run = load_run(spec)
        return {**_run_overview(run), "diagnosis": diagnose(run, Corpus.open(diagnosed))}
    options = ReadOptions(no_image=no_image)
    if is_corpus(path):
        corpus = Corpus.open(path)
        if id is None:
            return corpus_overview(corpus, verify=verify)
        result = _prepared_overview(corpus_slide(corpus, id, options))
        if verify:
            alone = Corpus(path, {**corpus.manifest, "slides": {id: corpus.entry(id)}})
            result["damaged"] = alone.verify()
        return result
    if is_run(path) or (not path.exists() and spec in shipped()):
        return _run_overview(load_run(spec))
    if not path.exists():
        raise ConfigError(
            f"{spec} does not exist",
            expected="a corpus, a run, a shipped model, a gene head or a slide",
            fix=f"check the path; models that ship: {', '.join(shipped()) or 'none'}",
        )
    if path.suffix == ".safetensors":
        return _head_overview(Head.load(path))
    result = _slide_overview(read_one(spec, options))
    if path.suffix == ".h5ad":
        notes = store.read_notes(path)
        result |= licence_words(notes.get("licences", {})) if notes else {}
    return result


def _run_overview(run: Run) -> dict[str, Any]:
    facts = run.provenance
    return {
        "kind": "run",
        "finished": run.finished,
        "preset": run.config.preset,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "panel": len(run.panel),
        "niche": run.preprocess.niche,
        "default_use": run.config.readout.use,
        "training_slides": [s["id"] for s in facts.get("slides", [])],
        "training_patients": sorted({s["patient"] for s in facts.get("slides", [])}),
        "encoders": {
            role: f"{e['name']} ({e['licence']})" for role, e in facts.get("encoders", {}).items()
        },
        **licence_words(licences(facts)),
        "software": facts.get("software", {}),
    }


def _head_overview(head: Head) -> dict[str, Any]:
    return {
        "kind": "gene head",
        "genes": list(head.panel.genes),
        "model_hash": head.model_hash,
        "fitted_on": sorted(head.slides),
        "n_spots": head.n_spots,
        "cv_error": head.cv_error,
        **licence_words(head.licences),
    }


def _slide_overview(slide: Slide) -> dict[str, Any]:
    return {
        **_slide_facts(slide),
        "warnings": list(slide_warnings(slide, ())),
        "um_per_px": um_per_px(slide),
        "image": None if slide.image is None else list(slide.image.shape),
        "obs": list(slide.obs.columns),
    }


def _prepared_overview(slide: PreparedSlide) -> dict[str, Any]:
    patches = slide.spot_patches
    return {
        **_slide_facts(slide),
        "um_per_px": slide.um_per_px,
        "spot_px": None if patches is None else patches.shape[1],
        "niches": sorted(slide.niches),
        "obs": [name for name in slide.spots if name not in without_counts(slide).spots],
    }


def _slide_facts(slide: Slide | PreparedSlide) -> dict[str, Any]:
    result: dict[str, Any] = {
        "kind": "slide",
        "id": slide.id,
        "technology": slide.technology,
        "n_spots": slide.n_spots,
        "n_genes": None if slide.genes is None else len(slide.genes),
        "patient": slide.patient,
        "patient_origin": slide.patient_origin,
        "warnings": list(slide.warnings),
    }
    umi = slide.total_umi
    if umi is not None and not np.isnan(umi).any():
        result["median_umi"] = float(np.median(umi))
    return result
