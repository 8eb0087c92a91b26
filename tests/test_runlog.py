"""The log of a run survives a kill at any byte."""

from __future__ import annotations

import json

import pytest

from st_align import runlog


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        runlog.append(path, {"step": step})
    return path


def test_lines_come_back_in_order(path):
    assert runlog.read(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_line_cut_at_any_byte_is_left_out(path):
    whole = path.read_bytes()
    last = len(whole) - len(json.dumps({"step": 3})) - 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        assert runlog.read(path) == [{"step": 1}, {"step": 2}]


def test_a_cut_line_does_not_join_the_next(path):
    path.write_bytes(path.read_bytes()[:-1])
    runlog.truncate(path, 3)
    runlog.append(path, {"step": 3})
    assert runlog.read(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_damage_elsewhere_is_an_error(path):
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step": '))
    with pytest.raises(ValueError, match="Expecting value"):
        runlog.read(path)


def test_truncated_to_a_step(path):
    runlog.truncate(path, 2)
    assert runlog.read(path) == [{"step": 1}, {"step": 2}]
    runlog.truncate(path.with_name("none.jsonl"), 2)
    assert not path.with_name("none.jsonl").exists()
