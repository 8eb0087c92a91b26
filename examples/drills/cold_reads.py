"""Niche patches a second from a disk whose cache is empty, by the size of the shuffle's blocks.

python examples/drills/cold_reads.py FILE.npy    written if need be: 1.5 GB of 112 px patches
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from st_align.corpus import map_array
from st_align.sampling import global_batch

N, BATCH, STEPS, BLOCKS, REPEATS = 40_000, 256, 10, (1, 8, 32, 128), 5


def write(path: Path) -> None:
    """Patches of noise."""
    some = np.random.default_rng(0).integers(0, 256, (1000, 112, 112, 3), dtype=np.uint8)
    rows = np.lib.format.open_memmap(path, "w+", np.uint8, (N, *some.shape[1:]))
    for start in range(0, N, len(some)):
        rows[start : start + len(some)] = some


def forget(path: Path) -> None:
    """Drop the file from the page cache."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def speed(path: Path, block: int, epoch: int) -> float:
    """Patches a second over some batches of an epoch."""
    forget(path)
    rows, first = map_array(path), epoch * (N // BATCH)
    start = time.perf_counter()
    for step in range(first, first + STEPS):
        rows[global_batch(0, step, N, BATCH, block=block)]
    return STEPS * BATCH / (time.perf_counter() - start)


def main() -> None:
    """Interleaved, medians."""
    path = Path(sys.argv[1])
    if not path.exists():
        write(path)
    found = {block: [] for block in BLOCKS}
    for epoch in range(REPEATS):
        for block in BLOCKS:
            found[block].append(speed(path, block, epoch))
    for block, speeds in found.items():
        print(f"block {block}: {statistics.median(speeds):,.0f} patches/s")


if __name__ == "__main__":
    main()
