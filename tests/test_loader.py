from __future__ import annotations

import dataclasses
import threading
from typing import NamedTuple

import numpy as np
import pytest
import torch

from st_align import loader
from st_align.augment import augment, spot_uniform
from st_align.batch import Batch
from st_align.config import Config, DataConfig, ModelConfig
from st_align.encoders.base import Encoded
from st_align.errors import CorpusError
from st_align.expression import choose_panel, panel_expression
from st_align.geometry import ring_mean
from st_align.loader import FrozenRows, SpotData, prefetch, slide_inputs
from st_align.model import FrozenShape
from toys import toy_prepared

CONFIG = Config(model=ModelConfig(niche_image="resnet-small-gn"))
FROZEN = Config()
SHAPE = FrozenShape(4, 5)


class ToyFeatures(NamedTuple):
    tokens: np.ndarray
    pooled: np.ndarray


def toy_features(rng: np.random.Generator, n: int) -> ToyFeatures:
    tokens = (3 + 2 * rng.normal(size=(n, *SHAPE))).astype(np.float16)
    return ToyFeatures(tokens, tokens.mean(axis=1))


def toy_data(slides, config=CONFIG, features=None):
    panel = choose_panel([s for s in slides if s.counts is not None], 20)
    expression = [panel_expression(s, panel) if s.counts is not None else None for s in slides]
    frozen = {"niche_image": SHAPE} if features else {}
    inputs = [
        slide_inputs(s, config, expression=x, features={"niche_image": f} if frozen else {})
        for s, x, f in zip(slides, expression, features or [None] * len(slides), strict=True)
    ]
    return SpotData(inputs, n_genes=len(panel), frozen=frozen), expression


@pytest.fixture
def slides(rng):
    return [toy_prepared(rng, id="a"), toy_prepared(rng, id="b", rows=4)]


def test_a_batch_holds_the_rows_asked_for(slides):
    data, expression = toy_data(slides)
    ids = np.array([40, 3, 35, 36])  # rows 4 of b, 3 and 35 of a, 0 of b
    batch = data.batch(ids)
    where = [(1, 4), (0, 3), (0, 35), (1, 0)]
    assert data.n_spots == 60
    assert batch.ids.tolist() == ids.tolist()
    assert batch.has_image.all()
    assert batch.has_counts.all()
    for i, (s, row) in enumerate(where):
        niche = slides[s].niches["lattice"]
        assert (batch.spot_image[i].numpy() == slides[s].spot_patches[row]).all()
        assert (batch.niche_image[i].numpy() == niche.patches[row]).all()
        assert (batch.spot_gene[i].numpy() == expression[s].values[row]).all()
        near = niche.neighbors[row]
        assert (batch.neighbors[i].numpy() == np.where(near < 0, -1, near + 36 * s)).all()


@pytest.mark.parametrize("at_once", [1, 7_000])
def test_a_batch_does_not_depend_on_how_many_rows_are_read_at_once(
    slides, rng, monkeypatch, at_once
):
    data, _ = toy_data(slides)
    ids = rng.permutation(60)
    whole = data.batch(ids)
    monkeypatch.setattr(loader, "_AT_ONCE", at_once)
    pieces = data.batch(ids)
    for field in dataclasses.fields(Batch):
        torch.testing.assert_close(
            getattr(pieces, field.name), getattr(whole, field.name), rtol=0, atol=0
        )


def test_niche_expression_is_the_mean_over_the_members(slides):
    data, expression = toy_data(slides)
    niche = data.batch(np.arange(60)).niche_gene.numpy()
    expected = [
        ring_mean(x.values, s.niches["lattice"].neighbors, x.valid)
        for s, x in zip(slides, expression, strict=True)
    ]
    np.testing.assert_array_equal(niche, np.concatenate(expected))


def test_linear_views_weigh_neighbours_by_their_distance(slides):
    data, (expression, _) = toy_data(slides)
    members = slides[0].niches["lattice"].neighbors
    weights = np.where(members >= 0, np.exp(-0.5), 0)
    weights[:, 0] = 1
    expected = np.einsum("nk,nkp->np", weights, expression.values[members])
    expected /= weights.sum(axis=1, keepdims=True)
    (near,) = data.slides[0].near_expression.read(np.arange(36))
    np.testing.assert_allclose(near, expected, rtol=1e-4, atol=1e-5)


