from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ranks import as_torchrun, wait_for_lines
from st_align import runlog
from st_align import train as train_module
from st_align.checkpoint import load_run
from st_align.corpus_build import build_corpus
from st_align.errors import ConfigError, CorpusError, ModelError, OutputError, TrainingError
from st_align.files import read_json
from st_align.infer import Embedder
from st_align.job import StopSignals, launch, step_rng
from st_align.provenance import json_hash
from st_align.readout import MAX_AXES
from st_align.train import train
from toy_corpus import CONFIG, ToyCorpus, configured, stop_after, toy_corpus
from toy_run import ColourEncoder
from toy_slides import toy_ref
from toys import toy_prepared

WORKER = Path(__file__).parent / "train_worker.py"
STEPS = 12
SHORT = configured(optim={"epochs": 1})


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lines: list[str] = []
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run = train(toy_corpus(), CONFIG, out, command="st-align train", log=lines.append)
    torch.set_num_threads(threads)
    return run, lines


def metrics(out: Path, *, timed: bool = False) -> list[dict]:
    lines = runlog.read(out / "metrics.jsonl")
    return lines if timed else [{k: v for k, v in x.items() if k != "spots_per_s"} for x in lines]


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_a_run_folder_holds_all_that_is_promised(undisturbed):
    run, lines = undisturbed
    names = {p.name for p in run.path.iterdir()}
    assert names == {
        *("model.safetensors", "config.json", "genes.txt", "preprocess.json"),
        *("provenance.json", "splits.json", "readout.safetensors", "metrics.jsonl", "trainer"),
        "MODEL_CARD.md",
    }
    assert run.finished
    assert len(run.panel) == 12
    assert (run.preprocess.spot_px, run.preprocess.niche_px) == (16, 24)
    assert [p.name for p in sorted((run.path / "trainer").iterdir())] == [
        "step-00000000",
        f"step-{STEPS:08d}",
    ]
    assert any(f"step {STEPS}/{STEPS}" in line for line in lines)


def test_metrics_hold_each_term_beside_chance_and_the_rates(undisturbed):
    run, _ = undisturbed
    lines = metrics(run.path, timed=True)
    assert [x["step"] for x in lines] == list(range(1, STEPS + 1))
    assert [x["epoch"] for x in lines] == [1] * 4 + [2] * 4 + [3] * 4
    for x in lines:
        terms = 0.4 * x["spot"] + 0.3 * x["niche"] + 0.3 * x["cross"]
        assert x["loss"] == pytest.approx(terms, rel=1e-5)
        assert x["ln_batch"] == pytest.approx(np.log(24))
        assert x["ln_spot"] == x["ln_cross"] == pytest.approx(np.log(24))
        assert x["spots_per_s"] > 0
    assert max(x["lr"] for x in lines) == pytest.approx(2e-3 * 24 / 256)
    assert lines[0]["weight_decay"] == pytest.approx(0.04)
    assert lines[-1]["weight_decay"] == pytest.approx(0.4)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_provenance_names_software_slides_split_and_command(undisturbed):
    run, _ = undisturbed
    facts = run.provenance
    assert facts["software"].keys() >= {"st-align", "python", "torch", "numpy"}
    assert [(s["id"], s["patient"]) for s in facts["slides"]] == [
        *(("a1", "A"), ("a2", "A"), ("b1", "B"))
    ]
    assert all(s["sha256"] for s in facts["slides"])
    assert facts["command"] == "st-align train"
    assert (facts["step"], facts["steps"], facts["epochs"]) == (STEPS, STEPS, 3)
    assert facts["machine"] == {
        **{"device": "cpu", "precision": "32-true", "ranks": 1, "threads": 1}
    }
    text = (run.path / "provenance.json").read_text()
    assert str(run.path) not in text


