"""Memory and time of one loss, forward and backward, with all logits at once or in chunks.

MALLOC_MMAP_THRESHOLD_=1048576 python examples/drills/loss_memory.py BATCH WIDTH LOGITS_AT_ONCE

The variable makes the C library give memory back at once, so that the peak is what was in use.
"""

from __future__ import annotations

import resource
import sys
import time

import torch

from st_align.batch import Batch
from st_align.config import LossConfig
from st_align.loss import StAlignLoss
from st_align.model import Embeddings


def peak_mib() -> float:
    """The most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """One loss of random embeddings on a ring of spots, six neighbours each."""
    n, width, at_once = map(int, sys.argv[1:])
    draw, ids = torch.Generator().manual_seed(0), torch.arange(n)
    x = Embeddings(*(torch.randn(n, width, generator=draw).requires_grad_() for _ in range(6)))
    nothing, yes = torch.zeros(n, 0), torch.ones(n, dtype=torch.bool)
    batch = Batch(
        ids=ids,
        neighbors=torch.stack([(ids + k) % n for k in range(7)], dim=1),
        has_image=yes,
        has_counts=yes,
        spot_image=nothing,
        niche_image=nothing,
        spot_gene=nothing,
        niche_gene=nothing,
    )
    before, start = peak_mib(), time.process_time()
    total = StAlignLoss(LossConfig(), logits_at_once=at_once)(x, batch, torch.tensor(2.66)).total
    total.backward()
    print(
        f"batch {n}, {at_once:,} logits at once: {peak_mib() - before:,.0f} MiB more at the peak, "
        f"{time.process_time() - start:.1f} s of CPU, loss {total.item():.6f}, "
        f"norm of a gradient {x.r.grad.norm():.6e}"
    )


if __name__ == "__main__":
    main()
