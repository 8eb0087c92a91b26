"""Preparing on a Dask cluster gives the corpus that one process gives."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from st_align.cluster import on_cluster
from st_align.corpus_build import build_corpus
from st_align.errors import ConfigError, CorpusError
from toy_slides import toy_ref


def dask() -> ModuleType:
    return pytest.importorskip("distributed", reason="the cluster extra is not installed")


def test_without_dask_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"st-align\[cluster\]"):
        next(on_cluster(str, [1], "tcp://127.0.0.1:1"))


@pytest.fixture(scope="module")
def address():
    """Of a local scheduler with two workers in this process."""
    distributed = dask()
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": False}
    with distributed.LocalCluster(**options, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


@pytest.mark.filterwarnings("default")
def test_the_corpus_is_the_same(address: str, tmp_path: Path) -> None:
    refs = [toy_ref(id, rows=2, damaged=id == "bad") for id in ("a", "bad", "ö 1")]
    sizes = {"spot_px": 4, "niche_px": 6, "progress": False}
    one = build_corpus(refs, tmp_path / "one", **sizes)
    many = build_corpus(refs, tmp_path / "many", dask=address, **sizes)
    for name in ("manifest.json", "quarantine.json"):
        assert (one.path / name).read_bytes() == (many.path / name).read_bytes()
    assert many.verify() == {}
    assert set(many.quarantined) == {"bad"}


@pytest.mark.filterwarnings("default")
def test_no_scheduler_is_said_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    dask()
    monkeypatch.setattr("st_align.cluster._CONNECT_S", "1s")
    with pytest.raises(ConfigError, match="no Dask scheduler answers"):
        next(on_cluster(str, [1], "tcp://127.0.0.1:1"))


@pytest.mark.filterwarnings("default")
def test_what_the_work_raises_ends_it(address: str) -> None:
    def fail(_: int) -> None:
        raise CorpusError("full")

    with pytest.raises(CorpusError, match="full"):
        list(on_cluster(fail, [1, 2], address))
