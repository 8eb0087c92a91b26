from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch

from st_align import checkpoint
from st_align.checkpoint import (
    CARD,
    FrozenUse,
    Preprocess,
    TrainerState,
    build_model,
    load_run,
    load_state,
    resolve_model,
    save_model,
    save_readouts,
    save_run,
    save_state,
    shipped,
)
from st_align.config import Config, EncoderConfig, ModelConfig
from st_align.errors import ModelError, OutputError
from st_align.expression import Panel
from st_align.files import read_json, read_tensors, write_json, write_tensors
from st_align.infer import run_hash
from st_align.model import FrozenShape
from st_align.optim import build_optimizer, moments, restore_moments, set_rates
from toy_readouts import toy_readouts

CONFIG = Config(
    model=ModelConfig(dim=16, heads=2, tokens=4, gene_layers=1),
    encoders={"efficientnet-lite0": EncoderConfig(weights="lite0.bin")},
)
PANEL = Panel(genes=("A", "B", "C"), ensembl=("ENSG1", "", "ENSG3"))
PREPROCESS = Preprocess(
    spot_px=16,
    niche_px=24,
    niche="lattice",
    frozen={
        "niche_image": FrozenUse(name="efficientnet-lite0", fingerprint="f" * 12, n_tokens=2, dim=6)
    },
)


@pytest.fixture
def folder(tmp_path, rng):
    folder = tmp_path / "run"
    model = build_model(CONFIG, len(PANEL), PREPROCESS.shapes)
    save_run(folder, CONFIG, PANEL, PREPROCESS, {"train": {"slides": ["a"]}})
    save_model(folder, model, {"step": 3, "finished": True})
    save_readouts(folder, toy_readouts(rng))
    return folder


def test_a_run_comes_back_as_it_was_saved(folder):
    run = load_run(folder)
    expected = build_model(CONFIG, len(PANEL), PREPROCESS.shapes).state_dict()
    assert not run.model.training
    assert run.config == CONFIG
    assert run.panel == PANEL
    assert run.preprocess == PREPROCESS
    assert run.preprocess.shapes == {"niche_image": FrozenShape(2, 6)}
    assert run.finished
    assert set(run.readouts.axes) == {"image", "gene", "spot", "niche", "spot+niche"}
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, expected[name])


def test_an_unfinished_run_loads_without_readouts(folder):
    save_model(folder, load_run(folder).model, {"step": 2, "finished": False})
    (folder / checkpoint.READOUT).unlink()
    run = load_run(folder)
    assert not run.finished
    assert not run.readouts.axes


def test_weights_at_the_start_depend_on_the_seed_alone():
    state = torch.random.get_rng_state()
    one, two = (build_model(CONFIG, 3, PREPROCESS.shapes).state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    reseeded = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, seed=1))
    other = build_model(reseeded, 3, PREPROCESS.shapes).state_dict()
    assert any(not torch.equal(one[name], other[name]) for name in one)


FILES = ["model.safetensors", "config.json", "genes.txt", "preprocess.json", "provenance.json"]


@pytest.mark.parametrize("name", [*FILES, "readout.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"(?s)is missing.*{name}"):
        load_run(folder)


@pytest.mark.parametrize("name", [*FILES[:2], *FILES[3:], "readout.safetensors"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.9])
def test_a_truncated_file_is_named(folder, name, keep):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ModelError, match=name):
        load_run(folder)


def test_one_changed_bit_of_the_weights_is_noticed(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load_run(folder)


@pytest.mark.parametrize("name", ["config.json", "preprocess.json", "provenance.json"])
def test_another_schema_version_is_refused(folder, name):
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(values | {"schema_version": 99}))
    with pytest.raises(ModelError, match=f"(?s){name} was not written for.*schema version 1.*99"):
        load_run(folder)


def test_a_foreign_safetensors_file_is_refused(folder):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors was not written for"):
        load_run(folder)


def test_weights_of_another_model_are_refused(folder):
    wider = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dim=32))
    other = build_model(wider, len(PANEL), PREPROCESS.shapes)
    write_tensors(folder / "model.safetensors", other.state_dict())
    with pytest.raises(ModelError, match=r"(?s)does not fit the model.*size mismatch"):
        load_run(folder)


def test_a_config_with_a_key_nobody_knows_is_refused(folder):
    write_json(folder / "config.json", {"modle": {}})
    with pytest.raises(ModelError, match=r"(?s)config\.json is damaged.*'modle'.*did you mean"):
        load_run(folder)


def test_a_preprocess_file_with_other_fields_is_refused(folder):
    write_json(folder / "preprocess.json", {"frozen": {"niche_image": {"name": "x"}}})
    with pytest.raises(ModelError, match=r"preprocess\.json is damaged"):
        load_run(folder)


def test_a_name_that_is_no_model_lists_those_that_ship(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "models")
    with pytest.raises(ModelError, match="no checkpoint ships"):
        resolve_model("tiny-brian")
    (tmp_path / "models").mkdir()
    folder.rename(tmp_path / "models" / "tiny-brain")
    assert load_run("tiny-brain").panel == PANEL
    with pytest.raises(ModelError, match="did you mean 'tiny-brain'"):
        resolve_model("tiny-brian")


