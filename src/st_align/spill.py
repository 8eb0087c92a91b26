"""Arrays that memory does not hold: they lie in a temporary file, which the system frees with them.

Patches and features of a Visium HD slide are of this kind.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile

import numpy as np
from numpy.typing import DTypeLike, NDArray

from st_align.errors import OutputError

IN_MEMORY, BLOCK = 1 << 29, 1 << 26
"""Bytes from which on an array lies in a file, and bytes to be written at a time."""


class Spill:
    """A new array; `values` is written by blocks of `rows` rows, and `written` is called after
    each, so that memory holds one block.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        kind = np.dtype(dtype)
        size, row = math.prod(shape) * kind.itemsize, math.prod(shape[1:]) * kind.itemsize
        self.rows = max(1, BLOCK // max(row, 1))
        self._mapped: mmap.mmap | None = None
        if size <= IN_MEMORY:
            self.values: NDArray[np.generic] = np.empty(shape, kind)
            return
        try:
            with tempfile.TemporaryFile() as file:
                _reserve(file.fileno(), size)
                self._mapped = mmap.mmap(file.fileno(), 0)
        except OSError as error:
            raise OutputError(
                "the folder for temporary files has no room for what memory does not hold",
                expected=f"{size / 1e9:.1f} GB",
                found=str(error.strerror),
                fix="set TMPDIR to a folder on a disk with more room",
            ) from error
        self.values = np.frombuffer(self._mapped, kind).reshape(shape)

    def written(self) -> None:
        """Give back the memory of what was written."""
        if self._mapped is not None:
            self._mapped.flush()
            self._mapped.madvise(mmap.MADV_DONTNEED)


def _reserve(file: int, size: int) -> None:
    """Room for all of it now: a write into a mapped hole of a full disk kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    os.ftruncate(file, size)
