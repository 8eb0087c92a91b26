"""Figures of reading and preparing: count CSV, Space Ranger folder, patches, prepare."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st_align.benchmarks.speed import (
    Figure,
    at_least,
    at_most,
    in_child,
    interleaved,
    python,
    ratios,
    st_align,
    unwatched,
)
from st_align.corpus import Corpus
from st_align.errors import ConfigError

_CSV = (4_000, 20_000)
_VISIUM = (5_000, 36_601, 20_000)
_GENES_OF_A_SPOT = (1_500, 6_000)
_TILE = 512
_COHORT, _COPIES = (8, 1_500), 12
"""So many copies of the slides: to start two more interpreters costs what two slides cost."""
_BATCH = 256

_LARGE_BLOCK = 1 << 24
_OURS = """
import sys
from pathlib import Path
import pyarrow.csv, scipy.sparse
from st_align.io.count_csv import read_count_csv
read_count_csv(Path(sys.argv[1]))
"""


def stimage(work: Path, seed: int) -> Iterator[Figure]:
    """A dense count CSV to sparse, beside `pyarrow.csv.read_csv` of it: as it is, and in large
    blocks on one thread, which suits wide tables better.
    """
    from pyarrow import csv

    from st_align.io.count_csv import read_count_csv

    path = work / "counts.csv"
    write_count_csv(path, *_CSV, np.random.default_rng(seed))
    large = csv.ReadOptions(use_threads=False, block_size=_LARGE_BLOCK)
    times = interleaved(
        {
            "ours": lambda: read_count_csv(path),
            "bare": lambda: csv.read_csv(path),
            "blocks": lambda: csv.read_csv(path, read_options=large),
        }
    )
    for side, case in (("bare", "pyarrow's defaults"), ("blocks", "16 MB blocks, one thread")):
        runs = ratios(times["ours"].wall, times[side].wall)
        figure = at_most(1.25, float(np.median(runs)))
        yield Figure(figure="count CSV, time over bare", case=case, unit="x", runs=runs, **figure)
    yield _seconds("count CSV", "{:,} x {:,}".format(*_CSV), times["ours"].wall)
    counts = read_count_csv(path).counts
    held = counts.data.nbytes + counts.indices.nbytes + counts.indptr.nbytes
    dense = 8 * _CSV[0] * _CSV[1]
    base = in_child(python(_OURS.rsplit("\n", 2)[0])).peak
    peak = max(in_child(python(_OURS, str(path))).peak - base for _ in range(3))
    for case, against, bound in (("dense float64", dense, 1.0), ("the sparse result", held, 1.5)):
        note = f"{peak / 1e6:,.0f} of {against / 1e6:,.0f} MB"
        yield Figure(
            figure=f"count CSV, peak memory over {case}", case="", unit="x", note=note,
            **at_most(bound, peak / against),
        )  # fmt: skip


def write_count_csv(path: Path, n_spots: int, n_genes: int, rng: np.random.Generator) -> None:
    """Poisson counts, 19 of 100 not 0, as STimage-1K4M has them."""
    rate = np.exp(rng.normal(-2.2, 1.3, n_genes))
    with path.open("w") as file:
        file.write("," + ",".join(f"GENE{i}" for i in range(n_genes)) + "\n")
        for i in range(n_spots):
            counts = rng.poisson(rate * rng.uniform(0.3, 2))
            file.write(f"{i // 64}x{i % 64}," + ",".join(map(str, counts.tolist())) + "\n")


def visium(work: Path, seed: int) -> Iterator[Figure]:
    """A Space Ranger folder with a full-resolution TIFF to a corpus, one process."""
    folder = work / "big"
    write_visium(folder, np.random.default_rng(seed))
    children = []
    for _ in range(2):
        shutil.rmtree(work / "corpus", ignore_errors=True)
        image = folder / "image.tif"
        command = st_align("prepare", folder / "outs", "--image", image, "--out", work / "corpus")
        children.append(in_child(command))
    case = "{:,} spots, {:,} genes, {:,} px TIFF".format(*_VISIUM)
    walls = tuple(child.wall for child in children)
    yield Figure(
        figure="Space Ranger to corpus", case=case, unit="s", runs=walls, **at_most(60, min(walls))
    )
    yield _seconds("Space Ranger to corpus, CPU", case, tuple(child.cpu for child in children))
    peak = max(child.peak for child in children) / 2**30
    yield Figure(
        figure="Space Ranger to corpus, peak memory", case=case, unit="GiB", **at_most(2, peak)
    )


def write_visium(folder: Path, rng: np.random.Generator) -> None:
    """SAMPLE/outs of a whole capture area, and a tiled JPEG TIFF."""
    import h5py
    import pandas as pd
    import tifffile

    from st_align.simulate.layouts import barcodes

    n_spots, n_genes, side = _VISIUM
    spatial = folder / "outs" / "spatial"
    spatial.mkdir(parents=True)
    rows, columns = 80, 64
    row, column = (axis.ravel() for axis in np.indices((rows, columns)))
    names, pitch = barcodes(rows * columns), side / 71
    y, x = (row + 1) * pitch * np.sqrt(3) / 2, (column + row % 2 / 2 + 1) * pitch
    inside = np.arange(len(names)) < n_spots
    table = {"barcode": names, "in_tissue": inside.astype(int), "array_row": row}
    table |= {"array_col": 2 * column + row % 2, "pxl_row_in_fullres": y.astype(int)}
    table |= {"pxl_col_in_fullres": x.astype(int)}
    pd.DataFrame(table).to_csv(spatial / "tissue_positions.csv", index=False)
    (spatial / "scalefactors_json.json").write_text(
        f'{{"spot_diameter_fullres": {0.65 * pitch}, "tissue_hires_scalef": 0.1}}'
    )
    per_spot = rng.integers(*_GENES_OF_A_SPOT, int(inside.sum()))
    indices = [np.sort(rng.choice(n_genes, n, replace=False)) for n in per_spot]
    with h5py.File(folder / "outs" / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = names[inside].astype("S")
        counts = rng.geometric(0.4, int(per_spot.sum())).astype(np.int32)
        group.create_dataset("data", data=counts, compression="gzip", compression_opts=1)
        flat = np.concatenate(indices).astype(np.int64)
        group.create_dataset("indices", data=flat, compression="gzip", compression_opts=1)
        group["indptr"] = np.concatenate([[0], np.cumsum(per_spot)]).astype(np.int64)
        group["shape"] = np.array([n_genes, len(per_spot)], np.int32)
        features = group.create_group("features")
        features["id"] = np.array([f"ENSG{i:011d}" for i in range(n_genes)], "S")
        features["name"] = np.array([f"GENE{i}" for i in range(n_genes)], "S")
        features["feature_type"] = np.full(n_genes, b"Gene Expression")
        features["genome"] = np.full(n_genes, b"GRCh38")

    def tiles() -> Iterator[NDArray[np.uint8]]:
        from PIL import Image

        coarse = rng.integers(90, 230, (8, 24, 24, 3), dtype=np.uint8)
        pool = [np.asarray(Image.fromarray(c).resize((_TILE, _TILE))) for c in coarse]
        for i in range((-(-side // _TILE)) ** 2):
            yield pool[i % len(pool)]

    tifffile.imwrite(
        folder / "image.tif", tiles(), shape=(side, side, 3), dtype=np.uint8,
        tile=(_TILE, _TILE), photometric="rgb", compression="jpeg",
    )  # fmt: skip


def patches(corpus: Corpus) -> Iterator[Figure]:
    """Random rows of the first slides' patch columns, in batches as training gathers them."""
    from st_align.loader import Patches

    slides = [s for s in corpus.slides(corpus.ids[:4]) if s.has_image]
    if not slides:
        raise ConfigError("the corpus has no slide with an image", found=str(corpus.path))
    rng = np.random.default_rng(0)
    for name in ("spot", "niche"):
        read: list[Any] = []
        for slide in slides:
            niche = slide.niches[sorted(slide.niches)[0]]
            read.append(Patches(slide.spot_patches if name == "spot" else niche.patches))  # type: ignore[arg-type]
        draws = [
            (i % len(read), rng.integers(0, slides[i % len(read)].n_spots, _BATCH))
            for i in range(64)
        ]

        def gather(read: list[Any] = read, draws: list[Any] = draws) -> None:
            for which, rows in draws:
                read[which].read(rows)

        gather()  # so that the pages are there
        speeds = tuple(64 * _BATCH / s for s in interleaved({"gather": gather})["gather"].wall)
        yield Figure(
            figure="patches per core and second", case=f"{name}, {read[0].values.shape[1]} px",
            unit="1/s", runs=speeds, **at_least(50_000, float(np.median(speeds))),
        )  # fmt: skip


