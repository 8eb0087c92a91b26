"""Damaged sources are refused in one message or read: no other error, hang, memory or leftovers."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz_cases
import sources
from st_align import cli
from st_align.config import preset, read_toml
from st_align.errors import StAlignError
from st_align.expression import read_panel
from st_align.image import open_image
from st_align.io import find_slides
from st_align.io.patients import read_patients
from st_align.io.tables import read_table
from st_align.io.visium import read_matrix

QUICK = range(200)
SLOW = range(200, 5000)
PER_TEST = 100
bounded = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sound")
    (root / "h5ad").mkdir()
    return fuzz_cases.make_sources(root)


def test_the_sound_sources_are_read(kinds):
    assert {name: fuzz_cases.read_all(path) for name, path in kinds.items()} == dict.fromkeys(
        kinds, "read"
    )


def survive(cases: range, kinds: dict[str, Path], at: Path) -> None:
    outcomes = []
    for case in cases:
        path, what = fuzz_cases.damaged(case, kinds, at / "case")
        before = contents(at)
        try:
            outcomes.append(fuzz_cases.read_all(path))
        except BaseException as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        assert contents(at) == before, f"{what}: reading wrote something"
    assert set(outcomes) == {"read", "refused"}


def _huge_place(kinds: dict[str, Path], at: Path) -> Path:
    path = shutil.copytree(kinds["h5"], at / "outs") / "spatial" / "tissue_positions_list.csv"
    table = pd.read_csv(path, header=None, dtype=str)
    table.iloc[3, 2] = "99999999999999999999"
    table.to_csv(path, header=False, index=False)
    return at / "outs"


def _one_spot_over_and_over(kinds: dict[str, Path], at: Path) -> Path:
    root = shutil.copytree(kinds["stimage"], at / "Visium")
    for path in (root / "coord" / "S1_coord.csv", root / "gene_exp" / "S1_count.csv"):
        table = pd.read_csv(path, index_col=0)
        table.iloc[:] = table.iloc[[0]].to_numpy()
        table.to_csv(path)
    return root


def _nul_in_a_matrix(kinds: dict[str, Path], at: Path) -> Path:
    """SciPy 1.17 ends the process on this one."""
    outs = shutil.copytree(kinds["mtx"], at / "outs")
    path = outs / "filtered_feature_bc_matrix" / "matrix.mtx"
    data = path.read_bytes()
    path.write_bytes(data[:199] + bytes(13) + data[212:])
    return outs


def _broken_gzip(kinds: dict[str, Path], at: Path) -> Path:
    outs = shutil.copytree(kinds["mtx.gz"], at / "outs")
    path = outs / "filtered_feature_bc_matrix" / "features.tsv.gz"
    data = path.read_bytes()
    path.write_bytes(data[:30] + b"\xff" * 40 + data[70:])
    return outs


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_huge_place, "not whole numbers"),
        (_one_spot_over_and_over, "coordinates of another"),
        (_broken_gzip, "is damaged"),
        (_nul_in_a_matrix, "NUL bytes"),
    ],
)
def test_what_fuzzing_found(kinds, tmp_path, damage, said):
    path = damage(kinds, tmp_path)
    with fuzz_cases.bounded(), pytest.raises(StAlignError, match=said):
        find_slides([path]).refs[0].read()


def test_a_tiff_without_a_page(tmp_path):
    path = tmp_path / "empty.tif"
    path.write_bytes(b"II*\0\0\0\0\0")
    with pytest.raises(StAlignError, match="truncated or damaged"):
        open_image(path)


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    found = [p for p in folder.rglob("*") if p.is_file()]
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


@pytest.mark.parametrize("first", QUICK[::PER_TEST])
def test_damaged_sources(kinds, tmp_path, first):
    survive(range(first, first + PER_TEST), kinds, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", SLOW[::PER_TEST])
def test_many_damaged_sources(kinds, tmp_path, first):
    survive(range(first, first + PER_TEST), kinds, tmp_path)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("image.png", open_image),
        ("matrix.h5", read_matrix),
        ("patients.csv", read_patients),
        ("table.csv", lambda path: read_table(path, ("barcode",), "table")),
        ("panel.txt", read_panel),
        ("config.toml", lambda path: read_toml(path, preset("tiny"))),
        ("slide.h5ad", fuzz_cases.read_all),
    ],
)
def test_any_bytes_are_refused_or_read(tmp_path, name, read):
    heads = st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0", b"\xff\xd8\xff",
         b"\x89HDF\r\n\x1a\n", b"slide,patient\n", b"barcode,x\n", b"\xef\xbb\xbf", b"[model]\n"]
    )  # fmt: skip

    @bounded
    @given(head=heads, rest=st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
    def case(head: bytes, rest: bytes) -> None:
        path = tmp_path / name
        path.write_bytes(head + rest)
        with suppress(StAlignError), fuzz_cases.bounded():
            read(path)

    case()


@bounded
@given(rows=st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=6))
def test_patient_tables_of_any_text(tmp_path_factory, rows):
    import csv

    path = tmp_path_factory.getbasetemp() / "patients.csv"
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file).writerows([("slide", "patient"), *rows])
    with suppress(StAlignError):
        assert all(slide and patient for slide, patient in read_patients(path).items())


@pytest.mark.parametrize("case", [4, 15, 23, 33, 41])
def test_prepare_quarantines_what_is_damaged_and_leaves_whole_slides_only(
    kinds, tmp_path, monkeypatch, capsys, case
):
    """Beside a sound slide, so that the corpus is written whatever becomes of the other."""
    path, what = fuzz_cases.damaged(case, kinds, tmp_path / "damaged")
    outs = sources.write_spaceranger(tmp_path / "fine", sources.section("fine"))
    out = tmp_path / "corpus"
    words = ["prepare", outs, path, "--out", out, "--json", tmp_path / "r.json"]
    code = run(monkeypatch, *words)
    said = capsys.readouterr()
    assert "Traceback" not in said.err, what
    assert code in (0, 2), what
    if code == 2:
        assert said.err.startswith("error: ")
        assert not (tmp_path / "r.json").exists()
        assert not list(out.glob("slides/*"))
        return
    result = json.loads((tmp_path / "r.json").read_text())
    written = sorted(p.name for p in (out / "slides").iterdir())
    assert sorted(result["slides"]) == written, what
    assert run(monkeypatch, "inspect", out, "--verify") == 0


def run(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["st-align", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0
