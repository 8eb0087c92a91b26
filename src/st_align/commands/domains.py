"""`st-align domains`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align import keys, store
from st_align.agreement import View
from st_align.domains import assign_domains
from st_align.errors import ConfigError, OutputError, SlideError, StAlignError, nearest
from st_align.files import require_writable
from st_align.geometry import neighbors
from st_align.metrics import score_domains
from st_align.slide import LATTICE

if TYPE_CHECKING:
    from anndata import AnnData


_COUNTING_AXES = 12
"""How many domains there are is read off so many linear axes."""


@dataclass(frozen=True, kw_only=True)
class DomainRequest:
    """Options of `st-align domains`; None is the default: of `use` the model's and both linear
    ones, of `method` a consensus.
    """

    n_domains: str = "auto"
    use: str | None = None
    label_key: str | None = None
    method: str | None = None
    refine: bool = False
    runs: int = 5
    seed: int = 0


def find_domains(
    files: Sequence[Path], request: DomainRequest, *, out: Path | None = None
) -> dict[str, Any]:
    """`st-align domains`: domains of embedded slides, written into their files or to `out` (a
    file for one slide, a folder for several), scored where `label_key` is given.

    A slide that cannot be read, clustered or written leaves all files as they were.
    """
    slides: dict[str, Any] = {}
    with ExitStack() as written:
        for path, target in zip(files, targets_of(files, out), strict=True):
            adata = store.read_h5ad(path)
            with store.naming(path):
                entry = slide_domains(adata, request, progress=True)
                name = str(store.notes(adata).get("slide", path.stem))
            slides[name if name not in slides else str(path)] = entry
            print(f"{name}: {_domain_words(entry)}")
            written.enter_context(store.writing(adata, target))
    print(f"written: {out or ', '.join(map(str, files))}")
    result: dict[str, Any] = {"slides": slides}
    if request.label_key:
        result["mean_ari"] = float(np.mean([s["ari"]["mean"] for s in slides.values()]))
    return result


def slide_domains(
    adata: AnnData, request: DomainRequest, *, progress: bool = False
) -> dict[str, Any]:
    """Domains of one embedded slide into its `obs` and notes; what was done, with scores."""
    labels, method = labels_of(adata, request.label_key), request.method or "consensus"
    x, names, views = views_of(adata, request.use, method)
    found = assign_domains(
        x,
        number_of(request.n_domains),
        method=method,
        runs=request.runs,
        seed=request.seed,
        neighbors=_lattice(adata, required=request.refine),
        refine=request.refine,
        views=views,
        progress=progress,
    )
    adata.obs[keys.DOMAIN] = pd.Categorical([str(k) for k in found.labels])
    entry: dict[str, Any] = {
        "method": method,
        "use": "+".join(names),
        "n_domains": found.n_domains,
        "refined": request.refine,
        "seed": request.seed,
    }
    if labels is not None:
        entry |= {"label_key": request.label_key, **score_domains(found, labels)}
    store.note(adata, domains=entry)
    return entry


def views_of(
    adata: AnnData, asked: str | None, method: str
) -> tuple[NDArray[np.float64], list[str], list[View]]:
    """What is clustered, of which uses, and what a consensus is fitted on: the use asked for, or
    the model's default one, where the slide has an image, and the linear niche axes, where it has
    counts. Without an image there is nothing that the default one could add.

    How many domains there are is read off `linear-scaled` where all are looked at.
    """
    x, use = embedding_of(adata, asked)
    if method != "consensus":
        return x, [use], []
    names = [use]
    linear = [name for name in keys.LINEAR_USES if keys.embedding(name) in adata.obsm]
    if asked is None and linear:
        names = [use, *linear] if keys.embedding("image") in adata.obsm else linear
        x = np.asarray(adata.obsm[keys.embedding(linear[-1])], np.float64)[:, :_COUNTING_AXES]
    stored = [name for name in names if keys.embedding(name) in adata.obsm]
    return x, stored or [use], [_view(adata, name) for name in stored]


def _view(adata: AnnData, use: str) -> View:
    x = np.asarray(adata.obsm[keys.embedding(use)], np.float64)
    kept = adata.uns.get(keys.TRAINING)
    training = kept.get(use) if isinstance(kept, Mapping) else None
    if training is None:
        return View(x)
    spots = np.asarray(training)
    if spots.ndim != 2 or spots.shape[1] != x.shape[1]:
        raise SlideError(
            f"training spots do not fit the {use} embedding",
            expected=f"uns[{keys.TRAINING!r}][{use!r}] of {x.shape[1]} axes",
            found=str(spots.shape),
            fix="embed the slide again",
        )
    return View(x, spots)


def embedding_of(adata: AnnData, use: str | None) -> tuple[NDArray[np.float64], str]:
    """[N, D] of one use, the model's default one for None; and its name."""
    known = (*keys.USES, *keys.LINEAR_USES)
    kept = [name for name in known if keys.embedding(name) in adata.obsm]
    if keys.EMBEDDING not in adata.obsm:
        raise SlideError(
            "there is no embedding",
            expected=f"obsm[{keys.EMBEDDING!r}]",
            fix="run: st-align embed SLIDE --model RUN --out FILE.h5ad",
        )
    if use is not None and use not in known:
        raise ConfigError(f"--use {use} is unknown", fix=nearest(use, known))
    if use is not None and use not in kept:
        raise ConfigError(f"there is no {use} embedding", expected=f"one of {', '.join(kept)}")
    notes = store.notes(adata)
    if use is None:
        return np.asarray(adata.obsm[keys.EMBEDDING], np.float64), str(notes.get("use", "default"))
    return np.asarray(adata.obsm[keys.embedding(use)], np.float64)[:, : notes.get("dims")], use


