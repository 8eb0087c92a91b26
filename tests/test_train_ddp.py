"""Several ranks and one process: the same losses and gradients on the same global batches; ranks
that die.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddp_worker import NO_DROPOUT, first_gradients, uneven_corpus
from ranks import as_srun, as_torchrun, finish, start, wait_for_lines
from st_align import runlog
from st_align.checkpoint import load_run
from st_align.errors import ConfigError, TrainingError
from st_align.files import read_tensors
from st_align.job import _processes, require_agreed, share, together
from st_align.sampling import global_batch
from st_align.train import train
from toy_corpus import stop_after

WORKER, TRAIN = (Path(__file__).parent / name for name in ("ddp_worker.py", "train_worker.py"))
STOPPED = 4
ROUNDING = 4e-6


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def jobs(tmp_path_factory, request):
    """A run of one process, and one begun by one process and resumed by two, or four."""
    folder = tmp_path_factory.mktemp("ddp")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, STOPPED)
        train(uneven_corpus(), NO_DROPOUT, folder / "run")
    shutil.copytree(folder / "run", folder / "alone")
    train(uneven_corpus(), NO_DROPOUT, folder / "alone", resume=True)
    finish(start(WORKER, folder, ranks=request.param))
    torch.set_num_threads(threads)
    return folder


def test_ranks_have_the_gradients_of_one_process(jobs):
    alone, shared = first_gradients(), read_tensors(jobs / "gradients.safetensors")
    assert shared.keys() == alone.keys()
    assert sum(float(g.abs().max()) > 1e-3 for g in alone.values()) > 20
    torch.testing.assert_close(shared["loss"], alone["loss"], rtol=1e-6, atol=1e-6)
    for name, gradient in alone.items():
        largest = float(gradient.abs().max())
        difference = float((shared[name] - gradient).abs().max())
        assert difference <= ROUNDING * max(largest, 1), name


def test_the_ranks_together_hold_the_global_batches(jobs):
    ranks = sorted(jobs.glob("rank-*.txt"))
    shares = [np.loadtxt(path, dtype=int, ndmin=2) for path in ranks]
    n = sum(slide.n_spots for slide in uneven_corpus().slides())
    for step, rows in enumerate(zip(*shares, strict=True), start=STOPPED):
        np.testing.assert_array_equal(np.concatenate(rows), global_batch(0, step, n, 24))
    assert len(shares[0]) == load_run(jobs / "run").provenance["steps"] - STOPPED


def test_a_run_resumed_on_more_ranks_has_the_same_losses(jobs):
    alone, shared = (runlog.read(jobs / name / "metrics.jsonl") for name in ("alone", "run"))
    assert [x["step"] for x in shared] == [x["step"] for x in alone]
    assert len(alone) >= STOPPED + 20
    for one, two in zip(alone, shared, strict=True):
        for name in ("loss", "ln_spot", "ln_cross", "lr"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)
        for name in ("spot", "niche", "cross"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), (one["step"], name)


def test_the_run_of_several_ranks_is_whole_and_says_how_it_was_made(jobs):
    run = load_run(jobs / "run")
    assert run.finished
    assert run.provenance["machine"]["ranks"] == len(list(jobs.glob("rank-*.txt")))
    assert set(run.readouts.axes) == {"image", "gene", "spot", "niche", "spot+niche"}


@pytest.mark.slow
def test_srun_starts_a_run_too(tmp_path):
    finish(start(TRAIN, tmp_path / "run", ranks=2, tell=as_srun))
    assert load_run(tmp_path / "run").provenance["machine"]["ranks"] == 2


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_with_a_clear_word_and_resume_goes_on(tmp_path):
    """Nobody watches over these two processes: what is left has to notice by itself."""
    finish(start(TRAIN, tmp_path / "undisturbed", ranks=2))
    first, second = start(TRAIN, tmp_path / "run", ranks=2)
    wait_for_lines(tmp_path / "run", 3, first)
    second.kill()
    killed = time.monotonic()
    said = first.communicate(timeout=30)[0]
    assert time.monotonic() - killed < 30
    assert first.returncode == 1
    second.communicate()
    assert "rank 0 of 2 lost the others: one of them ended" in said
    assert "--resume" in said
    finish(start(TRAIN, tmp_path / "run", ranks=2))
    one, two = (tmp_path / name / "model.safetensors" for name in ("run", "undisturbed"))
    assert one.read_bytes() == two.read_bytes()


class OneOfTwo:
    """What a rank sees of a job of two."""

    global_rank, world_size = 1, 2

    def broadcast(self, _: object) -> int:
        return 8


@pytest.mark.parametrize(("step", "found"), [(None, "the beginning"), (4, "step 4")])
def test_a_run_folder_that_ranks_do_not_share_is_noticed(step, found):
    with pytest.raises(TrainingError, match=rf"(?s)rank 1.*step 8.*{found}.*all machines share"):
        require_agreed(OneOfTwo(), step)
    require_agreed(OneOfTwo(), 8)


def test_another_error_of_a_rank_is_not_taken_for_a_lost_connection():
    with pytest.raises(RuntimeError, match="out of memory"), together(OneOfTwo()):
        raise RuntimeError("out of memory")


def test_shares_are_about_equal_and_cover_everything_once():
    sizes = {f"s{i}": size for i, size in enumerate([5, 40, 7, 40, 6, 4])}
    ranks = [SimpleNamespace(global_rank=rank, world_size=2) for rank in range(2)]
    shares = [share(rank, sizes) for rank in ranks]
    assert sorted(shares[0] + shares[1]) == sorted(sizes)
    assert [sum(sizes[name] for name in names) for names in shares] == [52, 50]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("SLURMEnvironment", 2, 2)),
        ({"SLURM_STEP_NUM_TASKS": "1"}, ("LightningEnvironment", 1, 1)),
        ({"SLURM_STEP_NUM_TASKS": None}, ("LightningEnvironment", 1, 1)),
        (as_torchrun(0, 4, 1) | {"LOCAL_WORLD_SIZE": "2"}, ("TorchElasticEnvironment", 2, 2)),
    ],
)
def test_who_started_the_processes(monkeypatch, changes, expected):
    """srun, a batch script without it, and torchrun inside of one."""
    tell(monkeypatch, SRUN | changes)
    environment, per_node, nodes = _processes()
    assert (type(environment).__name__, per_node, nodes) == expected


@pytest.mark.parametrize("per_node", [None, "3"])
def test_srun_without_tasks_per_node_is_told_what_to_give(monkeypatch, per_node):
    tell(monkeypatch, SRUN | {"SLURM_NTASKS_PER_NODE": per_node})
    with pytest.raises(ConfigError, match="--ntasks-per-node"):
        _processes()


SRUN = as_srun(0, 4, 20_000) | {"SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_NODES": "2"}


def tell(patch: pytest.MonkeyPatch, environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            patch.delenv(name, raising=False)
        else:
            patch.setenv(name, value)
