"""One rank of a job: writes the first step's gradients, then resumes the run in OUT/run.

OUT/rank-N.txt says which spots the rank's batches held, a line a step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from st_align.batch import Batch
from st_align.files import write_tensors
from st_align.job import launch
from st_align.loader import SpotData
from st_align.plan import plan_training
from st_align.sampling import global_batch, rank_rows
from st_align.splits import split_slides
from st_align.train import StepModule, step_fields, train
from toy_corpus import CONFIG, ToyCorpus, configured
from toys import toy_prepared

NO_DROPOUT = configured(CONFIG, model={"dropout": 0.0}, optim={"epochs": 8})


def uneven_corpus() -> ToyCorpus:
    """Ranks differ in how many of their rows have an image or counts."""
    rng = np.random.default_rng(0)
    return ToyCorpus(
        [
            toy_prepared(rng, id="both", patient="A"),
            toy_prepared(rng, id="dark", patient="B", rows=4, image=False),
            toy_prepared(rng, id="mute", patient="C", rows=4, counts=False),
        ]
    )


def first_gradients() -> dict[str, Tensor]:
    """Loss and parameter gradients of the first global batch, as this job sees them."""
    corpus, fabric = uneven_corpus(), launch()
    splits = split_slides({id: corpus.entry(id)["patient"] for id in corpus.ids})
    plan = plan_training(
        corpus, NO_DROPOUT, fabric, splits=splits, panel=None, init=None, log=lambda _: None
    )
    module = fabric.setup_module(StepModule(plan.model, plan.config.loss))
    rows = rank_rows(plan.length.batch, fabric.global_rank, fabric.world_size)
    ids = global_batch(0, 0, plan.data.n_spots, plan.length.batch)[rows]
    total, *_ = module(**step_fields(plan.data.batch(ids, augment_key=(0, 0))))
    fabric.backward(total)
    found = {name: p.grad for name, p in plan.model.named_parameters()}
    return found | {"loss": fabric.all_reduce(total.detach(), reduce_op="mean")}


def note_batches(file: Path) -> None:
    """Write down the ids of every training batch that is made from now on."""
    make = SpotData.batch

    def noted(data: SpotData, ids: np.ndarray, **options) -> Batch:
        if options.get("augment_key"):
            with file.open("a") as lines:
                print(*ids, file=lines)
        return make(data, ids, **options)

    SpotData.batch = noted


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    gradients = first_gradients()
    note_batches(folder / f"rank-{torch.distributed.get_rank()}.txt")
    if torch.distributed.get_rank() == 0:
        write_tensors(folder / "gradients.safetensors", gradients)
    train(uneven_corpus(), NO_DROPOUT, folder / "run", resume=True)
    torch.distributed.destroy_process_group()
