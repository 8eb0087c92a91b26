"""What the command's verbs do, file to file: each function is one verb on a trained model.

They read slides and our .h5ad files, call the core, write whole files, say what came out and
return what `--json` holds.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from st_align import keys, store
from st_align.checkpoint import CONFIG, load_run
from st_align.config import Config, Use, override, preset, read_toml
from st_align.corpus import Corpus
from st_align.domains import assign_domains
from st_align.encoders.base import FrozenEntry, View, find, registered
from st_align.errors import ConfigError, CorpusError, OutputError, SlideError, nearest
from st_align.features import cached_features
from st_align.geometry import neighbors
from st_align.infer import Embedder, to_anndata, training_slides
from st_align.io import ReadOptions
from st_align.metrics import score_domains
from st_align.predict import Head, fit_head, predict, score, top_hvg
from st_align.report import build_report
from st_align.slide import LATTICE
from st_align.sources import open_slide
from st_align.train import train

if TYPE_CHECKING:
    from anndata import AnnData


def fill_features(
    corpus_path: Path, name: str, weights: Path | None, view: str, niche_spec: str
) -> dict[str, Any]:
    """`st-align features`: a frozen encoder over every slide of a corpus that has its modality."""
    corpus = Corpus.open(corpus_path)
    entry = find(name)
    if not isinstance(entry, FrozenEntry):
        raise ConfigError(
            f"{name} is trained with the model: it has no features to keep",
            fix=nearest("", [n for n, e in registered().items() if isinstance(e, FrozenEntry)]),
        )
    if view not in get_args(View):
        raise ConfigError(f"--view {view} is unknown", fix=nearest(view, get_args(View)))
    encoder = entry.load(weights)
    filled = 0
    for id in tqdm(corpus.ids, desc=name, unit="slide"):
        found = cached_features(corpus, id, encoder, view, niche_spec=niche_spec)
        filled += found is not None
    print(
        f"{name}, {view} view: features of {filled} of {len(corpus.ids)} slides are in the corpus"
    )
    return {"encoder": name, "view": view, "fingerprint": encoder.fingerprint, "slides": filled}


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Options of `st-align train`; None leaves a setting to preset and config."""

    preset: str = "tiny"
    config: Path | None = None
    panel: str | None = None
    epochs: int | None = None
    batch: int | None = None
    seed: int | None = None
    hold_out_slides: Sequence[str] = ()
    hold_out_patients: Sequence[str] = ()
    init: str | None = None
    resume: bool = False

    def settings(self) -> tuple[Config, Path | None]:
        """The config, and the file of the panel where one was given."""
        config = preset(self.preset)
        if self.config is not None:
            config = read_toml(self.config, config)
        given = {"epochs": self.epochs, "batch": self.batch, "seed": self.seed}
        optim = {name: value for name, value in given.items() if value is not None}
        config = override(config, {"optim": optim}, "options")
        if self.panel is not None and self.panel.isdecimal():
            return override(config, {"data": {"panel": int(self.panel)}}, "--panel"), None
        return config, None if self.panel is None else Path(self.panel)


def train_model(corpus_path: Path, out: Path, request: TrainRequest) -> dict[str, Any]:
    """`st-align train`: a run folder in `out`."""
    config, panel = request.settings()
    run = train(
        Corpus.open(corpus_path),
        config,
        out,
        hold_out_slides=request.hold_out_slides,
        hold_out_patients=request.hold_out_patients,
        panel=panel,
        init=request.init,
        resume=request.resume,
        command=shlex.join(["st-align", *sys.argv[1:]]),
    )
    if run.finished:
        print(f"trained: {out}")
    else:
        print(f"stopped and saved; go on with the same command and --resume: {out}")
    return {"out": str(out), "finished": run.finished, "slides": sorted(training_slides(run))}


def embed_slide(slide: str, model: str, out: Path, options: ReadOptions) -> dict[str, Any]:
    """`st-align embed`: the embeddings of one slide as AnnData in `out`."""
    _require_suffix(out, ".h5ad")
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
    _print_warnings(result["warnings"])
    return result


