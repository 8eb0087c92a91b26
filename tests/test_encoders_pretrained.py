"""Pretrained image encoders: parity with upstream, weights files good and bad, where they lie.

Weights are stand-ins: the published layout, filled by the fixtures' rule.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from st_align.encoders import clip, conch, convert, ctranspath, hibou, lookup, resnet50, vit_timm
from st_align.encoders._images import FrozenImages, ImageFamily, Pixels
from st_align.encoders._weights import fingerprint
from st_align.encoders.base import FrozenEntry, find, registered
from st_align.encoders.lookup import ENV, find_weights, load_frozen
from st_align.errors import ModelError
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


@pytest.fixture(autouse=True)
def _no_folder_of_weights(monkeypatch):
    monkeypatch.delenv(ENV, raising=False)


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
    for entry in entries:
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


# Good files in other wrappings


@pytest.fixture(scope="module")
def resnet(golden) -> dict[str, torch.Tensor]:
    return stand_in(golden / "resnet50")


@pytest.fixture(scope="module")
def some_patches() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (1, 56, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def plain(resnet, some_patches, tmp_path_factory) -> torch.Tensor:
    file = write(resnet, tmp_path_factory.mktemp("plain") / "model.safetensors")
    return resnet50.RESNET50.load(file).encode_images(some_patches).pooled


def rewrapped(how: str, tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    path = folder / "weights.bin"
    if how == "model and module":
        held = {"model": {f"module.{k}": v for k, v in tensors.items()}, "epoch": 3}
        torch.save(held, path)
    elif how == "state_dict":
        torch.save({"state_dict": tensors, "arch": "resnet50"}, path)
    elif how == "old torch format":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    elif how == "safetensors named bin":
        write(tensors, folder / "a.safetensors").rename(path)
    elif how == "no counters, no head":
        left = {k: v for k, v in tensors.items() if not re.search("num_batches|^fc", k)}
        torch.save(left, path)
    elif how == "any order":
        torch.save(dict(reversed(tensors.items())), path)
    return path


@pytest.mark.parametrize(
    "how",
    [
        "model and module",
        "state_dict",
        "old torch format",
        "safetensors named bin",
        "no counters, no head",
        "any order",
    ],
)
def test_wrappings_make_no_difference(how, resnet, plain, some_patches, tmp_path):
    encoder = resnet50.RESNET50.load(rewrapped(how, resnet, tmp_path))
    assert torch.equal(encoder.encode_images(some_patches).pooled, plain)


def test_half_precision_weights_run_in_single_precision(resnet, plain, some_patches, tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in resnet.items()}
    encoder = resnet50.RESNET50.load(write(half, tmp_path / "model.safetensors"))
    found = encoder.encode_images(some_patches).pooled
    assert found.dtype == torch.float32
    assert 0 < difference(found, plain.numpy()) < 1e-2


def test_loading_draws_no_random_numbers(golden, tmp_path):
    file = write(stand_in(golden / "ctranspath"), tmp_path / "ctranspath.pth", wrapper="model")
    before = torch.get_rng_state()
    ctranspath.CTRANSPATH.load(file)
    assert torch.equal(torch.get_rng_state(), before)


def test_fingerprint_is_of_weights_and_of_preprocessing(tmp_path):
    one, other = (tmp_path / name for name in ("one", "other"))
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    marks = {fingerprint(one, "a"), fingerprint(one, "b"), fingerprint(other, "a")}
    assert len(marks) == 3


def test_features_can_be_trained_on_and_images_only_are_read(plain, rng):
    torch.nn.Linear(2048, 2)(plain).sum().backward()
    encoder = FrozenImages(
        "x", torch.nn.Identity(), None, pixels=Pixels(colours=()), dim=1, mark=""
    )
    with pytest.raises(TypeError, match="reads images"):
        encoder.encode_genes(None, None, np.ones(1), rng)


# Bad files


def refused(path: Path, family: ImageFamily = resnet50.RESNET50) -> str:
    with pytest.raises(ModelError) as error:
        family.load(path)
    text = str(error.value)
    assert str(path) in text
    assert "expected:" in text
    return text


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1213539401\n"


@pytest.mark.parametrize("file", ["w.bin", "w.safetensors"])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        (LFS, "Git LFS pointer"),
        ("\n<!DOCTYPE html>\n<html><head><title>Sign in</title></html>", "web page"),
        ("Access to model MahmoodLab/UNI is restricted.", "text: Access to model"),
        ('{"error": "Repository not found"}', 'text: {"error"'),
        ("", "empty file"),
    ],
)
def test_what_is_no_weights_file_is_named(content, name, file, tmp_path):
    path = tmp_path / file
    path.write_text(content)
    text = refused(path)
    assert name in text
    assert "to do:" in text


@pytest.mark.parametrize("kind", [".bin", ".safetensors", "old torch format"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated_file(kind, share, tmp_path, rng):
    tensors = {str(i): torch.from_numpy(rng.normal(size=(99, 99))) for i in range(20)}
    path = tmp_path / f"w{kind if kind[0] == '.' else '.bin'}"
    if kind[0] == ".":
        write(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "truncated" in refused(path)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\x1f\x8b\x08\x00" * 9, "another format: its first bytes are 1f 8b 08 00"),
        (b"PK\x05\x06" + b"\x00" * 18, "cannot be read as weights"),
        (b"\x80\x02]q\x00", "truncated|needs pickle"),
    ],
)
def test_other_binary_files(head, words, tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(head)
    assert re.search(words, refused(path))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickle_is_refused_with_the_way_to_convert_it(how, tmp_path):
    path, held = tmp_path / "w.pt", {"state_dict": {}, "args": argparse.Namespace(lr=1)}
    if how == "torch":
        torch.save(held, path)
    else:
        path.write_bytes(pickle.dumps(held))
    text = refused(path)
    assert "needs pickle" in text
    assert f"python -m st_align.encoders.convert {path}" in text
    if how == "torch":
        assert "argparse.Namespace" in text


def test_converted_file_loads(resnet, plain, some_patches, tmp_path, capsys):
    source, out = tmp_path / "w.pt", tmp_path / "out.safetensors"
    torch.save({"state_dict": resnet, "args": argparse.Namespace(lr=1)}, source)
    assert convert.main([str(source), str(out)]) == 0
    assert "320 tensors" in capsys.readouterr().out
    encoder = resnet50.RESNET50.load(out)
    assert torch.equal(encoder.encode_images(some_patches).pooled, plain)


def test_convert_says_what_is_wrong(tmp_path, capsys):
    torch.save([1, 2], tmp_path / "list.pt")
    assert convert.main([str(tmp_path / "list.pt"), str(tmp_path / "out.safetensors")]) == 2
    assert "no state dict" in capsys.readouterr().err
    assert convert.main([str(tmp_path / "none.pt"), "out"]) == 2
    assert "missing" in capsys.readouterr().err
    assert convert.main([]) == 2
    assert "RUNS WHATEVER CODE" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([1, 2], "an object of type list"),
        ({"epoch": 3, "lr": 0.1}, "a dict of epoch, lr"),
        ({"model": {"model": {"model": {"model": {}}}}}, "a dict of model"),
        (3, "an object of type int"),
    ],
)
def test_files_without_a_state_dict(held, words, tmp_path):
    torch.save(held, tmp_path / "w.bin")
    assert words in refused(tmp_path / "w.bin")


def test_missing_unexpected_and_misshapen_tensors_are_named(resnet, tmp_path):
    tensors = dict(resnet)
    del tensors["layer1.0.conv1.weight"]
    tensors["extra.weight"] = torch.zeros(2)
    tensors["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    text = refused(write(tensors, tmp_path / "model.safetensors"))
    assert "not a checkpoint of resnet50" in text
    assert "1 missing: layer1.0.conv1.weight" in text
    assert "1 unexpected: extra.weight" in text
    assert "conv1.weight is 64 x 3 x 3 x 3, not 64 x 3 x 7 x 7" in text


def test_names_in_messages_are_those_of_the_file(golden, tmp_path):
    tensors = {k: torch.zeros(s) for k, (s, _) in layout_of(golden / "hibou_b_hf").items()}
    del tensors["encoder.layer.3.attention.attention.key.bias"]
    tensors["encoder.layer.2.attention.attention.query.weight"] = torch.zeros(768, 767)
    text = refused(write(tensors, tmp_path / "w.safetensors"), hibou.HIBOU_B)
    assert "1 missing: encoder.layer.3.attention.attention.key.bias" in text
    assert "encoder.layer.2.attention.attention.query.weight + " in text


@pytest.mark.parametrize(
    ("fixture", "words"),
    [
        ("ctranspath", "it is one of ctranspath: give it to that encoder"),
        ("clip_vitb32", "it is one of clip-vit-b-32 or plip"),
    ],
)
def test_checkpoint_of_another_encoder_is_named(fixture, words, golden, tmp_path):
    zeros = {k: torch.zeros(s) for k, (s, _) in layout_of(golden / fixture).items()}
    assert words in refused(write(zeros, tmp_path / "w.bin", wrapper="model"))


def test_a_network_of_nobody_has_no_advice(tmp_path):
    path = write({"a": torch.zeros(1)}, tmp_path / "w.bin")
    assert "it is one of" not in refused(path)


# Where weights lie


def entry(name: str = "uni") -> FrozenEntry:
    return find(name)


def test_without_weights_it_says_what_to_get_and_where_to_put_it():
    with pytest.raises(ModelError) as error:
        load_frozen(entry(), None)
    for words in ("pytorch_model.bin", "huggingface.co/MahmoodLab/UNI", f"${ENV}/uni/"):
        assert words in str(error.value)


def test_given_path_comes_first(tmp_path, monkeypatch):
    (tmp_path / "uni").mkdir()
    monkeypatch.setenv(ENV, str(tmp_path))
    assert find_weights(entry(), "elsewhere/w.bin") == Path("elsewhere/w.bin")
    assert find_weights(entry(), Path("elsewhere")) == Path("elsewhere")
    assert find_weights(entry(), "~/w.bin") == Path.home() / "w.bin"


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("uni", "uni/pytorch_model.bin"),
        ("uni", "UNI/model.safetensors"),
        ("uni2", "UNI2-h/pytorch_model.bin"),
        ("clip-vit-b-32", "clip-vit-base-patch32/model.safetensors"),
        ("uni", "uni.bin"),
        ("plip", "plip.safetensors"),
        ("ctranspath", "ctranspath.pth"),
        ("hibou-b", "hibou-b.pth"),
        ("resnet50", "resnet50-11ad3fa6.pth"),
    ],
)
def test_folder_of_all_weights(name, there, tmp_path, monkeypatch):
    file = tmp_path / there
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"")
    monkeypatch.setenv(ENV, str(tmp_path))
    found = find_weights(entry(name), None)
    assert found == (file if file.parent == tmp_path else file.parent)
    assert lookup.weights_file(found, entry(name).info, name) == file
    others = [e for e in registered().values() if isinstance(e, FrozenEntry) and e.name != name]
    assert [e.name for e in others if find_weights(e, None)] == []


def test_a_name_that_many_encoders_publish_belongs_to_none(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setenv(ENV, str(tmp_path))
    assert find_weights(entry(), None) is None


def test_folder_of_all_weights_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv(ENV, str(tmp_path / "typo"))
    with pytest.raises(ModelError, match=f"{ENV} names no folder"):
        find_weights(entry(), None)
    assert find_weights(entry("efficientnet-lite0"), None) is None  # its weights are packaged


def test_given_folder_without_a_published_file_lists_what_is_there(tmp_path):
    (tmp_path / "weights.zip").write_bytes(b"")
    with pytest.raises(ModelError, match=r"(?s)pytorch_model.bin.*weights.zip"):
        load_frozen(entry(), tmp_path)


def test_given_path_without_a_file():
    with pytest.raises(ModelError, match=r"is missing: nowhere/w.bin"):
        load_frozen(entry(), "nowhere/w.bin")


def test_missing_library_is_named(monkeypatch, tmp_path):
    def load(weights):
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    with pytest.raises(ModelError, match=r"(?s)library.*timm.*pip install timm"):
        load_frozen(replace(entry(), load=load), tmp_path)


def test_hub_is_asked_only_when_told_to(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if repository == "nobody/offline":
            raise LocalEntryNotFoundError("cannot reach the hub")
        if file != "model.safetensors":
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert find_weights(entry(), None) is None
    assert asked == []
    found = find_weights(entry(), "hf:MahmoodLab/UNI")
    assert found == tmp_path / "model.safetensors"
    assert asked == [("MahmoodLab/UNI", f) for f in ("pytorch_model.bin", "model.safetensors")]
    with pytest.raises(
        ModelError, match=r"(?s)nobody/offline.*cannot reach the hub.*hf auth login"
    ):
        find_weights(entry(), "hf:nobody/offline")
    with pytest.raises(ModelError, match="none of these files"):
        find_weights(entry("ctranspath"), "hf:some/body")
