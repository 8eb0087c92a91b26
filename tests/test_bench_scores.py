"""What benches score with, and how far a model is from a slide: scores of domains, the audit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from st_align.benchmarks import audit
from st_align.benchmarks.domains_differences import differences, differences_table
from st_align.benchmarks.domains_score import coherence, draw, interval, resampled_ari, scores
from st_align.benchmarks.methods import Target
from st_align.errors import ConfigError, ModelError
from st_align.infer import training_slides
from toy_run import toy_run
from toys import two_patients

# --- scores ---------------------------------------------------------------------------------


def test_scores_leave_unlabelled_spots_out() -> None:
    labels = np.array(["x", "x", "y", "y", ""])
    xy = np.arange(10.0).reshape(5, 2)
    found = scores(labels, np.array([0, 0, 1, 1, 0]), xy)
    assert found["ari"] == found["nmi"] == found["homogeneity"] == found["completeness"] == 1
    assert scores(labels, np.array([0, 0, 0, 0, 1]), xy)["ari"] == 0


def test_coherence_tells_halves_from_scattered_domains() -> None:
    rng = np.random.default_rng(0)
    xy = np.stack(np.meshgrid(np.arange(20.0), np.arange(20.0)), axis=-1).reshape(-1, 2)
    halves, scattered = (xy[:, 0] > 9).astype(int), rng.integers(0, 2, 400)
    assert coherence(halves, xy)["pas"] < 0.05 < coherence(scattered, xy)["pas"]
    assert coherence(halves, xy)["chaos"] < coherence(scattered, xy)["chaos"]
    assert coherence(np.zeros(400, int), xy)["pas"] == 0


def test_weighted_ari_is_the_ari_of_the_repeated_spots() -> None:
    rng = np.random.default_rng(0)
    labels, found = rng.integers(0, 3, 40).astype(str), rng.integers(0, 4, 40)
    weights = draw(40, rng, replicates=5)
    expected = [
        adjusted_rand_score(np.repeat(labels, w.astype(int)), np.repeat(found, w.astype(int)))
        for w in weights
    ]
    np.testing.assert_allclose(resampled_ari(labels, [found], weights), expected)
    one = np.ones((1, 40))
    assert resampled_ari(np.full(40, "x"), [np.zeros(40, int)], one) == 1


def test_interval_holds_the_difference_and_widens_with_slides_that_disagree() -> None:
    rng = np.random.default_rng(0)
    alike = [rng.normal(0.1, 0.01, 1000) for _ in range(4)]
    apart = [rng.normal(m, 0.01, 1000) for m in (-0.1, 0.0, 0.2, 0.3)]
    narrow, wide = interval(alike, 0.1, rng), interval(apart, 0.1, rng)
    assert narrow.low < 0.1 < narrow.high
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_differences_are_of_each_track_and_of_the_slides_that_both_have() -> None:
    rng = np.random.default_rng(0)
    slides = two_patients(rng)[:2]
    targets = [
        Target(slide=s, labels=s.spots["domain"].to_numpy().astype(str), fit=(), protocol="")
        for s in slides
    ]
    true = {t.slide.id: np.unique(t.labels, return_inverse=True)[1][None] for t in targets}
    chance = {id: rng.permuted(labels, axis=1) for id, labels in true.items()}
    found = {(id, "good", "oracle K"): labels for id, labels in true.items()}
    found |= {(id, "chance", "oracle K"): labels for id, labels in chance.items()}
    found |= {("a1", "chance", "blind K"): chance["a1"], ("a1", "good", "blind K"): true["a1"],
              ("a2", "alone", "blind K"): true["a2"]}  # fmt: skip
    made = {(d.method, d.track): d for d in differences(targets, found, ["chance"], 0)}
    assert made.keys() == {("good", "oracle K"), ("good", "blind K")}
    assert made["good", "oracle K"].slides == ("a1", "a2")
    assert made["good", "blind K"].slides == ("a1",)
    assert made["good", "oracle K"].interval.low > 0.5
    both = differences(targets, found, ["chance", "good"], 0)
    page = differences_table(both, "oracle K").splitlines()
    assert page[0] == "| ARI less that of | chance | good | slides |"
    assert page[2].startswith("| good | +")
    assert page[3].startswith("| chance |  | -")
    assert "No row" in differences_table(both, "blind K, refined")


# --- audit ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "protocol"),
    [
        ({"b1": "B"}, audit.DONOR),
        ({"a2": "A", "b1": "B"}, audit.SECTION),
        ({"a1": "A"}, audit.LEAK),
        ({"Human_Brain_Visium_a1": "study"}, audit.LEAK),
    ],
)
def test_how_far_a_model_is_from_a_slide(trained: dict, protocol: str) -> None:
    assert audit.seen(trained, two_patients(np.random.default_rng(0))[0]).protocol == protocol


def test_nobody_said_whose_slide_it_is() -> None:
    slide = dataclasses.replace(
        two_patients(np.random.default_rng(0))[0], patient="a1", patient_origin="slide"
    )
    assert audit.seen({"b1": "B"}, slide).protocol == audit.UNKNOWN


def test_folds_of_one_name_score_the_slides_they_have_not_seen() -> None:
    a1, a2, b1 = two_patients(np.random.default_rng(0))
    folds = [("ours", toy_run([a2, b1])), ("ours", toy_run([a1, b1]))]
    (model,) = audit.contenders(folds)
    for slide in (a1, a2):
        run, found = model.for_slide(slide)
        assert slide.id not in training_slides(run)
        assert found.protocol == audit.SECTION
    lines = audit.require_no_leak([model], [a1, a2], allow=False)
    assert "saw a2 of A" in lines[0]
    with pytest.raises(ModelError, match="trained on b1"):
        audit.require_no_leak([model], [b1], allow=False)
    assert audit.LEAK in audit.require_no_leak([model], [b1], allow=True)[0]


def test_names_of_models() -> None:
    assert audit.parse_model("runs/one/") == ("one", "runs/one/")
    assert audit.parse_model("ours=runs/one") == ("ours", "runs/one")
    with pytest.raises(ConfigError, match="--model"):
        audit.parse_model("=runs/one")


def test_fitting_slides() -> None:
    a1, a2, b1 = two_patients(np.random.default_rng(0))
    assert [s.id for s in audit.fitting_slides(a1, [a1, a2, b1], "donor")] == ["b1"]
    assert [s.id for s in audit.fitting_slides(a1, [a1, a2, b1], "section")] == ["a2", "b1"]
    with pytest.raises(ConfigError, match="--protocol"):
        audit.fitting_slides(a1, [a1], "doner")
