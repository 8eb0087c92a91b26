"""`st-align bench hest`: HEST-bench's regression by name, on its folders and official splits.

    TASK/splits/train_0.csv, test_0.csv, ...   sample_id, patches_path, expr_path
    TASK/var_50genes.json                      {"genes": [...]}
    TASK/patches/ID.h5, TASK/adata/ID.h5ad     as the splits name them

Targets are ln(1 + raw count), not divided by the library: that is what upstream's loader gives
(hest/bench/st_dataset.py). PCC is taken per gene over all test spots of a split, then over genes,
then over splits, also as upstream; it mixes slides.

Shape letters: M spots with a patch, D features, g genes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align.benchmarks.cells import Bench, Cell, join
from st_align.benchmarks.genes_models import Sample, Scaling, ridge_weights
from st_align.benchmarks.genes_scores import correlation
from st_align.benchmarks.image_rows import image_encoders
from st_align.benchmarks.table import Row, markdown, to_json, write_csv
from st_align.colour import colour_statistics
from st_align.corpus import sha256
from st_align.errors import ConfigError, SlideError, nearest, require_file
from st_align.files import replace_file
from st_align.io.hest import barcodes_of, patches_of
from st_align.io.tables import read_table

Floats = NDArray[np.float64]
Fit = Callable[[Sequence[Floats], Sequence[Floats], Floats], Floats]
"""Features [M, D] and targets [M, g] of each training sample, features [M', D] -> [M', g]."""
GENE_LIST = "var_50genes.json"
OFFICIAL = "official split"
_SEED = 1
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Split:
    """Samples of one official split: id -> (patches, counts)."""

    name: str
    train: Mapping[str, tuple[Path, Path]]
    test: Mapping[str, tuple[Path, Path]]


def hest_readme(train: Sequence[Floats], targets: Sequence[Floats], test: Floats) -> Floats:
    """StandardScaler, PCA to 256, ridge: the README's table (`dimreduce: PCA`)."""
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = np.concatenate(train)
    pca = PCA(n_components=min(256, *x.shape), random_state=_SEED)
    reduce = make_pipeline(StandardScaler(), pca).fit(x)
    return _upstream_ridge(reduce.transform(x), np.concatenate(targets), reduce.transform(test))


def hest_a13(train: Sequence[Floats], targets: Sequence[Floats], test: Floats) -> Floats:
    """The same ridge on the features as they are (`dimreduce` not set)."""
    return _upstream_ridge(np.concatenate(train), np.concatenate(targets), test)


def cv_alpha(train: Sequence[Floats], targets: Sequence[Floats], test: Floats) -> Floats:
    """Ridge with an intercept on scaled features, its penalty chosen by leaving out training
    samples in turn (fifths of the spots where there is one).
    """
    scaling = Scaling.of([x.astype(np.float32) for x in train])
    mean = np.concatenate(targets).mean(axis=0)
    samples = []
    for i, (x, y) in enumerate(zip(train, targets, strict=True)):
        alone = np.arange(len(x)) * 5 // len(x)
        folds = alone if len(train) == 1 else np.full(len(x), i % 5)
        every = np.ones(y.shape[1], np.bool_)
        samples.append(Sample(scaling.apply(x.astype(np.float32)), y - mean, every, folds))
    return np.asarray(scaling.apply(test.astype(np.float32)) @ ridge_weights(samples) + mean)


PROTOCOLS: Mapping[str, Fit] = {
    "hest-readme": hest_readme,
    "hest-a13": hest_a13,
    "cv-alpha": cv_alpha,
}


