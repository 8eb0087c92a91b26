"""What we write opens in scanpy, squidpy and SpatialData, where these are installed."""

from __future__ import annotations

import numpy as np
import pytest

from st_align import keys, store
from st_align.embedded import to_anndata
from st_align.infer import Embedder
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


def test_what_spatialdata_io_reads_is_embedded_written_and_read_again(tmp_path) -> None:
    spatialdata = pytest.importorskip("spatialdata", reason="the scverse extra is not installed")
    reader = pytest.importorskip("spatialdata_io", reason="the scverse extra is not installed")
    import st_align as sta
    from st_align.simulate import simulate_cohort

    simulate_cohort(tmp_path / "cohort", slides=1, spots=60)
    data = reader.visium(tmp_path / "cohort/slides/P1_S1/outs", dataset_id="P1_S1")
    sta.tl.embed(data, model="tiny-brain")
    sta.tl.domains(data, n_domains=3, runs=1)
    data.write(tmp_path / "P1_S1.zarr")
    back = spatialdata.read_zarr(tmp_path / "P1_S1.zarr")
    before, after = (one.tables["table"] for one in (data, back))
    assert after.obs[keys.DOMAIN].tolist() == before.obs[keys.DOMAIN].tolist()
    np.testing.assert_array_equal(after.obsm[keys.EMBEDDING], before.obsm[keys.EMBEDDING])
    assert store.notes(after)["model"] == store.notes(before)["model"]
    sta.tl.domains(back, n_domains=4, runs=1)
    assert back.tables["table"].obs[keys.DOMAIN].nunique() == 4
