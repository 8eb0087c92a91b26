"""Trains on toy slides and dies by SIGKILL; run by test_faults in a process of its own.

python train_drill.py OUT POINT...  per point: kill at that file operation, then resume
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from prepare_drill import die_at
from st_align.train import train
from toy_corpus import CONFIG, configured, toy_corpus

SHORT = configured(CONFIG, optim={"epochs": 1})


def run(out: Path, point: int | None) -> bool:
    """Train in a child; whether it came to the end."""
    child = os.fork()
    if child == 0:
        if point is not None:
            die_at(point, out)
        train(toy_corpus(), SHORT, out, resume=True, save_every_s=0.0, log=lambda _: None)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number in map(int, sys.argv[2:]):
        place = Path(sys.argv[1]) / f"{number}"
        died, finished = not run(place, number), run(place, None)
        print(number, "died" if died else "ran through", "finished" if finished else "failed")
