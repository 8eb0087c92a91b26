"""Jobs of several processes on this machine, started as torchrun or srun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def as_torchrun(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }


def as_srun(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What srun tells a process; the port is made from the number of the job."""
    return {
        "SLURM_JOB_ID": str(10_000 + port - 15_000),
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "localhost",
        "SLURM_NTASKS": str(ranks),
        "SLURM_NTASKS_PER_NODE": str(ranks),
        "SLURM_NNODES": "1",
        "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
    }


def start(worker: Path, *arguments: object, ranks: int, tell=as_torchrun) -> list[subprocess.Popen]:
    port = free_port() if tell is as_torchrun else 15_000 + os.getpid() % 10_000
    return [
        launch(worker, *arguments, environment=tell(rank, ranks, port)) for rank in range(ranks)
    ]


def launch(worker: Path, *arguments: object, environment: Mapping[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, worker, *map(str, arguments)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes: list[subprocess.Popen]) -> None:
    """All come to a good end."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), outputs


def wait_for_lines(out: Path, n: int, process: subprocess.Popen) -> None:
    """Until a running worker has logged `n` steps."""
    path, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and path.read_text().count("\n") >= n:
            return
        time.sleep(0.005)
    pytest.fail(f"the worker did not reach step {n}")
