"""The whole way on a small simulated cohort: what a first look at the project runs.

Every step is the function behind the verb of that name, file to file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from st_align.baselines import linear_niche, spot_pca
from st_align.commands.domains import DomainRequest, find_domains
from st_align.commands.genes import fit_genes, predict_genes
from st_align.commands.train import TrainRequest, train_model
from st_align.corpus import Corpus
from st_align.corpus_build import build_corpus
from st_align.domains import assign_domains
from st_align.errors import require_new_or_empty
from st_align.io import ReadOptions, find_slides
from st_align.metrics import score_domains
from st_align.report import build_report
from st_align.simulate import simulate_cohort
from st_align.slide import PreparedSlide

EPOCHS = 12
_GENES = 12


def run_demo(
    out: Path, *, seed: int = 0, slides: int = 8, spots: int = 400, epochs: int = EPOCHS
) -> dict[str, Any]:
    """Simulate, prepare, train, embed a patient never seen, find domains, predict genes, report.

    Returns the rows of the printed table, the seconds of each step and where the report is.
    `out` is a new or empty folder.
    """
    require_new_or_empty(out, "the demo's folder", "choose another with --out, or remove it")
    seconds: dict[str, float] = {}
    with _step("simulate", seconds):
        cohort = simulate_cohort(out / "cohort", slides=slides, spots=spots, seed=seed)
    folder = out / "cohort"
    options = ReadOptions(patients=folder / cohort["patients"], obs=folder / cohort["obs"])
    with _step("prepare", seconds):
        found = find_slides([folder / cohort["source"]], options)
        corpus = build_corpus(found.refs, out / "corpus")
    patients: dict[str, str] = cohort["slides"]
    unseen = max(patients.values())
    held = sorted(id for id, patient in patients.items() if patient == unseen)
    with _step("train", seconds):
        request = TrainRequest(epochs=epochs, seed=seed, hold_out_patients=(unseen,))
        train_model(out / "corpus", out / "run", request)
    rows: list[dict[str, Any]] = []
    with _step("genes", seconds):
        files, rows = _predict(out, held)
    with _step("domains", seconds):
        domains = DomainRequest(n_domains=_count(corpus, held[0]), label_key="domain", seed=seed)
        for id, entry in find_domains(files, domains)["slides"].items():
            rows.append(_row("ST-Align", id, "ari", entry["ari"]))
    with _step("baselines", seconds):
        train = [corpus.slide(id) for id in corpus.ids if id not in held]
        for id in held:
            rows += _baselines(train, corpus.slide(id), seed)
    scores = pd.DataFrame(rows)
    report = build_report(
        out / "report.html", run=out / "run", files=files, scores=scores, title="ST-Align demo"
    )
    _print_table(scores, unseen)
    print(f"report: {report}")
    return {
        "rows": rows,
        "seconds": seconds,
        "held_out_patient": unseen,
        "report": str(report),
    }


def _predict(out: Path, held: list[str]) -> tuple[list[Path], list[dict[str, Any]]]:
    """Embed and predict the genes of every held-out slide; their files, and the scores."""
    head, run, corpus = out / "head.safetensors", str(out / "run"), out / "corpus"
    fit_genes(corpus, run, head, genes=None, top=_GENES, slides=None, patients=None)
    files, rows = [], []
    for id in held:
        files.append(out / f"{id}.h5ad")
        found = predict_genes(f"{corpus}::{id}", run, head, files[-1], ReadOptions())
        rows.append(_row("ST-Align", id, "mse", {"mean": found["mse"]}))
        rows.append(_row("mean predictor", id, "mse", {"mean": found["mse_mean_predictor"]}))
    return files, rows


def _count(corpus: Corpus, id: str) -> str:
    return str(corpus.slide(id).spots["domain"].nunique())


def _baselines(
    train: list[PreparedSlide], slide: PreparedSlide, seed: int
) -> Iterator[dict[str, Any]]:
    labels = slide.spots["domain"].to_numpy()
    k = len(set(labels))
    pca = assign_domains(spot_pca(slide), k, method="kmeans", seed=seed)
    yield _row("PCA + k-means", slide.id, "ari", score_domains(pca, labels)["ari"])
    linear = assign_domains(linear_niche(train, slide), k, seed=seed)
    yield _row("linear niche baseline", slide.id, "ari", score_domains(linear, labels)["ari"])


def _row(method: str, slide: str, metric: str, score: dict[str, Any]) -> dict[str, Any]:
    return {"method": method, "slide": slide, "metric": metric, "std": None, **score}


def _print_table(scores: pd.DataFrame, patient: str) -> None:
    print(f"\npatient {patient}, never seen in training (ARI: 1 is perfect; MSE: 0 is perfect)")
    for metric, part in scores.groupby("metric", sort=False):
        table = part.pivot_table(index="method", columns="slide", values="mean", sort=False)
        table["mean"] = table.mean(axis=1)
        print(f"\n{str(metric).upper()}\n{table.round(3).to_string()}")
    ari = scores[scores["metric"] == "ari"].groupby("method")["mean"].mean()
    if ari.idxmax() != "ST-Align":
        print(f"\nThe best domains here are those of: {ari.idxmax()}")
    print()


@contextmanager
def _step(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"== {name}")
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)
