"""How much domains move when a tenth of the spots is left out.

    python examples/stability.py LABEL_KEY K FILE.h5ad...

FILE.h5ad is what `st-align embed` wrote. Five random 90 % subsamples, each clustered once with a
seed of its own by what `st-align domains` does by default, and by one mixture on the first 8, 12,
16, 20 and 30 linear axes: adjusted Rand index on labelled spots, mean and standard deviation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import adjusted_rand_score

from st_align import keys, store
from st_align.agreement import DIMS, View
from st_align.commands.domains import labels_of, views_of
from st_align.domains import assign_domains

SUBSAMPLES, SHARE = 5, 0.9


def stability(path: Path, label_key: str, n_domains: int) -> dict[str, list[float]]:
    """Scores of every subsample by method."""
    adata = store.read_h5ad(path)
    _, _, views = views_of(adata, None, "consensus")
    linear = np.asarray(adata.obsm[keys.embedding("linear")], np.float64)
    labels = np.array([str(v) for v in labels_of(adata, label_key)])
    known = ~np.isin(np.char.lower(labels), list(keys.UNLABELLED))
    found: dict[str, list[float]] = {}
    for seed in range(SUBSAMPLES):
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.choice(len(labels), round(SHARE * len(labels)), replace=False))
        kept = [View(v.x[rows] - v.x[rows].mean(axis=0), v.training) for v in views]
        runs = {"consensus": assign_domains(
            kept[0].x, n_domains, method="consensus", runs=1, seed=seed, views=kept
        )}  # fmt: skip
        for dims in DIMS:
            x = linear[rows, :dims]
            runs[f"linear, {dims} axes"] = assign_domains(x, n_domains, runs=1, seed=seed)
        use = known[rows]
        for name, run in runs.items():
            score = adjusted_rand_score(labels[rows][use], run.labels[use])
            found.setdefault(name, []).append(float(score))
    return found


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    for name in sys.argv[3:]:
        print(name)
        for method, scores in stability(Path(name), sys.argv[1], int(sys.argv[2])).items():
            print(f"  {method:<16} {np.mean(scores):.3f} +- {np.std(scores):.3f}")
