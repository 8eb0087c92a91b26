"""`st-align features`."""

from __future__ import annotations

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
from st_align.features import cached_features, feature_folder, feature_record
from st_align.job import launch, share, total

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


def fill_features(corpus_path: Path, request: FeatureRequest) -> dict[str, Any] | None:
    """`st-align features`: a frozen encoder over every slide of a corpus that has its modality.

    Ranks share the slides; the first one tells of all of them and has the result.
    """
    corpus, entry = Corpus.open(corpus_path), _entry(request)
    view = _view(request, entry)
    fabric = launch()
    encoder = with_field(load_frozen(entry, request.weights), request.patch_um)
    first = fabric.is_global_zero
    if first and entry.modality == "image":
        print(f"{entry.name} sees {sees(encoder)}")
    folders = {id: feature_folder(corpus, id, encoder, view, request.niche) for id in corpus.ids}
    mine = share(fabric, {id: corpus.entry(id)["n_spots"] for id in corpus.ids})
    computed = cached = 0
    for id in tqdm(mine, desc=entry.name, unit="slide", disable=not first):
        there = folders[id].is_dir()
        found = cached_features(corpus, id, encoder, view, niche_spec=request.niche, progress=first)
        cached += there
        computed += found is not None and not there
    computed, cached = total(fabric, computed, cached)
    if not first:
        return None
    if isinstance(encoder, FieldEncoder) and not computed + cached:
        raise CorpusError(
            f"no slide of {corpus_path} was prepared with its image",
            fix="prepare the slides again without --no-image, into a new folder",
        )
    done = {"computed": computed, "cached": cached, "without": len(folders) - computed - cached}
    filled = [id for id in corpus.ids if folders[id].is_dir()]
    genes: dict[str, dict[str, int]] = {}
    if isinstance(encoder, FrozenGenes):
        genes = {id: _gene_facts(encoder, corpus, id, view, request.niche) for id in filled}
    warnings = [w for id in filled for w in feature_record(folders[id]).get("warnings", [])]
    for line in _said(entry, view, done, genes):
        print(line)
    print_warnings(warnings)
    return {
        "encoder": entry.name,
        "what": entry.modality,
        "view": view,
        "patch_um": request.patch_um,
        "fingerprint": encoder.fingerprint,
        **done,
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
    encoder: FrozenGenes, corpus: Corpus, id: str, view: View, niche: str
) -> dict[str, int]:
    """How many genes the encoder knows of a slide, by which route, and the spots without any."""
    slide = corpus.slide(id)
    features = cached_features(corpus, id, encoder, view, niche_spec=niche)
    if slide.genes is None or features is None:
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
