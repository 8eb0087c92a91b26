"""What benches write, and that a bench resumes and survives a crashed cell."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from st_align.benchmarks.cells import Bench, Cell, Cost, join, slide_hash
from st_align.benchmarks.table import COLUMNS, Row, markdown, to_json, write_csv
from st_align.errors import OutputError, SlideError
from toys import toy_prepared


def rows() -> list[Row]:
    found = [
        Row(slide=s, method="ours", track="oracle", protocol="donor-held-out", seed=i,
            metric="ari", value=v + i / 10)
        for s, v in (("a", 0.2), ("b", 0.4))
        for i in range(2)
    ]  # fmt: skip
    return [*found, Row(slide="a", method="uni", note="no weights")]


def test_csv_is_tidy(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", rows())
    with (tmp_path / "t.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    assert [float(line["value"]) for line in lines[:4]] == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert lines[4]["value"] == ""
    assert lines[4]["note"] == "no weights"


def test_markdown_has_mean_and_sd_then_overall_and_never_drops_a_method() -> None:
    text = markdown(
        rows(), metric="ari", track="oracle", extra={"paper": {"ours": "0.34", "uni": "0.1|9"}}
    )
    head, _, ours, uni = text.strip().splitlines()
    assert head == "| method | a | b | mean | protocol | paper |"
    assert ours == "| ours | 0.250 ± 0.050 | 0.450 ± 0.050 | 0.350 | donor-held-out | 0.34 |"
    assert uni == "| uni |  |  |  | no weights | 0.1\\|9 |"


def test_mean_is_left_out_where_a_slide_is_missing() -> None:
    text = markdown(rows()[:2], metric="ari", track="oracle", columns=["a", "b"])
    assert "| ours | 0.250 ± 0.050 |  |  |" in text


def test_json_shape() -> None:
    found = to_json(rows(), {"x": 1})
    assert found["headline"] == {"x": 1}
    assert found["rows"][0] == {
        "slide": "a", "method": "ours", "track": "oracle", "metric": "ari",
        "mean": pytest.approx(0.25), "std": pytest.approx(0.05), "runs": pytest.approx([0.2, 0.3]),
    }  # fmt: skip
    assert found["rows"][-1]["mean"] is None
    assert found["rows"][-1]["note"] == "no weights"
    json.dumps(found)


def test_a_cell_is_made_once_and_again_when_its_key_changes(tmp_path: Path) -> None:
    made = []

    def make() -> Cell:
        made.append(1)
        return Cell(rows=tuple(rows()), arrays={"labels": np.arange(3)},
                    costs={"fit": Cost(2.0, 1.0)})  # fmt: skip

    of = Row(slide="a", method="ours")
    first = Bench(tmp_path).cell("a/ours", {"seed": 0}, of, make)
    again = Bench(tmp_path).cell("a/ours", {"seed": 0}, of, make)
    assert len(made) == 1
    assert again.rows == first.rows
    np.testing.assert_array_equal(again.arrays["labels"], np.arange(3))
    assert (again.cost, again.costs) == (first.cost, {"fit": Cost(2.0, 1.0)})
    Bench(tmp_path).cell("a/ours", {"seed": 1}, of, make)
    assert len(made) == 2


def test_a_damaged_cell_is_made_anew(tmp_path: Path) -> None:
    of, cell = Row(slide="a", method="ours"), Cell(rows=tuple(rows()))
    Bench(tmp_path).cell("c", {}, of, lambda: cell)
    (file,) = (tmp_path / "cells").glob("*.json")
    file.write_text("{")
    assert Bench(tmp_path).cell("c", {}, of, lambda: cell).rows == cell.rows


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off"])
def test_a_cell_whose_arrays_are_damaged_is_made_anew(tmp_path: Path, content: bytes) -> None:
    of, cell = Row(slide="a", method="ours"), Cell(rows=(), arrays={"labels": np.arange(3)})
    Bench(tmp_path).cell("c", {}, of, lambda: cell)
    (file,) = (tmp_path / "cells").glob("*.npz")
    file.write_bytes(content)
    again = Bench(tmp_path).cell("c", {}, of, lambda: cell)
    np.testing.assert_array_equal(again.arrays["labels"], np.arange(3))


@pytest.mark.parametrize("error", [ValueError("boom"), SlideError("boom")])
def test_a_crashed_cell_is_a_row_and_is_tried_again(
    tmp_path: Path, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash() -> Cell:
        raise error

    bench, of = Bench(tmp_path), Row(slide="a", method="ours", track="oracle")
    cell = bench.cell("a ours", {}, of, crash)
    assert "boom" in cell.rows[0].note
    assert cell.rows[0].value is None
    assert bench.failed
    assert "boom" in capsys.readouterr().err
    assert (tmp_path / "failures" / "a_ours.txt").is_file() == isinstance(error, ValueError)
    bench.write_provenance(seed=0)
    assert json.loads((tmp_path / "provenance.json").read_text())["failed"]
    assert join([bench.cell("a ours", {}, of, lambda: Cell(rows=tuple(rows())))]) == rows()


def test_an_output_that_cannot_be_written_is_found_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        Bench(tmp_path / "file")


def test_slide_hash_sees_labels_and_counts() -> None:
    slide = toy_prepared(np.random.default_rng(0))
    assert slide_hash(slide) == slide_hash(toy_prepared(np.random.default_rng(0)))
    other = toy_prepared(np.random.default_rng(0))
    other.spots.loc[0, "domain"] = "else"
    assert slide_hash(other) != slide_hash(slide)
    fewer = toy_prepared(np.random.default_rng(0))
    fewer.counts.data[0] += 1
    assert slide_hash(fewer) != slide_hash(slide)
