from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed as dist
from torch import multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from st_align.batch import Batch
from st_align.config import LossConfig, ModelConfig
from st_align.encoders.base import Encoded
from st_align.loss import MAX_LOGIT_SCALE, LossTerms, StAlignLoss, clamp_logit_scale, info_nce
from st_align.model import Embeddings, FrozenShape, STAlign

NAMES = Embeddings._fields
CASES = ["base", "masked", "lonely", "sharp", "duplicates", "duplicates_masked"]
CASES += ["identical", "single"]
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def facts(
    excluded: np.ndarray, has_image: np.ndarray | None = None, has_counts: np.ndarray | None = None
) -> Batch:
    """A batch that holds what the loss reads; `excluded` [B, B] becomes niches."""
    n = len(excluded)
    ids = torch.arange(n) * 3 + 7
    neighbors = torch.full((n, 1 + int(excluded.sum(1).max())), -1)
    for i, row in enumerate(excluded):
        members = [i, *np.flatnonzero(row).tolist()]
        neighbors[i, : len(members)] = ids[members]
    nothing, all_rows = torch.zeros(n, 0), np.ones(n, bool)
    return Batch(
        ids=ids,
        neighbors=neighbors,
        has_image=torch.from_numpy(all_rows if has_image is None else has_image),
        has_counts=torch.from_numpy(all_rows if has_counts is None else has_counts),
        spot_image=nothing,
        niche_image=nothing,
        spot_gene=nothing,
        niche_gene=nothing,
    )


def part(batch: Batch, rows: slice) -> Batch:
    def cut(x: torch.Tensor | Encoded) -> torch.Tensor | Encoded:
        return Encoded(*(t[rows] for t in x)) if isinstance(x, Encoded) else x[rows]

    return Batch(**{name: cut(value) for name, value in vars(batch).items()})


def leaves(inputs: dict, case: str, rows: slice = slice(None)) -> Embeddings:
    return Embeddings(
        *(torch.from_numpy(inputs[f"{case}.{name}"][rows]).requires_grad_() for name in NAMES)
    )


def scale_of(tau: float) -> torch.Tensor:
    return torch.tensor(math.log(1 / float(tau)), dtype=torch.float64, requires_grad=True)


def random_embeddings(rng: np.random.Generator, n: int) -> Embeddings:
    return Embeddings(*(torch.from_numpy(rng.normal(size=(n, 6))) for _ in NAMES))


def expected_terms(
    embeddings: Embeddings, tau: float, excluded: np.ndarray, image: np.ndarray, counts: np.ndarray
) -> dict[str, float]:
    values = Embeddings(*(x.detach().numpy() for x in embeddings))
    both, any_ = np.flatnonzero(image & counts).tolist(), np.flatnonzero(image | counts).tolist()
    return {
        "spot": reference.two_way(values.r, values.u, tau, excluded=excluded, rows=both),
        "niche": reference.two_way(values.e, values.t, tau, excluded=excluded, rows=both),
        "cross": reference.one_way(
            values.h_spot, values.h_niche, tau, excluded=excluded, rows=any_
        ),
    }


@pytest.fixture(scope="module")
def numbers(golden) -> tuple[dict, dict]:
    folder = golden / "loss"
    return dict(np.load(folder / "inputs.npz")), dict(np.load(folder / "outputs.npz"))


@pytest.mark.parametrize("rows_at_once", [16, 5])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_golden_values_and_gradients(numbers, case, symmetric, rows_at_once):
    """Sixteen rows in one go, or in chunks of five, the last of one."""
    inputs, outputs = numbers
    x, scale = leaves(inputs, case), scale_of(inputs[f"{case}.tau"])
    config = LossConfig(symmetric_cross=symmetric)
    loss = StAlignLoss(config, logits_at_once=rows_at_once * len(x.r))
    found = loss(x, facts(inputs[f"{case}.excluded"]), scale)
    found.total.backward()
    kind = "symmetric" if symmetric else "forward"
    total = "total_symmetric" if symmetric else "total"
    for term, key in [("spot", "spot_symmetric"), ("niche", "niche_symmetric")]:
        np.testing.assert_allclose(found.terms[term], outputs[f"{case}.{key}"], **TIGHT)
    np.testing.assert_allclose(found.terms["cross"], outputs[f"{case}.ns_{kind}"], **TIGHT)
    np.testing.assert_allclose(found.total.detach(), outputs[f"{case}.{total}"], **TIGHT)
    for name, leaf in [*zip(NAMES, x, strict=True), ("logit_scale", scale)]:
        np.testing.assert_allclose(leaf.grad, outputs[f"{case}.grad_{total}.{name}"], **TIGHT)


