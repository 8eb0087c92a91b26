from __future__ import annotations

import numpy as np
import pytest
import torch

import reference
from st_align.encoders.base import Encoded
from st_align.fusion import Fusion, VectorFusion, build_fusion

B, T_IMAGE, T_GENE, D, HEADS = 5, 4, 3, 8, 2
KINDS = ["tokens", "vector", "concat"]


def encoded(n_tokens: int, seed: int) -> Encoded:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randn(B, n_tokens, D, generator=draw, dtype=torch.float64)
    return Encoded(tokens, torch.randn(B, D, generator=draw, dtype=torch.float64))


IMAGE, GENE = encoded(T_IMAGE, 1), encoded(T_GENE, 2)
ALL, NONE = torch.ones(B, dtype=torch.bool), torch.zeros(B, dtype=torch.bool)
SOME = torch.tensor([True, False, True, False, True])


def fusion(kind: str) -> Fusion:
    torch.manual_seed(0)
    module = build_fusion(kind, dim=D, heads=HEADS).double()
    with torch.no_grad():  # values of a trained model: no zeros, no ones
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    return module


def weight(layer: torch.nn.Linear) -> np.ndarray:
    return layer.weight.detach().numpy().T


def expected_h(module: VectorFusion, f_image: np.ndarray, f_gene: np.ndarray) -> np.ndarray:
    w = [weight(layer) for layer in (module.query, module.key, module.value)]
    z_image = reference.cross_attention(f_image, f_gene, *w, heads=HEADS).mean(axis=0)
    z_gene = reference.cross_attention(f_gene, f_image, *w, heads=HEADS).mean(axis=0)
    return reference.fuse(z_image, z_gene, weight(module.out_image), weight(module.out_gene))


@pytest.mark.parametrize("kind", ["tokens", "vector"])
def test_attention_fusions_follow_equations_7_to_9(kind):
    module = fusion(kind)
    f_image, f_gene = (f.detach().numpy() for f in module.present(IMAGE, GENE, ALL, ALL))
    h = module(IMAGE, GENE, ALL, ALL)
    for i in range(B):
        np.testing.assert_allclose(
            h[i].detach(), expected_h(module, f_image[i], f_gene[i]), atol=1e-12
        )


def test_concat_fuses_the_vectors_themselves():
    module = fusion("concat")
    f_image, f_gene = module.present(IMAGE, GENE, ALL, ALL)
    expected = torch.cat([module.out_image(f_image[:, 0]), module.out_gene(f_gene[:, 0])], dim=1)
    torch.testing.assert_close(module(IMAGE, GENE, ALL, ALL), expected)


def test_attention_over_tokens_depends_on_query_and_key():
    module = fusion("tokens")
    weights = module.attention(*module.present(IMAGE, GENE, ALL, ALL)).detach()
    assert weights.shape == (B, HEADS, T_IMAGE, T_GENE)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert weights.std(dim=-1).min() > 1e-3  # not uniform over the keys
    assert weights.std(dim=-2).min() > 1e-3  # not the same for all queries


def test_attention_over_one_vector_is_constant():
    module = fusion("vector")
    weights = module.attention(*module.present(IMAGE, GENE, ALL, ALL))
    assert torch.equal(weights, torch.ones(B, HEADS, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_spot_lacks_does_not_matter(kind):
    module = fusion(kind)
    noise = Encoded(IMAGE.tokens.clone(), IMAGE.pooled.clone())
    noise.tokens[~SOME] = noise.pooled[~SOME] = 99.0
    h = module(IMAGE, GENE, SOME, ALL)
    torch.testing.assert_close(module(noise, GENE, SOME, ALL), h, rtol=0, atol=0)
    both = module(IMAGE, GENE, ALL, ALL)
    torch.testing.assert_close(h[SOME], both[SOME])
    assert not torch.isclose(h[~SOME], both[~SOME]).all(dim=1).any()
    # Spots without an image still differ from each other.
    assert not torch.allclose(h[1], h[3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_spot_with_neither_modality_has_a_zero_h(kind):
    h = fusion(kind)(IMAGE, GENE, SOME, NONE)
    assert torch.equal(h[~SOME], torch.zeros_like(h[~SOME]))
    assert (h[SOME].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("has_image", "has_gene"), [(ALL, ALL), (NONE, ALL), (ALL, SOME)])
def test_all_parameters_get_a_gradient(kind, has_image, has_gene):
    module = fusion(kind)
    module(IMAGE, GENE, has_image, has_gene).square().sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_fresh_missing_tokens_learn():
    module = build_fusion("tokens", dim=D, heads=HEADS).double()
    module(IMAGE, GENE, NONE, ALL).square().sum().backward()
    assert module.missing_image.grad.abs().sum() > 0