def test_empty_spots_are_marked_and_leave_their_neighbours_niches(rng):
    slide = toy_prepared(rng)
    dark = np.array([0, 7])
    slide.spots.loc[dark, "total_umi"] = 0.0
    data, (expression,) = toy_data([slide])
    batch = data.batch(np.arange(36))
    assert np.flatnonzero(~batch.has_counts).tolist() == dark.tolist()
    assert (batch.spot_gene[dark] == 0).all()
    members = slide.niches["lattice"].neighbors[1]
    lit = [m for m in members if m >= 0 and m not in dark]
    assert len(lit) < (members >= 0).sum()
    np.testing.assert_allclose(
        batch.niche_gene[1], expression.values[lit].mean(axis=0), rtol=1e-5, atol=1e-6
    )


def test_the_centre_can_be_left_out_of_the_niche(rng):
    slide = toy_prepared(rng)
    niche = slide.niches["lattice"]
    niche.neighbors[5] = [5, *[-1] * 6]
    config = dataclasses.replace(CONFIG, data=DataConfig(niche_without_centre=True))
    data, (expression,) = toy_data([slide], config)
    values = data.batch(np.arange(36)).niche_gene
    ring = [m for m in niche.neighbors[8, 1:] if m >= 0]
    np.testing.assert_allclose(
        values[8], expression.values[ring].mean(axis=0), rtol=1e-5, atol=1e-6
    )
    assert (values[5].numpy() == expression.values[5]).all()  # alone: the centre stays


def test_absent_modalities_are_zeros_of_the_right_shape(rng):
    slides = [
        toy_prepared(rng, id="both"),
        toy_prepared(rng, id="dark", image=False),
        toy_prepared(rng, id="mute", counts=False),
    ]
    features = [toy_features(rng, 36), None, toy_features(rng, 36)]
    data, _ = toy_data(slides, FROZEN, features)
    batch = data.batch(np.array([0, 36, 72]))
    assert batch.has_image.tolist() == [True, False, True]
    assert batch.has_counts.tolist() == [True, True, False]
    assert batch.spot_image.shape == (3, 16, 16, 3)
    assert batch.niche_image.tokens.shape == (3, *SHAPE)
    assert batch.niche_image.tokens.dtype == torch.float32
    assert not batch.spot_image[1].any()
    assert not batch.niche_image.tokens[1].any()
    assert not batch.niche_image.pooled[1].any()
    assert not batch.spot_gene[2].any()
    assert not batch.niche_gene[2].any()
    augmented = data.batch(np.array([0, 36, 72]), augment_key=(0, 0))
    assert not augmented.spot_image[1].any()


def test_slides_without_any_image_still_make_batches(rng):
    data, _ = toy_data([toy_prepared(rng, image=False)], FROZEN, [None])
    batch = data.batch(np.arange(3))
    assert batch.spot_image.dtype == torch.uint8
    assert not batch.has_image.any()


def test_frozen_image_features_are_standardised_by_their_own_slide(rng):
    slides = [toy_prepared(rng, id="a"), toy_prepared(rng, id="b")]
    features = [toy_features(rng, 36), toy_features(rng, 36)]
    stained = ToyFeatures(*(5 * x + 7 for x in features[1]))
    plain, _ = toy_data(slides, FROZEN, features)
    shifted, _ = toy_data(slides, FROZEN, [features[0], stained])
    ids = np.arange(72)
    encoded, again = plain.batch(ids).niche_image, shifted.batch(ids).niche_image
    for values, others in zip(encoded, again, strict=True):
        for rows in (slice(0, 36), slice(36, 72)):
            channels = values[rows].reshape(-1, SHAPE.dim)
            torch.testing.assert_close(channels.mean(0), torch.zeros(SHAPE.dim), atol=1e-3, rtol=0)
            torch.testing.assert_close(
                channels.std(0, correction=0), torch.ones(SHAPE.dim), atol=1e-3, rtol=0
            )
        torch.testing.assert_close(values, others, atol=0.03, rtol=0)


