"""A dense count CSV becomes a sparse matrix, whatever its blocks, line ends and quotes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from st_align.errors import SlideError
from st_align.io import count_csv
from st_align.io.count_csv import read_count_csv

GENES = ["ACTB", "", "ACTB", "a,b"]


@pytest.fixture
def table(rng):
    counts = rng.poisson(0.5, (30, len(GENES))) * rng.integers(1, 100_000, (30, len(GENES)))
    return pd.DataFrame(counts, index=[f"{i}x{i % 7}" for i in range(30)], columns=GENES)


def assert_read(path, table):
    found = read_count_csv(path)
    assert found.symbols == list(table)
    assert found.barcodes.tolist() == table.index.tolist()
    assert found.counts.dtype == np.int32
    assert found.counts.has_canonical_format
    assert np.array_equal(found.counts.toarray(), table)
    assert found.counts.nnz == np.count_nonzero(table)


@pytest.mark.parametrize("block", [1, 10, 100, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_blocks_and_line_ends(tmp_path, table, monkeypatch, block, end):
    monkeypatch.setattr(count_csv, "BLOCK_BYTES", block)
    table.to_csv(tmp_path / "c.csv", lineterminator=end)
    assert_read(tmp_path / "c.csv", table)


def test_marks_quotes_and_blank_lines(tmp_path, table):
    import csv

    path = tmp_path / "ü.csv"
    table.index = [f"ö,{name}" for name in table.index]
    table.to_csv(path, quoting=csv.QUOTE_ALL, encoding="utf-8-sig")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n\n").rstrip(b"\n"))
    assert_read(path, table)


def test_whole_numbers_written_as_fractions(tmp_path, table):
    table.astype(float).to_csv(tmp_path / "c.csv")
    found = read_count_csv(tmp_path / "c.csv").counts
    assert found.dtype == np.float64
    assert np.array_equal(found.toarray(), table)


@pytest.mark.parametrize("missing", ["", "NA", "NaN"])
def test_a_missing_value_is_nan(tmp_path, missing):
    (tmp_path / "c.csv").write_text(f"spot,a,b\ns,1,2\nt,3,{missing}\n")
    found = read_count_csv(tmp_path / "c.csv").counts.toarray()
    np.testing.assert_array_equal(found, [[1, 2], [3, np.nan]])


def test_no_spots(tmp_path):
    (tmp_path / "c.csv").write_text("spot,a,b\n")
    assert read_count_csv(tmp_path / "c.csv").counts.shape == (0, 2)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "a header of 0 columns"),
        (b"spot\ns\n", "a header of 1 columns"),
        (b"spot,a,b\ns,1,2\nt,3\n", "1 values in row 2, a header of 2 genes"),
        (b"spot,a,b\ns,1,2,3\n", "3 values in row 1"),
        (b"spot,a,b\ns,1,x\n", "invalid value 'x'"),
        (b"spot,a,b\n\xff,1,2\n", "invalid start byte"),
        (b"spot,a,b\ns,1," + b"0" * 300, "a row of more than"),
        (b"\x89PNG\r\n\x1a\n", "codec can't decode"),
        (b'"' + b"a" * 200_000 + b',b\n"s,1\n', "field larger"),
    ],
)
def test_what_is_no_table(tmp_path, monkeypatch, content, found):
    monkeypatch.setattr(count_csv, "BLOCK_BYTES", 64)
    (tmp_path / "c.csv").write_bytes(content)
    with pytest.raises(SlideError, match="not a table of counts") as error:
        read_count_csv(tmp_path / "c.csv")
    assert found in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(SlideError, match="not a table of counts"):
        read_count_csv(tmp_path / "c.csv")
