"""Work for the workers of a running Dask cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from st_align.errors import ConfigError, CorpusError

_CONNECT_S = "15s"

Task = TypeVar("Task")
Result = TypeVar("Result")


def on_cluster(
    work: Callable[[Task], Result], tasks: Sequence[Task], address: str
) -> Iterator[tuple[Task, Result]]:
    """Each task and what `work` makes of it, in the order of ending.

    Dask not installed, and no scheduler at `address`, is a ConfigError; a task whose workers died
    is a CorpusError. What `work` raises is raised here, and tasks that wait are then cancelled.
    """
    distributed = _distributed()
    try:
        client = distributed.Client(address, timeout=_CONNECT_S)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Dask scheduler answers at {address!r}",
            expected="the address of a running one, such as tcp://HOST:8786",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="start one with: dask scheduler; then on each machine: dask worker ADDRESS",
        ) from error
    with client:
        # Not pure: a task that is asked for again is done again.
        futures = client.map(work, tasks, pure=False, retries=0)
        task_of = {future.key: task for future, task in zip(futures, tasks, strict=True)}
        try:
            for future in distributed.as_completed(futures):
                yield task_of[future.key], future.result()
        except distributed.KilledWorker as error:
            raise CorpusError(
                "the workers that prepared a slide were killed",
                found="most often: not enough memory",
                fix="give each worker more memory (dask worker --memory-limit), and run again: "
                "finished slides are kept",
            ) from error
        finally:
            client.cancel(futures)


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise ConfigError(
            "Dask is not installed",
            expected="dask and distributed",
            fix="pip install 'st-align[cluster]', or use --jobs N",
        ) from error
    return distributed