@pytest.mark.parametrize(("a", "b", "name"), [("r", "u", "spot"), ("h_spot", "h_niche", "ns")])
def test_golden_directions(numbers, a, b, name):
    inputs, outputs = numbers
    unit = {
        k: torch.nn.functional.normalize(torch.from_numpy(inputs[f"masked.{k}"])) for k in (a, b)
    }
    scale, kept = scale_of(0.07).exp(), torch.from_numpy(~inputs["masked.excluded"])
    for first, second, way in [(a, b, "forward"), (b, a, "backward")]:
        rows = info_nce(unit[first], unit[second], scale, kept, torch.arange(16))
        np.testing.assert_allclose(rows.mean().detach(), outputs[f"masked.{name}_{way}"], **TIGHT)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 7), rows_at_once=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_equals_the_literal_loops_whatever_is_absent(seed, n, rows_at_once):
    rng = np.random.default_rng(seed)
    excluded = np.triu(rng.random((n, n)) < 0.2, 1)
    excluded |= excluded.T
    image, counts = rng.random(n) < 0.7, rng.random(n) < 0.7
    x = random_embeddings(rng, n)
    loss = StAlignLoss(LossConfig(), logits_at_once=rows_at_once * n)
    found = loss(x, facts(excluded, image, counts), scale_of(0.2))
    expected = expected_terms(x, 0.2, excluded, image, counts)
    for name, value in expected.items():
        assert float(found.terms[name]) == pytest.approx(value, abs=1e-12)
    total = 0.4 * expected["spot"] + 0.3 * expected["niche"] + 0.3 * expected["cross"]
    assert float(found.total.detach()) == pytest.approx(total, abs=1e-12)
    assert int(found.rows["spot"]) == (image & counts).sum()
    assert int(found.rows["cross"]) == (image | counts).sum()


