from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from st_align.encoders import base
from st_align.encoders import lite0 as lite0_module
from st_align.encoders._images import FrozenImages
from st_align.encoders.base import FrozenEntry, TrainedEntry, TrainedShape, find, registered
from st_align.encoders.gene import GeneTransformer, principal_axes
from st_align.encoders.lite0 import load as load_lite0
from st_align.errors import ConfigError, ModelError

SHAPE = TrainedShape(dim=16, heads=2, tokens=16, layers=2, dropout=0.0, n_genes=24)
LITE0 = "efficientnet-lite0"


# The registry


def test_registered_names():
    kinds = {name: (type(entry), entry.modality) for name, entry in registered().items()}
    assert kinds["resnet-small-gn"] == kinds["resnet50-gn"] == (TrainedEntry, "image")
    assert kinds["gene-transformer"] == kinds["ae-gene"] == (TrainedEntry, "gene")
    assert kinds[LITE0] == (FrozenEntry, "image")


def test_misspelt_name_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'ae-gene'"):
        find("ae-gen")


def test_wrong_modality_lists_the_right_ones():
    with pytest.raises(ConfigError, match=r"(?s)reads images.*ae-gene"):
        find(LITE0, "gene")


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="twice"):
        base.register(find("ae-gene"))


def test_importing_the_encoders_imports_no_vision_library():
    code = (
        "import sys, st_align.encoders.base as b; b.registered();"
        "sys.exit(int('timm' in sys.modules or 'torchvision' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# Trained encoders


def inputs(modality: str, n: int, rng: np.random.Generator, side: int = 56) -> torch.Tensor:
    if modality == "image":
        return torch.from_numpy(rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8))
    return torch.from_numpy(rng.normal(size=(n, SHAPE.n_genes)).astype(np.float32))


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return find(name).build(SHAPE)


@pytest.mark.parametrize("name", ["resnet-small-gn", "gene-transformer", "ae-gene"])
def test_trained_encoders_return_tokens_and_pooled(name, rng):
    encoder = build(name)
    encoded = encoder(inputs(find(name).modality, 3, rng))
    assert encoded.tokens.shape == (3, 16, 16)
    assert encoded.pooled.shape == (3, 16)
    (encoded.tokens.square().sum() + encoded.pooled.square().sum()).backward()
    assert [key for key, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["resnet-small-gn", "gene-transformer"])
def test_a_spot_does_not_depend_on_its_batch(name, rng):
    encoder = build(name).double()
    x = inputs(find(name).modality, 4, rng)
    x = x if x.dtype == torch.uint8 else x.double()
    torch.testing.assert_close(encoder(x)[1][2:3], encoder(x[2:3])[1])


@pytest.mark.parametrize("side", [28, 56, 64])
def test_small_resnet_reads_any_side(side, rng):
    assert build("resnet-small-gn")(inputs("image", 2, rng, side)).tokens.shape == (2, 16, 16)


def test_small_resnet_sees_place_colour_and_brightness(rng):
    encoder = build("resnet-small-gn")
    patch = inputs("image", 1, rng)
    bright = (patch.float() * 0.5 + 100).to(torch.uint8)
    other = [patch.flip(1), patch[..., [1, 0, 2]], bright]
    start = encoder(patch).pooled
    for changed in other:
        assert (encoder(changed).pooled - start).norm() > 0.01 * start.norm()
    corner = patch.clone()
    corner[:, :12, :12] = 255
    moved = (encoder(corner).tokens - encoder(patch).tokens).norm(dim=-1).view(4, 4)
    assert moved[:2, :2].mean() > 2 * moved[2:, 2:].mean()  # tokens lie as the patch does


def test_resnet50_has_group_norm_and_reads_224_pixels(rng):
    encoder = build("resnet50-gn").eval()
    kinds = {type(m).__name__ for m in encoder.modules()}
    assert not any("BatchNorm" in kind for kind in kinds)
    assert any("GroupNorm" in kind for kind in kinds)
    sizes = []
    encoder.network.register_forward_pre_hook(lambda _, x: sizes.append(tuple(x[0].shape)))
    with torch.no_grad():
        encoded = encoder(inputs("image", 1, rng, 28))
    assert sizes == [(1, 3, 224, 224)]
    assert encoded.tokens.shape == (1, 16, 16)
    assert 23e6 < sum(p.numel() for p in encoder.network.parameters()) < 24e6


