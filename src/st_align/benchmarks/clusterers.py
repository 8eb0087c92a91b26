"""Clusterers of `bench domains`: the one of every row, and those of methods' authors.

Shape letters: N spots, D axes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st_align.agreement import View
from st_align.benchmarks.methods import Clusterer, Embedded, Floats
from st_align.domains import Clustering, Domains, assign_domains, kmeans

MAX_AXES = 30
"""A wider embedding is read on its first principal axes of the slide."""


def on_axes(x: Floats) -> Floats:
    """`x` [N, D] on at most `MAX_AXES` principal axes of the slide: every row is read alike."""
    x = np.asarray(x, np.float64)
    if x.shape[1] <= MAX_AXES:
        return x
    centred = x - x.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    return np.asarray(centred @ axes[:, ::-1][:, :MAX_AXES])


def each_seed(name: str, labels: Callable[[Embedded, int, int], NDArray[Any]]) -> Clusterer:
    """Of a function (embedding, number of domains, seed) -> labels [N]: a seed a run. Its runs
    are not compared: the first stands for all where one is shown.
    """

    def find(embedded: Embedded, n_domains: int, runs: int, seed: int) -> list[Clustering]:
        seeds = range(seed, seed + runs)
        return [Clustering(np.asarray(labels(embedded, n_domains, s)), 0.0) for s in seeds]

    return Clusterer(name, find)


def leiden_where_installed() -> Clusterer | None:
    """None where scanpy or igraph is absent."""
    if importlib.util.find_spec("scanpy") is None or importlib.util.find_spec("igraph") is None:
        return None
    return each_seed("Leiden", lambda embedded, n, seed: leiden(embedded.x, n, seed))


def leiden(x: Floats, n_domains: int, seed: int) -> NDArray[Any]:
    """Leiden on 15 nearest neighbours at the resolution, found by bisection, that gives
    `n_domains`, or as many as come nearest.
    """
    import anndata
    import scanpy

    adata = anndata.AnnData(obsm={"x": np.asarray(x, np.float32)}, shape=(len(x), 0))
    scanpy.pp.neighbors(adata, use_rep="x", random_state=seed)
    low, high, best = 0.01, 4.0, None
    for _ in range(16):
        middle = (low + high) / 2
        scanpy.tl.leiden(adata, resolution=middle, random_state=seed, flavor="igraph",
                         n_iterations=2, directed=False)  # fmt: skip
        labels = adata.obs["leiden"].cat.codes.to_numpy()
        off = abs(int(labels.max()) + 1 - n_domains)
        best = min(best or (off, labels), (off, labels), key=lambda found: found[0])
        if off == 0:
            break
        low, high = (middle, high) if labels.max() + 1 < n_domains else (low, middle)
    return np.asarray(best[1] if best else np.zeros(len(x)), np.int64)


def _mixture(embedded: Embedded, n_domains: int, runs: int, seed: int) -> list[Clustering]:
    return _runs(assign_domains(on_axes(embedded.x), n_domains, runs=runs, seed=seed))


def _consensus(embedded: Embedded, n_domains: int, runs: int, seed: int) -> list[Clustering]:
    views = embedded.views or (View(embedded.x),)
    x = np.asarray(views[0].x, np.float64)
    return _runs(
        assign_domains(x, n_domains, method="consensus", runs=runs, seed=seed, views=views)
    )


def _runs(found: Domains) -> list[Clustering]:
    return [Clustering(*run) for run in zip(found.unrefined, found.fits, strict=True)]


def _kmeans(embedded: Embedded, n_domains: int, seed: int) -> NDArray[Any]:
    x = np.asarray(embedded.x, np.float64)
    return kmeans(x, n_domains, np.random.default_rng(seed)).labels


MIXTURE = Clusterer("", _mixture)
"""The one of every row: `st-align domains --method gmm`."""
CONSENSUS = Clusterer("consensus", _consensus)
"""What `st-align domains` does by default."""
KMEANS = each_seed("k-means", _kmeans)
