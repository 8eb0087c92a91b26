"""`st-align features`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from tqdm import tqdm

from st_align.commands.output import print_warnings
from st_align.corpus import Corpus
from st_align.encoders._genes import FrozenGenes
from st_align.encoders.base import FrozenEntry, Modality, View, find, registered
from st_align.encoders.field import FieldEncoder, sees, with_field
from st_align.encoders.lookup import load_frozen
from st_align.errors import ConfigError, CorpusError, nearest
from st_align.features import Features, cached_features, feature_folder, feature_record

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class FeatureRequest:
    """Options of `st-align features`; `what` None is what the encoder reads, `view` None the one
    for which the presets use encoders of its kind: niches for images, spots for genes.
    """

    encoder: str
    weights: Path | None = None
    view: str | None = None
    what: str | None = None
    niche: str = "lattice"
    patch_um: float | None = None


def fill_features(corpus_path: Path, request: FeatureRequest) -> dict[str, Any]:
    """`st-align features`: a frozen encoder over every slide of a corpus that has its modality."""
    corpus, entry = Corpus.open(corpus_path), _entry(request)
    view = _view(request, entry)
    encoder = with_field(load_frozen(entry, request.weights), request.patch_um)
    if entry.modality == "image":
        print(f"{entry.name} sees {sees(encoder)}")
    done: Counter[str] = Counter()
    genes: dict[str, dict[str, int]] = {}
    warnings: list[str] = []
    for id in tqdm(corpus.ids, desc=entry.name, unit="slide"):
        folder = feature_folder(corpus, id, encoder, view, request.niche)
        there = folder.is_dir()
        found = cached_features(corpus, id, encoder, view, niche_spec=request.niche, progress=True)
        done["without" if found is None else "cached" if there else "computed"] += 1
        if found is None:
            continue
        warnings += feature_record(folder).get("warnings", [])
        if isinstance(encoder, FrozenGenes):
            genes[id] = _gene_facts(encoder, corpus, id, found)
    if isinstance(encoder, FieldEncoder) and not done["computed"] + done["cached"]:
        raise CorpusError(
            f"no slide of {corpus_path} was prepared with its image",
            fix="prepare the slides again without --no-image, into a new folder",
        )
    for line in _said(entry, view, done, genes):
        print(line)
    print_warnings(warnings)
    return {
        "encoder": entry.name,
        "what": entry.modality,
        "view": view,
        "patch_um": request.patch_um,
        "fingerprint": encoder.fingerprint,
        **{name: done[name] for name in ("computed", "cached", "without")},
        "genes": genes,
        "warnings": warnings,
    }


def _entry(request: FeatureRequest) -> FrozenEntry:
    """The encoder asked for, if it is a frozen one of the modality asked for."""
    entry, what = find(request.encoder), request.what
    if what is not None and what not in get_args(Modality):
        raise ConfigError(f"--what {what} is unknown", fix=nearest(what, get_args(Modality)))
    frozen = [e for e in registered().values() if isinstance(e, FrozenEntry)]
    fitting = ", ".join(e.name for e in frozen if e.modality == (what or entry.modality))
    if what is not None and entry.modality != what:
        raise ConfigError(
            f"--what {what} does not fit: {entry.name} reads {entry.modality}s",
            expected=f"an encoder of {what}s: {fitting}",
            fix=f"choose one of these, or --what {entry.modality}",
        )
    if not isinstance(entry, FrozenEntry):
        raise ConfigError(
            f"{entry.name} is trained with the model: it has no features to keep",
            expected=f"a frozen encoder of {entry.modality}s: {fitting}",
        )
    return entry


def _view(request: FeatureRequest, entry: FrozenEntry) -> View:
    if request.view is None:
        return "niche" if entry.modality == "image" else "spot"
    if request.view not in get_args(View):
        raise ConfigError(
            f"--view {request.view} is unknown", fix=nearest(request.view, get_args(View))
        )
    return cast(View, request.view)


def _gene_facts(
    encoder: FrozenGenes, corpus: Corpus, id: str, features: Features
) -> dict[str, int]:
    """How many genes the encoder knows of a slide, by which route, and the spots without any."""
    slide = corpus.slide(id)
    if slide.genes is None:
        return {}
    match = encoder.vocabulary.match(slide.genes)
    return {
        "measured": match.n_genes,
        "found": len(match.tokens),
        "by_symbol": match.by_symbol,
        "by_ensembl": match.by_ensembl,
        "by_synonym": match.by_hgnc,
        "spots": slide.n_spots,
        "spots_without_genes": int((~features.pooled.any(axis=1)).sum()),
    }


def _said(
    entry: FrozenEntry,
    view: View,
    done: Mapping[str, int],
    genes: Mapping[str, Mapping[str, int]],
) -> list[str]:
    line = f"{entry.name}, {view} view: {done['computed']} slides computed, "
    line += f"{done['cached']} there already"
    lines = [line + (f", {done['without']} without {entry.modality}s" * (done["without"] > 0))]
    if not genes:
        return lines
    worst = sorted(genes, key=lambda id: genes[id]["found"] / genes[id]["measured"])
    for id in worst[:_SHOWN]:
        g = genes[id]
        lines.append(
            f"  {id}: {g['found']:,} of {g['measured']:,} genes are in the vocabulary: "
            f"{g['by_symbol']:,} by symbol, {g['by_ensembl']:,} by Ensembl id, "
            f"{g['by_synonym']:,} by synonym (HGNC)"
        )
    if len(worst) > _SHOWN:
        lines.append(f"  the other {len(worst) - _SHOWN} slides have larger shares (--json: all)")
    without = sum(g["spots_without_genes"] for g in genes.values())
    total = sum(g["spots"] for g in genes.values())
    lines.append(f"  {without:,} of {total:,} spots express no gene of it: zero vectors")
    return lines