def labels_of(adata: AnnData, key: str | None) -> NDArray[Any] | None:
    """[N] of an obs column; a ConfigError where there is none of that name."""
    if key is None:
        return None
    if key not in adata.obs:
        raise ConfigError(
            f"there are no labels {key!r}", fix=nearest(key, [str(c) for c in adata.obs])
        )
    labels: NDArray[Any] = adata.obs[key].astype(object).to_numpy()
    return labels


def _lattice(adata: AnnData, *, required: bool) -> NDArray[np.int32] | None:
    """The rings over which domains are smoothed; None where places are unknown and not needed."""
    technology = str(store.notes(adata).get("technology", "Visium"))
    lattice = LATTICE[next((known for known in LATTICE if known == technology), "Visium")]
    barcodes = adata.obs_names.to_numpy().astype(str)
    try:
        xy = store.coordinates(adata)
        return neighbors(
            "lattice", xy=xy, places=_places(adata), lattice=lattice, barcodes=barcodes
        )
    except StAlignError:
        if required:
            raise
        return None


def _places(adata: AnnData) -> NDArray[np.int32] | None:
    """[N, 2] array rows and columns; None where they are not known of every spot."""
    if not {keys.ARRAY_ROW, keys.ARRAY_COL} <= set(adata.obs):
        return None
    places = adata.obs[[keys.ARRAY_ROW, keys.ARRAY_COL]].apply(pd.to_numeric, errors="coerce")
    return places.to_numpy(np.int32) if (places >= 0).all(axis=None) else None


def number_of(text: str) -> int | str:
    """A whole number or `auto`; anything else is a ConfigError."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            "--n-domains is a whole number or auto", expected="7, or auto", found=text
        ) from None


def targets_of(files: Sequence[Path], out: Path | None) -> list[Path]:
    """Where each file's domains go; a place that cannot be written is found before the work."""
    if out is None:
        targets = list(files)
    elif len(files) == 1 and out.suffix == ".h5ad":
        targets = [out]
    elif out.is_file() or out.suffix == ".h5ad":
        raise OutputError(f"--out {out} is one file", expected=f"a folder for {len(files)} slides")
    else:
        targets = [out / path.name for path in files]
    if len({os.path.realpath(target) for target in targets}) < len(targets):
        raise OutputError(
            "two slides would be written into one file",
            found=", ".join(map(str, files)),
            fix="give each file once; with --out, rename those of one name",
        )
    for target in targets:
        require_writable(target)
    return targets


def _domain_words(entry: dict[str, Any]) -> str:
    words = f"{entry['n_domains']} domains ({entry['use']}, {entry['method']})"
    if "ari" not in entry:
        return words
    return f"{words}, ARI {entry['ari']['mean']:.3f} +- {entry['ari']['std']:.3f}"
