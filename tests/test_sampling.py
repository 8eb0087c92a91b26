from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_align.config import OptimConfig
from st_align.errors import ConfigError
from st_align.sampling import (
    batch_size,
    epoch_order,
    global_batch,
    rank_rows,
    steps_per_epoch,
)
from st_align.schedules import learning_rate, n_epochs, weight_decay
from st_align.splits import split_slides

sizes = st.integers(2, 60)


@given(n=sizes, batch=sizes, block=sizes | st.just(1), seed=st.integers(0, 9))
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_visits_every_spot_once_but_the_last(n, batch, block, seed, epoch):
    per_epoch, size = steps_per_epoch(n, batch), batch_size(n, batch)
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    seen = np.concatenate([global_batch(seed, step, n, batch, block=block) for step in steps])
    assert len(set(seen.tolist())) == len(seen) == n - n % size
    assert set(seen.tolist()) <= set(range(n))


def test_epochs_differ_in_order_and_in_what_they_drop():
    orders = [epoch_order(0, epoch, 100) for epoch in range(6)]
    assert len({tuple(order[96:]) for order in orders}) == 6
    assert (epoch_order(0, 3, 100) == orders[3]).all()
    assert (epoch_order(1, 3, 100) != orders[3]).any()


def test_a_batch_of_blocks_reads_runs_of_spots_from_several_places():
    n, batch, block = 100_000, 256, 32
    runs = global_batch(3, 17, n, batch, block=block).reshape(-1, block)
    assert (np.diff(runs, axis=1) == 1).all()
    assert len(set(runs[:, 0] // 2_000)) > 4  # slides, were they of 2,000 spots
    epochs = [global_batch(3, e * (n // batch), n, batch, block=block) for e in range(4)]
    assert len({int(spots[0]) % block for spots in epochs}) > 1  # blocks begin elsewhere
    assert not set(epochs[0].tolist()) >= set(epochs[1].tolist())


def test_every_spot_is_left_out_of_some_epoch_alike():
    n, batch, block = 1_000, 96, 16
    dropped = np.zeros(n, int)
    for epoch in range(2_000):
        steps = range(epoch * 10, epoch * 10 + 10)
        dropped += 1
        for step in steps:
            dropped[global_batch(0, step, n, batch, block=block)] -= 1
    expected = 2_000 * (n % batch) / n
    assert 0.5 * expected < dropped.min() < dropped.max() < 1.6 * expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_together_hold_the_global_batch(ranks):
    whole = global_batch(7, 5, 1000, 64)
    shares = [whole[rank_rows(64, rank, ranks)] for rank in range(ranks)]
    assert {len(share) for share in shares} == {64 // ranks}
    assert (np.concatenate(shares) == whole).all()


def test_a_batch_that_ranks_cannot_share_names_one_that_they_can():
    with pytest.raises(ConfigError, match=r"optim\.batch = 24"):
        rank_rows(25, 0, 2)


def test_a_batch_larger_than_the_set_takes_all_of_it():
    assert batch_size(10, 256) == 10
    assert steps_per_epoch(10, 256) == 1
    assert sorted(global_batch(0, 3, 10, 256)) == list(range(10))


def test_order_of_an_epoch_cannot_be_changed_by_its_reader():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 10)[0] = 3


@pytest.mark.parametrize(
    ("n", "expected"), [(1_000, 60), (15_000, 10), (150_000, 2), (1_300_000, 2)]
)
def test_epochs_follow_the_budget_of_spots(n, expected):
    assert n_epochs(OptimConfig(spot_budget=150_000), n) == expected
    assert n_epochs(OptimConfig(epochs=3), n) == 3


def test_learning_rate_warms_up_then_falls_and_scales_with_the_batch():
    optim = OptimConfig(lr=1e-3, warmup=0.05)
    rates = [learning_rate(optim, step, 200, 256) for step in range(200)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == max(rates) == pytest.approx(1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[105] == pytest.approx(5e-4)
    assert 0 < rates[-1] < 1e-6
    assert learning_rate(optim, 10, 200, 1024) == pytest.approx(4e-3)
    assert learning_rate(OptimConfig(lr=1e-3, warmup=0), 0, 1, 256) == pytest.approx(1e-3)


def test_weight_decay_rises_from_start_to_end():
    optim = OptimConfig(weight_decay=0.04, weight_decay_end=0.4)
    values = [weight_decay(optim, step, 101) for step in range(101)]
    assert values[0] == pytest.approx(0.04)
    assert values[50] == pytest.approx(0.22)
    assert values[100] == pytest.approx(0.4)
    assert values == sorted(values)
    assert weight_decay(optim, 0, 1) == pytest.approx(0.04)


PATIENTS = {"a1": "A", "a2": "A", "b1": "B", "c1": "C"}


def test_held_out_patients_take_all_their_slides():
    splits = split_slides(PATIENTS, hold_out_patients=["A"])
    assert splits.train == ("b1", "c1")
    assert splits.held_out == ("a1", "a2")
    assert splits.same_patient == ()
    assert splits.to_dict()["held_out"] == {"slides": ["a1", "a2"], "patients": ["A"]}


def test_a_held_out_slide_whose_patient_trains_is_named():
    splits = split_slides(PATIENTS, hold_out_slides=["a1"], hold_out_patients=["B"])
    assert splits.train == ("a2", "c1")
    assert splits.same_patient == ("a1",)


def test_the_hash_of_a_split_changes_with_the_part_and_the_patient_of_a_slide():
    plain = split_slides(PATIENTS)
    assert plain.hash == split_slides(dict(reversed(PATIENTS.items()))).hash
    others = [
        split_slides(PATIENTS, hold_out_slides=["a1"]),
        split_slides(PATIENTS | {"a1": "B"}),
    ]
    assert len({s.hash for s in [plain, *others]}) == 3


@given(
    patients=st.dictionaries(st.text("abc", min_size=1), st.sampled_from("ABC"), min_size=1),
    data=st.data(),
)
def test_no_patient_is_on_both_sides_of_a_split_by_patients(patients, data):
    held = data.draw(st.sets(st.sampled_from(sorted(set(patients.values())))))
    if held == set(patients.values()):
        with pytest.raises(ConfigError, match="every slide is held out"):
            split_slides(patients, hold_out_patients=held)
        return
    splits = split_slides(patients, hold_out_patients=held)
    assert {patients[s] for s in splits.train}.isdisjoint(patients[s] for s in splits.held_out)
    assert sorted([*splits.train, *splits.held_out]) == sorted(patients)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hold_out_slides": ["a3"]}, r"no slide .* 'a3'(.|\n)*known: a1, a2"),
        ({"hold_out_patients": ["D"]}, r"no patient .* 'D'(.|\n)*known: A, B, C"),
        ({"hold_out_patients": ["A", "B", "C"]}, "every slide is held out"),
    ],
)
def test_impossible_splits_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        split_slides(PATIENTS, **given)