# The gene encoders start as PCA


def expression(rng: np.random.Generator, rows: int, genes: int) -> np.ndarray:
    sizes = np.linspace(3, 0.1, genes)
    mixing = np.linalg.qr(rng.normal(size=(genes, genes)))[0]
    return (rng.normal(size=(rows, genes)) * sizes @ mixing + 1).astype(np.float32)


def pca_scores(values: np.ndarray, n: int) -> np.ndarray:
    centred = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:n]
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])
    return centred @ (axes * signs[:, None]).T


def initialised(values: np.ndarray) -> GeneTransformer:
    encoder = GeneTransformer(
        TrainedShape(dim=16, heads=2, tokens=4, layers=1, dropout=0.1, n_genes=values.shape[1])
    )
    encoder.initialise(values)
    return encoder


@pytest.mark.parametrize(("rows", "genes"), [(300, 40), (300, 10), (9, 40)])
def test_before_training_pooled_is_pca_times_one_constant(rng, rows, genes):
    values = expression(rng, rows, genes)
    pooled = initialised(values)(torch.from_numpy(values)).pooled.detach().numpy()
    scores = pca_scores(values, 16)
    n = min(16, genes, rows - 1)
    constant = np.sqrt(16 / (scores**2).sum(axis=1).mean())
    np.testing.assert_allclose(pooled[:, :n], constant * scores[:, :n], atol=1e-5)
    np.testing.assert_allclose(pooled[:, n:], 0, atol=1e-5)  # fewer axes than d: zeros
    assert (pooled**2).sum(axis=1).mean() == pytest.approx(16, rel=1e-4)


def test_axes_are_not_whitened(rng):
    values = expression(rng, 300, 40)
    pooled = initialised(values)(torch.from_numpy(values)).pooled.detach().numpy()
    spread, expected = pooled.std(axis=0), pca_scores(values, 16).std(axis=0)
    np.testing.assert_allclose(spread / spread[0], expected / expected[0], rtol=1e-4)


def test_start_knows_no_chance_and_no_row_order(rng):
    values = expression(rng, 300, 40)
    first, second = initialised(values), initialised(values[::-1])
    torch.testing.assert_close(first.linear.weight, second.linear.weight)
    assert torch.equal(first.linear.weight, initialised(values).linear.weight)


def test_values_that_do_not_vary_give_finite_weights():
    encoder = initialised(np.full((5, 8), 0.3, np.float32))
    pooled = encoder(torch.full((2, 8), 0.3)).pooled
    assert torch.isfinite(encoder.linear.weight).all()
    torch.testing.assert_close(pooled, torch.zeros(2, 16), atol=1e-3, rtol=0)


def test_principal_axes_over_many_chunks(rng):
    values = expression(rng, 9000, 6)
    mean, axes, variances = principal_axes(values, 3)
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-10)
    scores = (values - mean) @ axes.T
    np.testing.assert_allclose(scores.var(axis=0), variances, rtol=1e-6)
    assert (np.diff(variances) < 0).all()


def test_training_moves_pooled_off_the_linear_path(rng):
    values = expression(rng, 50, 40)
    encoder, x = initialised(values), torch.from_numpy(values)
    encoder(x).pooled.square().sum().backward()
    assert encoder.branch.weight.grad.abs().sum() > 0


# EfficientNet-Lite0


@pytest.fixture(scope="module")
def lite0() -> FrozenImages:
    return load_lite0()


@pytest.fixture(scope="module")
def recorded(golden) -> tuple[dict, dict]:
    folder = golden / "efficientnet_lite0"
    return dict(np.load(folder / "inputs.npz")), dict(np.load(folder / "outputs.npz"))


@pytest.fixture(scope="module")
def stand_in(golden) -> dict[str, torch.Tensor]:
    spec = importlib.util.spec_from_file_location("fill", golden / "fill.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    layout = json.loads((golden / "efficientnet_lite0" / "state_dict_layout.json").read_text())
    return {k: torch.from_numpy(v) for k, v in fill.fill_state_dict(layout).items()}


def difference(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected))


