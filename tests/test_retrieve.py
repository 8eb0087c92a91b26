"""Spots like one spot: within a kind, across kinds, as table and as page."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest

import toy_run
from sources import section, write_h5ad
from st_align import store
from st_align.commands.embed import embed_slide
from st_align.commands.retrieve import RetrieveRequest, find_spots
from st_align.embedding import SlideVectors
from st_align.errors import ConfigError, OutputError, SlideError
from st_align.io import ReadOptions
from st_align.retrieve import Shelf, aligned, nearest
from toys import toy_prepared


def shelf(slide, vectors):
    names = np.array([f"{slide}{i}" for i in range(len(vectors))])
    return Shelf(slide=slide, barcodes=names, vectors=np.asarray(vectors, np.float32))


def test_nearest_by_cosine():
    shelves = [shelf("a", [[2, 0], [0, 1], [0, 0]]), shelf("b", [[1, 1], [5, 0]])]
    hits = nearest(np.array([1.0, 0]), shelves, n=3, leave_out=("a", "a0"))
    assert hits["barcode"].tolist() == ["b1", "b0", "a1"]
    np.testing.assert_allclose(hits["similarity"], [1, 2**-0.5, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("query", "shelves", "n", "error"),
    [
        ([1, 0], [shelf("a", [[1, 0]])], 0, ConfigError),
        ([0, 0], [shelf("a", [[1, 0]])], 1, SlideError),
        ([1, 0], [shelf("a", [[1, 0, 0]])], 1, SlideError),
        ([1, 0], [shelf("a", [[0, 0]])], 1, SlideError),
        ([1, 0], [], 1, SlideError),
    ],
)
def test_what_cannot_be_found(query, shelves, n, error):
    with pytest.raises(error):
        nearest(np.array(query, float), shelves, n=n)


def test_aligned_kinds_give_the_mean_cosine(rng):
    r, u, e, t = rng.normal(size=(4, 6, 5)).astype(np.float32)
    h = np.zeros((6, 10), np.float32)
    yes = np.ones(6, bool)
    seen = SlideVectors(r=r, u=u, e=e, t=t, h_spot=h, h_niche=h, has_image=yes, has_counts=yes)

    def cosine(a, b):
        return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    product = (aligned(seen, "image") * aligned(seen, "gene")).sum(axis=1)
    np.testing.assert_allclose(product, (cosine(r, u) + cosine(e, t)) / 2, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("retrieve")
    rng = np.random.default_rng(0)
    run = toy_run.toy_run([toy_prepared(rng, id=f"t{i}", n_genes=12) for i in range(2)])
    toy_run.save(run, root / "run")
    (root / "slides").mkdir()
    for seed, id in enumerate(("s<b>1", "s2")):
        write_h5ad(root / "slides" / f"{id}.h5ad", section(id, seed=seed))
        out = root / f"{id}.h5ad"
        embed_slide(str(root / "slides" / f"{id}.h5ad"), str(root / "run"), out, ReadOptions())
    return root


def test_page_and_table(work, tmp_path):
    query = f"{work / 's<b>1.h5ad'}::{section('s<b>1', seed=0).barcodes[2]}"
    files = [work / "s<b>1.h5ad", work / "s2.h5ad"]
    result = find_spots(query, files, RetrieveRequest(n=4), tmp_path / "hits.html")
    page = (tmp_path / "hits.html").read_text()
    assert page.count("data:image/jpeg") == 5
    assert "<b>" not in page
    assert json.dumps(result)
    find_spots(query, files, RetrieveRequest(by="gene", n=4), tmp_path / "hits.csv")
    assert list(pd.read_csv(tmp_path / "hits.csv")) == ["slide", "barcode", "row", "similarity"]


def test_across_kinds_needs_the_model(work, tmp_path):
    query = f"{work / 's2.h5ad'}::{section('s2', seed=1).barcodes[0]}"
    request = RetrieveRequest(by="image", find="gene", n=3)
    with pytest.raises(ConfigError, match="goes through the model"):
        find_spots(query, [work / "s2.h5ad"], request, tmp_path / "x.csv")
    request = RetrieveRequest(by="gene", find="image", n=3, model=str(work / "run"))
    found = find_spots(query, [work / "s<b>1.h5ad"], request, tmp_path / "x.csv")
    assert {hit["slide"] for hit in found["hits"]} == {"s<b>1"}


def test_spots_off_the_tissue_move_no_other_spot(work, tmp_path):
    file, request = work / "s2.h5ad", RetrieveRequest(find="gene", model=str(work / "run"), n=5)
    whole = store.read_h5ad(file)
    query = f"{work / 's<b>1.h5ad'}::{section('s<b>1', seed=0).barcodes[2]}"
    expected = find_spots(query, [file], request, tmp_path / "x.csv")["hits"]
    off = whole[:2].copy()
    off.obs_names = ["off-1", "off-2"]
    off.obs["in_tissue"], whole.obs["in_tissue"] = 0, 1
    anndata.concat([off, whole], uns_merge="first").write_h5ad(tmp_path / "s2.h5ad")
    found = find_spots(query, [tmp_path / "s2.h5ad"], request, tmp_path / "x.csv")["hits"]
    assert [hit["barcode"] for hit in found] == [hit["barcode"] for hit in expected]
    assert [hit["row"] for hit in found] == [hit["row"] + 2 for hit in expected]


def test_bad_queries(work, tmp_path):
    file = work / "s2.h5ad"
    for query, error, message in (
        (str(file), ConfigError, "names no spot"),
        (f"{file}::nowhere", SlideError, "has no spots of this name"),
    ):
        with pytest.raises(error, match=message):
            find_spots(query, [file], RetrieveRequest(), tmp_path / "x.csv")
    good = f"{file}::{store.read_h5ad(file).obs_names[0]}"
    with pytest.raises(ConfigError, match="is no kind"):
        find_spots(good, [file], RetrieveRequest(by="genes"), tmp_path / "x.csv")
    with pytest.raises(OutputError, match=r"\.csv or \.html"):
        find_spots(good, [file], RetrieveRequest(), tmp_path / "x.txt")
    plain = work / "slides" / "s2.h5ad"
    with pytest.raises(SlideError, match="has no image embedding"):
        find_spots(good, [plain], RetrieveRequest(), tmp_path / "x.csv")
