"""The processes of a training job: how they start, stop, and draw random numbers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from st_align.errors import ConfigError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_AGREE_EVERY = 10


def launch() -> Fabric:
    """The processes of this job: one, or as many as torchrun started; bf16 autocast on GPU."""
    from lightning_fabric import Fabric

    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    ranks = int(os.environ.get("WORLD_SIZE", per_node))
    cuda = torch.cuda.is_available()
    if cuda and per_node > torch.cuda.device_count():
        raise ConfigError(
            "more processes than GPUs",
            expected=f"at most {torch.cuda.device_count()} on this machine",
            found=str(per_node),
            fix="lower --nproc-per-node, or hide the GPUs with CUDA_VISIBLE_DEVICES=",
        )
    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        strategy="ddp" if ranks > 1 else "auto",
        devices=per_node,
        num_nodes=ranks // per_node,
        precision="bf16-mixed" if cuda else "32-true",
    )
    fabric.launch()
    return fabric


@contextmanager
def step_rng(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's random numbers (dropout) are a function of (seed, step, rank); the state
    they had outside comes back.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
        yield


class StopSignals:
    """While entered, the first SIGINT or SIGTERM asks for a stop; a second one acts as usual."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _ask(self, *_: object) -> None:
        # Nothing is said here: printing from within a print that was interrupted fails.
        self._asked = True
        self.__exit__()

    def agreed(self, fabric: Fabric, done: int) -> bool:
        """Whether to stop after `done` steps. Ranks stop together: they ask each other now and
        then.
        """
        if fabric.world_size == 1:
            return self._asked
        if done % _AGREE_EVERY:
            return False
        asked = fabric.all_reduce(
            torch.tensor(float(self._asked), device=fabric.device), reduce_op="sum"
        )
        return bool(asked)
