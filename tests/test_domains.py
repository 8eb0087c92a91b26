"""Clusterers, the number of domains, smoothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture

from st_align import domains as module
from st_align import mixture
from st_align.domains import (
    METHODS,
    assign_domains,
    choose_n_domains,
    gaussian_mixture,
    refine_labels,
)
from st_align.errors import ConfigError, SlideError
from st_align.metrics import ari
from toys import HEX_RING, hex_places


def clouds(rng, *, n=60, c=4, d=5, apart=8.0) -> tuple[np.ndarray, np.ndarray]:
    """`c` round clouds on a regular simplex."""
    truth = np.repeat(np.arange(c), n)
    return apart / np.sqrt(2) * np.eye(c, d)[truth] + rng.normal(0, 1, (n * c, d)), truth


def ring(rows: int, cols: int) -> np.ndarray:
    """[N, 7] neighbours on a hexagonal lattice without holes."""
    places = hex_places(rows, cols)
    row_of = {tuple(p): i for i, p in enumerate(places.tolist())}
    members = np.full((len(places), 7), -1)
    for i, (r, c) in enumerate(places.tolist()):
        found = [row_of[r + a, c + b] for a, b in HEX_RING if (r + a, c + b) in row_of]
        members[i, : len(found) + 1] = [i, *found]
    return members


@pytest.mark.parametrize("method", METHODS)
def test_clusterers_find_clouds(rng, method):
    x, truth = clouds(rng)
    found = assign_domains(x, 4, method=method, runs=2)
    assert found.method == method
    assert all(ari(truth, labels) > 0.98 for labels in found.runs)


def test_the_mixture_is_blind_to_rotation_and_scale_where_kmeans_is_not(rng):
    x, truth = clouds(rng, d=3, c=3)
    stretched = x @ rng.normal(size=(3, 3)) * [1, 1, 20]
    assert ari(truth, assign_domains(stretched, 3, runs=1).labels) > 0.98
    assert ari(truth, assign_domains(stretched, 3, runs=1, method="kmeans").labels) < 0.7


def test_the_mixture_reaches_the_likelihood_of_scikit_learn(rng):
    x, _ = clouds(rng, apart=3.0)
    ours = gaussian_mixture(x, 4, rng)
    theirs = GaussianMixture(
        4, covariance_type="tied", n_init=10, tol=1e-6, max_iter=2000, random_state=0
    )
    white = (x - x.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, bias=True)).T)
    assert ours.fit == pytest.approx(theirs.fit(white).score(white), abs=1e-3)
    assert ari(theirs.predict(white), ours.labels) > 0.98


def test_runs_are_reseeded_reproducible_and_independent_of_their_number(rng):
    x, _ = clouds(rng, apart=1.5)
    three, five = (assign_domains(x, 6, method="kmeans", runs=n, seed=7) for n in (3, 5))
    for a, b in zip(three.unrefined, five.unrefined, strict=False):
        np.testing.assert_array_equal(a, b)
    assert len({tuple(labels) for labels in five.runs}) > 1
    other = assign_domains(x, 6, method="kmeans", runs=3, seed=8)
    assert any((a != b).any() for a, b in zip(three.runs, other.runs, strict=True))
    assert five.best == int(np.argmax(five.fits))
    np.testing.assert_array_equal(five.labels, five.runs[five.best])


def test_domains_are_numbered_by_size(rng):
    x, truth = clouds(rng)
    keep = np.concatenate([np.flatnonzero(truth == c)[:n] for c, n in enumerate((20, 60, 10, 40))])
    found = assign_domains(x[keep], 4, runs=1)
    assert np.bincount(found.labels).tolist() == [60, 40, 20, 10]


def test_every_domain_has_a_spot_even_where_there_are_as_many_as_spots(rng):
    x = rng.normal(size=(12, 3))
    for count in (2, 7, 12):
        found = assign_domains(x, count, method="kmeans", runs=1)
        assert len(np.unique(found.labels)) == found.n_domains == count
    assert len(np.unique(assign_domains(x[:2], 2, runs=1).labels)) == 2


def test_large_slides_are_fitted_on_a_sample_first(rng, monkeypatch):
    x, _ = clouds(rng, apart=5.0)
    whole = assign_domains(x, 4, runs=1)
    monkeypatch.setattr(mixture, "FIT_SPOTS", 80)
    sampled = assign_domains(x, 4, runs=1)
    assert ari(whole.labels, sampled.labels) > 0.99
    assert sampled.fits[0] == pytest.approx(whole.fits[0], abs=1e-3)
    monkeypatch.setattr(module, "_SWEEP_SPOTS", 160)
    assert choose_n_domains(x) == 4


@pytest.mark.parametrize("count", [2, 5, 14])
def test_the_number_of_domains_is_found_without_labels(rng, count):
    x, truth = clouds(rng, n=40, c=count, d=14, apart=7.0)
    found = assign_domains(x, "auto", runs=1)
    assert found.n_domains == choose_n_domains(x) == count
    assert ari(truth, found.labels) > 0.98


def test_auto_stays_within_2_and_15(rng):
    assert choose_n_domains(rng.normal(size=(300, 4))) <= 15
    assert choose_n_domains(np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])) == 2


@pytest.mark.parametrize(
    ("n_domains", "options", "said"),
    [
        (0, {}, "2 to 40"),
        (1, {}, "2 to 40"),
        (-3, {}, "found:    -3"),
        (41, {}, "2 to 40 .40 spots., or auto"),
        ("seven", {}, "'seven'"),
        (2.0, {}, "found:    2.0"),
        (3, {"runs": 0}, "number of runs"),
        (3, {"method": "kmean"}, "did you mean 'kmeans'"),
    ],
)
def test_options_out_of_range(rng, n_domains, options, said):
    with pytest.raises(ConfigError, match=said):
        assign_domains(rng.normal(size=(40, 3)), n_domains, **options)


def test_repeated_rows_bound_the_number_of_domains(rng):
    x = np.repeat(rng.normal(size=(3, 2)), 5, axis=0)
    assert assign_domains(x, 3, runs=1).n_domains == 3
    with pytest.raises(ConfigError, match="15 spots, 3 of them distinct"):
        assign_domains(x, 4)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.array([[0.0, 1.0], [np.nan, 1.0], [2.0, 3.0]]), "in 1 of 3 spots"),
        (np.array([[0.0], [np.inf], [-np.inf]]), "in 2 of 3 spots"),
        (np.ones((9, 4)), "the same at every spot"),
        (np.ones((1, 4)), "the same at every spot"),
        (np.ones((9, 0)), "no table"),
        (np.ones(9), "no table"),
    ],
)
def test_embeddings_that_cannot_be_clustered(x, said):
    for n_domains in (2, "auto"):
        with pytest.raises(SlideError, match=said):
            assign_domains(x, n_domains)


def test_axes_that_do_not_vary_change_nothing(rng):
    x, _ = clouds(rng)
    padded = np.hstack([x, np.zeros((len(x), 2)), x[:, :1]])
    assert ari(assign_domains(x, 4, runs=1).labels, assign_domains(padded, 4, runs=1).labels) == 1


def test_smoothing_takes_the_majority_of_the_ring():
    #  0 0 0 1 1 1      a lone 1 among 0s, and a border that stays
    members = ring(6, 6)
    labels = (hex_places(6, 6)[:, 1] >= 6).astype(int)
    noisy = labels.copy()
    noisy[[13, 22]] = 1 - noisy[[13, 22]]
    np.testing.assert_array_equal(refine_labels(noisy, members), labels)
    np.testing.assert_array_equal(refine_labels(labels, members), labels)


def test_smoothing_of_more_spots_than_are_counted_at_once(rng):
    members, labels = ring(100, 90), rng.integers(5, size=9_000)
    for i, found in enumerate(refine_labels(labels, members)):
        votes = np.bincount(labels[members[i][members[i] >= 0]], minlength=5)
        assert votes[found] == votes.max()
        assert found == labels[i] or votes[labels[i]] < votes.max()


def test_smoothing_keeps_ties_and_the_last_spots_of_a_domain():
    pair = np.array([[0, 1], [1, 0]])
    assert refine_labels(np.array([0, 1]), pair).tolist() == [0, 1]
    labels = np.zeros(36, int)
    labels[14] = 1
    assert refine_labels(labels, ring(6, 6))[14] == 1
    labels[28] = 2
    labels[[13, 15]] = 2  # spots 13, 15 and 28 lie apart: all of domain 2 would go
    np.testing.assert_array_equal(refine_labels(labels, ring(6, 6)), labels)
    # What is given back to domain 1 was all that domain 0 had won: it gets its own back, too.
    chain = np.array([[0, 1, 1], [1, 0, 2], [2, 2, 2]])
    assert set(refine_labels(np.array([0, 1, 2]), chain)) == {0, 1, 2}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=30, max_size=30), st.permutations(range(30)))
def test_smoothing_follows_the_spots_and_loses_no_domain(values, order):
    labels, members, order = np.array(values), ring(5, 6), np.array(order)
    smooth = refine_labels(labels, members)
    assert set(smooth) == set(labels)
    place = np.argsort(order)
    moved = np.where(members[order] >= 0, place[members[order]], -1)
    np.testing.assert_array_equal(refine_labels(labels[order], moved), smooth[order])


def test_domains_hold_both_forms(rng):
    members = ring(8, 8)
    x = np.where(hex_places(8, 8)[:, 1:] >= 8, 1.5, -1.5) + rng.normal(size=(64, 2))
    both = assign_domains(x, 2, runs=2, neighbors=members)
    assert both.is_refined
    np.testing.assert_array_equal(both.labels, refine_labels(both.unrefined[both.best], members))
    plain = assign_domains(x, 2, runs=2, neighbors=members, refine=False)
    assert not plain.is_refined
    np.testing.assert_array_equal(plain.labels, both.unrefined[both.best])
    np.testing.assert_array_equal(plain.refined[0], both.refined[0])
    alone = assign_domains(x, 2, runs=1)
    assert alone.refined is None
    assert not alone.is_refined
    with pytest.raises(ValueError, match="64 labels"):
        assign_domains(x, 2, runs=1, neighbors=members[:5])


def test_the_answer_does_not_depend_on_the_number_of_threads(rng):
    from threadpoolctl import threadpool_limits

    x, _ = clouds(rng, apart=2.0)
    answers = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            answers.append(assign_domains(x, 5, runs=2))
    for a, b in zip(answers[0].runs, answers[1].runs, strict=True):
        np.testing.assert_array_equal(a, b)
