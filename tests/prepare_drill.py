"""Prepares toy slides and dies by SIGKILL; run by test_corpus in processes of its own.

python prepare_drill.py files OUT POINT...  per point: kill at that file operation, then rerun
python prepare_drill.py moments OUT N       N times: kill at a random moment, then rerun
python prepare_drill.py build OUT JOBS      prepare once
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from st_align.corpus_build import build_corpus
from toy_slides import toy_ref

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}
REFS = [toy_ref(id, rows=2, damaged=id == "bad") for id in ("a", "bad", "ö 1")]


def build(out: Path, jobs: int = 1) -> None:
    build_corpus(
        REFS, out, niche_specs=("lattice",), spot_px=4, niche_px=6, jobs=jobs, progress=False
    )
    build_corpus(REFS, out, niche_specs=("k3",), spot_px=4, niche_px=6, jobs=jobs, progress=False)


def die_at(point: int, folder: Path) -> None:
    """SIGKILL this process just before its `point`-th operation on files below `folder`."""
    left = point

    def watch(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in OPERATIONS and str(folder) in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def run(out: Path, point: int | None) -> bool:
    """Build in a child; whether it came to the end."""
    child = os.fork()
    if child == 0:
        if point is not None:
            die_at(point, out)
        build(out)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def kill_at_moments(out: Path, times: int) -> None:
    """Into OUT/whole without a kill, into OUT/0 and so on with one each."""
    start = time.perf_counter()
    assert run(out / "whole", None)
    lasts, rng = time.perf_counter() - start, np.random.default_rng(0)
    for number in range(times):
        child = os.fork()
        if child == 0:
            build(out / f"{number}")
            os._exit(0)
        time.sleep(rng.uniform(0.02, 0.9) * lasts)
        os.kill(child, signal.SIGKILL)
        died = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        finished = run(out / f"{number}", None)
        print(number, "died" if died else "ran through", "finished" if finished else "failed")


def main() -> None:
    mode, out, *numbers = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    if mode == "build":
        build(out, numbers[0])
        return
    if mode == "moments":
        kill_at_moments(out, numbers[0])
        return
    for point in numbers:
        died = not run(out / f"{point}", point)
        finished = run(out / f"{point}", None)
        print(point, "died" if died else "ran through", "finished" if finished else "failed")


if __name__ == "__main__":
    main()
