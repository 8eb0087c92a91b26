"""Rows of `bench domains` that need no package but this one."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from st_align import keys, store
from st_align.agreement import DIMS, View
from st_align.baselines import linear_niche, spot_pca
from st_align.benchmarks import stimage_clip
from st_align.benchmarks.audit import ON_SLIDE, ZERO_SHOT, Contender
from st_align.benchmarks.cells import SkippedError
from st_align.benchmarks.clusterers import CONSENSUS, KMEANS
from st_align.benchmarks.methods import (
    Embedded,
    Floats,
    Method,
    Target,
    always,
    needs_counts,
    with_genes,
)
from st_align.checkpoint import READOUT, Run
from st_align.commands.domains import views_of
from st_align.corpus import sha256
from st_align.embedded import to_anndata
from st_align.encoders.base import FrozenEncoder, FrozenEntry, find, registered
from st_align.encoders.lookup import find_weights, load_frozen
from st_align.errors import ConfigError, StAlignError, nearest
from st_align.expression import choose_panel
from st_align.features import cached_features, slide_features
from st_align.infer import Embedder, run_hash, without_image
from st_align.job import is_first
from st_align.shared import shared_symbols
from st_align.slide import PreparedSlide, Slide
from st_align.trained import prepare_as

LINEAR = "linear niche, fitted elsewhere"
SHARED_GENES = 4000
"""The linear niche baseline reads the genes that vary most among those all slides measured."""
LINEAR_DIMS = 16

ENCODERS = {
    "CTransPath": ("ctranspath",),
    "UNI": ("uni",),
    "Prov-GigaPath": ("gigapath",),
    "Hibou": ("hibou-l", "hibou-b"),
    "CONCH": ("conch",),
    "scFoundation": ("scfoundation",),
    "scGPT": ("scgpt",),
    "EfficientNet-Lite0": ("efficientnet-lite0",),
}
"""Rows of the paper's Table 1 by encoder (the first whose weights are found), and the ungated
encoder, which the paper does not have.
"""
TOWERS = {
    "CLIP": "clip-vit-b-32",
    "PLIP": "plip",
    "EfficientNet-Lite0 as CLIP": "efficientnet-lite0",
}


def parse_weights(given: Iterable[str]) -> dict[str, str]:
    """`NAME=PATH` of `--weights`; anything else, or an unknown encoder, is a ConfigError."""
    known = (*registered(), "novae")
    pairs = {}
    for item in given:
        name, _, path = item.partition("=")
        if not name or not path:
            raise ConfigError("--weights is NAME=PATH", expected="uni=weights.bin", found=item)
        if name not in known:
            raise ConfigError(f"no encoder is called {name!r}", fix=nearest(name, known))
        pairs[name] = path
    return pairs


def built_in(weights: Mapping[str, str]) -> list[Method]:
    """All rows but the models and the peers; `weights` are paths by encoder."""
    methods = [_frozen(name, names, weights) for name, names in ENCODERS.items()]
    methods.insert(5, Method(name="Scanpy-style PCA", protocol=always(ON_SLIDE), embed=_spot_pca,
                             own=KMEANS, missing=needs_counts))  # fmt: skip
    for name, tower in TOWERS.items():
        methods += [_clip(name, tower, weights, elsewhere) for elsewhere in (False, True)]
    return [*methods, *_linear()]


def model_row(model: Contender, prepared: Mapping[str, Slide | PreparedSlide]) -> Method:
    """A trained model, several folds of one model; `prepared` gives a target's source by id."""

    def embed(target: Target, seed: int) -> Embedded:
        run, _ = model.for_slide(target.slide)
        slide = prepared[target.slide.id]
        if isinstance(slide, Slide):
            slide = prepare_as(run.preprocess, slide)
        found = Embedder(run, corpus=target.corpus, progress=is_first()).embed(slide)
        adata = to_anndata(run, without_image(slide), found)  # without the picture
        note = f"{store.notes(adata)['use']}, {found.panel_measured:.0%} of the panel measured"
        counted, _, views = views_of(adata, None, CONSENSUS.name)
        x = np.asarray(adata.obsm[keys.EMBEDDING])
        return Embedded(x=x, views=tuple(views), counted=counted, note=note)

    return Method(
        name=model.name,
        protocol=lambda target: model.for_slide(target.slide)[1].protocol,
        embed=embed,
        own=CONSENSUS,
        key=lambda target: _run_key(model.for_slide(target.slide)[0]),
    )


def _run_key(run: Run) -> dict[str, str]:
    return {"model": run_hash(run), "axes": sha256(run.path / READOUT)[:12]}


def encoder_vectors(encoder: FrozenEncoder, slide: PreparedSlide, target: Target) -> Floats:
    """[N, D] pooled vectors of a slide's spots, from the corpus's cache where there is one."""
    if target.corpus is not None:
        found = cached_features(target.corpus, slide.id, encoder, "spot", niche_spec="lattice")
    else:
        found = slide_features(slide, encoder, "spot", niche_spec="lattice", progress=is_first())
    if found is None:
        raise SkippedError(f"slide {slide.id} has no {encoder.modality}s")
    return np.asarray(found.pooled, np.float32)


def _spot_pca(target: Target, seed: int) -> Embedded:
    return Embedded(x=spot_pca(target.slide))


