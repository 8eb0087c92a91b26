"""`inspect RUN --diagnose CORPUS`: numbers that tell collapse and leaks."""

from __future__ import annotations

import numpy as np
import pytest

from st_align.diagnose import _effective_rank, _slide_probe, diagnose
from st_align.infer import Embedder
from toy_corpus import ToyCorpus
from toy_run import toy_run
from toys import toy_prepared


@pytest.fixture
def slides(rng):
    return [toy_prepared(rng, id=f"s{k}", patient=f"p{k}") for k in range(2)]


def test_effective_rank_counts_the_axes_that_vary(rng):
    even, _ = np.linalg.qr(rng.normal(size=(500, 6)))
    assert _effective_rank([even]) == pytest.approx(6, abs=0.1)
    line = np.outer(rng.normal(size=500), np.ones(6))
    assert _effective_rank([line]) == pytest.approx(1, abs=1e-6)
    # What slides do not share is no axis: each is centred on itself.
    assert _effective_rank([line, line + 100 * np.eye(6)[0]]) == pytest.approx(1, abs=1e-6)


def test_the_probe_finds_slides_only_where_vectors_tell_them_apart(rng):
    same = [rng.normal(size=(200, 4)) for _ in range(3)]
    found = _slide_probe(same, 0)
    assert found["chance"] == pytest.approx(1 / 3)
    assert abs(found["accuracy"] - 1 / 3) < 0.1
    apart = [values + 5 * k for k, values in enumerate(same)]
    assert _slide_probe(apart, 0)["accuracy"] > 0.99


def test_a_diagnosis_has_every_number_and_is_the_same_under_a_seed(slides, monkeypatch):
    # No caches on disk: the corpus lies in memory.
    monkeypatch.setattr("st_align.diagnose.Embedder", lambda run, corpus: Embedder(run))
    run, corpus = toy_run(slides), ToyCorpus(slides)
    found = diagnose(run, corpus)
    assert found == diagnose(run, corpus)
    assert set(found["effective_rank"]) == {"r", "u", "e", "t", "h_spot", "h_niche"}
    assert all(1 <= rank <= 16 for rank in found["effective_rank"].values())
    for scale in ("spot", "niche"):
        assert 0 <= found["alignment"][scale] <= 4
        assert found["uniformity"][scale] <= 0
        assert found["attention"][scale] >= 0
    assert found["attention"]["niche"] > 0
