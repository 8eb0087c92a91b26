"""Genes on her2st patients as in docs/results.md.

    python examples/real_slides.py DATA OUT       about 8 minutes on two cores

DATA holds `her2st/ST`. Steps whose output lies in OUT are
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

from st_align.checkpoint import load_run
from st_align.corpus import Corpus
from st_align.expression import log_normalise
from st_align.features import slide_features
from st_align.infer import training_slides
from st_align.loader import frozen_encoders
from st_align.predict import top_hvg
from st_align.ridge import choose_alpha, moments, solve
from st_align.slide import PreparedSlide

COMMAND = [str(Path(sys.executable).with_name("st-align"))]
STUDY = "Human_Breast_Andersson_10142021_ST_"
PATIENTS = {f"{STUDY}{s}": s[0] for s in ("A1", "A2", "C2", "C3", "C4", "C5")}


def main() -> None:
    """`DATA OUT`."""
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    genes(data, out)


def genes(data: Path, out: Path) -> None:
    """her2st: one patient held out of training, its genes predicted from the image."""
    corpus = out / "her2st"
    table = patients(out / "her2st.csv", PATIENTS)
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
