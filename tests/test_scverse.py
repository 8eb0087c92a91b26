"""Files we write open in scanpy and plot with squidpy, where these are installed."""

from __future__ import annotations

import numpy as np
import pytest

from st_align import store
from st_align.infer import Embedder, to_anndata
from toy_run import toy_run
from toys import toy_prepared

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_file_of_ours_plots(rng: np.random.Generator, tmp_path) -> None:
    squidpy = pytest.importorskip("squidpy", reason="the scverse extra is not installed")
    scanpy = pytest.importorskip("scanpy", reason="the scverse extra is not installed")
    import matplotlib

    matplotlib.use("Agg")
    slides = [toy_prepared(rng, id=name) for name in ("s0", "s1")]
    run = toy_run(slides)
    store.write_h5ad(
        to_anndata(run, slides[0], Embedder(run).embed(slides[0])), tmp_path / "s0.h5ad"
    )
    adata = scanpy.read_h5ad(tmp_path / "s0.h5ad")
    squidpy.pl.spatial_scatter(adata, color="domain", save=str(tmp_path / "squidpy.png"))
    axes = scanpy.pl.embedding(adata, "X_stalign", color="domain", show=False)
    assert axes is not None
    assert (tmp_path / "squidpy.png").stat().st_size > 1000
