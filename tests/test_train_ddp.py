"""Two ranks and one process: the same losses and gradients on the same global batches."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddp_worker import NO_DROPOUT, first_gradients, uneven_corpus
from st_align import runlog
from st_align.checkpoint import load_run
from st_align.files import read_tensors
from st_align.train import train
from toy_corpus import stop_after

WORKER = Path(__file__).parent / "ddp_worker.py"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run_ranks(folder: Path, ranks: int) -> None:
    """What torchrun does, without its agent."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "TORCHELASTIC_RUN_ID": "test",
        "GROUP_RANK": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, folder],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [p.returncode for p in processes] == [0] * ranks, outputs


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """A run of one process, and one begun by one process and resumed by two."""
    folder = tmp_path_factory.mktemp("ddp")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4)
        train(uneven_corpus(), NO_DROPOUT, folder / "run")
    shutil.copytree(folder / "run", folder / "alone")
    train(uneven_corpus(), NO_DROPOUT, folder / "alone", resume=True)
    run_ranks(folder, 2)
    torch.set_num_threads(threads)
    return folder


def test_two_ranks_have_the_gradients_of_one_process(jobs):
    alone, shared = first_gradients(), read_tensors(jobs / "gradients.safetensors")
    assert shared.keys() == alone.keys()
    assert sum(float(g.abs().max()) > 1e-3 for g in alone.values()) > 20
    torch.testing.assert_close(shared["loss"], alone["loss"], rtol=1e-6, atol=1e-6)
    for name, gradient in alone.items():
        largest = float(gradient.abs().max())
        difference = float((shared[name] - gradient).abs().max())
        assert difference <= 1e-6 * max(largest, 1), name


def test_a_run_resumed_on_two_ranks_sees_the_same_batches(jobs):
    alone, shared = (runlog.read(jobs / name / "metrics.jsonl") for name in ("alone", "run"))
    assert [x["step"] for x in shared] == [x["step"] for x in alone]
    assert len(alone) > 8
    for one, two in zip(alone, shared, strict=True):
        for name in ("loss", "spot", "niche", "cross", "ln_spot", "ln_cross", "lr"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)


def test_the_run_of_two_ranks_is_whole_and_says_how_it_was_made(jobs):
    run = load_run(jobs / "run")
    assert run.finished
    assert run.provenance["machine"]["ranks"] == 2
    assert set(run.readouts.axes) == {"image", "gene", "spot", "niche", "spot+niche"}