def test_readouts_cover_every_use(undisturbed):
    run, _ = undisturbed
    shapes = {use: axes.shape for use, axes in run.readouts.axes.items()}
    assert {use: rows for use, (rows, _) in shapes.items()} == {
        **{"image": 32, "gene": 16, "spot": 32, "niche": 32, "spot+niche": 64}
    }
    for use, axes in run.readouts.axes.items():
        assert axes.shape[1] <= MAX_AXES
        np.testing.assert_allclose(axes.T @ axes, np.eye(axes.shape[1]), atol=1e-5), use


def test_killed_at_a_random_step_and_resumed_it_ends_in_the_same_bytes(undisturbed, tmp_path):
    run, _ = undisturbed
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, WORKER, out], stdout=subprocess.PIPE)
    wait_for_lines(out, 3, process)  # killed wherever it is by then
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    stopped_at = load_run(out).provenance["step"]
    assert stopped_at < STEPS
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "half a li')
    lines: list[str] = []
    resumed = train(toy_corpus(), CONFIG, out, resume=True, log=lines.append)
    assert any("resuming after step" in line for line in lines)
    assert resumed.finished
    assert weights(out) == weights(run.path)
    assert (out / "readout.safetensors").read_bytes() == (
        run.path / "readout.safetensors"
    ).read_bytes()
    assert metrics(out) == metrics(run.path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_returns(undisturbed, tmp_path, monkeypatch, number):
    run, _ = undisturbed
    before, said = signal.getsignal(number), []
    stop_after(monkeypatch, 3, number)
    stopped = train(toy_corpus(), CONFIG, tmp_path / "run", log=said.append)
    assert signal.getsignal(number) is before
    assert not stopped.finished
    assert stopped.provenance["step"] == 3
    assert not stopped.readouts.axes
    assert said[-1] == "asked to stop: saved after step 3 of 12; go on with --resume"
    assert train(toy_corpus(), CONFIG, tmp_path / "run", resume=True).finished
    assert weights(tmp_path / "run") == weights(run.path)
    assert metrics(tmp_path / "run") == metrics(run.path)


@pytest.fixture
def default_sigint():
    """A process started in the background ignores SIGINT; this one does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_sigint")
def test_a_second_signal_acts_as_it_did_before():
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def damage_newest(out: Path) -> str:
    newest = sorted((out / "trainer").iterdir())[-1]
    path = newest / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    return newest.name


def test_a_damaged_newest_resume_point_is_passed_over(undisturbed, tmp_path, monkeypatch):
    run, _ = undisturbed
    out, said = tmp_path / "run", []
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train(toy_corpus(), CONFIG, out, save_every_s=0.0)
    assert damage_newest(out) == "step-00000005"
    train(toy_corpus(), CONFIG, out, resume=True, log=said.append)
    assert any("damaged" in line and "step-00000005" in line for line in said)
    assert any("resuming after step 4" in line for line in said)
    assert weights(out) == weights(run.path)
    assert metrics(out) == metrics(run.path)


def test_a_finished_run_resumes_to_itself(undisturbed):
    run, _ = undisturbed
    before = weights(run.path)
    said: list[str] = []
    again = train(toy_corpus(), CONFIG, run.path, resume=True, log=said.append)
    assert again.finished
    assert weights(run.path) == before
    assert len(metrics(run.path)) == STEPS


def test_resuming_where_nothing_is_starts_from_the_beginning(tmp_path):
    said: list[str] = []
    run = train(toy_corpus(), SHORT, tmp_path / "run", resume=True, log=said.append)
    assert run.finished
    assert any("nothing to resume" in line for line in said)


def test_a_model_whose_resume_points_were_deleted_is_not_trained_over(undisturbed, tmp_path):
    run, _ = undisturbed
    out = tmp_path / "run"
    shutil.copytree(run.path, out, ignore=shutil.ignore_patterns("trainer"))
    with pytest.raises(OutputError, match=r"(?s)a model but no resume point.*--init"):
        train(toy_corpus(), CONFIG, out, resume=True)
    assert weights(out) == weights(run.path)


def test_a_run_is_resumed_only_with_what_it_was_started_with(undisturbed, tmp_path):
    run, _ = undisturbed
    out = tmp_path / "run"
    shutil.copytree(run.path, out)
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    changes = [
        (toy_corpus(), configured(optim={"lr": 1.0}), {}, "config_hash"),
        (toy_corpus(), CONFIG, {"hold_out_slides": ["a1"]}, "splits_hash"),
        (toy_corpus(seed=1), CONFIG, {}, "the data of slide 'a1'"),
    ]
    for corpus, config, options, named in changes:
        with pytest.raises(ConfigError, match=f"(?s)other settings or data.*{named}"):
            train(corpus, config, out, resume=True, **options)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


@pytest.mark.parametrize(
    ("save_every_s", "found"), [(300, "step 7(.|\n)*loss nan"), (0, "step 6(.|\n)*logit_scale")]
)
def test_numbers_that_are_not_finite_stop_the_run_and_are_never_saved(
    tmp_path, monkeypatch, save_every_s, found
):
    out = tmp_path / "run"
    clamp = train_module.clamp_logit_scale
    calls = []

    def poison(logit_scale):
        clamp(logit_scale)
        calls.append(1)
        if len(calls) == 6:
            with torch.no_grad():
                logit_scale.fill_(float("nan"))

    monkeypatch.setattr(train_module, "clamp_logit_scale", poison)
    with pytest.raises(TrainingError, match=found):
        train(toy_corpus(), CONFIG, out, save_every_s=save_every_s)
    kept = load_run(out)
    assert not kept.finished
    assert all(value.isfinite().all() for value in kept.model.state_dict().values())
    assert kept.provenance["step"] == (0 if save_every_s else 5)
    assert [x["step"] for x in metrics(out)] == list(range(1, 7))


def test_a_learning_rate_out_of_all_reason_is_named(tmp_path):
    config = configured(optim={"lr": 1e30, "warmup": 0.0})
    with pytest.raises(TrainingError, match=r"(?s)at step \d of 12, in epoch 1.*optim\.lr"):
        train(toy_corpus(), config, tmp_path / "run")


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_use_is_refused_unless_resuming(tmp_path, resume):
    (tmp_path / "notes.txt").write_text("mine")
    if resume:
        assert train(toy_corpus(), SHORT, tmp_path, resume=True).finished
        return
    with pytest.raises(OutputError, match=r"(?s)not empty.*--resume"):
        train(toy_corpus(), SHORT, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def tiny_corpus(spots: int) -> ToyCorpus:
    rng = np.random.default_rng(0)
    return ToyCorpus([toy_prepared(rng, rows=1, cols=spots)])


REFUSED = [
    ({"hold_out_slides": ["a3"]}, ConfigError, "no slide to hold out is called 'a3'"),
    ({"hold_out_patients": ["Z"]}, ConfigError, "no patient to hold out is called 'Z'"),
    ({"hold_out_patients": ["A", "B"]}, ConfigError, "every slide is held out"),
    ({"config": configured(data={"niche": "k3"})}, CorpusError, "st-align prepare .*--niche k3"),
    ({"corpus": tiny_corpus(1)}, CorpusError, "(?s)too few spots.*2.*found:    1"),
    ({"panel": Path("no-such-file")}, ConfigError, "panel is missing"),
    ({"init": "no-such-run"}, ModelError, "no model 'no-such-run'"),
    ({"config": configured(model={"spot_image": "resnet"})}, ConfigError, "no encoder is called"),
]


@pytest.mark.parametrize(("given", "error", "message"), REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, given, error, message):
    options = {"corpus": toy_corpus(), "config": CONFIG, "out": tmp_path / "run"} | given
    corpus, config, out = (options.pop(name) for name in ("corpus", "config", "out"))
    with pytest.raises(error, match=message):
        train(corpus, config, out, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_set_smaller_than_a_batch_is_one_batch_and_says_so(tmp_path):
    said: list[str] = []
    run = train(tiny_corpus(6), SHORT, tmp_path / "run", log=said.append)
    assert any("the batch is 6 spots" in line for line in said)
    assert (run.provenance["batch"], run.provenance["steps"]) == (6, 1)


def test_held_out_slides_leave_no_trace_but_their_names(tmp_path):
    said: list[str] = []
    one = train(toy_corpus(), SHORT, tmp_path / "one", hold_out_slides=["a2"], log=said.append)
    others = toy_corpus()
    del others._slides["a2"], others.ids[1]
    two = train(others, SHORT, tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert one.panel == two.panel
    splits = read_json(tmp_path / "one" / "splits.json")
    assert one.provenance["splits_hash"] == json_hash(splits)
    assert splits["held_out"] == {"slides": ["a2"], "patients": ["A"]}
    assert one.provenance["splits_hash"] != two.provenance["splits_hash"]
    assert one.provenance["same_patient"] == splits["same_patient"] == ["a2"]
    assert any("same patient" in line and "a2" in line for line in said)


def test_a_held_out_patient_raises_no_warning(tmp_path):
    said: list[str] = []
    run = train(toy_corpus(), SHORT, tmp_path / "run", hold_out_patients=["A"], log=said.append)
    assert run.provenance["held_out"] == {"slides": ["a1", "a2"], "patients": ["A"]}
    assert run.provenance["same_patient"] == []
    assert not any("warning" in line for line in said)


def test_a_panel_from_a_file_is_the_panel(tmp_path):
    (tmp_path / "genes.txt").write_text("GENE5\nGENE2\n")
    run = train(toy_corpus(), SHORT, tmp_path / "run", panel=tmp_path / "genes.txt")
    assert run.panel.genes == ("GENE5", "GENE2")


def test_training_starts_from_another_run(undisturbed, tmp_path, monkeypatch):
    base, _ = undisturbed
    stop_after(monkeypatch, 1)
    config = configured(SHORT, optim={"lr": 1e-12}, data={"panel": 5})
    train(toy_corpus(), config, tmp_path / "run", init=base.path, hold_out_patients=["A"])
    run = load_run(tmp_path / "run")
    assert run.panel == base.panel
    for name, value in base.model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, atol=1e-9, rtol=1e-9)
    assert [s["id"] for s in run.provenance["slides"]] == ["b1"]
    assert [s["id"] for s in run.provenance["init"]["slides"]] == ["a1", "a2", "b1"]


def test_a_model_of_another_architecture_or_panel_is_no_start(undisturbed, tmp_path):
    base, _ = undisturbed
    wider = configured(SHORT, model={"dim": 32})
    with pytest.raises(ModelError, match=r"model\.dim is 16, not 32"):
        train(toy_corpus(), wider, tmp_path / "run", init=base.path)
    (tmp_path / "genes.txt").write_text("GENE5\nGENE2\n")
    with pytest.raises(ModelError, match="leave out --panel"):
        train(
            toy_corpus(),
            SHORT,
            tmp_path / "run",
            init=base.path,
            panel=tmp_path / "genes.txt",
        )
    assert not (tmp_path / "run").exists()


def test_slides_without_image_or_without_counts_train_beside_the_others(tmp_path):
    rng = np.random.default_rng(0)
    slides = [
        toy_prepared(rng, id="both", patient="A"),
        toy_prepared(rng, id="dark", patient="B", image=False),
        toy_prepared(rng, id="mute", patient="C", counts=False),
    ]
    run = train(ToyCorpus(slides), SHORT, tmp_path / "run")
    (line, *_) = metrics(tmp_path / "run")
    assert line["ln_spot"] < line["ln_cross"] == pytest.approx(np.log(24))
    assert set(run.readouts.axes) == {"image", "gene", "spot", "niche", "spot+niche"}


def test_counts_alone_train_and_have_no_image_readout(tmp_path):
    corpus = ToyCorpus([toy_prepared(np.random.default_rng(0), image=False)])
    run = train(corpus, SHORT, tmp_path / "run")
    (line, *_) = metrics(tmp_path / "run")
    assert (line["spot"], line["niche"]) == (0, 0)
    assert line["cross"] > 0
    assert run.preprocess.spot_px is None
    assert set(run.readouts.axes) == {"gene", "spot", "niche", "spot+niche"}


def test_images_alone_cannot_choose_a_panel(tmp_path):
    corpus = ToyCorpus([toy_prepared(np.random.default_rng(0), counts=False)])
    with pytest.raises(CorpusError, match="no slide has counts"):
        train(corpus, SHORT, tmp_path / "run")


def test_dropout_is_a_function_of_seed_step_and_rank():
    def draw(seed: int, step: int, rank: int) -> float:
        with step_rng(seed, step, rank, torch.device("cpu")):
            return torch.rand(()).item()

    before = torch.random.get_rng_state()
    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({draw(*key) for key in [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 0)]}) == 4
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_full_disk_stops_with_a_word_and_leaves_a_usable_run(tmp_path, monkeypatch):
    out = tmp_path / "run"
    save = train_module.save_state

    def full(folder, state):
        if state.step == 5:
            monkeypatch.setattr(os, "fsync", no_space)
        save(folder, state)

    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_module, "save_state", full)
    with pytest.raises(OutputError, match="No space left"):
        train(toy_corpus(), CONFIG, out, save_every_s=0.0)
    monkeypatch.undo()
    assert train(toy_corpus(), CONFIG, out, resume=True).finished


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A corpus of two slides on disk, and a run through a frozen encoder on one of them."""
    folder = tmp_path_factory.mktemp("disk")
    refs = [toy_ref(id, rows=6) for id in ("a1", "b1")]
    corpus = build_corpus(refs, folder / "corpus", spot_px=16, niche_px=24, progress=False)
    config = configured(SHORT, model={"niche_image": "toy-colour"})
    run = train(corpus, config, folder / "run", hold_out_slides=["b1"])
    return corpus, config, run


def test_a_run_through_a_frozen_encoder_says_which_and_its_licence(on_disk):
    corpus, _, run = on_disk
    use = run.preprocess.frozen["niche_image"]
    assert (use.name, use.fingerprint, use.n_tokens, use.dim) == ("toy-colour", "c0" * 6, 1, 6)
    facts = run.provenance["encoders"]["niche_image"]
    assert facts["licence"] == "BSD-3-Clause"
    assert facts["fingerprint"] == use.fingerprint
    assert run.provenance["slides"][0]["sha256"] == corpus.entry("a1")["sha256"]
    assert len(list(corpus.folder("a1").rglob("pooled.npy"))) == 1
    assert list(corpus.folder("b1").rglob("pooled.npy")) == []


def test_a_trained_run_embeds_the_slide_it_never_saw(on_disk):
    corpus, _, run = on_disk
    found = Embedder(run, corpus=corpus).embed(corpus.slide("b1"))
    assert found.h_niche.shape == (24, 32)
    assert set(found.readouts) == {"image", "gene", "spot", "niche", "spot+niche"}
    for scores in found.readouts.values():
        np.testing.assert_allclose(scores.mean(axis=0), 0, atol=1e-4)


def test_features_of_other_weights_are_no_start(on_disk, tmp_path, monkeypatch):
    corpus, config, run = on_disk
    monkeypatch.setattr(ColourEncoder, "fingerprint", "d1" * 6)
    with pytest.raises(ModelError, match="niche_image was read through other weights"):
        train(corpus, config, tmp_path / "run", init=run.path)


def test_readouts_are_fitted_on_training_slides_of_any_number(on_disk, tmp_path, monkeypatch):
    corpus, config, _ = on_disk
    monkeypatch.setattr("st_align.readout._SPOTS", 10)
    monkeypatch.setattr("st_align.readout._SLIDES", 1)
    run = train(corpus, config, tmp_path / "run")
    assert run.readouts.axes["gene"].shape[1] == 9  # ten spots of one slide, centred


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in as_torchrun(0, 4, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"(?s)more processes than GPUs.*at most 2.*4"):
        launch()