def test_statistics_of_a_larger_slide_are_taken_over_all_of_it(rng):
    features = toy_features(rng, 300)
    features.tokens[:, :, 0] += np.linspace(0, 20, 300, dtype=np.float16)[:, None]
    features.tokens[:, :, 1] = 5  # never varies
    tokens, _ = FrozenRows(features, scored=np.arange(300)).read(np.arange(300))
    channels = tokens.reshape(-1, SHAPE.dim)
    np.testing.assert_allclose(channels.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(channels.std(axis=0), [1, 0, 1, 1, 1], atol=1e-4)


def test_image_inputs_do_not_depend_on_counts(rng):
    slide = toy_prepared(rng)
    other = dataclasses.replace(slide, counts=slide.counts[::-1])
    features = [toy_features(rng, 36)]
    one, two = (toy_data([s], FROZEN, features)[0].batch(np.arange(36)) for s in (slide, other))
    assert (one.spot_image == two.spot_image).all()
    assert (one.niche_image.tokens == two.niche_image.tokens).all()
    assert (one.spot_gene != two.spot_gene).any()


def test_a_niche_that_was_not_prepared_names_the_command(rng):
    config = dataclasses.replace(CONFIG, data=DataConfig(niche="k3"))
    with pytest.raises(CorpusError, match=r"st-align prepare .* --niche k3"):
        slide_inputs(toy_prepared(rng), config, expression=None, features={})


def test_augmentation_is_a_function_of_seed_epoch_and_spot(slides):
    data, _ = toy_data(slides)
    ids = np.arange(20)
    one = data.batch(ids, augment_key=(0, 1)).spot_image
    shuffled = data.batch(ids[::-1].copy(), augment_key=(0, 1)).spot_image.flip(0)
    assert (one == shuffled).all()
    for key in [(0, 2), (1, 1)]:
        assert (data.batch(ids, augment_key=key).spot_image != one).any()
    assert (data.batch(ids).spot_image != one).any()


def test_augmentation_is_the_same_for_one_patch_and_for_more_than_are_done_at_once(rng):
    patches, ids = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), np.arange(100, 140)
    alone = [augment(p[None], i[None], (0, 1))[0] for p, i in zip(patches, ids, strict=True)]
    np.testing.assert_array_equal(augment(patches, ids, (0, 1)), alone)


def test_augmentation_turns_patches_in_all_eight_ways_and_shades_them_mildly():
    corner = np.zeros((400, 8, 8, 3), np.uint8)
    corner[:, 0, 1] = 200
    seen = augment(corner, np.arange(400), (3, 1)).astype(int)
    places = {tuple(np.unravel_index(p.argmax(), (8, 8))) for p in seen[..., 0]}
    assert places == {(0, 1), (1, 0), (0, 6), (6, 0), (7, 1), (1, 7), (7, 6), (6, 7)}
    flat = augment(np.full((400, 4, 4, 3), 100, np.uint8), np.arange(400), (3, 1)).astype(int)
    assert (flat == flat[:, :1, :1]).all()
    assert 78 <= flat.min() < 90
    assert 110 < flat.max() <= 122
    assert flat.mean() == pytest.approx(100, abs=1.5)


def test_spot_random_numbers_are_uniform_and_unrelated():
    draws = spot_uniform(np.arange(20_000), (0, 0), 3)
    assert 0 <= draws.min() <= draws.max() < 1
    np.testing.assert_allclose(draws.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose(draws.var(axis=0), 1 / 12, atol=0.002)
    correlation = np.corrcoef(np.c_[draws, spot_uniform(np.arange(20_000), (0, 1), 3)].T)
    assert np.abs(correlation - np.eye(6)).max() < 0.03
    assert abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.03


def test_a_batch_moves_whole(slides):
    data, _ = toy_data(slides)
    batch = data.batch(np.arange(4)).to("meta")
    assert isinstance(batch, Batch)
    assert batch.spot_image.is_meta
    assert not isinstance(batch.spot_image, Encoded)


def test_prefetch_keeps_the_order_works_ahead_and_stops():
    made = []

    def make(key):
        made.append((key, threading.current_thread().name))
        return key

    batches = prefetch(make, range(100), ahead=2)
    assert [next(batches) for _ in range(5)] == [0, 1, 2, 3, 4]
    batches.close()
    assert len(made) <= 9
    assert threading.current_thread().name not in {name for _, name in made}
    assert [*prefetch(make, range(4))] == [0, 1, 2, 3]


def test_prefetch_raises_what_making_a_batch_raised():
    def make(key):
        if key == 2:
            raise CorpusError("a damaged column")
        return key

    batches = prefetch(make, range(5))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(CorpusError, match="damaged column"):
        next(batches)
