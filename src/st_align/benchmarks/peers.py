"""Peers that other packages implement: BANKSY, STAGATE, GraphST, CellCharter, Novae.

Each is imported when its row is made; a package that is absent makes a row that says how to get
it. Settings are those of the authors' own DLPFC examples. What draws on global random state is
seeded around.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from st_align.agreement import View
from st_align.benchmarks.audit import ON_SLIDE, ZERO_SHOT
from st_align.benchmarks.cells import SkippedError
from st_align.benchmarks.clusterers import each_seed, leiden_where_installed
from st_align.benchmarks.methods import (
    Clusterer,
    Embedded,
    Method,
    Target,
    always,
    needs_counts,
    seeded,
)
from st_align.encoders._torchvision import import_timm
from st_align.geometry import fit_scale
from st_align.slide import LATTICE, PITCH_UM, PreparedSlide

if TYPE_CHECKING:
    from anndata import AnnData

ON_THE_SLIDE = "trained on the slide"
_GENES = 3000
STAGATE_EPOCHS, GRAPHST_EPOCHS = 1000, 600
PACKAGES = ("pybanksy", "stagate-modern", "graphst-modern", "cellcharter", "novae", "scanpy",
            "igraph", "torch-geometric", "scikit-learn", "anndata")  # fmt: skip
"""What decides the numbers of these rows and of their clusterers."""
_EXTRA = "pip install 'st-align[bench]'"


def peers(weights: Mapping[str, str]) -> list[Method]:
    """All rows of other packages; `weights` may name a folder of Novae's."""
    leiden, full = leiden_where_installed(), each_seed("full mixture", _full_mixture)
    return [
        _peer("BANKSY", "banksy", "pybanksy", ON_SLIDE, _banksy, leiden),
        _peer("STAGATE", "STAGATE_pyG", "stagate-modern", ON_THE_SLIDE, _stagate),
        _peer("GraphST", "GraphST", "graphst-modern", ON_THE_SLIDE, _graphst, leiden),
        _peer("CellCharter", "cellcharter", "cellcharter", ON_SLIDE, _cellcharter, full),
        _novae(weights.get("novae")),
    ]


def _peer(
    name: str,
    module: str,
    package: str,
    protocol: str,
    embed: Callable[[Target, int], Embedded],
    own: Clusterer | None = None,
) -> Method:
    def missing(target: Target) -> str:
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed ({_EXTRA})"
        return needs_counts(target)

    return Method(name=name, protocol=always(protocol), embed=embed, own=own, missing=missing,
                  key=lambda target: {"package": _version(package)})  # fmt: skip


def _version(package: str) -> str:
    return versions([package]).get(package, "absent")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of those that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def normalised(slide: PreparedSlide, n_genes: int = _GENES) -> AnnData:
    """Highly variable genes (seurat_v3, on counts) as log1p CP10k; `obsm['spatial']` in units of
    the pitch, so that a radius means the same on every slide. Spots without counts hold zeros.
    """
    import scanpy

    adata = raw(slide)
    scanpy.pp.highly_variable_genes(
        adata, flavor="seurat_v3", n_top_genes=min(n_genes, adata.n_vars)
    )
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    return adata


def raw(slide: PreparedSlide) -> AnnData:
    """Counts of genes that some spot expresses; `obsm['spatial']` [N, 2] in units of the pitch."""
    import anndata
    import pandas as pd
    from scipy import sparse

    if slide.genes is None or slide.counts is None:
        raise SkippedError("the slide has no counts")
    xy = slide.spots[["x", "y"]].to_numpy(np.float64)
    pitch = fit_scale(xy, None, LATTICE[slide.technology], PITCH_UM[slide.technology]).pitch_px
    seen = np.flatnonzero(np.asarray(slide.counts.sum(axis=0)).ravel() > 0)
    adata = anndata.AnnData(
        X=sparse.csr_matrix(slide.counts[:, seen]).astype(np.float32),
        obs=pd.DataFrame(index=slide.spots["barcode"].astype(str).to_numpy(dtype=object)),
        var=pd.DataFrame(index=slide.genes.symbols[seen].astype(object)),
    )
    adata.obsm["spatial"] = xy / pitch
    return adata


def _banksy(target: Target, seed: int) -> Embedded:
    """Expression, mean over the two rings and azimuthal Gabor filter, lambda .2 (the authors'
    choice for Visium cortex), on 20 principal axes.
    """
    import scanpy
    from banksy.embed_banksy import generate_banksy_matrix
    from banksy.initialize_banksy import initialize_banksy
    from sklearn.decomposition import PCA

    adata = normalised(target.slide, 2000)
    adata = adata[:, adata.var["highly_variable"]].copy()
    scanpy.pp.scale(adata, max_value=10)
    adata.obs["x"], adata.obs["y"] = adata.obsm["spatial"].T
    graph = initialize_banksy(
        adata, ("x", "y", "spatial"), 18, nbr_weight_decay="scaled_gaussian", max_m=1,
        plt_edge_hist=False, plt_nbr_weights=False, plt_theta=False,
    )  # fmt: skip
    _, matrix = generate_banksy_matrix(adata, graph, [0.2], 1, verbose=False)
    values = np.nan_to_num(np.asarray(matrix.X, np.float32))
    n_axes = min(20, *values.shape)
    x = PCA(n_axes, svd_solver="arpack", random_state=seed).fit_transform(values)
    return Embedded(x=x, note="lambda .2, 18 neighbours")


