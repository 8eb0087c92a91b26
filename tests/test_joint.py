"""One set of domains over several slides, from embeddings or from counts alone."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from st_align import keys, store
from st_align.cli import app
from st_align.commands.domains import DomainRequest
from st_align.commands.joint import SHARES, find_joint_domains
from st_align.errors import ConfigError, OutputError, SlideError
from st_align.joint import Seen, counts_views, joint_domains
from toys import toy_prepared


@pytest.fixture
def slides(rng):
    return [toy_prepared(rng, id=f"s{i}", patient=f"p{i}", rows=8, cols=8) for i in range(2)]


def test_domains_mean_the_same_on_all_slides(slides):
    found = joint_domains(counts_views(slides), 2)
    for slide, labels, chances in zip(slides, found.labels, found.probabilities, strict=True):
        right = (slide.spots["domain"] == "right").to_numpy()
        assert max((labels == right).mean(), (labels != right).mean()) > 0.95
        np.testing.assert_allclose(chances.sum(axis=1), 1, rtol=1e-5)
    orders = [
        (labels == (slide.spots["domain"] == "right")).mean() > 0.5
        for slide, labels in zip(slides, found.labels, strict=True)
    ]
    assert orders[0] == orders[1]
    shares = found.shares(["s0", "s1"], ["p0", "p1"])
    assert list(shares) == ["slide", "patient", "domain", "share", "spots"]
    assert shares["spots"].sum() == sum(s.n_spots for s in slides)


def test_the_same_seed_gives_the_same(slides):
    values = counts_views(slides)
    first, again = (joint_domains(values, 3, seed=4) for _ in range(2))
    np.testing.assert_array_equal(np.concatenate(first.labels), np.concatenate(again.labels))


@pytest.mark.parametrize("method", ["consensus", "gmm"])
def test_the_order_of_the_files_does_not_matter(slides, tmp_path, method):
    paths = files(tmp_path, slides)
    request = DomainRequest(n_domains="2", method=method, runs=2)
    for name, order in (("a", paths), ("b", paths[::-1])):
        find_joint_domains(order, request, out=tmp_path / name)
    for path in paths:
        first, other = (store.read_h5ad(tmp_path / name / path.name) for name in "ab")
        assert first.obs[keys.DOMAIN].tolist() == other.obs[keys.DOMAIN].tolist()
    shares = [(tmp_path / name / SHARES).read_bytes() for name in "ab"]
    assert shares[0] == shares[1]


def test_what_cannot_be_joined(slides, rng):
    with pytest.raises(SlideError, match="not embedded alike"):
        joint_domains([Seen(rng.normal(size=(9, n)), []) for n in (2, 3)], 2)
    with pytest.raises(SlideError, match="not embedded alike"):
        joint_domains([], 2)
    with pytest.raises(SlideError, match="need counts"):
        counts_views([toy_prepared(rng, counts=False)])


def files(folder, slides):
    for slide in slides:
        adata = anndata.AnnData(slide.counts.toarray().astype(np.float32))
        adata.obs_names, adata.var_names = slide.spots["barcode"], slide.genes.symbols
        adata.obs["array_row"] = slide.spots["array_row"].to_numpy()
        adata.obs["array_col"] = slide.spots["array_col"].to_numpy()
        adata.obs["patient"], adata.obs["domain"] = slide.patient, slide.spots["domain"].to_numpy()
        adata.obsm["spatial"] = slide.spots[["x", "y"]].to_numpy()
        adata.write_h5ad(folder / f"{slide.id}.h5ad")
    return [folder / f"{slide.id}.h5ad" for slide in slides]


def test_files_with_counts_only(slides, tmp_path):
    paths = files(tmp_path, slides)
    before = [path.read_bytes() for path in paths]
    (tmp_path / "out").mkdir()
    command = ["domains", *map(str, paths), "--joint", "--n-domains", "2", "--label-key", "domain"]
    command += ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert [path.read_bytes() for path in paths] == before
    answer = json.loads((tmp_path / "r.json").read_text())
    assert answer["use"] == "expression"
    assert answer["mean_ari"] > 0.8
    assert len(pd.read_csv(tmp_path / "out" / SHARES)) == 4
    adata = store.read_h5ad(tmp_path / "out" / "s0.h5ad")
    assert set(adata.obs[keys.DOMAIN]) == {"0", "1"}
    assert list(adata.obsm[keys.probability(keys.DOMAIN)]) == ["0", "1"]
    assert set(result.output.split()) >= {"p0", "s0", "p1", "s1"}


def test_legacy_slides_that_know_no_rows_and_columns(rng, tmp_path):
    xy = np.stack(np.meshgrid(np.arange(9.0), np.arange(9.0)), axis=-1).reshape(-1, 2)
    right = xy[:, 0] > 4
    means = np.where(right[:, None], np.linspace(8, 1, 30), np.linspace(1, 8, 30))
    paths = [tmp_path / f"s{i}.h5ad" for i in range(2)]
    for path in paths:
        adata = anndata.AnnData(rng.poisson(means).astype(np.float32))
        adata.var_names = [f"GENE{i}" for i in range(30)]
        adata.obs["domain"] = np.where(right, "right", "left")
        adata.obsm["spatial"] = xy + rng.normal(0, 0.03, xy.shape)
        adata.write_h5ad(path)
    request = DomainRequest(n_domains="2", label_key="domain")
    found = find_joint_domains(paths, request, out=tmp_path / "out")
    assert found["mean_ari"] > 0.8
    assert any("square lattice" in text for text in found["warnings"])


def test_bad_requests_leave_files_alone(slides, tmp_path):
    paths = files(tmp_path, slides)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(OutputError, match="files that st-align embed did not write"):
        find_joint_domains(paths, DomainRequest(n_domains="2"))
    for request in (DomainRequest(method="kmeans"), DomainRequest(refine=True)):
        with pytest.raises(ConfigError, match="Gaussian mixture"):
            find_joint_domains(paths, request, out=tmp_path / "out")
    with pytest.raises(SlideError, match="not all slides have a niche embedding"):
        find_joint_domains(paths, DomainRequest(use="niche"), out=tmp_path / "out")
    assert [path.read_bytes() for path in paths] == before
