"""One rank of a bench: `python bench_worker.py LOG WORD...` runs `st-align bench WORD...`.

LOG-N.txt names the cells that rank N tried to make and the runs it trained, a line each.
ST_ALIGN_TEST_FAIL=1: no colours can be read of any slide.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import toy_run
from st_align import cli
from st_align.benchmarks import ablation, genes
from st_align.benchmarks.cells import Bench
from st_align.errors import SlideError
from st_align.job import is_first

LOG = sys.argv[1]


def note(word: str) -> None:
    with Path(f"{LOG}-{0 if is_first() else 1}.txt").open("a") as lines:
        print(word, file=lines)


def note_what_is_made() -> None:
    ask, train = Bench.cell, ablation.train

    def cell(bench, name, key, of, make):
        def noted():
            note(f"cell {name}")
            return make()

        return ask(bench, name, key, of, noted)

    def trained(*args, **options):
        note(f"run {args[2].name}")
        return train(*args, **options)

    Bench.cell, ablation.train = cell, trained


def fail(_: object) -> None:
    raise SlideError("no colour today")


if __name__ == "__main__":
    torch.set_num_threads(1)
    light = [("toy-colour", toy_run.ColourEncoder()), ("uni", "no weights")]
    genes.image_encoders = lambda _: iter(light)
    if os.environ.get("ST_ALIGN_TEST_FAIL"):
        genes.colours = fail
    note_what_is_made()
    sys.argv = ["st-align", "bench", *sys.argv[2:]]
    cli.main()
