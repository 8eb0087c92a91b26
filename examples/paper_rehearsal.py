"""The paper's run of docs/paper-run.md, rehearsed on two small pieces of her2st sections.

    python examples/stand_in_weights.py WEIGHTS
    ST_ALIGN_WEIGHTS=WEIGHTS python examples/paper_rehearsal.py DATA OUT

DATA holds `her2st/ST` and `stimage1k4m/meta`. C2 is trained on, C3 is new: 40 and 20 spots in the
middle of each, because a core reads about one patch a second through UNI. Training is stopped
half-way by SIGTERM and resumed. OUT/costs.tsv gets wall time, processor time and peak memory of
every step; each is the installed command, on one core.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

COMMAND = [str(Path(sys.executable).with_name("st-align"))]
STUDY = "Human_Breast_Andersson_10142021_ST_"
TRAINED, NEW = f"{STUDY}C2", f"{STUDY}C3"
SPOTS = {TRAINED: 40, NEW: 20}
STOP_AT = 9


def main(data: Path, out: Path) -> None:
    """prepare, features, train (stopped and resumed), embed, domains, genes, inspect."""
    out.mkdir(parents=True)
    corpus, run, head = out / "corpus", out / "run", out / "head.safetensors"
    index = next((data / "stimage1k4m" / "meta").glob("*.csv"))
    source = pieces(data / "her2st" / "ST", out / "source" / "ST")
    verb(out, "prepare", source, "--out", corpus, "--niche", "k3", "--meta", index)
    verb(out, "features", corpus, "--encoder", "uni", "--view", "niche", "--niche", "k3")
    verb(out, "features", corpus, "--encoder", "scgpt", "--view", "spot")
    train = ("train", corpus, "--out", run, "--preset", "paper", "--hold-out-slide", NEW,
             "--batch", 4, "--epochs", 2)  # fmt: skip
    verb(out, *train, stop=run / "metrics.jsonl")
    verb(out, *train, "--resume")
    new = f"{corpus}::{NEW}"
    verb(out, "embed", new, "--model", run, "--out", out / "new.h5ad")
    verb(out, "domains", out / "new.h5ad", "--n-domains", 3)
    verb(out, "genes", "fit", corpus, "--model", run, "--top-hvg", 50, "--out", head)
    predicted = ("--head", head, "--out", out / "predicted.h5ad")
    verb(out, "genes", "predict", new, "--model", run, *predicted)
    verb(out, "inspect", run)
    print((out / "costs.tsv").read_text())


def pieces(st: Path, out: Path) -> Path:
    """The spots nearest to the middle of each section, in STimage-1K4M's layout."""
    for folder in ("coord", "gene_exp", "image"):
        (out / folder).mkdir(parents=True)
    for slide, n in SPOTS.items():
        spots = pd.read_csv(st / "coord" / f"{slide}_coord.csv", index_col=0)
        xy = spots[["yaxis", "xaxis"]]
        kept = ((xy - xy.median()) ** 2).sum(axis=1).nsmallest(n).index
        counts = pd.read_csv(st / "gene_exp" / f"{slide}_count.csv", index_col=0)
        spots[spots.index.isin(kept)].to_csv(out / "coord" / f"{slide}_coord.csv")
        counts[counts.index.isin(kept)].to_csv(out / "gene_exp" / f"{slide}_count.csv")
        shutil.copy(st / "image" / f"{slide}.png", out / "image")
    return out.parent


def verb(out: Path, *words: object, stop: Path | None = None) -> None:
    """Run the command and note its costs; with `stop`, end it by SIGTERM once that log of steps
    has come to `STOP_AT`.
    """
    start = time.perf_counter()
    done = subprocess.Popen(
        [*COMMAND, *map(str, words)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while stop is not None and done.poll() is None:
        lines = stop.read_text().splitlines() if stop.is_file() else []
        if lines and json.loads(lines[-1])["step"] >= STOP_AT:
            done.send_signal(signal.SIGTERM)
            break
        time.sleep(0.5)
    _, status, usage = os.wait4(done.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(map(str, words))}")
    wall, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    with (out / "costs.tsv").open("a") as file:
        file.write(f"{' '.join(map(str, words[:4]))}\t{wall:.0f} s\t{cpu:.0f} s of processor\t")
        file.write(f"{usage.ru_maxrss / 2**20:.2f} GiB\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
