"""The partition that many mixtures agree on."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from st_align.agreement import DIMS, View, agreed_mixture
from st_align.domains import assign_domains
from st_align.errors import SlideError
from st_align.mixture import best_mixture


def clouds(rng, n=60, c=4, d=10, apart=6.0):
    truth = np.repeat(np.arange(c), n)
    centres = rng.normal(size=(c, d)) * apart
    return centres[truth] + rng.normal(size=(len(truth), d)), truth


def test_a_view_gone_astray_is_outvoted(rng):
    x, truth = clouds(rng)
    noise = rng.normal(size=x.shape)
    found = agreed_mixture([View(noise), View(x), View(x[:, ::-1])], 4, rng)
    assert adjusted_rand_score(truth, found.labels) > 0.98
    assert 0.5 < found.agreement < 0.8  # with two thirds of the members
    assert agreed_mixture([View(x)], 4, rng).agreement > 0.98


def test_every_domain_asked_for_is_there(rng):
    x, _ = clouds(rng, n=5, c=3)
    for count in (2, 5, 9):
        assert len(np.unique(agreed_mixture([View(x)], count, rng).labels)) == count


def test_the_same_seed_gives_the_same_labels_whatever_the_axes(rng):
    x, _ = clouds(rng, d=max(DIMS) + 5)
    one, other = (agreed_mixture([View(x)], 4, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(one.labels, other.labels)


def test_large_slides_are_fitted_and_linked_on_some_spots(rng, monkeypatch):
    x, truth = clouds(rng)
    monkeypatch.setattr("st_align.agreement._MOST", 60)
    monkeypatch.setattr("st_align.agreement._LANDMARKS", 50)
    found = agreed_mixture([View(x)], 4, rng)
    assert len(found.labels) == len(x)
    assert adjusted_rand_score(truth, found.labels) > 0.98


def test_domains_by_consensus_look_at_all_views(rng):
    x, truth = clouds(rng)
    noise = rng.normal(size=x.shape)
    found = assign_domains(noise, 4, method="consensus", runs=2, views=[View(x), View(x)])
    assert adjusted_rand_score(truth, found.labels) > 0.98
    assert len(found.fits) == 2
    assert min(found.fits) > 0.9
    with pytest.raises(SlideError, match="NaN"):
        assign_domains(x, 4, method="consensus", views=[View(np.where(x > 9, np.nan, x))])
    with pytest.raises(ValueError, match="a view of 10"):
        assign_domains(x, 4, method="consensus", views=[View(x[:10])])
    with pytest.raises(ValueError, match="3 axes of training, 10 here"):
        assign_domains(x, 4, method="consensus", views=[View(x, x[:, :3])])


def test_half_of_the_members_see_as_many_training_spots_as_the_slide_has(rng, monkeypatch):
    x, truth = clouds(rng)
    training = x[rng.integers(len(x), size=5 * len(x))]
    seen = []

    def watched(spots, *args, of):
        seen.append((len(spots), len(of)))
        return best_mixture(spots, *args, of=of)

    monkeypatch.setattr("st_align.agreement.best_mixture", watched)
    found = agreed_mixture([View(x, training)], 4, rng)
    assert adjusted_rand_score(truth, found.labels) > 0.98
    n = len(x)
    few = len(dict.fromkeys(min(d, x.shape[1]) for d in DIMS))
    assert seen == [(round(0.8 * n), n), (round(1.6 * n), n)] * few
    seen.clear()
    agreed_mixture([View(x, training[:10])], 4, rng)
    assert seen[1] == (round(0.8 * (n + 10)), n)
