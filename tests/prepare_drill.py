"""Prepares toy slides and dies by SIGKILL; run by test_corpus in processes of its own.

python prepare_drill.py files OUT POINT...  per point: kill at that file operation, then rerun
python prepare_drill.py build OUT JOBS      prepare once
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

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


def main() -> None:
    mode, out, *numbers = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    if mode == "build":
        build(out, numbers[0])
        return
    for point in numbers:
        died = not run(out / f"{point}", point)
        finished = run(out / f"{point}", None)
        print(point, "died" if died else "ran through", "finished" if finished else "failed")


if __name__ == "__main__":
    main()
