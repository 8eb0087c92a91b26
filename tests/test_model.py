from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from st_align.batch import Batch
from st_align.config import LossConfig, ModelConfig
from st_align.encoders import base
from st_align.encoders.base import Encoded, EncoderInfo, FrozenEntry
from st_align.errors import ConfigError, ModelError
from st_align.loss import StAlignLoss, clamp_logit_scale
from st_align.model import Embeddings, FrozenInput, FrozenShape, STAlign, frozen_roles

B, G, D = 6, 12, 8
CONFIG = ModelConfig(dim=D, heads=2, tokens=4, gene_layers=1, dropout=0.0)
LITE0 = FrozenShape(4, 20)
ALL, NONE = [True] * B, [False] * B
SOME = [True, False, True, True, False, True]
LATE = [False, False, True, False, True, True]


def build(config: ModelConfig = CONFIG, **frozen: FrozenShape) -> STAlign:
    torch.manual_seed(0)
    return STAlign(config, n_genes=G, frozen={"niche_image": LITE0, **frozen})


def features(n_tokens: int, width: int, n: int = B) -> Encoded:
    draw = torch.Generator().manual_seed(n_tokens)
    tokens = torch.randn(n, n_tokens, width, generator=draw)
    return Encoded(tokens.half(), torch.randn(n, width, generator=draw).half())


def toy_batch(has_image: list[bool], has_counts: list[bool], n: int = B, seed: int = 1) -> Batch:
    """Spots without a modality hold zeros there, as the loader gives them."""
    draw = torch.Generator().manual_seed(seed)
    image, counts = torch.tensor(has_image), torch.tensor(has_counts)
    patches = torch.randint(0, 256, (n, 16, 16, 3), generator=draw, dtype=torch.uint8)
    niche = features(*LITE0, n)
    return Batch(
        ids=torch.arange(n),
        neighbors=torch.arange(n)[:, None],
        has_image=image,
        has_counts=counts,
        spot_image=patches * image[:, None, None, None],
        niche_image=Encoded(niche.tokens * image[:, None, None], niche.pooled * image[:, None]),
        spot_gene=torch.randn(n, G, generator=draw) * counts[:, None],
        niche_gene=torch.randn(n, G, generator=draw) * counts[:, None],
    )


def test_embeddings_have_the_papers_shapes():
    embeddings = build()(toy_batch(ALL, ALL))
    shapes = {name: tuple(x.shape) for name, x in embeddings._asdict().items()}
    vectors = dict.fromkeys(("r", "u", "e", "t"), (B, D))
    assert shapes == vectors | dict.fromkeys(("h_spot", "h_niche"), (B, 2 * D))


@pytest.mark.parametrize("has_image", [SOME, NONE, ALL])
@pytest.mark.parametrize("has_counts", [LATE, NONE, ALL])
def test_absent_modalities_give_zeros_and_disturb_nobody(has_image, has_counts):
    model = build()
    whole = model(toy_batch(ALL, ALL))
    found = model(toy_batch(has_image, has_counts))
    image, counts = torch.tensor(has_image), torch.tensor(has_counts)
    for name, held in {"r": image, "e": image, "u": counts, "t": counts}.items():
        x = getattr(found, name)
        assert torch.equal(x[~held], torch.zeros_like(x[~held]))
        torch.testing.assert_close(x[held], getattr(whole, name)[held])
    for name in ("h_spot", "h_niche"):
        x, held = getattr(found, name), image | counts
        assert torch.equal(x[~held], torch.zeros_like(x[~held]))
        assert (x[held].abs().sum(dim=1) > 0).all()
        both = image & counts
        torch.testing.assert_close(x[both], getattr(whole, name)[both])


@pytest.mark.parametrize("has_image", [SOME, NONE, ALL])
@pytest.mark.parametrize("has_counts", [LATE, NONE, ALL])
@pytest.mark.parametrize("fusion", ["tokens", "vector", "concat"])
def test_every_parameter_gets_a_finite_gradient(fusion, has_image, has_counts):
    model = build(dataclasses.replace(CONFIG, fusion=fusion))
    batch = toy_batch(has_image, has_counts)
    StAlignLoss(LossConfig())(model(batch), batch, model.logit_scale).total.backward()
    wrong = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all()
    ]
    assert wrong == []


def test_counts_alone_train_through_the_cross_scale_term():
    model, batch = build(), toy_batch(NONE, ALL)
    found = StAlignLoss(LossConfig())(model(batch), batch, model.logit_scale)
    found.total.backward()
    assert float(found.terms["spot"]) == float(found.terms["niche"]) == 0
    assert float(found.terms["cross"]) > 0.1
    assert model.encoders["spot_gene"].to_tokens.weight.grad.abs().sum() > 0
    assert model.encoders["spot_image"].to_tokens.weight.grad.abs().sum() == 0


