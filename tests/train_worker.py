"""A training run in a process of its own, to be killed: `python train_worker.py OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from st_align.train import train
from toy_corpus import CONFIG, toy_corpus

if __name__ == "__main__":
    torch.set_num_threads(1)
    train(toy_corpus(), CONFIG, Path(sys.argv[1]), save_every_s=0.0)
