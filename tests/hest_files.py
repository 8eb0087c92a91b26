"""A small folder in the layout of HEST-bench, and of HEST-1k."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from sources import Section, section, write_h5ad

UM_PER_PX = 0.8
SIDE = 24


def write_sample(
    root: Path,
    id: str,
    *,
    counts: str = "adata",
    skip: int = 0,
    seed: int = 0,
    meta: dict | None = None,
) -> Section:
    """Counts and patches of one sample: flat patches whose red is the first gene's count."""
    part = section(id, seed=seed)
    for folder in (counts, "patches", "metadata"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    write_h5ad(root / counts / f"{id}.h5ad", part)
    rng = np.random.default_rng([seed, 7])
    order = rng.permutation(len(part.barcodes))[skip:]
    img = np.full((len(order), SIDE, SIDE, 3), 90, np.uint8)
    img[..., 0] = np.clip(40 * part.counts[order, 0], 0, 255)[:, None, None]
    with h5py.File(root / "patches" / f"{id}.h5", "w") as file:
        file["img"] = img
        file["barcode"] = np.array([b.encode() for b in part.barcodes[order]])[:, None]
        source = SIDE * 0.5 / UM_PER_PX
        file["coords"] = (part.xy[order] - source // 2).astype(np.int64)
    if meta is not None:
        (root / "metadata" / f"{id}.json").write_text(json.dumps(meta))
    return part


def write_task(root: Path, samples: list[str], genes: list[str]) -> Path:
    """Every sample is tested once."""
    for i, id in enumerate(samples):
        write_sample(root, id, seed=i)
    (root / "splits").mkdir()
    for i, tested in enumerate(samples):
        for part, ids in (("train", [s for s in samples if s != tested]), ("test", [tested])):
            table = pd.DataFrame(
                {
                    "sample_id": ids,
                    "patches_path": [f"patches/{s}.h5" for s in ids],
                    "expr_path": [f"adata/{s}.h5ad" for s in ids],
                }
            )
            table.to_csv(root / "splits" / f"{part}_{i}.csv", index=False)
    (root / "var_50genes.json").write_text(json.dumps({"genes": genes}))
    return root