def test_lite0_parity_with_the_packaged_weights(lite0, recorded):
    images, outputs = recorded
    encoded = lite0.encode_images(images["images"])
    assert difference(encoded.pooled, outputs["pretrained_features"]) < 1e-5
    photo = lite0.encode_images(images["photo_resized"][None])
    assert difference(photo.pooled, outputs["pretrained_photo_features"]) < 1e-5


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_lite0_parity_with_stand_in_weights(stand_in, recorded, tmp_path, suffix):
    from safetensors.torch import save_file

    path = tmp_path / f"weights{suffix}"
    shuffled = dict(sorted(stand_in.items()))  # timm's names are placed by name
    (torch.save if suffix == ".pt" else save_file)(shuffled, path)
    images, outputs = recorded
    encoder = load_lite0(path)
    encoded = encoder.encode_images(images["images"])
    assert difference(encoded.pooled, outputs["features"]) < 1e-5
    corner = encoder.maps(images["images"])[0][:, :8, :2, :2]
    assert difference(corner, outputs["feature_map_corner"]) < 1e-5


@pytest.mark.parametrize("side", [56, 112, 150])
def test_lite0_tokens_at_any_side(lite0, rng, side):
    patches = rng.integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    patches.flags.writeable = False  # as a memory map gives them
    encoded = lite0.encode_images(patches)
    assert encoded.tokens.shape == (2, lite0.n_tokens, lite0.dim)
    assert encoded.tokens.dtype == encoded.pooled.dtype == torch.float32
    if side == 112:  # the last map is 4 x 4 there
        torch.testing.assert_close(encoded.tokens.mean(dim=1), encoded.pooled)
        whole = lite0.maps(patches)[0]
        torch.testing.assert_close(encoded.tokens[:, 5], whole[:, :, 1, 1])


def test_lite0_needs_its_network_for_patches_only(rng, monkeypatch):
    """Importing timm takes longer than embedding half a slide whose features are cached."""
    monkeypatch.setattr(lite0_module, "import_timm", lambda: pytest.fail("timm was imported"))
    encoder = load_lite0()
    assert encoder.fingerprint == load_lite0().fingerprint
    with pytest.raises(pytest.fail.Exception, match="timm"):
        encoder.encode_images(rng.integers(0, 256, (1, 56, 56, 3), dtype=np.uint8))


def test_lite0_features_can_be_trained_on(lite0, rng):
    encoded = lite0.encode_images(rng.integers(0, 256, (2, 56, 56, 3), dtype=np.uint8))
    head = torch.nn.Linear(lite0.dim, 2)
    head(encoded.pooled).sum().backward()
    assert head.weight.grad.isfinite().all()
    assert head.weight.grad.abs().max() > 0


def test_lite0_reads_no_genes(lite0, rng):
    with pytest.raises(TypeError, match="reads images"):
        lite0.encode_genes(None, None, np.ones(1), rng)


def test_loading_lite0_draws_no_random_numbers(lite0):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert load_lite0().fingerprint == lite0.fingerprint
    assert torch.equal(torch.get_rng_state(), before)


def test_fingerprint_follows_the_weights(lite0, stand_in, tmp_path):
    torch.save(stand_in, tmp_path / "a.pt")
    other = load_lite0(tmp_path / "a.pt").fingerprint
    assert len(other) == 12
    assert set(other) <= set("0123456789abcdef")
    assert other != lite0.fingerprint


class Payload:
    def __reduce__(self):
        return (print, ("ran",))


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / "weights.pt"
    tensors = {str(i): torch.zeros(3) for i in range(296)}
    if kind == "html":
        path.write_text("<!DOCTYPE html><html>sign in</html>")
    elif kind == "truncated":
        torch.save(tensors, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "pickle":
        torch.save({"state": Payload()}, path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(Payload()))
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "count":
        torch.save({"a": torch.zeros(1)}, path)
    elif kind == "shape":
        torch.save(tensors, path)
    elif kind == "safetensors":
        path = path.with_suffix(".safetensors")
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    return path


BAD = ["missing", "html", "truncated", "pickle", "plain pickle", "list", "count", "shape"]


@pytest.mark.parametrize("kind", [*BAD, "safetensors"])
def test_unusable_weights_are_one_clear_error(kind, tmp_path, capsys):
    path = bad_file(kind, tmp_path)
    with pytest.raises(ModelError, match=str(path)) as error:
        load_lite0(path)
    assert "expected" in str(error.value)
    assert "ran" not in capsys.readouterr().out
