"""The tables of docs/results.md: domains on DLPFC sections, genes on her2st patients.

    python examples/real_slides.py domains DATA OUT     about 15 minutes on two cores
    python examples/real_slides.py genes DATA OUT       about 8 minutes

DATA holds `dlpfc/*.h5ad`, `her2st/ST` and `visium_lung/outs`. Steps whose output lies in OUT are
not run again; every verb is the installed command, timed and weighed on its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from st_align.baselines import linear_niche, spot_pca
from st_align.checkpoint import load_run
from st_align.corpus import Corpus
from st_align.domains import assign_domains
from st_align.expression import log_normalise
from st_align.features import slide_features
from st_align.infer import training_slides
from st_align.loader import frozen_encoders
from st_align.metrics import score_domains
from st_align.predict import top_hvg
from st_align.ridge import choose_alpha, moments, solve
from st_align.slide import PreparedSlide

COMMAND = [str(Path(sys.executable).with_name("st-align"))]
STUDY = "Human_Breast_Andersson_10142021_ST_"
PATIENTS = {f"{STUDY}{s}": s[0] for s in ("A1", "A2", "C2", "C3", "C4", "C5")} | {
    "151674": "Br8100", "151675": "Br8100", "151510": "Br5292", "visium_lung": "lung",
}  # fmt: skip
USES = ("image", "gene", "spot", "niche", "spot+niche")


def main() -> None:
    """`domains` or `genes`."""
    what, data, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    {"domains": domains, "genes": genes}[what](data, out)


def domains(data: Path, out: Path) -> None:
    """One corpus of all slides; each DLPFC section of Br8100 held out in turn."""
    corpus, table = out / "corpus", patients(out / "patients.csv", PATIENTS)
    sources = [data / "her2st", data / "dlpfc", data / "visium_lung"]
    verb(out, "prepare", *sources, "--out", corpus, "--patients", table, made=corpus)
    rows = []
    for held, other in (("151675", "151674"), ("151674", "151675")):
        run, file = out / f"run-{held}", out / f"{held}.h5ad"
        verb(out, "train", corpus, "--out", run, "--hold-out-slide", held,
             made=run / "readout.safetensors")  # fmt: skip
        verb(out, "embed", f"{corpus}::{held}", "--model", run, "--out", file, made=file)
        for use in USES:
            result = out / f"{held}-{use}.json"
            verb(out, "domains", file, "--n-domains", 7, "--label-key", "layer", "--use", use,
                 "--out", out / "scratch.h5ad", "--json", result, made=result)  # fmt: skip
            rows.append((f"ST-Align, {use}", held, json.loads(result.read_text())["slides"][held]))
        rows += baselines(Corpus.open(corpus), held, other)
    show(
        pd.DataFrame(
            [
                {"method": m, "slide": s, "ari": f"{e['ari']['mean']:.3f} ± {e['ari']['std']:.3f}",
                 "refined": f"{e['ari_refined']:.3f}", "nmi": f"{e['nmi']:.3f}"}
                for m, s, e in rows
            ]
        ).pivot(index="method", columns="slide")
    )  # fmt: skip


def baselines(corpus: Corpus, held: str, other: str) -> list[tuple[str, str, dict[str, Any]]]:
    """PCA + k-means on the slide itself; the linear niche baseline fitted on the other section."""
    slide = corpus.slide(held)
    labels, ring = slide.spots["layer"].to_numpy(object), slide.niches["lattice"].neighbors
    pca = assign_domains(spot_pca(slide), 7, method="kmeans", neighbors=ring, refine=False)
    rows = [("PCA + k-means (on the slide)", held, score_domains(pca, labels))]
    for dims in (8, 12, 16, 20, 30):
        axes = linear_niche([corpus.slide(other)], slide, dims=dims)
        found = assign_domains(axes, 7, neighbors=ring, refine=False)
        rows.append((f"linear niche baseline, {dims} axes", held, score_domains(found, labels)))
    return rows


def genes(data: Path, out: Path) -> None:
    """her2st: one patient held out of training, its genes predicted from the image."""
    corpus = out / "her2st"
    table = patients(out / "her2st.csv", {s: p for s, p in PATIENTS.items() if p in "AC"})
    verb(out, "prepare", data / "her2st", "--out", corpus, "--patients", table, made=corpus)
    rows: list[dict[str, Any]] = []
    for held, fitted in (("C", "A"), ("A", "C")):
        run, head = out / f"run-{held}", out / f"head-{fitted}.safetensors"
        verb(out, "train", corpus, "--out", run, "--hold-out-patient", held,
             made=run / "readout.safetensors")  # fmt: skip
        verb(out, "genes", "fit", corpus, "--model", run, "--top-hvg", 50, "--out", head, made=head)
        for id in sorted(k for k, p in PATIENTS.items() if p == held):
            result = out / f"{id}.json"
            verb(out, "genes", "predict", f"{corpus}::{id}", "--model", run, "--head", head,
                 "--out", out / f"{id}.h5ad", "--json", result, made=result)  # fmt: skip
            found = json.loads(result.read_text())
            rows.append({"to": f"{fitted} to {held}", "method": "mean predictor", "slide": id,
                         "mse": found["mse_mean_predictor"], "pcc": np.nan})  # fmt: skip
            rows.append({"to": f"{fitted} to {held}", "method": "ST-Align", "slide": id,
                         "mse": found["mse"], "pcc": found["pcc"]})  # fmt: skip
        rows += ridge_on_lite0(Corpus.open(corpus), run, held, f"{fitted} to {held}")
    show(pd.DataFrame(rows).groupby(["to", "method"])[["mse", "pcc"]].mean().round(3))


def ridge_on_lite0(corpus: Corpus, run: Path, held: str, name: str) -> list[dict[str, Any]]:
    """Ridge on frozen Lite0 vectors as they are, of the spot and of the niche patch; penalty by
    leaving training slides out in turn.
    """
    loaded = load_run(run)
    encoder = frozen_encoders(loaded.config)["niche_image"]
    train = corpus.slides(training_slides(loaded))
    names = top_hvg(train, 50)
    rows = []
    for view in ("spot", "niche"):

        def seen(slide: PreparedSlide, view: Any = view) -> np.ndarray:
            found = slide_features(slide, encoder, view, niche_spec="lattice")
            return np.asarray(found.pooled, np.float64)

        x = {s.id: seen(s) for s in train}
        y = {s.id: expression(s, names) for s in train}
        x_mean = np.concatenate(list(x.values())).mean(axis=0)
        y_mean = np.concatenate(list(y.values())).mean(axis=0)
        measured = np.ones(len(names), bool)
        folds = [moments(x[s.id] - x_mean, y[s.id] - y_mean, measured) for s in train]
        weights = solve(sum(folds[1:], folds[0]), choose_alpha(folds).alpha)
        for slide in corpus.slides(i for i in corpus.ids if PATIENTS[i] == held):
            guess, true = (seen(slide) - x_mean) @ weights + y_mean, expression(slide, names)
            pcc = [np.corrcoef(g, t)[0, 1] for g, t in zip(guess.T, true.T, strict=True)]
            rows.append({"to": name, "method": f"ridge on Lite0, {view}", "slide": slide.id,
                         "mse": np.mean((guess - true) ** 2), "pcc": np.nanmean(pcc)})  # fmt: skip
    return rows


def expression(slide: PreparedSlide, names: list[str]) -> np.ndarray:
    """log1p CP10k [N, genes]."""
    columns = pd.Index(slide.genes.symbols).get_indexer(names)
    return log_normalise(slide.counts[:, columns], slide.total_umi)[0].toarray().astype(np.float64)


def patients(path: Path, of: dict[str, str]) -> Path:
    """The table that `prepare --patients` reads; it names the slides of its sources, no others."""
    pd.DataFrame({"slide": of.keys(), "patient": of.values()}).to_csv(path, index=False)
    return path


def verb(out: Path, *words: object, made: Path) -> None:
    """Run the command unless its output is there; note wall time and peak memory."""
    if made.exists():
        return
    start = time.perf_counter()
    done = subprocess.Popen([*COMMAND, *map(str, words)], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(done.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(map(str, words))}")
    line = f"{' '.join(map(str, words[:2]))}\t{made}\t{time.perf_counter() - start:.0f} s\t"
    with (out / "costs.tsv").open("a") as file:
        file.write(f"{line}{usage.ru_maxrss / 2**20:.2f} GiB\n")


def show(table: pd.DataFrame) -> None:
    """Print in full."""
    print(table.to_string())


if __name__ == "__main__":
    main()
