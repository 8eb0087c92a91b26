"""The processes of a training job: how they start, stop, and draw random numbers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from st_align.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment

T = TypeVar("T")

_AGREE_EVERY = 10
_PATIENCE = timedelta(days=1)
"""How long ranks wait for one another: the first job on a corpus runs its frozen encoders, and
shares differ. A rank that ended is noticed at once, whatever this is.
"""


def launch(*, alone: bool = False) -> Fabric:
    """The processes of this job: one, or as many as torchrun or srun started; bf16 autocast on
    GPU. `alone`: this process by itself, on the device it has, whatever others there are.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy

    environment, per_node, nodes = (LightningEnvironment(), 1, 1) if alone else _processes()
    cuda = torch.cuda.is_available()
    if cuda and per_node > torch.cuda.device_count():
        raise ConfigError(
            "more processes than GPUs",
            expected=f"at most {torch.cuda.device_count()} on this machine",
            found=str(per_node),
            fix="lower --nproc-per-node; with srun ask for --gpus-per-node, not --gpus-per-task "
            "(a process has to see all GPUs of its machine); or hide them: CUDA_VISIBLE_DEVICES=",
        )
    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        strategy=DDPStrategy(timeout=_PATIENCE) if per_node * nodes > 1 else "auto",
        devices=[torch.cuda.current_device()] if cuda and alone else per_node,
        num_nodes=nodes,
        plugins=[environment],
        precision="bf16-mixed" if cuda else "32-true",
    )
    fabric.launch()
    return fabric


def _processes() -> tuple[ClusterEnvironment, int, int]:
    """Who started this process, how many on this machine, and on how many machines."""
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if dist.is_available() and dist.is_torchelastic_launched():
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // per_node
        return TorchElasticEnvironment(), per_node, nodes
    # Without srun, a batch script finds the variables of its allocation but is one process.
    ranks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if ranks == 1:
        return LightningEnvironment(), 1, 1
    per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE", 0))
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    if per_node * nodes != ranks:
        raise ConfigError(
            "srun did not start as many processes on each machine",
            expected=f"--ntasks-per-node, {ranks} processes in all",
            found=f"{nodes} machines, --ntasks-per-node={per_node or 'not given'}",
            fix="give --nodes and --ntasks-per-node to sbatch or srun, and leave out --ntasks",
        )
    return SLURMEnvironment(auto_requeue=False), per_node, nodes


def share(fabric: Fabric, sizes: Mapping[str, int]) -> list[str]:
    """The names this rank works on, of all in `sizes`: dealt out from the largest down, so that
    shares are about equal. Every name falls to one rank.
    """
    ordered = sorted(sizes, key=lambda name: (-sizes[name], name))
    return ordered[fabric.global_rank :: fabric.world_size]


def total(fabric: Fabric, *counts: int) -> list[int]:
    """Each count summed over the ranks, once all have come to this point."""
    with together(fabric):
        summed = fabric.all_reduce(torch.tensor(counts, device=fabric.device), reduce_op="sum")
    return cast(Tensor, summed).tolist()


def gather(fabric: Fabric, value: T) -> list[T]:
    """The `value` of every rank, in their order, once all have come to this point."""
    found = [value] * fabric.world_size
    if fabric.world_size > 1:
        with together(fabric):
            dist.all_gather_object(found, value)
    return found


def leave(*, orderly: bool) -> None:
    """Close this process's connections to the other ranks, where it has any, before it exits:
    threads of gloo that are still at work then would abort it. `orderly`: nothing went wrong;
    otherwise NCCL, which might wait for ranks that are gone, is left as it is.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if orderly or dist.get_backend() == "gloo":
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the one that speaks: the first rank, or there is no other."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_rank())


def require_one_process(what: str) -> None:
    """ConfigError where torchrun or srun started several processes for `what`."""
    _, per_node, nodes = _processes()
    if per_node * nodes > 1:
        raise ConfigError(
            f"{what} is for one process",
            expected="one",
            found=f"{per_node * nodes}",
            fix="start it without torchrun, or with srun --ntasks=1",
        )


@contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """Inside, a connection to another rank that breaks is a TrainingError that says so."""
    try:
        yield
    except RuntimeError as error:
        if fabric.world_size == 1 or not _is_broken_connection(error):
            raise
        raise TrainingError(
            f"rank {fabric.global_rank} of {fabric.world_size} lost the others: one of them ended",
            found=str(error).splitlines()[0],
            fix="look for what that rank said last (nothing: it was killed, most often for its "
            "memory), then run the same command again (train: with --resume)",
        ) from error


def _is_broken_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def require_agreed(fabric: Fabric, step: int | None) -> None:
    """Every rank goes on from the same step, None the beginning; else TrainingError."""
    first = fabric.broadcast(step)
    if step != first:
        raise TrainingError(
            f"rank {fabric.global_rank} does not see the resume point of the first rank",
            expected=_position(first),
            found=_position(step),
            fix="put the run folder on a file system that all machines share",
        )


def _position(step: int | None) -> str:
    return "the beginning" if step is None else f"step {step}"


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
