"""The table of docs/results.md on genes: what each part of a gene head brings on her2st.

    python examples/gene_recipe.py DATA OUT        about 8 minutes on two cores

DATA holds `her2st/ST`. Within patient C each slide is predicted from the other three; across, all
slides of A from those of C and the reverse. The 50 genes are the most variable of the training
slides, penalties come from inner cross-validation on these; nothing is tuned on what is scored.
Only the former head reads r and e of the model, which within C has seen the scored slide.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from real_slides import PATIENTS, patients, verb

from st_align.benchmarks.genes_models import (
    BY_TRAINING,
    HeadPredictor,
    MeanPredictor,
    Predictor,
    RidgePredictor,
    Scaling,
    Task,
)
from st_align.benchmarks.image_rows import colours, frozen, run_parts
from st_align.checkpoint import load_run
from st_align.corpus import Corpus
from st_align.geometry import ring_mean
from st_align.loader import frozen_encoders
from st_align.predict import top_hvg
from st_align.ridge import Moments, choose_alpha, leading_axes, moments, solve, total
from st_align.slide import PreparedSlide
from st_align.targets import gene_panel, inner_folds, targets

Floats = np.ndarray


def main() -> None:
    """Prepare, train on each patient, score every method on every fold."""
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    corpus = out / "her2st"
    table = patients(out / "her2st.csv", {s: p for s, p in PATIENTS.items() if p in "AC"})
    verb(out, "prepare", data / "her2st", "--out", corpus, "--patients", table, made=corpus)
    of = {p: sorted(s for s, owner in PATIENTS.items() if owner == p) for p in "AC"}
    rows: list[dict[str, object]] = []
    for fitted, held in (("C", "A"), ("A", "C")):
        run = out / f"run-{held}"
        verb(out, "train", corpus, "--out", run, "--hold-out-patient", held,
             made=run / "readout.safetensors")  # fmt: skip
        found = methods(Corpus.open(corpus), run)
        rows += scores(Corpus.open(corpus), found, of[fitted], of[held], f"{fitted} to {held}")
        if fitted == "C":
            for id in of["C"]:
                others = [other for other in of["C"] if other != id]
                rows += scores(Corpus.open(corpus), found, others, [id], "within C")
        show(rows)


def show(rows: list[dict[str, object]]) -> None:
    """Means over slides."""
    order = list(dict.fromkeys(row["method"] for row in rows))
    scored = ["pcc", "mse / mean's", "centred mse / variance", "seconds"]
    found = pd.DataFrame(rows).groupby(["folds", "method"])[scored].mean()
    print(found.reindex(order, level="method").round(3).to_string())


def methods(corpus: Corpus, path: Path) -> list[tuple[Predictor, str]]:
    """Predictors and the track on which each is run."""
    run = load_run(path)
    encoder = frozen_encoders(run.config)["niche_image"]
    plain = {f"ridge on Lite0, {v}": frozen(corpus, encoder, v, "lattice")
             for v in ("spot", "niche")} | {"ridge on 21 colours": colours}  # fmt: skip
    parts = run_parts(run, corpus)
    former = [parts["r"], parts["e"], plain["ridge on Lite0, niche"], colours]
    return [
        (MeanPredictor(), ""),
        *((RidgePredictor(name, read, name), BY_TRAINING) for name, read in plain.items()),
        (Former(former), ""),
        (HeadPredictor("genes fit, genes predict", run, corpus, ""), ""),
    ]


class Former:
    """The head of schema 2: r, e, niche and colours, averaged over 0, 1 or 2 rings."""

    name, identity, tracks = "former head", "", ("",)

    def __init__(self, reads: list[Callable[[PreparedSlide], Floats]]) -> None:
        self.reads = reads

    def predict(self, task: Task, track: str) -> dict[str, Floats]:
        """Rings and penalty by the inner folds."""
        folds, parts = inner_folds(task.train).of, [dict[int, Moments]() for _ in range(3)]
        seen = [self._ringed(slide) for slide in task.train]
        # Axes that span all training spots: the same answer as on the features, sooner.
        axes = [leading_axes(list(x), sum(map(len, x))) for x in zip(*seen, strict=True)]
        for slide, ringed, found in zip(task.train, seen, task.training_targets(), strict=True):
            y = found.values - found.values[found.valid].mean(axis=0)
            for part, x in zip(
                parts, [x @ a for x, a in zip(ringed, axes, strict=True)], strict=True
            ):
                for fold in np.unique(folds[slide.id]).tolist():
                    rows = found.valid & (folds[slide.id] == fold)
                    new = moments(x[rows], y[rows], found.measured)
                    part[fold] = part[fold] + new if fold in part else new
        choices = [choose_alpha(list(part.values())) for part in parts]
        best = int(np.argmin([choice.error for choice in choices]))
        weights = axes[best] @ solve(total(list(parts[best].values())), choices[best].alpha)
        means = task.means()
        return {s.id: np.maximum(self._ringed(s)[best] @ weights + means, 0) for s in task.test}

    def _ringed(self, slide: PreparedSlide) -> list[Floats]:
        blocks = [read(slide) for read in self.reads]
        found = [np.concatenate([Scaling.of([b]).apply(b) for b in blocks], axis=1)]
        for _ in range(2):
            found.append(ring_mean(found[-1], slide.niches["lattice"].neighbors))
        return found


def scores(
    corpus: Corpus, found: list[tuple[Predictor, str]], train: list[str], test: list[str], name: str
) -> list[dict[str, object]]:
    """One row a method and slide, means over genes."""
    fitted, held = corpus.slides(train), corpus.slides(test)
    task = Task(train=fitted, test=held, panel=gene_panel(top_hvg(fitted, 50), fitted))
    means, rows = task.means(), []
    for method, track in found:
        start = time.perf_counter()
        answers = method.predict(task, track)
        seconds = time.perf_counter() - start
        for slide in held:
            measured = targets(slide, task.panel)
            true = measured.values[measured.valid][:, measured.measured]
            guess = answers[slide.id][measured.valid][:, measured.measured]
            flat = means[measured.measured]
            a, b = guess - guess.mean(axis=0), true - true.mean(axis=0)
            norm = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
            pcc = np.divide((a * b).sum(axis=0), norm, out=np.full(len(norm), np.nan),
                            where=norm > 1e-9)  # fmt: skip
            rows.append(
                {"folds": name, "method": method.name, "slide": slide.id, "seconds": seconds,
                 "pcc": np.nan if np.isnan(pcc).all() else np.nanmean(pcc),
                 "mse / mean's": ((guess - true) ** 2).mean() / ((flat - true) ** 2).mean(),
                 "centred mse / variance": ((a - b) ** 2).mean() / (b**2).mean()}
            )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
