"""The figures' arithmetic, their files, and that each family of figures runs (on little)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from st_align.benchmarks import speed, speed_files, speed_graph, speed_train
from st_align.benchmarks.speed import Figure, Times, at_least, at_most, in_child, interleaved
from st_align.benchmarks.speed_run import WHAT, run_speed
from st_align.corpus import Corpus
from st_align.errors import ConfigError
from st_align.io.count_csv import read_count_csv
from st_align.simulate import simulate_cohort

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    out = tmp_path_factory.mktemp("speed") / "corpus"
    simulate_cohort(out, slides=2, spots=60, layout="corpus")
    return Corpus.open(out)


def test_sides_take_turns() -> None:
    order: list[str] = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 3
    assert len(times["a"].wall) == len(times["b"].cpu) == 3
    assert Times((3.0, 1.0, 2.0), ()).median == 2
    assert Times((3.0, 1.0, 2.0), ()).best == 1


def test_targets() -> None:
    assert at_least(0.95, 0.95) == {"value": 0.95, "target": ">= 0.95", "met": True}
    assert at_most(5, 5.1)["met"] is False


def test_files_hold_the_figures(tmp_path: Path) -> None:
    shown = Figure(figure="a|b", case="c", unit="x", runs=(0.5, 1.5), **at_least(0.95, 1.0))
    other = Figure(figure="d", case="", value=1234.4, unit="s")
    speed.write(tmp_path, "what", [shown, other])
    rows = (tmp_path / "speed-what.csv").read_text().splitlines()
    assert rows[0] == "figure,case,value,unit,runs,target,met,note"
    assert rows[1] == "a|b,c,1.0,x,0.5 1.5,>= 0.95,True,"
    table = (tmp_path / "speed-what.md").read_text().splitlines()
    assert table[2] == "| a\\|b | c | 1 x (0.5 to 1.5) | >= 0.95 | yes |"
    assert table[3] == "| d |  | 1,234 s |  |  |"


@linux
def test_memory_of_a_child_is_its_anonymous_memory(tmp_path: Path) -> None:
    """50 MB held are seen; 50 MB mapped from a file are not."""
    np.zeros(50_000_000, np.uint8).tofile(tmp_path / "x")
    empty = "import numpy, time; time.sleep(0.2)"
    held = "import numpy, time; x = numpy.ones(50_000_000, numpy.uint8); time.sleep(0.2)"
    mapped = (
        f"import numpy, time; x = numpy.memmap({str(tmp_path / 'x')!r}); x.sum(); time.sleep(.2)"
    )
    peaks = [in_child(speed.python(code)).peak for code in (empty, held, mapped)]
    assert 40e6 < peaks[1] - peaks[0] < 70e6
    assert peaks[2] - peaks[0] < 20e6


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        in_child([sys.executable, "-c", "1 / 0"])


def test_unknown_figures_and_presets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'training'"):
        run_speed("trainin", tmp_path, corpus=None, preset="tiny", seed=0)
    with pytest.raises(ConfigError, match="tiny or open"):
        run_speed("training", tmp_path, corpus=None, preset="huge", seed=0)
    with pytest.raises(ConfigError, match="--corpus LARGE"):
        run_speed("memory", tmp_path, corpus=None, preset="tiny", seed=0)
    assert not any(tmp_path.iterdir())


def test_training_is_measured(corpus: Corpus, tmp_path: Path, monkeypatch) -> None:
    """`tiny` without frozen features, to be quick."""
    raw = speed_train.raw_config()
    monkeypatch.setattr(speed_train, "preset", lambda _: raw)
    monkeypatch.setitem(speed_train._BATCH, "tiny", 16)
    monkeypatch.setitem(speed_train._STEPS, "tiny", 1)
    share, pace = speed_train.training(corpus, "tiny", tmp_path)
    assert share.case == "tiny, batch 16, cpu"
    assert 0.2 < share.value < 5
    assert len(share.runs) == 5
    assert pace.value > 1


def test_epoch_and_patches_are_measured(corpus: Corpus) -> None:
    (start,) = speed_train.epoch(corpus)
    assert start.met
    spot, niche = speed_files.patches(corpus)
    assert spot.value > niche.value > 100


def test_growth_is_measured() -> None:
    near = list(speed_graph.neighbours(0, (100, 400)))
    assert len(near) == 8
    assert all(f.value > 0 for f in near)
    found = list(speed_graph.domains(0, (200, 800)))
    assert [f.unit for f in found] == ["s"] * 3 + ["s", "exponent"] * 3


@linux
def test_count_csv_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_files, "_CSV", (40, 50))
    found = list(speed_files.stimage(tmp_path, 0))
    assert [f.unit for f in found] == ["x", "x", "s", "x", "x"]
    names, counts, genes = read_count_csv(tmp_path / "counts.csv")
    assert counts.shape == (40, 50) == (len(names), len(genes))


@linux
@pytest.mark.slow
def test_preparing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_files, "_COHORT", (2, 60))
    monkeypatch.setattr(speed_files, "_COPIES", 1)
    monkeypatch.setattr(speed_files, "_cluster", lambda: None)
    assert [f.unit for f in speed_files.prepare(tmp_path, 0)] == ["s", "s", "x"]
    monkeypatch.setattr(speed_files, "_VISIUM", (200, 300, 4_096))
    monkeypatch.setattr(speed_files, "_GENES_OF_A_SPOT", (50, 200))
    found = list(speed_files.visium(tmp_path, 0))
    assert [f.unit for f in found] == ["s", "s", "GiB"]
    assert Corpus.open(tmp_path / "corpus").n_spots == 200


def test_every_figure_of_the_help_is_there() -> None:
    from st_align.cli.bench_speed import speed as verb

    said = verb.__annotations__["what"]
    assert all(name in said for name in WHAT)
