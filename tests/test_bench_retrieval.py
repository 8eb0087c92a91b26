"""`bench retrieval`: ranks against literal sorting, chance against counting, the whole bench."""

from __future__ import annotations

import csv
import json
import tracemalloc

import numpy as np
import pytest

import toy_run
from st_align.benchmarks import retrieval_scores as retrieval_scores_module
from st_align.benchmarks.image_rows import colours
from st_align.benchmarks.retrieval import RetrievalRequest, bench_retrieval
from st_align.benchmarks.retrieval_ridge import fit_ridge_retriever
from st_align.benchmarks.retrieval_scores import chance_scores, ranks, retrieval_scores
from st_align.corpus_build import build_corpus
from st_align.errors import ConfigError, ModelError, SlideError
from st_align.infer import without_counts
from toy_slides import toy_ref
from toys import toy_prepared


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    refs = [toy_ref(f"{p}{i}", rows=5) for p in "ab" for i in (1, 2)]
    out = tmp_path_factory.mktemp("retrieval") / "corpus"
    return build_corpus(refs, out, spot_px=16, niche_px=24, progress=False)


@pytest.fixture(scope="module")
def run_without_b(corpus, tmp_path_factory):
    run = toy_run.toy_run(corpus.slides(["a1", "a2"]))
    return toy_run.save(run, tmp_path_factory.mktemp("run") / "run")


def test_ranks_against_sorting(rng) -> None:
    a, b = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    rings = np.c_[np.arange(30), np.r_[np.arange(1, 30), -1]]
    found = ranks(a, b, rings)
    for i in range(30):
        cosine = [(a[i] @ b[j]) / np.sqrt((a[i] @ a[i]) * (b[j] @ b[j])) for j in range(30)]
        order = np.argsort(-np.array(cosine)).tolist()
        assert found.own[i] == order.index(i) + 1
        assert found.near[i] == min(order.index(j) for j in rings[i] if j >= 0) + 1


def test_a_perfect_retriever_and_one_that_says_nothing(rng) -> None:
    a, rings = rng.normal(size=(600, 5)), np.arange(600)[:, None]
    assert retrieval_scores(ranks(a, 3 * a, rings))["recall@1"] == 1
    constant = np.tile([0.3, 0.1, 0.7, 0.2, 0.9], (600, 1))
    found = retrieval_scores(ranks(a, constant, rings))
    assert found["recall@50"] == 0
    assert found["median rank"] == 300.5
    assert retrieval_scores(ranks(0 * a, a, rings))["median rank"] == 300.5


def test_chance_is_what_random_vectors_reach(rng) -> None:
    n = 400
    rings = np.c_[np.arange(n), (np.arange(n) + 1) % n, np.full(n, -1)]
    expected = chance_scores(rings)
    assert expected["recall@10"] == pytest.approx(10 / n)
    literal = 1 - np.prod([(n - 2 - i) / (n - i) for i in range(10)])
    assert expected["recall@10 within one ring"] == pytest.approx(literal)
    drawn = [
        retrieval_scores(ranks(rng.normal(size=(n, 6)), rng.normal(size=(n, 6)), rings))
        for _ in range(20)
    ]
    for name in ("recall@10", "recall@50", "recall@50 within one ring"):
        found = np.mean([one[name] for one in drawn])
        assert found == pytest.approx(expected[name], rel=0.2)
    assert chance_scores(rings[:4, :1])["recall@50"] == 1


def test_cosines_of_a_large_gallery_are_never_all_in_memory(rng, monkeypatch) -> None:
    a, b = rng.normal(size=(2, 2000, 3))
    rings = np.c_[np.arange(2000), (np.arange(2000) + 1) % 2000]
    whole = ranks(a, b, rings)
    monkeypatch.setattr(retrieval_scores_module, "_AT_ONCE", 100_000)
    tracemalloc.start()
    found = ranks(a, b, rings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2000**2 / 4, "a quarter of all cosines"
    np.testing.assert_array_equal(found.own, whole.own)
    np.testing.assert_array_equal(found.near, whole.near)
    monkeypatch.setattr(retrieval_scores_module, "_AT_ONCE", 10)
    np.testing.assert_array_equal(ranks(a[:50], b[:50], rings[:50, :1]).own,
                                  ranks(a[:50], b[:50], np.arange(50)[:, None]).own)  # fmt: skip


def test_the_ridge_finds_halves_that_differ_in_colour_and_sees_no_counts(rng) -> None:
    train = [toy_prepared(rng, id=f"t{i}", patient=f"p{i}") for i in range(2)]
    reads = {"spot": (colours,), "niche": (colours,)}
    ridge = fit_ridge_retriever(train, "lattice", reads)
    slide = toy_prepared(rng, id="x", patient="x")
    for scale in ("spot", "niche"):
        image = ridge.from_image(slide, scale, whiten=False)
        gene = ridge.from_counts(slide, scale, whiten=False)
        found = ranks(image, gene, np.arange(slide.n_spots)[:, None])
        assert np.median(found.own) < slide.n_spots / 3
        blind = ridge.from_image(without_counts(slide), scale, whiten=False)
        np.testing.assert_array_equal(image, blind)
    with pytest.raises(SlideError, match="no training slide of the model"):
        fit_ridge_retriever([], "lattice", reads)


def test_the_whole_bench(corpus, run_without_b, tmp_path) -> None:
    out = tmp_path / "out"
    request = RetrievalRequest(models=[f"m={run_without_b}"])
    result, _ = bench_retrieval(corpus.path, out, request)
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["slide"] for row in rows} == {"b1", "b2"}
    assert not any(row["note"] for row in rows)
    tracks = {row["track"] for row in rows}
    assert tracks == {f"{d}, {g}" for d in ("image → gene", "gene → image")
                      for g in ("own slide", "pooled")}  # fmt: skip
    methods = {row["method"] for row in rows}
    assert {"chance", "m, both", "m, niche (e, t), centred", "ridge, both"} <= methods
    chance = {
        row["track"]: float(row["value"])
        for row in rows
        if (row["method"], row["metric"], row["slide"]) == ("chance", "recall@10", "b1")
    }
    assert chance["image → gene, own slide"] == pytest.approx(2 * chance["image → gene, pooled"])
    text = (out / "results.md").read_text()
    assert "m on b1: donor-held-out" in text
    assert "recall@10 against ridge" in text
    best = result["headline"]["image → gene, own slide"]
    assert best["ridge"].startswith("ridge")
    assert json.loads((out / "provenance.json").read_text())["failed"] == []
    assert (out / "retrieval.png").read_bytes().startswith(b"\x89PNG")
    assert bench_retrieval(corpus.path, out, request) == (result, [])


def test_slides_the_model_saw_are_refused_when_named(corpus, run_without_b, tmp_path) -> None:
    request = RetrievalRequest(models=[str(run_without_b)], slides=["a1"])
    with pytest.raises(ModelError, match="was trained on a1"):
        bench_retrieval(corpus.path, tmp_path / "out", request)


def test_nothing_to_retrieve(corpus, tmp_path) -> None:
    with pytest.raises(ConfigError, match="no model"):
        bench_retrieval(corpus.path, tmp_path / "out", RetrievalRequest(models=[]))
    every = toy_run.save(toy_run.toy_run(corpus.slides()), tmp_path / "every")
    with pytest.raises(ConfigError, match="seen every slide"):
        bench_retrieval(corpus.path, tmp_path / "out", RetrievalRequest(models=[str(every)]))