def bench_hest(root: Path, out: Path, protocol: str) -> tuple[dict[str, Any], list[str]]:
    """Write results.csv, results.md and provenance into `out`; gives what `--json`
    holds and the cells that failed.

    `root` is the folder of a task, or of several. Raises ConfigError for an unknown protocol or
    no task in `root`, SlideError for files that are missing or do not fit.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"--protocol {protocol} is unknown", fix=nearest(protocol, PROTOCOLS))
    tasks = {path.name: (read_splits(path), read_genes(path)) for path in _tasks(root)}
    bench, cells = Bench(out), []
    for method, identity, read in _methods():
        for task, (splits, genes) in tasks.items():
            of = Row(slide=task, method=method, track=protocol, protocol=OFFICIAL)
            if isinstance(read, str):
                cells.append(Cell(rows=(Row(slide=task, method=method, note=read),)))
                continue
            seen: dict[Path, Floats] = {}
            for split in splits:
                key = _key(split, genes, protocol, identity)

                def make(
                    read: Read = read,
                    split: Split = split,
                    of: Row = of,
                    seen: dict[Path, Floats] = seen,
                ) -> Cell:
                    return Cell(rows=tuple(_score(read, split, tasks[of.slide][1], of, seen)))

                cells.append(bench.cell(f"{task} {method} {split.name} {protocol}", key, of, make))
    rows = join(cells)
    text = f"# HEST-bench, {protocol}\n\nPCC, mean ± sd over splits.\n\n"
    text += markdown(rows, metric="pcc", track=protocol)
    write_csv(out / "results.csv", rows)
    replace_file(out / "results.md", text.encode())
    bench.write_provenance(bench="hest", root=str(root), protocol=protocol, tasks=sorted(tasks))
    return to_json(rows, _headline(rows)), bench.failed


def read_splits(task: Path) -> list[Split]:
    """The official splits of a task, in their order; files that they name must be there."""
    splits = []
    for train in sorted((task / "splits").glob("train_*.csv"), key=_number):
        test = train.with_name(train.name.replace("train_", "test_"))
        parts = [_samples(task, path) for path in (train, test)]
        both = set(parts[0]) & set(parts[1])
        if both:
            raise SlideError(f"{train} and {test.name} share samples", found=", ".join(both))
        splits.append(Split(name=f"split {_number(train)}", train=parts[0], test=parts[1]))
    if not splits:
        raise SlideError(
            f"{task} has no splits", expected="splits/train_0.csv and splits/test_0.csv, ..."
        )
    return splits


def read_genes(task: Path) -> list[str]:
    """The task's genes, from `var_50genes.json`."""
    path = require_file(task / GENE_LIST, "the list of genes", SlideError)
    try:
        genes = json.loads(path.read_bytes())["genes"]
    except (ValueError, KeyError, TypeError) as error:
        raise SlideError(f"{path} is no list of genes", expected='{"genes": [...]}') from error
    return [str(gene) for gene in genes]


def expression(counts: Path, barcodes: NDArray[np.str_], genes: Sequence[str]) -> Floats:
    """[M, g] ln(1 + raw count) of these spots and genes, in this order."""
    import h5py

    from st_align.io.anndata_table import read_obs, read_spots

    require_file(counts, "the counts", SlideError)
    with h5py.File(counts, "r") as file:
        obs = read_obs(file, str(counts))
        spots = read_spots(file, str(counts), obs, np.ones(len(obs), np.bool_))
    if spots.counts is None or spots.genes is None:
        raise SlideError(f"{counts} has no counts")
    rows = pd.Index(spots.barcodes).get_indexer(pd.Index(barcodes))
    columns = pd.Index(spots.genes.symbols).get_indexer(pd.Index(genes))
    absent = [*barcodes[rows < 0], *(g for g, c in zip(genes, columns, strict=True) if c < 0)]
    if absent:
        raise SlideError(
            f"{counts} lacks spots or genes of the task",
            expected="every barcode of the patches, every gene of the list",
            found=f"{len(absent)} missing, such as {', '.join(absent[:3])}",
        )
    return np.asarray(np.log1p(spots.counts[rows][:, columns].toarray().astype(np.float64)))


Read = Callable[[NDArray[np.uint8]], NDArray[np.floating]]
"""Patches [M, p, p, 3] -> features [M, D]."""


def _methods() -> Iterator[tuple[str, str, Read | str]]:
    """Name, what identifies its features, and how they are read or why they cannot be."""
    yield "colour statistics", "colours-1", colour_statistics
    for name, encoder in image_encoders().items():
        if isinstance(encoder, str):
            yield name, "", encoder
            continue

        def read(patches: NDArray[np.uint8], encode: Any = encoder) -> NDArray[np.floating]:
            pooled: NDArray[np.floating] = encode.encode_images(patches).pooled.cpu().numpy()
            return pooled

        yield name, encoder.fingerprint, read