def test_training_aligns_modalities_and_scales():
    model, batch = build(), toy_batch([True] * 16, [True] * 16, n=16)
    loss = StAlignLoss(LossConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    totals = []
    for _ in range(40):
        found = loss(model(batch), batch, model.logit_scale)
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step()
        clamp_logit_scale(model.logit_scale)
        totals.append(float(found.total.detach()))
    assert totals[-1] < 0.3 * totals[0]


def test_gene_embeddings_start_as_principal_components(rng):
    model = build()
    spot, niche = (rng.normal(size=(40, G)).astype(np.float32) * k for k in (1, 3))
    model.initialise(spot, niche)
    batch = toy_batch(ALL, ALL)
    batch = dataclasses.replace(
        batch, spot_gene=torch.from_numpy(spot[:B]), niche_gene=torch.from_numpy(niche[:B])
    )
    found = model(batch)
    for values, x in ((spot, found.u), (niche, found.t)):
        centred = values - values.mean(axis=0)
        scores = np.abs(np.linalg.svd(centred)[2][:D] @ centred[:B].T).T
        ratio = np.abs(x.detach().numpy()) / scores
        np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-3)


def test_temperature_sets_the_first_logit_scale():
    model = STAlign(CONFIG, n_genes=G, frozen={"niche_image": LITE0}, temperature=0.5)
    assert float(model.logit_scale.detach().exp()) == pytest.approx(2)


def test_state_dict_gives_the_same_model_back():
    model, other = build(), STAlign(CONFIG, n_genes=G, frozen={"niche_image": LITE0})
    other.load_state_dict(model.state_dict())
    for a, b in zip(model(toy_batch(SOME, ALL)), other(toy_batch(SOME, ALL)), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_autocast_stays_near_float32():
    model, batch = build(), toy_batch(SOME, LATE)
    exact = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(batch)
    for a, b in zip(exact, found, strict=True):
        assert (a - b).norm() < 0.05 * a.norm()


# Frozen encoders in any role, by configuration alone


@pytest.fixture
def frozen_names(monkeypatch) -> dict[str, str]:
    """Two encoders that the package does not know."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base.registered()))
    info = EncoderInfo(title="toy", licence="none", gated=False, source="here")
    for modality in ("image", "gene"):
        base.register(
            FrozenEntry(name=f"toy-{modality}", modality=modality, info=info, load=lambda _: None)
        )
    return {
        "spot_image": "toy-image",
        "niche_image": "toy-image",
        "spot_gene": "toy-gene",
        "niche_gene": "toy-gene",
    }


@pytest.mark.parametrize("role", ["spot_image", "niche_image", "spot_gene", "niche_gene"])
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_a_frozen_encoder_fills_any_role(frozen_names, role, n_tokens, rng):
    config = dataclasses.replace(CONFIG, **{role: frozen_names[role]})
    assert set(frozen_roles(config)) == {role, "niche_image"}
    model = build(config, **{role: FrozenShape(n_tokens, 20)})
    values = rng.normal(size=(40, G)).astype(np.float32)
    model.initialise(values, values)
    batch = dataclasses.replace(toy_batch(SOME, LATE), **{role: features(n_tokens, 20)})
    StAlignLoss(LossConfig())(model(batch), batch, model.logit_scale).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_one_frozen_vector_becomes_tokens():
    module = FrozenInput(FrozenShape(1, 20), dim=D, tokens=4)
    encoded = module(features(1, 20))
    assert encoded.tokens.shape == (B, 4, D)
    assert encoded.tokens.std(dim=1).min() > 1e-3
    assert module(features(5, 20)).pooled.shape == (B, D)


def test_frozen_tokens_keep_their_order():
    module = FrozenInput(FrozenShape(5, 20), dim=D, tokens=4)
    given = features(5, 20)
    swapped = Encoded(given.tokens.flip(1), given.pooled)
    torch.testing.assert_close(module(swapped).tokens, module(given).tokens.flip(1))


def test_unknown_shape_of_a_frozen_role_is_an_error():
    with pytest.raises(ModelError, match=r"(?s)niche_image.*efficientnet-lite0.*to do"):
        STAlign(CONFIG, n_genes=G, frozen={})


def test_encoder_of_the_wrong_modality_is_an_error():
    with pytest.raises(ConfigError, match="reads images"):
        build(dataclasses.replace(CONFIG, niche_gene="resnet-small-gn"))


def test_embeddings_are_a_tuple_in_the_papers_order():
    assert Embeddings._fields == ("r", "u", "e", "t", "h_spot", "h_niche")
