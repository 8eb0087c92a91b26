"""Labels carried over: right where slides agree, unknown where a tissue is new, calibrated."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import toy_run
from sources import section, write_h5ad
from st_align import keys
from st_align.annotate import Labelled, Seen, _calibrated, _folds, _temperature, annotate
from st_align.commands.annotate import annotate_slide
from st_align.discriminant import fitted, side_by_side
from st_align.errors import ConfigError, SlideError
from st_align.io import ReadOptions
from toys import toy_prepared


def labelled(slide, **changes) -> Labelled:
    labels = slide.spots["domain"].to_numpy().astype(str)
    return Labelled(slide=slide, embedding=None, labels=changes.get("labels", labels))


@pytest.fixture
def slides(rng):
    return [toy_prepared(rng, id=f"s{i}", rows=10, cols=10) for i in range(3)]


@pytest.mark.parametrize("n_annotated", [1, 2])
def test_labels_arrive(slides, n_annotated):
    found = annotate(
        [labelled(s) for s in slides[:n_annotated]], Seen(slide=slides[2], embedding=None)
    )
    truth = slides[2].spots["domain"].to_numpy()
    assert (found.nearest == truth).mean() > 0.95
    assert found.folds == ("squares" if n_annotated == 1 else "slides")
    assert found.features == ("genes",)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-5)
    assert (found.labels == keys.UNKNOWN).mean() < 0.1


def test_labels_of_the_new_slide_are_never_read(slides):
    hidden = dataclasses.replace(slides[2], spots=slides[2].spots.drop(columns="domain"))
    known = [labelled(slides[0])]
    first, blind = (annotate(known, Seen(slide=s, embedding=None)) for s in (slides[2], hidden))
    np.testing.assert_array_equal(first.labels, blind.labels)


def test_a_tissue_that_was_not_annotated_is_unknown(slides, rng):
    """A fifth of the new slide has a programme that no annotated spot has."""
    new = slides[2]
    counts = new.counts.toarray()
    strange = new.spots["array_row"].to_numpy() < 2
    counts[np.ix_(strange, np.arange(10, 20))] = rng.poisson(90, (int(strange.sum()), 10))
    new = dataclasses.replace(new, counts=type(new.counts)(counts.astype(np.int32)))
    found = annotate([labelled(s) for s in slides[:2]], Seen(slide=new, embedding=None))
    unknown = found.labels == keys.UNKNOWN
    assert unknown[strange].mean() > unknown[~strange].mean()


def test_a_slide_with_other_shares_of_the_labels_is_placed(rng):
    """Two labels 4 apart, 1 in 2 annotated and 1 in 10 of the new slide, whose scale is another."""
    y = rng.integers(0, 2, 600)
    model = fitted(side_by_side([rng.normal(4.0 * y[:, None], 1, (600, 3))]), y)
    rare = (np.arange(500) < 50).astype(int)
    block = 7 * rng.normal(4.0 * rare[:, None], 1, (500, 3)) + 100
    as_it_is = model.lda.predict(side_by_side([block]))
    placed = model.lda.predict(model.placed([block]))
    assert (as_it_is == rare).mean() < 0.9
    assert (placed == rare).mean() > 0.98


def test_one_slide_is_left_out_by_quarters_unless_one_holds_a_label_alone(slides):
    slide = slides[0]
    _, halves = np.unique(slide.spots["domain"], return_inverse=True)
    quarters, squares, _ = _folds([slide], [halves])
    assert (len(np.unique(quarters[0])), len(np.unique(squares[0]))) == (4, 5)
    along = slide.spots[["x", "y"]].sum(axis=1).to_numpy()
    corner = (along < np.quantile(along, 0.1)).astype(int)
    assert corner.sum() >= 10
    instead, squares, _ = _folds([slide], [corner])
    np.testing.assert_array_equal(instead[0], squares[0])


def test_embeddings_alone(slides, rng):
    def embedding(slide):
        right = (slide.spots["domain"] == "right").to_numpy(float)
        return (right[:, None] + rng.normal(0, 0.2, (len(right), 3))).astype(np.float32)

    bare = [dataclasses.replace(s, counts=None, genes=None) for s in slides]
    known = [dataclasses.replace(labelled(bare[0]), embedding=embedding(bare[0]))]
    found = annotate(known, Seen(slide=bare[2], embedding=embedding(bare[2])))
    assert found.features == ("embedding",)
    assert (found.nearest == bare[2].spots["domain"].to_numpy()).mean() > 0.95
    with pytest.raises(SlideError, match="nothing in common"):
        annotate([labelled(bare[0])], Seen(slide=bare[2], embedding=None))


def test_few_labels(slides):
    new = Seen(slide=slides[1], embedding=None)
    few = np.where(np.arange(slides[0].n_spots) < 3, "rare", slides[0].spots["domain"])
    found = annotate([labelled(slides[0], labels=few.astype(str))], new)
    assert found.left_out == {"rare": 3}
    for labels in (np.full(100, ""), np.full(100, "one")):
        with pytest.raises(SlideError, match="too few labels"):
            annotate([labelled(slides[0], labels=labels)], new)


def test_temperature_calibrates(rng):
    truth = rng.dirichlet([1, 1, 1], 4000)
    y = np.array([rng.choice(3, p=p) for p in truth])
    overconfident = _calibrated(truth, 0.5)
    assert _temperature(overconfident, y) == pytest.approx(2, rel=0.2)


def test_what_cannot_be_read_is_told_before_anything_is_embedded(rng, tmp_path, monkeypatch):
    run = toy_run.toy_run([toy_prepared(rng, id=f"t{i}", n_genes=12) for i in range(2)])
    toy_run.save(run, tmp_path / "run")
    there = str(write_h5ad(tmp_path / "a.h5ad", section("a")))
    other = str(write_h5ad(tmp_path / "b.h5ad", section("b", seed=1)))
    monkeypatch.setattr("st_align.commands.annotate.Embedder", None)
    for slide, error, message in (
        (str(tmp_path / "none.h5ad"), SlideError, "does not exist"),
        (other, ConfigError, "there are no labels"),
    ):
        with pytest.raises(error, match=message):
            annotate_slide(
                slide, [there], "layer", str(tmp_path / "run"), tmp_path / "o.h5ad", ReadOptions()
            )
    assert not (tmp_path / "o.h5ad").exists()