def test_equal_tensors_make_equal_files(tmp_path):
    tensors = {name: torch.arange(6.0).reshape(2, 3) for name in "cab"}
    write_tensors(tmp_path / "one", tensors)
    write_tensors(tmp_path / "two", dict(sorted(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert set(read_tensors(tmp_path / "one")) == set("abc")


def test_scalars_and_empty_sets_of_tensors_survive(tmp_path):
    write_tensors(tmp_path / "a", {"s": torch.tensor(3.0)})
    write_tensors(tmp_path / "b", {})
    assert read_tensors(tmp_path / "a")["s"] == 3.0
    assert read_tensors(tmp_path / "b") == {}


def test_a_full_disk_leaves_the_old_file_and_nothing_else(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"(?s)cannot write .*No space left"):
        save_model(folder, load_run(folder).model, {})
    with pytest.raises(OutputError, match="No space left"):
        save_state(folder, TrainerState(step=1, weights={}, moments={}))
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert load_state(folder)[0] is None


def test_an_unwritable_place_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        save_run(tmp_path / "file" / "run", CONFIG, PANEL, PREPROCESS, {})
    with pytest.raises(OutputError, match="cannot write"):
        write_json(tmp_path / "file" / "x.json", {})


def test_json_of_other_shapes_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ModelError, match="expected: a JSON object"):
        read_json(tmp_path / "x.json")


def state(step: int) -> TrainerState:
    values = {"w": torch.full((4,), float(step))}
    return TrainerState(step=step, weights=values, moments={"exp_avg:w": values["w"] / 2})


def test_the_last_two_resume_points_are_kept_and_the_newest_is_taken(tmp_path):
    for step in (1, 2, 30, 30, 100):
        save_state(tmp_path, state(step))
    kept = sorted(p.name for p in (tmp_path / "trainer").iterdir())
    assert kept == ["step-00000030", "step-00000100"]
    loaded, damaged = load_state(tmp_path)
    assert damaged == []
    assert loaded.step == 100
    assert loaded.weights["w"].tolist() == [100.0] * 4
    assert loaded.moments["exp_avg:w"].tolist() == [50.0] * 4


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_resume_point_falls_back_to_the_one_before(tmp_path, file):
    save_state(tmp_path, state(1))
    save_state(tmp_path, state(2))
    newest = tmp_path / "trainer" / "step-00000002" / file
    newest.write_bytes(newest.read_bytes()[:-3])
    loaded, damaged = load_state(tmp_path)
    assert loaded.step == 1
    assert len(damaged) == 1
    assert file in damaged[0]
    oldest = tmp_path / "trainer" / "step-00000001" / file
    oldest.unlink()
    with pytest.raises(ModelError, match=r"(?s)no resume point .* can be read.*--init"):
        load_state(tmp_path)


def test_a_save_that_was_killed_midway_does_not_count(tmp_path):
    save_state(tmp_path, state(1))
    half = tmp_path / "trainer" / ".step-00000002.part"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert load_state(tmp_path)[0].step == 1
    save_state(tmp_path, state(2))
    assert load_state(tmp_path)[0].step == 2
    assert not half.exists()


def test_no_resume_point_is_none(tmp_path):
    assert load_state(tmp_path) == (None, [])


def adamw_steps(model, optimizer, n):
    for i in range(n):
        set_rates(optimizer, lr=0.1, weight_decay=0.2)
        optimizer.zero_grad()
        model(torch.full((2, 3), float(i + 1))).square().sum().backward()
        optimizer.step()


def test_an_optimizer_goes_on_from_its_moments():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 1))
    optimizer = build_optimizer(model, fused=False)
    adamw_steps(model, optimizer, 3)
    twin = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 1))
    twin.load_state_dict(model.state_dict())
    resumed = build_optimizer(twin, fused=False)
    restore_moments(twin, resumed, {k: v.clone() for k, v in moments(model, optimizer).items()})
    adamw_steps(model, optimizer, 3)
    adamw_steps(twin, resumed, 3)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def test_only_matrices_decay():
    model = build_model(CONFIG, 3, PREPROCESS.shapes)
    optimizer = build_optimizer(model, fused=False)
    set_rates(optimizer, lr=0.1, weight_decay=0.3)
    matrices, rest = optimizer.param_groups
    assert all(p.ndim >= 2 for p in matrices["params"])
    assert all(p.ndim < 2 for p in rest["params"])
    assert any(p is model.logit_scale for p in rest["params"])
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    n = len(matrices["params"]) + len(rest["params"])
    assert n == len(list(model.parameters()))


def test_the_shipped_brain_model_loads_is_small_and_says_what_it_is():
    assert "tiny-brain" in shipped()
    run = load_run("tiny-brain")
    assert sum(p.stat().st_size for p in run.path.iterdir()) < 15e6
    assert run.finished
    assert {s["patient"] for s in run.provenance["slides"]} == {"Br8100", "Br5292"}
    assert set(run.readouts.linear) == {"linear", "linear-scaled"}
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    card = (run.path / CARD).read_text()
    for word in ("Br8100", "Br5292", "151674", "151675", "151510", "not stated", run_hash(run)):
        assert word in card
    with pytest.raises(ModelError, match="tiny-brain"):
        load_run("tiny-brian")
