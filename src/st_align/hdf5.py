"""Opening HDF5 files that may be damaged: libhdf5 goes round for ever on one kind of damage."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

_HEAP = b"GCOL\x01\0\0\0"
"""A global heap collection, version 1: where text of variable length lies."""
_HEAD = 16
"""Bytes of the head of a collection and of each object in it (HDF5 File Format, III.E)."""


def open_file(path: Path) -> Any:
    """The h5py file, read only; damaged: OSError, as h5py does."""
    import h5py

    require_sound_heaps(path)
    return h5py.File(path, "r")


def require_sound_heaps(path: Path) -> None:
    """OSError where an object of a global heap is the free space and has size 0: libhdf5 steps
    over it by its size, so it would never end.
    """
    if path.stat().st_size == 0:
        raise OSError("the file is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        heap = data.find(_HEAP)
        while heap >= 0:
            if _endless(data, heap):
                raise OSError(f"the heap at byte {heap:,} is damaged")
            heap = data.find(_HEAP, heap + _HEAD)


def _endless(data: mmap.mmap, heap: int) -> bool:
    (size,) = struct.unpack_from("<Q", data, heap + 8) if heap + _HEAD <= len(data) else (0,)
    at, end = heap + _HEAD, min(heap + size, len(data))
    while at + _HEAD <= end:
        index, _, _, used = struct.unpack_from("<HHIQ", data, at)
        if index == 0:
            return bool(used == 0)
        at += _HEAD + (used + 7) // 8 * 8
    return False
