"""HEST-bench folders: official splits, genes, counts, and samples as slides without counts.

    TASK/splits/train_0.csv, test_0.csv, ...   sample_id, patches_path, expr_path
    TASK/var_50genes.json                      {"genes": [...]}
    TASK/patches/ID.h5, TASK/adata/ID.h5ad     as the splits name them

Shape letters: M spots with a patch, g genes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align.errors import ConfigError, SlideError, require_file
from st_align.io import ReadOptions, find_slides
from st_align.io.tables import read_table
from st_align.slide import Slide

GENE_LIST = "var_50genes.json"


class Sample(NamedTuple):
    """The files of a sample."""

    id: str
    patches: Path
    counts: Path


@dataclass(frozen=True, kw_only=True)
class Split:
    """Samples of one official split."""

    name: str
    train: Sequence[Sample]
    test: Sequence[Sample]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of the bench: its folder, splits and genes."""

    path: Path
    splits: Sequence[Split]
    genes: Sequence[str]

    def samples(self) -> dict[str, Sample]:
        """Every sample of the splits by id."""
        return {s.id: s for split in self.splits for s in (*split.train, *split.test)}


def read_tasks(root: Path) -> dict[str, Task]:
    """The tasks of `root`, itself or folders in it, by name; none is a ConfigError, files that are
    missing or do not fit a SlideError.
    """
    folders = [root, *sorted(p for p in root.iterdir() if p.is_dir())] if root.is_dir() else []
    tasks = [path for path in folders if (path / "splits").is_dir()]
    if not tasks:
        raise ConfigError(
            f"{root} holds no task of HEST-bench",
            expected=f"a folder with splits/, patches/ and {GENE_LIST}, or a folder of such",
            found="a folder without" if root.is_dir() else "no folder",
        )
    return {p.resolve().name: Task(path=p, splits=_splits(p), genes=_genes(p)) for p in tasks}


def expression(
    counts: Path, barcodes: NDArray[np.str_], genes: Sequence[str]
) -> NDArray[np.float64]:
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


def image_slides(task: Task) -> Mapping[str, Slide]:
    """The task's samples as slides with their image alone, by id; those that are no slide (another
    technology, files elsewhere) are left out.
    """
    wanted = task.samples()
    refs = find_slides([task.path], ReadOptions(format="hest")).refs
    found = {ref.id: ref.read() for ref in refs if ref.id in wanted}
    return {
        id: dataclasses.replace(slide, counts=None, genes=None, total_umi=None)
        for id, slide in found.items()
    }


def _splits(task: Path) -> list[Split]:
    """The official splits, in their order; files that they name must be there."""
    splits = []
    for train in sorted((task / "splits").glob("train_*.csv"), key=_number):
        test = train.with_name(train.name.replace("train_", "test_"))
        parts = [_samples(task, path) for path in (train, test)]
        both = {s.id for s in parts[0]} & {s.id for s in parts[1]}
        if both:
            raise SlideError(
                f"{train} and {test.name} share samples", found=", ".join(sorted(both))
            )
        splits.append(Split(name=f"split {_number(train)}", train=parts[0], test=parts[1]))
    if not splits:
        raise SlideError(
            f"{task} has no splits", expected="splits/train_0.csv and splits/test_0.csv, ..."
        )
    return splits


def _genes(task: Path) -> list[str]:
    path = require_file(task / GENE_LIST, "the list of genes", SlideError)
    try:
        genes = json.loads(path.read_bytes())["genes"]
    except (ValueError, KeyError, TypeError) as error:
        raise SlideError(f"{path} is no list of genes", expected='{"genes": [...]}') from error
    return [str(gene) for gene in genes]


def _samples(task: Path, path: Path) -> list[Sample]:
    columns = ("sample_id", "patches_path", "expr_path")
    table = read_table(path, columns, "split")
    samples = []
    for id, *files in table[list(columns)].astype(str).to_numpy():
        patches, counts = (require_file(task / f, f"a file of {id}", SlideError) for f in files)
        samples.append(Sample(id, patches, counts))
    return samples


def _number(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdecimal() else 0
