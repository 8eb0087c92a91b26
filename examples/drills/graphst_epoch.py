"""Seconds of one epoch of GraphST on a slide, as upstream runs it (its graph a dense N x N array)
and as `bench domains` does (held sparse): `python graphst_epoch.py SLIDE`, with st-align[bench].

The first epochs, which set things up, are left out: (time of 15 - time of 5) / 10.
"""

from __future__ import annotations

import sys
import time
import warnings

import torch

from st_align.benchmarks.methods import seeded
from st_align.benchmarks.peers import GRAPHST_EPOCHS, raw
from st_align.io import ReadOptions
from st_align.io.detect import read_one
from st_align.prepare import prepare_slide


def cpu_seconds(slide: str, epochs: int, *, sparse: bool) -> float:
    """Processor time of some epochs."""
    from GraphST.GraphST import GraphST

    adata = raw(prepare_slide(read_one(slide, ReadOptions()), ("lattice",)))
    with seeded(0):
        model = GraphST(adata, device=torch.device("cpu"), random_seed=0, epochs=epochs)
        if sparse:
            model.adj = model.adj.to_sparse()
        start = time.process_time()
        model.train()
        return time.process_time() - start


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for sparse in (False, True):
        few, more = (cpu_seconds(sys.argv[1], n, sparse=sparse) for n in (5, 15))
        epoch = (more - few) / 10
        whole = f"{GRAPHST_EPOCHS} epochs {GRAPHST_EPOCHS * epoch:,.0f} s"
        print(f"{'sparse' if sparse else 'dense'}: {epoch:.2f} s an epoch, {whole}")
