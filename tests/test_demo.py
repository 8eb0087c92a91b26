"""The demo, whole; and the claim that the model beats what learns nothing on a patient unseen."""

from __future__ import annotations

from pathlib import Path

import anndata
import pandas as pd
import pytest

from st_align.demo import run_demo
from st_align.errors import OutputError


def means(result: dict) -> pd.Series:
    return pd.DataFrame(result["rows"]).groupby(["metric", "method"])["mean"].mean()


def test_the_demo_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    result = run_demo(out, slides=4, spots=100, epochs=3)
    page = Path(result["report"]).read_text()
    assert "<script" not in page.lower()
    assert "http-equiv" in page.lower()
    assert result["held_out_patient"] == "P2"
    adata = anndata.read_h5ad(out / "P2_S1.h5ad")
    assert "X_stalign" in adata.obsm
    assert "stalign_domain" in adata.obs
    assert adata.obsm["stalign_predicted"].shape == (100, 12)
    score = means(result)
    assert score["mse", "ST-Align"] < score["mse", "mean predictor"]
    assert {"ST-Align", "PCA + k-means", "linear niche baseline"} == set(score["ari"].index)
    assert "never seen in training" in capsys.readouterr().out
    with pytest.raises(OutputError, match="not empty"):
        run_demo(out)


@pytest.mark.slow
def test_the_model_beats_the_mean_predictor_and_pca_kmeans_over_five_seeds(tmp_path: Path) -> None:
    for seed in range(5):
        score = means(run_demo(tmp_path / str(seed), seed=seed))
        assert score["mse", "ST-Align"] < score["mse", "mean predictor"], seed
        assert score["ari", "ST-Align"] > score["ari", "PCA + k-means"], seed