@dataclass(frozen=True, kw_only=True)
class DomainRequest:
    """Options of `st-align domains`; `use` None is the model's default."""

    n_domains: str = "auto"
    use: Use | None = None
    label_key: str | None = None
    method: str = "gmm"
    refine: bool = True
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
    _require_suffix(out, ".safetensors")
    if (genes is None) == (top is None):
        raise ConfigError("say which genes", expected="either --genes or --top-hvg")
    run, corpus = load_run(model), Corpus.open(corpus_path)
    chosen = corpus.slides(_narrow(corpus, training_slides(run), slides, patients))
    names = list(genes) if genes is not None else top_hvg(chosen, top or 0)
    head = fit_head(run, chosen, names, corpus=corpus, progress=True)
    head.save(out)
    print(
        f"{len(head.genes)} genes fitted on {len(head.slides)} slides, {head.n_spots:,} spots; "
        f"error over variance with {head.folds} left out: {head.cv_error:.3f}; {out}"
    )
    return {
        "genes": list(head.genes),
        "slides": sorted(head.slides),
        "n_spots": head.n_spots,
        "alpha": head.alpha,
        "rings": head.rings,
        "cv_error": head.cv_error,
        "folds": head.folds,
        "out": str(out),
    }


def predict_genes(
    slide: str, model: str, head_path: Path, out: Path, options: ReadOptions
) -> dict[str, Any]:
    """`st-align genes predict`: expression from the image; scored when there are counts."""
    _require_suffix(out, ".h5ad")
    run, head = load_run(model), Head.load(head_path)
    prepared, corpus = open_slide(slide, run.preprocess, options)
    predicted = predict(head, run, prepared, corpus=corpus, progress=True)
    adata = to_anndata(run, prepared, Embedder(run, corpus=corpus).embed(prepared))
    adata.obsm[keys.PREDICTED] = predicted
    result: dict[str, Any] = {"slide": prepared.id, "out": str(out)}
    if prepared.counts is not None:
        result |= score(predicted, prepared, head)
        store.note(adata, genes={k: result[k] for k in ("mse", "mse_mean_predictor", "pcc")})
    result["fitted_on_slide"] = prepared.id in head.slides
    result["fitted_on_patient"] = prepared.patient in head.slides.values()
    store.write_h5ad(adata, out)
    print(f"{prepared.id}: {len(head.genes)} genes predicted, {out}")
    if "mse" in result:
        print(
            f"  MSE {result['mse']:.4f}, mean predictor {result['mse_mean_predictor']:.4f}, "
            f"PCC {result['pcc'] if result['pcc'] is None else round(result['pcc'], 4)}"
        )
    if result["fitted_on_slide"]:
        _print_warnings(["the head was fitted on this slide: the scores are not honest"])
    return result


def report_on(path: Path, out: Path) -> dict[str, Any]:
    """`st-align report` of a run folder or of a file of ours."""
    _require_suffix(out, ".html")
    if (path / CONFIG).is_file():
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


def _slide_domains(adata: AnnData, path: Path, request: DomainRequest) -> dict[str, Any]:
    labels = _labels(adata, path, request.label_key)
    x, use = _embedding(adata, path, request.use)
    found = assign_domains(
        x,
        _number(request.n_domains),
        method=request.method,
        runs=request.runs,
        seed=request.seed,
        neighbors=_lattice(adata) if request.refine else None,
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


def _embedding(adata: AnnData, path: Path, use: Use | None) -> tuple[NDArray[np.float64], str]:
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


def _lattice(adata: AnnData) -> NDArray[np.int32]:
    """The rings over which domains are smoothed."""
    obs = adata.obs
    technology = str(store.notes(adata).get("technology", "Visium"))
    lattice = LATTICE["ST" if technology == "ST" else "Visium"]
    places = None
    if keys.ARRAY_ROW in obs and (obs[keys.ARRAY_ROW] >= 0).all():
        places = obs[[keys.ARRAY_ROW, keys.ARRAY_COL]].to_numpy(np.int32)
    xy = np.asarray(adata.obsm[keys.SPATIAL], np.float64)
    barcodes = adata.obs_names.to_numpy().astype(str)
    return neighbors("lattice", xy=xy, places=places, lattice=lattice, barcodes=barcodes)


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


def _domain_words(entry: dict[str, Any]) -> str:
    words = f"{entry['n_domains']} domains ({entry['use']}, {entry['method']})"
    if "ari" not in entry:
        return words
    return f"{words}, ARI {entry['ari']['mean']:.3f} +- {entry['ari']['std']:.3f}"


def _require_suffix(out: Path, suffix: str) -> None:
    if out.suffix != suffix:
        raise OutputError(f"--out {out} ends in {suffix}", found=out.suffix or "no ending")


def _print_warnings(warnings: Sequence[str]) -> None:
    for text in warnings:
        print(f"  warning: {text}")
