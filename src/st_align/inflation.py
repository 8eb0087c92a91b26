"""Refuses files that claim to hold far more than they store: damaged sizes, decompression bombs.

Checked before anything is allocated. Counts shrink 2 to 30 times on disk, tissue images up to 170
times; the formats allow 1,000 times and more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from st_align.errors import SlideError

MAX_RATIO = 100
"""Bytes in memory per byte on disk."""
IMAGE_RATIO = 500
"""The same for images: JPEG stores sound sections at up to 170 to 1, bombs are 1,000 to 1."""
ALWAYS = 1 << 28
"""So many bytes in memory are allowed whatever the ratio: white images and empty matrices."""


def require_plausible(what: str, decoded: int, stored: int, *, ratio: int = MAX_RATIO) -> None:
    """SlideError where `stored` bytes claim to hold `decoded` ones."""
    if decoded > max(ALWAYS, ratio * stored):
        raise SlideError(
            f"{what} claims more than it can hold",
            expected=f"at most {ratio} times its {stored:,} bytes on disk",
            found=f"{decoded:,} bytes in memory",
            fix="copy or download it again; if it is sound, save it with less compression",
        )


def require_plausible_arrays(element: Any, what: str) -> None:
    """The same for every array in an h5py or zarr element, or for the array that it is."""
    if hasattr(element, "keys"):
        for name in element:
            require_plausible_arrays(element[name], f"{what}/{name}")
        return
    if getattr(element, "shape", None) is None:  # null values have none
        return
    decoded = int(element.size) * element.dtype.itemsize
    if decoded > ALWAYS:
        require_plausible(what, decoded, _stored(element)())


def _stored(array: Any) -> Callable[[], int]:
    if hasattr(array, "nbytes_stored"):
        stored: Callable[[], int] = array.nbytes_stored
    else:
        stored = array.id.get_storage_size
    return stored


def require_plausible_text(path: Path) -> int:
    """The bytes of a text file once unpacked, where it is gzip. A NUL raises OSError: it is no
    text, and SciPy's reader of matrices crashes on it. Damaged gzip raises OSError, EOFError or
    zlib.error.
    """
    import gzip

    stored, decoded = path.stat().st_size, 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        while block := file.read(1 << 20):
            decoded += len(block)
            require_plausible(str(path), decoded, stored)
            if b"\0" in block:
                raise OSError(f"{path.name} holds NUL bytes")
    return decoded


def require_plausible_parquet(path: Path) -> None:
    """The same for a parquet file, by the rows that it states; damaged: OSError, ValueError."""
    import pyarrow.parquet as pq

    facts = pq.read_metadata(path)
    require_plausible(str(path), 8 * facts.num_rows * facts.num_columns, path.stat().st_size)
