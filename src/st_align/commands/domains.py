"""`st-align domains`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align import keys, store
from st_align.domains import assign_domains
from st_align.errors import ConfigError, OutputError, SlideError, StAlignError, nearest
from st_align.geometry import neighbors
from st_align.metrics import score_domains
from st_align.slide import LATTICE

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True, kw_only=True)
class DomainRequest:
    """Options of `st-align domains`; `use` None is the model's default."""

    n_domains: str = "auto"
    use: str | None = None
    label_key: str | None = None
    method: str = "gmm"
    refine: bool = False
    runs: int = 5
    seed: int = 0


def find_domains(
    files: Sequence[Path], request: DomainRequest, *, out: Path | None = None
) -> dict[str, Any]:
    """`st-align domains`: domains of embedded slides, written into their files or to `out` (a
    file for one slide, a folder for several), scored where `label_key` is given.
    """
    targets = _targets(files, out)
    slides: dict[str, Any] = {}
    for path, target in zip(files, targets, strict=True):
        adata = store.read_h5ad(path)
        entry = _slide_domains(adata, path, request)
        store.write_h5ad(adata, target)
        name = str(store.notes(adata).get("slide", path.stem))
        slides[name if name not in slides else str(path)] = entry
        print(f"{name}: {_domain_words(entry)}, {target}")
    result: dict[str, Any] = {"slides": slides}
    if request.label_key:
        result["mean_ari"] = float(np.mean([s["ari"]["mean"] for s in slides.values()]))
    return result


def _slide_domains(adata: AnnData, path: Path, request: DomainRequest) -> dict[str, Any]:
    labels = _labels(adata, path, request.label_key)
    x, use = _embedding(adata, path, request.use)
    found = assign_domains(
        x,
        _number(request.n_domains),
        method=request.method,
        runs=request.runs,
        seed=request.seed,
        neighbors=_lattice(adata, required=request.refine),
        refine=request.refine,
    )
    adata.obs[keys.DOMAIN] = pd.Categorical([str(k) for k in found.labels])
    entry: dict[str, Any] = {
        "method": request.method,
        "use": use,
        "n_domains": found.n_domains,
        "refined": request.refine,
        "seed": request.seed,
    }
    if labels is not None:
        entry |= {"label_key": request.label_key, **score_domains(found, labels)}
    store.note(adata, domains=entry)
    return entry


def _embedding(adata: AnnData, path: Path, use: str | None) -> tuple[NDArray[np.float64], str]:
    kept = [name for name in keys.USES if keys.embedding(name) in adata.obsm]
    if keys.EMBEDDING not in adata.obsm:
        raise SlideError(
            f"{path} has no embedding",
            expected=f"obsm[{keys.EMBEDDING!r}]",
            fix="run: st-align embed SLIDE --model RUN --out FILE.h5ad",
        )
    if use is not None and use not in keys.USES:
        raise ConfigError(f"--use {use} is unknown", fix=nearest(use, keys.USES))
    if use is not None and use not in kept:
        raise ConfigError(f"{path} has no {use} embedding", expected=f"one of {', '.join(kept)}")
    name = keys.EMBEDDING if use is None else keys.embedding(use)
    default = str(store.notes(adata).get("use", "default"))
    return np.asarray(adata.obsm[name], np.float64), use or default


def _labels(adata: AnnData, path: Path, key: str | None) -> NDArray[Any] | None:
    if key is None:
        return None
    if key not in adata.obs:
        raise ConfigError(
            f"{path} has no labels {key!r}", fix=nearest(key, [str(c) for c in adata.obs])
        )
    labels: NDArray[Any] = adata.obs[key].astype(object).to_numpy()
    return labels


def _lattice(adata: AnnData, *, required: bool) -> NDArray[np.int32] | None:
    """The rings over which domains are smoothed; None where places are unknown and not needed."""
    obs = adata.obs
    technology = str(store.notes(adata).get("technology", "Visium"))
    lattice = LATTICE["ST" if technology == "ST" else "Visium"]
    places = None
    if keys.ARRAY_ROW in obs and (obs[keys.ARRAY_ROW] >= 0).all():
        places = obs[[keys.ARRAY_ROW, keys.ARRAY_COL]].to_numpy(np.int32)
    xy = np.asarray(adata.obsm[keys.SPATIAL], np.float64)
    barcodes = adata.obs_names.to_numpy().astype(str)
    try:
        return neighbors("lattice", xy=xy, places=places, lattice=lattice, barcodes=barcodes)
    except StAlignError:
        if required:
            raise
        return None


def _number(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            "--n-domains is a whole number or auto", expected="7, or auto", found=text
        ) from None


def _targets(files: Sequence[Path], out: Path | None) -> list[Path]:
    if out is None:
        return list(files)
    if len(files) == 1 and out.suffix == ".h5ad":
        return [out]
    if out.is_file() or out.suffix == ".h5ad":
        raise OutputError(f"--out {out} is one file", expected=f"a folder for {len(files)} slides")
    names = [path.name for path in files]
    if len(set(names)) < len(names):
        raise OutputError("two files have one name", found=", ".join(names), fix="rename one")
    out.mkdir(parents=True, exist_ok=True)
    return [out / name for name in names]


def _domain_words(entry: dict[str, Any]) -> str:
    words = f"{entry['n_domains']} domains ({entry['use']}, {entry['method']})"
    if "ari" not in entry:
        return words
    return f"{words}, ARI {entry['ari']['mean']:.3f} +- {entry['ari']['std']:.3f}"