def prepare(work: Path, seed: int) -> Iterator[Figure]:
    """The same slides prepared by one process and by two, then by one and by a local Dask cluster
    of two: a cluster that waits takes a share of a core, too.
    """
    from st_align.simulate import simulate_cohort

    slides, spots = _COHORT
    cohort, sources, corpus = work / "cohort", work / "sources", work / "corpus"
    simulate_cohort(cohort, slides=slides, spots=spots, seed=seed)
    for folder in (cohort / "slides").iterdir():
        for copy in range(_COPIES):
            shutil.copytree(folder, sources / f"{folder.name}_{copy}", copy_function=os.link)
    what = f"{_COPIES * slides} slides of {spots:,} spots"

    def run(*options: object) -> None:
        unwatched(st_align("prepare", sources, "--out", corpus, *options))

    def beside_one(case: str, *options: object) -> Iterator[Figure]:
        times = interleaved(
            {"one": run, "more": lambda: run(*options)},
            before=lambda: shutil.rmtree(corpus, ignore_errors=True),
        )
        runs = ratios(times["one"].wall, times["more"].wall)
        yield _seconds("prepare", f"{what}, 1 process", times["one"].wall)
        yield _seconds("prepare", f"{what}, {case}", times["more"].wall)
        yield Figure(
            figure="prepare, speed over 1 process", case=case, unit="x", runs=runs,
            **at_least(1.8, float(np.median(runs))),
        )  # fmt: skip

    yield from beside_one("2 processes", "--jobs", 2)
    cluster = _cluster()
    if cluster is not None:
        with cluster:
            yield from beside_one("Dask cluster of 2", "--dask", cluster.scheduler_address)


def _cluster() -> Any:
    """A local cluster of two workers of a thread each; None where Dask is not installed."""
    try:
        import distributed
    except ImportError:
        return None
    start: Any = distributed.LocalCluster  # untyped
    return start(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)


def _seconds(figure: str, case: str, runs: tuple[float, ...]) -> Figure:
    note = f"best {min(runs):.3g} s"
    return Figure(
        figure=figure, case=case, value=float(np.median(runs)), unit="s", runs=runs, note=note
    )
