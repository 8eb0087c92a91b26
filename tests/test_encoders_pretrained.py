"""Pretrained image encoders: parity with upstream, what they see, what is told of them.

Weights are stand-ins: the published layout, filled by the fixtures' rule.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from st_align.encoders import clip, conch, ctranspath, hibou, resnet50, vit_timm
from st_align.encoders._images import FrozenImages, ImageFamily, Pixels
from st_align.encoders.base import FrozenEntry, registered
from weights_files import layout_of, stand_in, write

TOLERANCE = 1e-5
FAMILIES = {
    "uni": vit_timm.UNI,
    "uni2_h": vit_timm.UNI2,
    "prov_gigapath": vit_timm.GIGAPATH,
    "hibou_b": hibou.HIBOU_B,
    "conch": conch.CONCH,
    "ctranspath": ctranspath.CTRANSPATH,
    "clip_vitb32": clip.CLIP,
    "plip": clip.PLIP,
    "resnet50": resnet50.RESNET50,
}


def difference(found: torch.Tensor | np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


# Parity with upstream


@dataclass(frozen=True)
class Case:
    family: ImageFamily
    fixture: str
    file: str
    wrapper: str | None = None
    unneeded: str = "^$"  # of no effect on the features, by the fixture's README

    def __str__(self) -> str:
        return self.fixture


TEXT = r"text|position_ids"
CASES = [
    Case(resnet50.RESNET50, "resnet50", "pytorch_model.bin"),
    Case(ctranspath.CTRANSPATH, "ctranspath", "ctranspath.pth", wrapper="model"),
    Case(hibou.HIBOU_B, "hibou_b", "hibou-b.pth"),
    Case(hibou.HIBOU_B, "hibou_b_hf", "model.safetensors"),
    Case(clip.CLIP, "clip_vitb32", "model.safetensors", unneeded=TEXT),
    Case(clip.PLIP, "plip", "pytorch_model.bin", unneeded=TEXT),
    Case(conch.CONCH, "conch", "pytorch_model.bin", unneeded=TEXT),
    pytest.param(Case(vit_timm.UNI, "uni", "pytorch_model.bin"), marks=pytest.mark.large),
]


@dataclass(frozen=True)
class Loaded:
    encoder: FrozenImages
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    last: torch.Tensor
    """The map of the two pictures and of the photo."""
    pooled: torch.Tensor


@pytest.fixture(scope="module", params=CASES, ids=str)
def loaded(request, golden, tmp_path_factory):
    """An encoder with stand-in weights that reads pictures at its own size, on the CPU."""
    case, folder = request.param, golden / request.param.fixture
    place = tmp_path_factory.mktemp(case.fixture)
    write(stand_in(folder, unneeded=case.unneeded), place / case.file, wrapper=case.wrapper)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        encoder = case.family.load(place)
    inputs, outputs = (dict(np.load(folder / f"{part}puts.npz")) for part in ("in", "out"))
    pictures = np.concatenate([inputs["images"], inputs["photo_resized"][None]])
    yield Loaded(encoder, inputs, outputs, *encoder.maps(pictures))
    shutil.rmtree(place)


def test_parity(loaded):
    assert difference(loaded.pooled[:2], loaded.outputs["features"]) < TOLERANCE
    assert difference(loaded.pooled[2:], loaded.outputs["photo_features"]) < TOLERANCE
    assert loaded.pooled.shape == (3, loaded.encoder.dim)
    assert loaded.last.shape[1] == loaded.encoder.dim
    assert loaded.last.dtype == loaded.pooled.dtype == torch.float32


def test_the_map_is_upstreams(loaded):
    last, outputs, name = loaded.last[:2], loaded.outputs, loaded.encoder.name
    if name in ("uni", "hibou-b"):  # recorded: the first and the last patches, 64 channels
        tokens = outputs["tokens"][:, 1:] if name == "uni" else outputs["tokens"]
        found = last[:, :64].flatten(2).transpose(1, 2)
        first = tokens.shape[1] - 2
        assert difference(found[:, :first], tokens[:, :first]) < TOLERANCE
        assert difference(found[:, -2:], tokens[:, -2:]) < TOLERANCE
    if name == "resnet50":
        corner = last[:, :8, :2, :2]
        assert difference(corner, outputs["feature_map_corner"]) < TOLERANCE
    if name in ("ctranspath", "clip-vit-b-32", "conch"):  # nothing of it is recorded
        changed = loaded.inputs["images"][:1].copy()
        eighth = changed.shape[1] // 8
        changed[:, :eighth, -eighth:] = 0
        encoded = loaded.encoder.encode_images(changed)
        before = torch.nn.functional.adaptive_avg_pool2d(last[:1], 4).flatten(2).transpose(1, 2)
        assert encoded.tokens.shape == before.shape
        assert (encoded.tokens - before).norm(dim=-1).argmax() == 3


def test_features_of_a_photo_hardly_depend_on_who_resizes_it(loaded):
    if loaded.encoder.name in ("hibou-b", "clip-vit-b-32"):  # the two that differ most from PIL
        found = loaded.encoder.encode_images(loaded.inputs["photo"][None]).pooled
        assert difference(found, loaded.outputs["photo_features"]) < 2e-3


@pytest.mark.large
@pytest.mark.parametrize(("name", "fixture"), [("uni2", "uni2_h"), ("gigapath", "prov_gigapath")])
def test_parity_and_peak_memory_of_the_giants(name, fixture, golden, tmp_path):
    file, worker = tmp_path / "pytorch_model.bin", Path(__file__).with_name("encoder_worker.py")
    run = [sys.executable, str(worker)]
    subprocess.run([*run, "fill", str(golden / fixture), str(file)], check=True)
    out = subprocess.run(
        [*run, "run", name, str(golden / fixture), str(file)], check=True, stdout=subprocess.PIPE
    )
    size = file.stat().st_size
    file.unlink()
    facts = json.loads(out.stdout)
    print(facts)
    assert max(facts["differences"]) < TOLERANCE
    assert facts["tokens"] == [2, 16, 1536]
    assert facts["peak"] < 1.5 * size


@pytest.mark.gpu
def test_bfloat16_on_the_gpu_keeps_the_direction(golden, tmp_path):
    folder = golden / "uni"
    encoder = vit_timm.UNI.load(write(stand_in(folder), tmp_path / "uni.bin"))
    found = encoder.encode_images(np.load(folder / "inputs.npz")["images"]).pooled
    expected = torch.from_numpy(np.load(folder / "outputs.npz")["features"])
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.999


# Pixels


@pytest.mark.parametrize("fixture", FAMILIES)
def test_photo_is_resized_as_pil_does(fixture, golden):
    inputs, pixels = np.load(golden / fixture / "inputs.npz"), FAMILIES[fixture].pixels
    photo = torch.from_numpy(inputs["photo"])[None].permute(0, 3, 1, 2)
    found = pixels.resized(photo, pixels.side).permute(0, 2, 3, 1)[0].numpy()
    off = np.abs(found.astype(int) - inputs["photo_resized"].astype(int))
    assert off.max() <= 2
    assert off.mean() < 0.2
    np.testing.assert_allclose(pixels.colours, [inputs["mean"], inputs["std"]], atol=1e-4)


def test_pixels_are_normalised_and_keep_their_axes():
    picture = np.zeros((1, 4, 6, 3), np.uint8)
    picture[0, 1, 2] = (255, 0, 51)
    pixels = Pixels(colours=((0.5, 0.25, 0.2), (0.5, 0.25, 0.1)))
    picture.flags.writeable = False  # as a memory map gives them
    found = pixels.read(picture, torch.device("cpu"))
    assert found.shape == (1, 3, 4, 6)
    torch.testing.assert_close(found[0, :, 1, 2], torch.tensor([1.0, -1.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([-1.0, -1.0, -2.0]))


@pytest.mark.parametrize("side", [28, 56, 112, 224, 300])
def test_patches_of_any_side_come_out_at_the_size_of_the_network(side, rng):
    patches = rng.integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    for family in FAMILIES.values():
        found = family.pixels.read(patches, torch.device("cpu"))
        assert found.shape == (3, 3, family.pixels.side, family.pixels.side)


def test_gigapath_cuts_an_eighth_off():
    ring = np.zeros((1, 256, 256, 3), np.uint8)
    ring[:, 16:-16, 16:-16] = 200
    assert (
        vit_timm.GIGAPATH.pixels.resized(torch.tensor(ring).permute(0, 3, 1, 2), 224) == 200
    ).all()


# The registry


def test_every_pretrained_encoder_says_what_it_is():
    entries = [e for e in registered().values() if isinstance(e, FrozenEntry)]
    names = {family.name for family in FAMILIES.values()} | {"hibou-l", "efficientnet-lite0"}
    assert names <= {entry.name for entry in entries}
    for entry in (entry for entry in entries if entry.name in names):
        info = entry.info
        assert all((info.title, info.licence, info.source)), entry.name
        if entry.modality == "image":
            assert info.requires
            assert info.files or entry.name == "efficientnet-lite0"


def as_layout(folder: Path) -> dict[str, torch.Tensor]:
    return {k: torch.empty(s, device="meta") for k, (s, _) in layout_of(folder).items()}


def test_each_layout_is_recognised_by_its_encoder_alone(golden):
    entries = [e for e in registered().values() if isinstance(e, FrozenEntry)]
    for fixture in [*FAMILIES, "hibou_b_hf"]:
        tensors = as_layout(golden / fixture)
        found = {e.name for e in entries if e.modality == "image" and e.recognises(tensors)}
        twins = {"clip-vit-b-32", "plip"}
        name = FAMILIES.get(fixture, hibou.HIBOU_B).name
        assert found == (twins if name in twins else {name})


@pytest.mark.parametrize("fixture", ["hibou_b", "hibou_b_hf"])
def test_hibou_l_is_hibou_b_grown(golden, fixture):
    """Twice as deep, 1024 wide, SwiGLU of 2736; there is no fixture of it."""
    sizes = {768: 1024, 2304: 3072, 4096: 5472, 2048: 2736}
    large = {}
    for name, (shape, _) in layout_of(golden / fixture).items():
        block = re.search(r"(?<=(?:blocks|.layer)\.)\d+", name)
        for number in range(24) if block else [None]:
            new = name if block is None else f"{name[: block.start()]}{number}{name[block.end() :]}"
            large[new] = torch.empty([sizes.get(n, n) for n in shape], device="meta")
    assert hibou.HIBOU_L.recognises(large)
    assert not hibou.HIBOU_B.recognises(large)


def test_loading_draws_no_random_numbers(golden, tmp_path):
    file = write(stand_in(golden / "ctranspath"), tmp_path / "ctranspath.pth", wrapper="model")
    before = torch.get_rng_state()
    ctranspath.CTRANSPATH.load(file)
    assert torch.equal(torch.get_rng_state(), before)


def test_images_only_are_read(rng):
    encoder = FrozenImages("x", torch.nn.Identity, None, pixels=Pixels(colours=()), dim=1, mark="")
    with pytest.raises(TypeError, match="reads images"):
        encoder.encode_genes(None, None, np.ones(1), rng)
