"""Which spots make a batch: integers only, never data.

The spots of a global batch are a function of (seed, epoch, step) alone, whatever the number of
ranks; each rank takes its share of the rows. An epoch drops its last N mod B spots, other ones
each epoch. A set smaller than a batch makes one batch of all its spots.

Spots are shuffled in blocks of consecutive ones. In a block of 1 any spot may follow any other,
and every row is read from another place of the disk. In larger blocks a batch reads runs of rows,
a fixed number of spots from each of several slides (from two where a block lies over a seam), and
an epoch needs an index of N / block numbers. Blocks begin elsewhere each epoch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from st_align.errors import ConfigError


def batch_size(n: int, batch: int) -> int:
    """Spots of a global batch when `n` spots are there and `batch` are wanted."""
    return min(batch, n)


def steps_per_epoch(n: int, batch: int) -> int:
    """Whole batches of an epoch."""
    return n // batch_size(n, batch)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """[n] every number below n once, in the order of one epoch (read-only)."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.setflags(write=False)
    return order


def global_batch(seed: int, step: int, n: int, batch: int, *, block: int = 1) -> NDArray[np.int64]:
    """[B] spots of the global batch of one step, counted over all epochs from 0."""
    size = batch_size(n, batch)
    epoch, within = divmod(step, steps_per_epoch(n, batch))
    places = np.arange(within * size, (within + 1) * size)
    order = epoch_order(seed, epoch, n // block)
    if block == 1:
        return order[places]
    # The blocks in their order, then the n mod block spots that fill none.
    starts = np.append(order, len(order))[places // block] * block
    turn = np.random.default_rng([seed, epoch, block]).integers(n)
    spots: NDArray[np.int64] = (starts + places % block + turn) % n
    return spots


def rank_rows(size: int, rank: int, ranks: int) -> slice:
    """The rows of a global batch of `size` that one of `ranks` ranks takes: equally many each."""
    if size % ranks:
        raise ConfigError(
            f"a batch of {size} spots cannot be shared equally by {ranks} ranks",
            expected=f"a multiple of {ranks}",
            fix=f"set optim.batch = {max(size // ranks, 1) * ranks}",
        )
    share = size // ranks
    return slice(rank * share, (rank + 1) * share)
