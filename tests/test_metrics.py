"""Scores of domains against labels."""

from __future__ import annotations

import numpy as np
import pytest

from st_align.domains import Domains
from st_align.errors import SlideError
from st_align.metrics import ari, labelled, nmi, score_domains

LABELS = np.array(["L1", "L1", "L2", "L2", "NA", None, "L2", " nan"], object)
FOUND = np.array([0, 0, 1, 1, 0, 1, 1, 2])
SWAPPED = np.array([1, 1, 0, 0, 2, 2, 0, 2])
WRONG = np.array([0, 1, 0, 1, 0, 0, 0, 0])


def domains(*, refined: bool = True, lattice: bool = True) -> Domains:
    return Domains(
        method="gmm",
        n_domains=3,
        is_refined=refined,
        best=1,
        fits=(-1.0, -0.5),
        unrefined=(WRONG, WRONG),
        refined=(FOUND, WRONG) if lattice else None,
    )


def test_missing_labels_are_told_by_what_people_write():
    assert labelled(LABELS).tolist() == [True] * 4 + [False, False, True, False]
    assert labelled(["<NA>", "None", "NAN", "", float("nan"), "na"]).sum() == 0
    assert labelled(["WM", 0, 1.5, "nana"]).all()


def test_perfect_domains_score_1_whatever_their_names_and_the_unlabelled_spots():
    assert ari(LABELS, FOUND) == ari(LABELS, SWAPPED) == 1
    assert nmi(LABELS, FOUND) == pytest.approx(1)
    assert ari(LABELS, WRONG) < 0.1


def test_ari_counts_pairs_as_its_definition_does():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, 30), rng.integers(0, 4, 30)
    i, j = np.triu_indices(30, 1)
    same_a, same_b = a[i] == a[j], b[i] == b[j]
    expected = same_a.mean() * same_b.mean()
    best = (same_a.mean() + same_b.mean()) / 2
    index = ((same_a & same_b).mean() - expected) / (best - expected)
    assert ari(a.astype(str), b) == pytest.approx(index)


def test_ari_scores_the_runs_in_the_form_that_is_stored():
    score = score_domains(domains(), LABELS)
    low = ari(LABELS, WRONG)
    assert score["ari"]["runs"] == [1.0, low]
    assert score["ari"]["mean"] == pytest.approx((1 + low) / 2)
    assert score["ari"]["std"] == pytest.approx((1 - low) / 2)
    assert score["ari_stored"] == low
    assert score["ari_refined"] == pytest.approx((1 + low) / 2)
    assert score["ari_unrefined"] == pytest.approx(low)
    assert score["n_labelled"] == 5
    plain = score_domains(domains(refined=False), LABELS)
    assert plain["ari"]["runs"] == [low, low]
    assert plain["ari_refined"] == score["ari_refined"]


def test_without_a_lattice_there_is_no_refined_score():
    score = score_domains(domains(refined=False, lattice=False), LABELS)
    assert score["ari_refined"] is None


def test_nothing_to_score_is_said():
    with pytest.raises(SlideError, match="no spot has a label"):
        ari(np.array(["NA", ""], object), np.array([0, 1]))
    with pytest.raises(ValueError, match="8 labels, 3 spots"):
        ari(LABELS, FOUND[:3])
