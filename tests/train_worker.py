"""A training run of its own process, killed and resumed by tests: `python train_worker.py OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from st_align.train import train
from toy_corpus import CONFIG, toy_corpus

if __name__ == "__main__":
    torch.set_num_threads(1)
    train(toy_corpus(), CONFIG, Path(sys.argv[1]), resume=True, save_every_s=0.0)