def _score(
    read: Read, split: Split, genes: Sequence[str], of: Row, seen: dict[Path, Floats]
) -> Iterator[Row]:
    """Rows of a split; `seen` keeps features of patches, which several splits share."""

    def loaded(samples: Mapping[str, tuple[Path, Path]]) -> tuple[list[Floats], list[Floats]]:
        x, y = [], []
        for patches, counts in samples.values():
            barcodes = barcodes_of(patches)
            if patches not in seen:
                blocks = [
                    read(patches_of(patches, start, start + _BATCH))
                    for start in range(0, len(barcodes), _BATCH)
                ]
                seen[patches] = np.concatenate(blocks).astype(np.float64)
            x.append(seen[patches])
            y.append(expression(counts, barcodes, genes))
        return x, y

    (train, targets), (tested, truth) = loaded(split.train), loaded(split.test)
    guess = PROTOCOLS[of.track](train, targets, np.concatenate(tested))
    true = np.concatenate(truth)
    by_gene = {"pcc": correlation(true, guess), "mse": ((guess - true) ** 2).mean(axis=0)}
    for metric, values in by_gene.items():
        for gene, value in zip(genes, values.tolist(), strict=True):
            name = f"{split.name}, {gene}"
            yield _row(of, name, f"{metric} by gene", value)
        yield _row(of, split.name, metric, float(np.nanmean(values)))


def _row(of: Row, item: str, metric: str, value: float) -> Row:
    known = None if np.isnan(value) else value
    return Row(slide=of.slide, method=of.method, track=of.track, item=item, protocol=of.protocol,
               metric=metric, value=known)  # fmt: skip


def _headline(rows: Sequence[Row]) -> dict[str, float]:
    """Mean PCC of each method over its tasks."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.metric == "pcc" and row.value is not None:
            found.setdefault(row.method, {}).setdefault(row.slide, []).append(row.value)
    return {
        method: float(np.mean([np.mean(splits) for splits in tasks.values()]))
        for method, tasks in found.items()
    }


def _key(split: Split, genes: Sequence[str], protocol: str, identity: str) -> dict[str, Any]:
    files = {
        part: {id: [sha256(path) for path in paths] for id, paths in samples.items()}
        for part, samples in (("train", split.train), ("test", split.test))
    }
    return {"bench": "hest", "files": files, "genes": list(genes), "protocol": protocol,
            "identity": identity}  # fmt: skip


def _tasks(root: Path) -> list[Path]:
    """The folders with splits: `root`, or those in it."""
    folders = [root, *sorted(p for p in root.iterdir() if p.is_dir())] if root.is_dir() else []
    tasks = [path for path in folders if (path / "splits").is_dir()]
    if not tasks:
        raise ConfigError(
            f"{root} holds no task of HEST-bench",
            expected=f"a folder with splits/, patches/ and {GENE_LIST}, or a folder of such",
            found="a folder without" if root.is_dir() else "no folder",
        )
    return tasks


def _samples(task: Path, path: Path) -> dict[str, tuple[Path, Path]]:
    table = read_table(path, ("sample_id", "patches_path", "expr_path"), "split")
    samples = {}
    for id, *files in table[["sample_id", "patches_path", "expr_path"]].astype(str).to_numpy():
        patches, counts = (require_file(task / f, f"a file of {id}", SlideError) for f in files)
        samples[id] = (patches, counts)
    return samples


def _number(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdecimal() else 0


def _upstream_ridge(x: Floats, y: Floats, test: Floats) -> Floats:
    """hest/bench/trainer.py: alpha = 100 / (D g), no intercept, LSQR."""
    from sklearn.linear_model import Ridge

    ridge = Ridge(solver="lsqr", alpha=100 / (x.shape[1] * y.shape[1]), fit_intercept=False,
                  max_iter=1000, random_state=_SEED)  # fmt: skip
    return np.asarray(ridge.fit(x, y).predict(test))