def _linear() -> list[Method]:
    def elsewhere(target: Target, seed: int) -> Embedded:
        train = [s for s in target.fit if s.counts is not None]
        names = shared_symbols([target.slide, *train])
        train = [with_genes(s, names) for s in train]
        panel = choose_panel(train, SHARED_GENES).genes
        x = linear_niche(
            [with_genes(s, panel) for s in train], with_genes(target.slide, panel), dims=max(DIMS)
        )
        note = f"{len(panel)} genes, {len(train)} slide{'s' * (len(train) > 1)}"
        return Embedded(x=x[:, :LINEAR_DIMS], views=(View(x),), note=note)

    def on_slide(target: Target, seed: int) -> Embedded:
        panel = choose_panel([target.slide], SHARED_GENES).genes
        slide = with_genes(target.slide, panel)
        return Embedded(x=linear_niche([slide], slide))

    return [
        Method(name=LINEAR, protocol=lambda target: target.protocol, embed=elsewhere,
               own=CONSENSUS, missing=_needs_fit, key=_fit_key),
        Method(name="linear niche, fitted per slide", protocol=always(ON_SLIDE), embed=on_slide,
               missing=needs_counts),
    ]  # fmt: skip


def _needs_fit(target: Target) -> str:
    if needs_counts(target):
        return needs_counts(target)
    train = [s for s in target.fit if s.counts is not None]
    if not train:
        return "no slide to fit on: give slides of other patients, or --protocol section"
    return "" if shared_symbols([target.slide, *train]) else "no gene in common with other slides"


def _fit_key(target: Target) -> dict[str, Any]:
    return {"fit": {s.id: target.hashes.get(s.id, "") for s in target.fit}}


def _weights_of(
    names: Sequence[str], weights: Mapping[str, str]
) -> tuple[FrozenEntry, Path | None]:
    """The first encoder whose weights are given or found; SkippedError when none are."""
    wanted = []
    for name in names:
        entry = find(name)
        if not isinstance(entry, FrozenEntry):
            raise ValueError(f"{name} is not frozen")
        path = find_weights(entry, weights.get(name))
        if path is not None or not entry.info.files:
            return entry, path
        wanted.append(f"{' or '.join(entry.info.files)} from {entry.info.source}")
    raise SkippedError(f"no weights ({'; '.join(wanted)}; --weights {names[0]}=FILE)")


def _missing_weights(names: Sequence[str], weights: Mapping[str, str], target: Target) -> str:
    try:
        entry, _ = _weights_of(names, weights)
    except SkippedError as reason:
        return str(reason)
    slide = target.slide
    there = slide.has_image if entry.modality == "image" else slide.counts is not None
    return "" if there else f"the slide has no {entry.modality}s"


def _load(names: Sequence[str], weights: Mapping[str, str]) -> FrozenEncoder:
    entry, path = _weights_of(names, weights)
    return _loaded(entry.name, path)


@functools.lru_cache(maxsize=1)
def _loaded(name: str, path: Path | None) -> FrozenEncoder:
    """The last encoder is kept: methods are the outer loop, slides the inner one."""
    entry = find(name)
    if not isinstance(entry, FrozenEntry):
        raise ValueError(f"{name} is not frozen")
    return load_frozen(entry, path)


def _weights_key(names: Sequence[str], weights: Mapping[str, str]) -> dict[str, Any]:
    """Where weights that cannot be loaded are noticed when the row is made, not here."""
    try:
        return {"weights": _load(names, weights).fingerprint}
    except (SkippedError, StAlignError):
        return {"weights": "none"}


def _frozen(name: str, names: Sequence[str], weights: Mapping[str, str]) -> Method:
    def embed(target: Target, seed: int) -> Embedded:
        encoder = _load(names, weights)
        return Embedded(x=encoder_vectors(encoder, target.slide, target), note=encoder.name)

    return Method(
        name=name,
        protocol=always(ZERO_SHOT),
        embed=embed,
        missing=lambda target: _missing_weights(names, weights, target),
        key=lambda target: _weights_key(names, weights),
    )


def _clip(name: str, tower: str, weights: Mapping[str, str], elsewhere: bool) -> Method:
    """CLIP or PLIP after STimage-1K4M: trained on the slide itself, or on the fitting slides."""

    def train_slides(target: Target) -> list[PreparedSlide]:
        if not elsewhere:
            return [target.slide]
        return [s for s in target.fit if s.has_image and s.counts is not None]

    def missing(target: Target) -> str:
        reason = _missing_weights((tower,), weights, target) or needs_counts(target)
        if reason or not elsewhere:
            return reason
        train = train_slides(target)
        if not train:
            return "no other slide with image and counts to train on"
        return "" if shared_symbols([target.slide, *train]) else "no gene in common"

    def embed(target: Target, seed: int) -> Embedded:
        encoder, train = _load((tower,), weights), train_slides(target)
        if elsewhere:
            names = shared_symbols([target.slide, *train])
            panel = choose_panel([with_genes(s, names) for s in train], stimage_clip.OVERLAP_GENES)
        else:
            panel = choose_panel(train, stimage_clip.SLIDE_GENES)
        pairs = [stimage_clip.pair(encoder_vectors(encoder, s, target), s, panel) for s in train]
        towers = stimage_clip.train(pairs, seed=seed)
        own = stimage_clip.pair(encoder_vectors(encoder, target.slide, target), target.slide, panel)
        return Embedded(x=towers.embed(own), note=f"{len(panel)} genes, {encoder.name}")

    def key(target: Target) -> dict[str, Any]:
        return _weights_key((tower,), weights) | (_fit_key(target) if elsewhere else {})

    def protocol(target: Target) -> str:
        return target.protocol if elsewhere else ON_SLIDE

    title = f"{name}, trained {'elsewhere' if elsewhere else 'on the slide'}"
    return Method(name=title, protocol=protocol, embed=embed, missing=missing, key=key)