class Largest(TorchDispatchMode):
    """Numbers in the largest array that is made."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else [out]
        self.n = max(self.n, *(t.numel() for t in tensors if isinstance(t, torch.Tensor)), 0)
        return out


def test_no_array_of_all_pairs_is_made_when_logits_are_done_in_chunks(rng):
    x, n = Embeddings(*(v.requires_grad_() for v in random_embeddings(rng, 96))), 96
    batch = facts(np.eye(n, k=1, dtype=bool))
    found = {}
    for rows_at_once in (n, 9):
        loss = StAlignLoss(LossConfig(), logits_at_once=rows_at_once * n)
        with Largest() as largest:
            loss(x, batch, scale_of(0.07)).total.backward()
        found[rows_at_once] = largest.n
    assert found[n] == n * (n + 1)
    assert found[9] <= n * 6 * 6  # all six embeddings side by side


def test_joint_permutation_changes_nothing(rng):
    excluded = np.zeros((9, 9), bool)
    excluded[2, 5] = excluded[5, 2] = True
    x, order = random_embeddings(rng, 9), rng.permutation(9)
    loss, scale = StAlignLoss(LossConfig()), scale_of(0.07)
    moved = Embeddings(*(v[order] for v in x))
    there = loss(moved, facts(excluded[np.ix_(order, order)]), scale).total
    torch.testing.assert_close(there, loss(x, facts(excluded), scale).total)


def test_one_sided_niches_mask_both_directions_and_can_be_turned_off(rng):
    x, scale = random_embeddings(rng, 6), scale_of(0.07)
    one_sided, none = np.zeros((6, 6), bool), np.zeros((6, 6), bool)
    one_sided[1, 4] = True
    masked = StAlignLoss(LossConfig())
    free = StAlignLoss(LossConfig(mask_neighbors=False))
    total = masked(x, facts(one_sided), scale).total
    torch.testing.assert_close(total, masked(x, facts(one_sided | one_sided.T), scale).total)
    assert total < masked(x, facts(none), scale).total
    torch.testing.assert_close(
        free(x, facts(one_sided), scale).total, masked(x, facts(none), scale).total
    )


def test_zero_vectors_of_absent_rows_give_finite_zero_gradients(rng):
    x = Embeddings(*(v.requires_grad_() for v in random_embeddings(rng, 4)))
    with torch.no_grad():
        for v in x:
            v[1] = 0
    image, counts = np.array([True, False, True, False]), np.array([True, False, True, True])
    batch = facts(np.zeros((4, 4), bool), image, counts)
    StAlignLoss(LossConfig())(x, batch, scale_of(0.07)).total.backward()
    for v in x:
        assert torch.equal(v.grad[1], torch.zeros(6, dtype=torch.float64))
    assert torch.equal(x.r.grad[3], torch.zeros(6, dtype=torch.float64))
    assert x.h_spot.grad[3].abs().sum() > 0


def test_logits_stay_float32_under_autocast(rng):
    x = Embeddings(*(v.bfloat16() for v in random_embeddings(rng, 32)))
    batch, loss = facts(np.zeros((32, 32), bool)), StAlignLoss(LossConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(x, batch, scale_of(0.01).float()).total
    exact = loss(Embeddings(*(v.double() for v in x)), batch, scale_of(0.01)).total
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)


def test_weights_are_those_of_the_config(rng):
    x, batch = random_embeddings(rng, 5), facts(np.zeros((5, 5), bool))
    found = StAlignLoss(LossConfig(spot=1.0, niche=0.0, cross=0.0))(x, batch, scale_of(0.07))
    torch.testing.assert_close(found.total, found.terms["spot"])


@pytest.mark.parametrize(("before", "after"), [(-1.0, 0.0), (3.0, 3.0), (9.0, MAX_LOGIT_SCALE)])
def test_logit_scale_is_clamped(before, after):
    scale = torch.nn.Parameter(torch.tensor(before))
    clamp_logit_scale(scale)
    assert float(scale.detach()) == pytest.approx(after)


# Two processes, as torchrun starts them.


def run_ranks(check, folder: Path, *arguments) -> None:
    multiprocessing.spawn(_on_rank, (check, folder / "rendezvous", arguments), nprocs=2)


def _on_rank(rank: int, check, rendezvous: Path, arguments: tuple) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        check(rank, *arguments)
        dist.barrier()  # neither leaves while the other one's threads still talk to it
    finally:
        dist.destroy_process_group()


def check_golden(rank: int, inputs: dict, outputs: dict) -> None:
    own = slice(8 * rank, 8 * rank + 8)
    for case, logits_at_once in itertools.product(("base", "masked"), (2**22, 3 * 16)):
        x, scale = leaves(inputs, case, own), scale_of(inputs[f"{case}.tau"])
        batch = part(facts(inputs[f"{case}.excluded"]), own)
        found = StAlignLoss(LossConfig(), logits_at_once=logits_at_once)(x, batch, scale)
        found.total.backward()
        mine = f"{case}.rank{rank}"
        np.testing.assert_allclose(found.total.detach(), outputs[f"{mine}.total"], **TIGHT)
        for term, key in [("spot", "spot_symmetric"), ("cross", "ns_forward")]:
            np.testing.assert_allclose(found.terms[term], outputs[f"{mine}.{key}"], **TIGHT)
        for name, leaf in zip(NAMES, x, strict=True):
            both = sum(outputs[f"{case}.rank{q}.grad_total.{name}"] for q in (0, 1))
            np.testing.assert_allclose(leaf.grad, both[own], **TIGHT)
            single = outputs[f"{case}.grad_total.{name}"][own]
            np.testing.assert_allclose(leaf.grad, 2 * single, **TIGHT)
        np.testing.assert_allclose(scale.grad, outputs[f"{mine}.grad_total.logit_scale"], **TIGHT)


def test_golden_split_over_two_ranks(numbers, tmp_path):
    run_ranks(check_golden, tmp_path, *numbers)


def model_step(model: torch.nn.Module, scale: torch.nn.Parameter, batch: Batch) -> LossTerms:
    terms = StAlignLoss(LossConfig())(model(batch), batch, scale)
    model.zero_grad()
    terms.total.backward()
    return terms


def whole_batch(has_image: list[int], has_counts: list[int]) -> Batch:
    n, draw = len(has_image), torch.Generator().manual_seed(3)
    base = facts(np.eye(n, k=1, dtype=bool), np.array(has_image, bool), np.array(has_counts, bool))
    features = Encoded(torch.randn(n, 4, 10, generator=draw), torch.randn(n, 10, generator=draw))
    fields = vars(base) | {
        "spot_image": torch.randint(0, 256, (n, 16, 16, 3), generator=draw, dtype=torch.uint8),
        "niche_image": features,
        "spot_gene": torch.randn(n, 12, generator=draw, dtype=torch.float64),
        "niche_gene": torch.randn(n, 12, generator=draw, dtype=torch.float64),
    }
    return Batch(**fields)


def check_parallel_training(rank: int) -> None:
    for fusion in ("tokens", "concat"):
        check_parallel_steps(rank, fusion)


def check_parallel_steps(rank: int, fusion: str) -> None:
    config = ModelConfig(dim=8, heads=2, tokens=4, gene_layers=1, dropout=0.0, fusion=fusion)
    torch.manual_seed(0)
    model = STAlign(config, n_genes=12, frozen={"niche_image": FrozenShape(4, 10)}).double()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    # Rank 1 has no image at all, then few rows that count; both ranks always hold 4 rows.
    for image, counts in [("11110000", "11011111"), ("01101000", "11110100")]:
        batch = whole_batch(list(map(int, image)), list(map(int, counts)))
        terms = model_step(parallel, model.logit_scale, part(batch, slice(4 * rank, 4 * rank + 4)))
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        total = terms.total.detach().clone()
        dist.all_reduce(total)
        if rank == 0:
            check_against_one_process(model, batch, total / 2, gradients)
        dist.barrier()


def check_against_one_process(model, batch, total, gradients) -> None:
    real = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        expected = model_step(model, model.logit_scale, batch)
    finally:
        dist.is_initialized = real
    torch.testing.assert_close(total, expected.total.detach(), rtol=1e-10, atol=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-11)


def test_two_ranks_with_uneven_valid_rows_train_like_one_process(tmp_path):
    run_ranks(check_parallel_training, tmp_path)
