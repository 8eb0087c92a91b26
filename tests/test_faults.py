"""What breaks around a run: killed processes, clocks, names, folders that move. Full and read-only
disks are in `examples/drills/faults.py`.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ranks import wait_for_lines
from st_align import runlog
from st_align.checkpoint import load_run
from st_align.corpus import Corpus
from st_align.corpus_build import build_corpus
from st_align.infer import Embedder
from st_align.train import train
from toy_corpus import CONFIG, configured
from toy_run import ColourEncoder
from toy_slides import toy_ref

HERE = Path(__file__).parent
KILLS = 20
LAST = 190
"""Operations on files that a training of four steps makes, about."""
REFS = [toy_ref(id, rows=6) for id in ("a1", "ö 1")]
SHORT = configured(CONFIG, optim={"epochs": 1}, model={"niche_image": ColourEncoder.name})


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tree(folder: Path) -> dict[str, str]:
    """Every file and its hash; of a run's, those that hold times and places are left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("metrics.jsonl", "provenance.json")
    }


def losses(out: Path) -> list[dict]:
    lines = runlog.read(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "spots_per_s"} for line in lines]


def drill(folder: Path, points: range) -> None:
    """SIGKILL before each of these file operations of a training; what resuming makes of it."""
    numbers = [str(n) for n in (*points, 10**6)]
    done = subprocess.run(
        [sys.executable, HERE / "train_drill.py", folder, *numbers],
        check=True,
        capture_output=True,
        text=True,
    )
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines.pop(numbers[-1]) == "ran through finished"
    assert set(lines.values()) == {"died finished"}, (lines, done.stderr[-2000:])
    undisturbed = folder / numbers[-1]
    for point in points:
        killed = folder / f"{point}"
        assert losses(killed) == losses(undisturbed), point
        for name in ("model.safetensors", "readout.safetensors", "config.json"):
            assert (killed / name).read_bytes() == (undisturbed / name).read_bytes(), (point, name)


def test_training_killed_at_some_file_operations(tmp_path):
    drill(tmp_path, range(2, LAST, 55))


@pytest.mark.slow
def test_training_killed_at_every_file_operation(tmp_path):
    drill(tmp_path, range(1, LAST))


@pytest.mark.slow
def test_training_killed_at_five_random_moments_of_one_run(tmp_path, rng):
    def worker(name: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, HERE / "train_worker.py", tmp_path / name], stdout=subprocess.DEVNULL
        )

    assert worker("whole").wait() == 0
    for line in sorted(rng.choice(np.arange(1, 10), 5, replace=False).tolist()):
        process = worker("killed")
        wait_for_lines(tmp_path / "killed", line, process)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
    assert worker("killed").wait() == 0
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_preparing_killed_at_random_moments(tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "prepare_drill.py", "moments", tmp_path, f"{KILLS}"],
        check=True,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == KILLS
    assert sum(line.endswith("died finished") for line in lines) > KILLS / 2, lines
    for number in range(KILLS):
        assert tree(tmp_path / f"{number}") == tree(tmp_path / "whole"), number


@pytest.mark.slow
def test_preparing_with_two_jobs_killed_at_random_moments(tmp_path, rng):
    """Each time in a folder of its own; workers have to notice by themselves."""

    def prepare(out: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, HERE / "prepare_drill.py", "build", out, "2"])

    start = time.perf_counter()
    assert prepare(tmp_path / "whole").wait() == 0
    lasts, died = time.perf_counter() - start, 0
    for number in range(KILLS):
        out = tmp_path / f"killed-{number}"
        process = prepare(out)
        time.sleep(rng.uniform(0.3 * lasts, lasts))
        process.kill()
        died += process.wait() < 0
        assert prepare(out).wait() == 0
        assert tree(out) == tree(tmp_path / "whole"), number
    assert died > KILLS / 2


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    jumps, real = itertools.cycle([-20, 30]), time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + next(jumps) * 3e7)  # years
        corpus = build_corpus(REFS, tmp_path / "c", spot_px=16, niche_px=24, progress=False)
        train(corpus, SHORT, tmp_path / "run", save_every_s=0.0)
    corpus = build_corpus(REFS, tmp_path / "d", spot_px=16, niche_px=24, progress=False)
    train(corpus, SHORT, tmp_path / "again", save_every_s=0.0)
    assert tree(tmp_path / "c") == tree(tmp_path / "d")
    assert tree(tmp_path / "run") == tree(tmp_path / "again")


def test_a_corpus_and_a_run_move_half_way_to_names_of_other_alphabets(tmp_path):
    first, second = tmp_path / "Gewebe, süß", tmp_path / "組織 100% 'образец'"
    corpus = build_corpus(REFS, first / "Korpus", spot_px=16, niche_px=24, progress=False)
    run = train(corpus, SHORT, first / "Lauf", save_every_s=0.0)
    weights = (run.path / "model.safetensors").read_bytes()
    first.rename(second)
    newest = sorted((second / "Lauf" / "trainer").iterdir())[-1]
    shutil.rmtree(newest)
    said: list[str] = []
    moved = Corpus.open(second / "Korpus")
    train(moved, SHORT, second / "Lauf", resume=True, log=said.append)
    assert any(line.startswith("resuming after step") for line in said)
    assert (second / "Lauf" / "model.safetensors").read_bytes() == weights
    found = Embedder(load_run(second / "Lauf"), corpus=moved).embed(moved.slide("ö 1"))
    assert found.h_niche.shape == (24, 32)