def _stagate(target: Target, seed: int) -> Embedded:
    """512 and 30 units, 1,000 epochs, spots within 1.5 pitches joined (the authors' 150 um)."""
    from STAGATE_pyG import Cal_Spatial_Net, train_STAGATE

    adata = normalised(target.slide)
    Cal_Spatial_Net(adata, rad_cutoff=1.5, verbose=False)
    with seeded(seed):
        adata = train_STAGATE(adata, n_epochs=STAGATE_EPOCHS, random_seed=seed, verbose=False)
    return Embedded(x=adata.obsm["STAGATE"], note="its own clusterer, mclust EEE, is this mixture")


def _graphst(target: Target, seed: int) -> Embedded:
    """Upstream's defaults (3 neighbours, 600 epochs); read on 20 principal axes, as upstream.

    The graph, which upstream holds as an N x N table, is sparse: the same sums, in less time.
    """
    import torch
    from GraphST.GraphST import GraphST
    from sklearn.decomposition import PCA

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with seeded(seed):
        model = GraphST(raw(target.slide), device=device, random_seed=seed, epochs=GRAPHST_EPOCHS)
        model.adj = model.adj.to_sparse()
        adata = model.train()
    x = PCA(20, random_state=seed).fit_transform(adata.obsm["emb"])
    return Embedded(x=x)


def _cellcharter(target: Target, seed: int) -> Embedded:
    """Means over the spot and the rings at distance 1, 2 and 3 of 20 principal axes.

    Upstream reduces with scVI or PCA; its clusterer is a Gaussian mixture with full covariances.
    """
    import_timm()  # beside a CPU torch, squidpy and Lightning need its torchvision as well
    import cellcharter
    import scanpy
    from scipy import sparse

    adata = normalised(target.slide)
    scanpy.pp.pca(adata, n_comps=20, random_state=seed)
    ring, n = target.neighbors, adata.n_obs
    rows, columns = np.nonzero(ring[:, 1:] >= 0)
    joined = (np.ones(len(rows)), (rows, ring[rows, columns + 1]))
    adata.obsp["spatial_connectivities"] = sparse.csr_matrix(joined, shape=(n, n))
    cellcharter.gr.aggregate_neighbors(adata, n_layers=3, use_rep="X_pca")

    x = np.asarray(adata.obsm["X_cellcharter"], np.float64)
    return Embedded(x=x, views=(View(x),))


def _full_mixture(embedded: Embedded, n_domains: int, seed: int) -> NDArray[Any]:
    """CellCharter's, on all axes of its embedding."""
    import_timm()
    import anndata
    import cellcharter

    x = embedded.views[0].x
    adata = anndata.AnnData(obsm={"x": np.asarray(x, np.float32)}, shape=(len(x), 0))
    trainer = {"accelerator": "cpu", "enable_progress_bar": False}
    model = cellcharter.tl.Cluster(n_domains, random_state=seed, trainer_params=trainer)
    with seeded(seed):
        model.fit(adata, use_rep="x")
        return np.asarray(model.predict(adata, use_rep="x").codes)


def _novae(weights: str | None) -> Method:
    """Novae, zero-shot, from a folder that its `save_pretrained` wrote."""

    def missing(target: Target) -> str:
        if weights is None:
            return "no weights (huggingface.co/prism-oncology/novae-human-0; --weights novae=DIR)"
        if importlib.util.find_spec("novae") is None:
            return "novae is not installed (pip install -c constraints.txt novae)"
        if not Path(weights).is_dir():
            return f"no weights: {weights} is no folder"
        return needs_counts(target)

    def embed(target: Target, seed: int) -> Embedded:
        import novae

        adata = raw(target.slide)
        technology = "visium" if target.slide.technology == "Visium" else None
        adata.obsm["spatial"] = adata.obsm["spatial"] * PITCH_UM[target.slide.technology]
        with seeded(seed):
            novae.spatial_neighbors(adata, technology=technology)
            model = novae.Novae.from_pretrained(str(weights))
            model.compute_representations(adata, zero_shot=True)
        return Embedded(x=np.asarray(adata.obsm["novae_latent"], np.float64))

    return Method(name="Novae", protocol=always(ZERO_SHOT), embed=embed, missing=missing,
                  key=lambda target: {"weights": str(weights)})  # fmt: skip
