"""A dense count CSV (a row per spot, a column per gene) to a sparse matrix, in little memory.

Readers of wide tables pay for every column of every block. Here the rows of a block are cut into
lines of one value each, which Arrow parses as a single column.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from st_align.errors import SlideError

BLOCK_BYTES = 1 << 20
_MAX_HEADER = 1 << 26
_CHARACTERS = 32
"""Of a value, on average over a row, at most: a longer row is no row of counts."""
_LINE_ENDS = (b"\n", b"\r")
_MISSING = ["", "NA", "NaN", "nan"]


class CountTable(NamedTuple):
    """What a count CSV holds."""

    barcodes: NDArray[np.str_]
    """[N] the first column."""
    counts: sparse.csr_array
    """[N, G] int32, or float64 where a value is missing or no whole number."""
    symbols: list[str]
    """[G] the header; symbols may repeat or be empty."""


def read_count_csv(path: Path) -> CountTable:
    """Read a header of gene symbols, then a row per spot: its name and its counts.

    Neither the text nor the dense matrix is ever whole in memory. What is no such table is a
    SlideError.
    """
    import pyarrow as pa

    try:
        header, start = _header(path)
        try:
            return _parsed(path, start, header[1:], pa.int32())
        except (ValueError, pa.ArrowException):  # not whole numbers, or not all of them are there
            return _parsed(path, start, header[1:], pa.float64())
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise SlideError(
            f"{path} is not a table of counts",
            expected="a header of gene symbols, then one row per spot: its name and its counts",
            found=str(error).splitlines()[0][:200],
        ) from error


def _header(path: Path) -> tuple[list[str], int]:
    """Names of the columns, and the byte at which the first row begins."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        line = file.readline(_MAX_HEADER)
    names = next(csv.reader([line]), [])
    if len(names) < 2 or len(line) == _MAX_HEADER:
        raise ValueError(f"a header of {len(names)} columns in {len(line):,} characters")
    with path.open("rb") as raw:
        mark = codecs.BOM_UTF8 if raw.read(3) == codecs.BOM_UTF8 else b""
    return names, len(mark) + len(line.encode())


def _parsed(path: Path, start: int, symbols: list[str], kind: Any) -> CountTable:
    """The table, its values read as an Arrow type; as whole numbers, which take half the memory,
    a value that is missing is a ValueError.
    """
    barcodes: list[str] = []
    data, indices = _Growing(kind.to_pandas_dtype()), _Growing(np.int32)
    per_row = [np.zeros(1, np.int64)]
    for text in _blocks(path, start, BLOCK_BYTES, _CHARACTERS * (len(symbols) + 1)):
        names, values = _rows(text, len(symbols), kind, len(barcodes))
        barcodes += names
        found = np.flatnonzero(values)
        data.append(values[found])
        indices.append(found % len(symbols))
        per_row.append(np.bincount(found // len(symbols), minlength=len(names)))
    shape, ends = (len(barcodes), len(symbols)), np.concatenate(per_row).cumsum()
    # One int64 among the indices would make all of them int64.
    indptr = ends.astype(sparse.get_index_dtype(maxval=int(ends[-1])))
    matrix = sparse.csr_array((data.whole(), indices.whole(), indptr), shape=shape)
    return CountTable(np.array(barcodes, str), matrix, symbols)


def _blocks(path: Path, start: int, size: int, longest: int) -> Iterator[bytes]:
    """Whole lines of a file from a byte on, about `size` bytes at a time."""
    rest = b""
    with path.open("rb") as file:
        file.seek(start)
        while text := file.read(size):
            text = rest + text
            end = max(text.rfind(sign) for sign in _LINE_ENDS) + 1
            rest = text[end:]
            if len(rest) > max(longest, size):
                raise ValueError(f"a row of more than {len(rest):,} bytes")
            if end:
                yield text[:end]
    if rest:
        yield rest


def _rows(text: bytes, n_genes: int, kind: Any, before: int) -> tuple[list[str], NDArray[Any]]:
    """Names of the spots of some lines, and their values, row after row [rows x genes]."""
    import pyarrow as pa
    from pyarrow import csv as pa_csv

    names: list[str] = []
    rows: list[bytes] = []
    for line in text.splitlines():
        if not line.strip():
            continue
        quoted = line.startswith(b'"')
        name, _, row = line[quoted:].partition(b'",' if quoted else b",")
        found = row.count(b",") + 1
        if found != n_genes:
            number = before + len(names) + 1
            raise ValueError(f"{found} values in row {number}, a header of {n_genes} genes")
        names.append(name.decode())
        rows.append(row)
    if not rows:
        return [], np.empty(0, kind.to_pandas_dtype())
    column = b"\n".join(rows).replace(b",", b"\n") + b"\n"
    table = pa_csv.read_csv(
        pa.BufferReader(column),
        read_options=pa_csv.ReadOptions(
            column_names=["counts"], use_threads=False, block_size=len(column)
        ),
        parse_options=pa_csv.ParseOptions(ignore_empty_lines=False),
        convert_options=pa_csv.ConvertOptions(column_types={"counts": kind}, null_values=_MISSING),
    )
    (values,) = table.column(0).chunks
    return names, values.to_numpy(zero_copy_only=not pa.types.is_floating(kind))


class _Growing:
    """An array that grows in place: parts to be joined would take twice the room."""

    def __init__(self, dtype: Any) -> None:
        self._values, self._n = np.empty(0, dtype), 0

    def append(self, part: NDArray[Any]) -> None:
        """Put `part` at the end."""
        end = self._n + len(part)
        if end > len(self._values):
            self._values.resize(end + end // 4, refcheck=False)
        self._values[self._n : end] = part
        self._n = end

    def whole(self) -> NDArray[Any]:
        """All parts."""
        self._values.resize(self._n, refcheck=False)
        return self._values
