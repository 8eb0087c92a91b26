"""Weights files of pretrained encoders: good ones in any wrapping, bad ones, and where they lie."""

from __future__ import annotations

import argparse
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from st_align.encoders import convert, hibou, lookup, resnet50
from st_align.encoders._images import ImageFamily
from st_align.encoders._weights import fingerprint
from st_align.encoders.base import FrozenEntry, find, registered
from st_align.encoders.lookup import ENV, find_weights, load_frozen
from st_align.errors import ModelError
from weights_files import layout_of, stand_in, write


@pytest.fixture(autouse=True)
def _no_folder_of_weights(monkeypatch):
    monkeypatch.delenv(ENV, raising=False)


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
    found = encoder.encode_images(some_patches).pooled
    assert torch.equal(found, plain)
    torch.nn.Linear(2048, 2)(found).sum().backward()  # features can be trained on


def test_half_precision_weights_run_in_single_precision(resnet, plain, some_patches, tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in resnet.items()}
    encoder = resnet50.RESNET50.load(write(half, tmp_path / "model.safetensors"))
    found = encoder.encode_images(some_patches).pooled
    assert found.dtype == torch.float32
    assert 0 < (found - plain).norm() < 1e-2 * plain.norm()


def test_fingerprint_is_of_weights_and_of_preprocessing(tmp_path):
    one, other = (tmp_path / name for name in ("one", "other"))
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    marks = {fingerprint(one, "a"), fingerprint(one, "b"), fingerprint(other, "a")}
    assert len(marks) == 3


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
    asked.clear()
    with pytest.raises(ModelError, match=r"(?s)best_model\.pt, with args\.json and vocab\.json"):
        find_weights(entry("scgpt"), "hf:some/mirror")
    assert asked[0] == ("some/mirror", "args.json")
