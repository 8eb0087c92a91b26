"""A corpus is built, resumed, opened, moved and checked."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import toy_slides
from st_align import corpus_files
from st_align.corpus import Corpus, is_corpus, map_array
from st_align.corpus_build import build_corpus
from st_align.errors import ConfigError, CorpusError, ModelError, OutputError
from st_align.expression import Panel, panel_expression
from st_align.io import ReadOptions, find_slides
from st_align.prepare import prepare_slide
from st_align.slide import PreparedSlide
from toy_slides import read_toy, toy_ref, toy_slide

DRILL = Path(__file__).with_name("prepare_drill.py")
build = functools.partial(build_corpus, spot_px=4, niche_px=6, progress=False)


def once(id: str, path: str):
    """Read a toy the first time only."""
    mark = Path(path)
    if mark.exists():
        raise ValueError("gone")
    mark.touch()
    return toy_slide(id)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def refs():
    return [toy_ref(id) for id in ("a1", "a2", "b1")]


@pytest.fixture
def corpus(refs, tmp_path) -> Corpus:
    return build(refs, tmp_path / "corpus")


def same(found: PreparedSlide, wanted: PreparedSlide) -> None:
    for field in dataclasses.fields(PreparedSlide):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        if field.name == "spots":
            pd.testing.assert_frame_equal(a, b)
        elif field.name == "counts" and a is not None:
            np.testing.assert_array_equal(a.toarray(), b.toarray())
            assert a.dtype == b.dtype
        elif field.name == "genes" and a is not None:
            assert a.symbols.tolist() == b.symbols.tolist()
            assert a.ensembl.tolist() == b.ensembl.tolist()
        elif field.name == "niches":
            assert set(a) == set(b)
            for spec in a:
                for part in ("neighbors", "boxes", "patches"):
                    np.testing.assert_array_equal(getattr(a[spec], part), getattr(b[spec], part))
        elif field.name == "spot_patches":
            np.testing.assert_array_equal(a, b)
        elif field.name not in ("source", "image"):
            assert a == b, field.name


class TestRoundTrip:
    @pytest.mark.parametrize("absent", ["nothing", "image", "counts"])
    def test_what_is_read_is_what_was_prepared(self, tmp_path, absent):
        slide = toy_slide("x", image=absent != "image", counts=absent != "counts")
        ref = dataclasses.replace(toy_ref("x"), read=lambda: slide)
        found = build([ref], tmp_path, niche_specs=("k3", "lattice")).slide("x")
        same(found, prepare_slide(slide, ("k3", "lattice"), spot_px=4, niche_px=6))
        assert found.source == "x.h5ad"

    def test_manifest(self, corpus):
        assert corpus.ids == ["a1", "a2", "b1"]
        assert corpus.n_spots == 48
        entry = corpus.manifest["slides"]["a1"]
        assert entry["patient"] == "a"
        assert entry["n_spots"] == 16
        assert entry["um_per_px"] == pytest.approx(5.0)
        assert entry["niches"] == ["lattice"]
        assert entry == corpus.entry("a1")
        files = {n for n in tree(corpus.folder("a1")) if n != "slide.json"}
        assert set(entry["sha256"]) == files
        assert corpus.quarantined == {}
        text = (corpus.path / "manifest.json").read_text()
        assert "/" not in entry["source"]
        assert str(corpus.path) not in text

    def test_counts_work_on_a_read_only_map(self, corpus):
        slide = corpus.slide("a1")
        wanted = toy_slide("a1").counts.toarray()
        assert isinstance(slide.counts, sparse.csr_array)
        np.testing.assert_array_equal(slide.counts[[3, 1]].toarray(), wanted[[3, 1]])
        np.testing.assert_array_equal(slide.counts[:, [2, 0]].toarray(), wanted[:, [2, 0]])
        np.testing.assert_array_equal(slide.counts.sum(axis=1), wanted.sum(axis=1))
        with pytest.raises(ValueError, match="read-only"):
            slide.spot_patches[0] = 0

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files cannot be listed")
    def test_many_slides_need_few_open_files(self, corpus):
        before = len(os.listdir("/proc/self/fd"))
        kept = [Corpus.open(corpus.path).slides() for _ in range(5)]
        assert len(os.listdir("/proc/self/fd")) <= before + 2
        assert kept[4][2].spot_patches.any()

    def test_slides_of_one_annotation_share_their_genes(self, corpus):
        one, two = corpus.slides(["a1", "b1"])
        assert one.genes is two.genes

    def test_a_moved_corpus_works(self, corpus, tmp_path):
        moved = tmp_path / "mit Leerzeichen" / "größe"
        moved.parent.mkdir()
        corpus.path.rename(moved)
        again = Corpus.open(moved)
        same(again.slide("a1"), prepare_slide(toy_slide("a1"), ("lattice",), spot_px=4, niche_px=6))
        assert again.verify() == {}
        assert again.expression("a1", Panel(genes=("GENE1",), ensembl=("",))).measured.all()

    def test_unknown_slide(self, corpus):
        with pytest.raises(CorpusError, match="did you mean 'a1'"):
            corpus.slide("a11")


def test_a_real_slide(data, tmp_path):
    name = "Human_Breast_Andersson_10142021_ST_A1"
    found = find_slides([f"{data / 'her2st' / 'ST'}::{name}"])
    corpus = build_corpus(found.refs, tmp_path, progress=False)
    slide, entry = corpus.slide(name), corpus.entry(name)
    assert slide.um_per_px == pytest.approx(200 / 62.8, rel=0.02)
    assert (entry["n_spots"], entry["technology"]) == (346, "ST")
    assert ((slide.niches["lattice"].neighbors >= 0).sum(axis=1) > 1).mean() > 0.95
    assert str(data) not in (tmp_path / "manifest.json").read_text()
    tissue = slide.spot_patches[:, 20:36, 20:36].mean(axis=(1, 2, 3))
    assert (tissue > 60).mean() > 0.9  # the background of this image is black


class TestResume:
    def test_a_second_call_reads_nothing(self, corpus, refs, monkeypatch):
        calls, before = [], tree(corpus.path)
        monkeypatch.setattr(toy_slides, "toy_slide", calls.append)
        assert build(refs, corpus.path).ids == corpus.ids
        assert calls == []
        assert tree(corpus.path) == before

    def test_order_and_additions_do_not_show(self, corpus, refs, tmp_path):
        other = tmp_path / "other"
        build(refs[::-1][:1], other, niche_specs=("k3",))
        build(refs[::-1], other, niche_specs=("lattice",))
        build(refs, corpus.path, niche_specs=("k3",))
        build(refs, other, niche_specs=("lattice", "k3"))
        assert tree(other) == tree(corpus.path)
        assert Corpus.open(other).slide("a1").niches.keys() == {"k3", "lattice"}
        assert Corpus.open(other).verify() == {}

    def test_another_niche_adds_that_niche_only(self, corpus, refs):
        before = tree(corpus.path / "slides")
        build(refs, corpus.path, niche_specs=("k3",))
        after = tree(corpus.path / "slides")
        changed = {n for n in before if after[n] != before[n]}
        assert {Path(n).name for n in changed} == {"slide.json"}
        assert all("niches/k3/" in n for n in set(after) - set(before))

    def test_jobs_do_not_show(self, corpus, refs, tmp_path):
        build([*refs, toy_ref("bad", damaged=True)], tmp_path / "two", jobs=2)
        build([*refs, toy_ref("bad", damaged=True)], corpus.path)
        assert tree(tmp_path / "two") == tree(corpus.path)

    def test_a_changed_source_is_prepared_again(self, corpus, refs):
        panel = Panel(genes=("GENE1", "GENE2"), ensembl=("", ""))
        old = np.array(corpus.expression("a1", panel).values)
        changed = build([toy_ref("a1", seed=9), *refs[1:]], corpus.path)
        wanted = prepare_slide(read_toy("a1", 9, False, 4), ("lattice",), spot_px=4, niche_px=6)
        same(changed.slide("a1"), wanted)
        fresh = changed.expression("a1", panel).values
        np.testing.assert_array_equal(fresh, panel_expression(wanted, panel).values)
        assert not np.array_equal(fresh, old)
        assert changed.verify() == {}

    def test_only_what_concerns_a_slide_counts_as_a_change(self, tmp_path):
        image, seen = tmp_path / "a1.png", []
        image.write_bytes(b"one")

        def read(*_):
            seen.append(1)
            return toy_slide("a1")

        def reads(patients: dict[str, str], layers: list[str], table: str = "t.csv") -> bool:
            seen.clear()
            obs = pd.DataFrame({"slide": ["a1", "b1"], "layer": layers})
            options = ReadOptions(image=image, patients=tmp_path / table)
            read_it = functools.partial(read, options, patients, obs)
            build([dataclasses.replace(toy_ref("a1"), read=read_it)], tmp_path / "corpus")
            return bool(seen)

        assert reads({"a1": "P"}, ["L1", "L1"])
        assert not reads({"a1": "P", "b1": "Q"}, ["L1", "L2"], "moved.csv")
        assert reads({"a1": "other"}, ["L1", "L1"])
        assert reads({"a1": "other"}, ["L6", "L1"])
        image.write_bytes(b"another")
        assert reads({"a1": "other"}, ["L6", "L1"])
        assert not reads({"a1": "other"}, ["L6", "L1"])

    def test_what_a_kill_left_is_swept_away(self, corpus, refs):
        before = tree(corpus.path)
        for left in ("slides/.b2.part", "slides/a1/niches/.k3.part", "slides/.a1.old.part"):
            (corpus.path / left).mkdir()
            (corpus.path / left / "data.npy").write_bytes(b"half")
        build(refs, corpus.path)
        assert tree(corpus.path) == before


class TestKilled:
    def drill(self, folder: Path, points: range) -> None:
        """SIGKILL before each of these file operations: the rerun equals an undisturbed corpus."""
        numbers = [str(n) for n in (*points, 10**6)]
        done = subprocess.run(
            [sys.executable, DRILL, "files", folder, *numbers],
            check=True,
            capture_output=True,
            text=True,
        )
        lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
        wanted = tree(folder / numbers[-1])
        assert lines.pop(numbers[-1]) == "ran through finished"
        assert set(lines.values()) == {"died finished"}, done.stdout
        assert "quarantine.json" in wanted
        assert len([n for n in wanted if "niches/k3" in n]) == 6
        for point in points:
            assert tree(folder / f"{point}") == wanted, point

    def test_at_some_file_operations(self, tmp_path):
        self.drill(tmp_path, range(2, 170, 17))

    @pytest.mark.slow
    def test_at_every_file_operation(self, tmp_path):
        self.drill(tmp_path, range(1, 170))

    @pytest.mark.slow
    def test_at_random_moments_with_two_jobs(self, tmp_path, rng):
        def run(out: Path) -> subprocess.Popen:
            return subprocess.Popen([sys.executable, DRILL, "build", out, "2"])

        start = time.perf_counter()
        assert run(tmp_path / "whole").wait() == 0
        lasts = time.perf_counter() - start
        for delay in rng.uniform(0.2 * lasts, lasts, 8):
            process = run(tmp_path / "killed")
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert run(tmp_path / "killed").wait() == 0
        assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


class TestQuarantine:
    def test_one_bad_slide_does_not_stop_the_others(self, refs, tmp_path):
        bad = toy_ref("bad", damaged=True)
        corpus = build([bad, *refs], tmp_path, absent={"gone": "its image is not there"})
        assert corpus.ids == ["a1", "a2", "b1"]
        assert corpus.quarantined == {
            "bad": "bad.h5ad is truncated; found: nothing; to do: copy it again",
            "gone": "its image is not there",
        }
        with pytest.raises(CorpusError, match="truncated"):
            corpus.slide("bad")
        mended = build([toy_ref("bad")], tmp_path)
        assert "bad" in mended.ids
        assert list(mended.quarantined) == ["gone"]

    def test_any_failure_of_a_reader_is_a_reason(self, refs, tmp_path):
        def explode():
            raise RecursionError("deep")

        bad = dataclasses.replace(toy_ref("bad"), read=explode)
        assert build([bad, *refs], tmp_path).quarantined == {"bad": "RecursionError: deep"}

    @pytest.mark.parametrize("existed", [True, False])
    def test_none_left(self, tmp_path, existed):
        out = tmp_path / "corpus"
        if existed:
            out.mkdir()
        bad = [toy_ref(f"bad{i}", damaged=True) for i in range(7)]
        with pytest.raises(CorpusError, match="no slide could be prepared") as caught:
            build(bad, out)
        assert "bad0: bad0.h5ad is truncated" in str(caught.value)
        assert "2 more" in str(caught.value)
        assert out.exists() == existed
        assert tree(tmp_path) == {}

    def test_a_slide_that_was_asked_for_in_the_same_way_stays(self, refs, tmp_path):
        """Another niche is asked for, and the source cannot be read any more."""
        asked = functools.partial(once, "a1", str(tmp_path / "read"))
        ref = dataclasses.replace(refs[0], read=asked)
        build([ref, refs[1]], tmp_path / "corpus")
        again = build([ref, refs[1]], tmp_path / "corpus", niche_specs=("k3",))
        assert again.ids == ["a1", "a2"]
        assert again.quarantined == {"a1": "ValueError: gone"}
        assert again.verify() == {}

    def test_a_slide_asked_for_otherwise_is_not_listed_as_it_was(self, corpus, refs):
        """Its patient, say, may be another one now: `train --hold-out-patient` must not miss it."""
        kept = tree(corpus.folder("a1"))
        again = build([toy_ref("a1", damaged=True), *refs[1:]], corpus.path)
        assert again.ids == ["a2", "b1"]
        assert "truncated" in again.quarantined["a1"]
        assert "kept but not listed" in again.quarantined["a1"]
        assert tree(corpus.folder("a1")) == kept
        other = build([toy_ref("c1")], corpus.path)  # the rest of the corpus is as it was
        assert other.ids == ["a2", "b1", "c1"]
        assert other.quarantined == again.quarantined
        back = build(refs[:1], corpus.path)
        assert (back.ids, back.quarantined) == (["a1", "a2", "b1", "c1"], {})

    def test_a_slide_whose_files_are_gone_is_not_listed_as_it_was(self, corpus, refs):
        again = build(refs[1:], corpus.path, absent={"a1": "no image/a1.png"})
        assert again.ids == ["a2", "b1"]
        assert again.quarantined["a1"].startswith("no image/a1.png; ")

    def test_none_of_a_corpus_left_removes_nothing(self, refs, tmp_path):
        build(refs[:1], tmp_path)
        kept = tree(tmp_path / "slides")
        with pytest.raises(CorpusError, match="no slide could be prepared"):
            build([toy_ref("a1", damaged=True)], tmp_path)
        assert tree(tmp_path / "slides") == kept
        with pytest.raises(CorpusError, match="holds no slides") as caught:
            Corpus.open(tmp_path)
        assert "quarantine.json" in caught.value.found
        assert build(refs[:1], tmp_path).ids == ["a1"]


class TestOutput:
    def test_a_file(self, refs, tmp_path):
        (tmp_path / "out").write_text("mine")
        with pytest.raises(OutputError, match="is a file"):
            build(refs, tmp_path / "out")
        assert (tmp_path / "out").read_text() == "mine"

    def test_below_a_file(self, refs, tmp_path):
        (tmp_path / "out").write_text("mine")
        with pytest.raises(OutputError, match="cannot write"):
            build(refs, tmp_path / "out" / "corpus")

    def test_a_folder_with_something_else(self, refs, tmp_path):
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(OutputError, match="neither empty nor a corpus"):
            build(refs, tmp_path)
        assert tree(tmp_path) == {"thesis.txt": b"mine"}

    def test_other_patch_sizes(self, corpus, refs):
        before = tree(corpus.path)
        with pytest.raises(CorpusError, match="another spot_px") as caught:
            build_corpus(refs, corpus.path, spot_px=8, niche_px=6, progress=False)
        assert (caught.value.expected, caught.value.found) == ("4", "8")
        assert tree(corpus.path) == before

    def test_unknown_niche(self, refs, tmp_path):
        with pytest.raises(ConfigError, match="no niche"):
            build(refs, tmp_path / "corpus", niche_specs=("lattice", "ring"))
        assert not (tmp_path / "corpus").exists()

    def test_a_preparation_at_work(self, corpus, refs):
        with (
            corpus_files.locked(corpus.path),
            pytest.raises(OutputError, match="another process is writing"),
        ):
            build(refs, corpus.path)

    @pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
    def test_a_disk_that_refuses(self, refs, tmp_path, monkeypatch, error):
        """From the second slide on, no array can be written."""
        build(refs[:1], tmp_path / "corpus")
        before = tree(tmp_path)

        def refuse(file, values, **_):
            file.write(b"half")
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(corpus_files.np, "save", refuse)
        with pytest.raises(OutputError, match="finished work is kept") as caught:
            build(refs, tmp_path / "corpus")
        assert os.strerror(error) in caught.value.found
        assert "MB free" in caught.value.expected
        monkeypatch.undo()
        assert tree(tmp_path) == before
        assert Corpus.open(tmp_path / "corpus").ids == ["a1"]
        assert build(refs, tmp_path / "corpus").ids == ["a1", "a2", "b1"]

    def test_a_disk_that_refuses_a_worker(self, refs, tmp_path):
        out = tmp_path / "corpus"
        build(refs[:1], out)
        shutil.rmtree(out / "slides")
        (out / "slides").write_text("in the way")
        with pytest.raises(OutputError, match="cannot write"):
            build(refs, out, jobs=2)

    def test_a_killed_worker_ends_the_work_and_keeps_what_is_done(self, refs, tmp_path):
        die = dataclasses.replace(toy_ref("die"), read=functools.partial(os._exit, 1))
        with pytest.raises(CorpusError, match="was killed") as caught:
            build([*refs, die], tmp_path / "corpus", jobs=2)
        assert "--jobs" in caught.value.fix
        assert build(refs, tmp_path / "corpus").ids == ["a1", "a2", "b1"]

    def test_no_folder_can_be_made(self, refs, tmp_path, monkeypatch):
        def refuse(*_, **__):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(OutputError, match="Permission denied"):
            build(refs, tmp_path / "corpus")


class TestDamage:
    @pytest.mark.parametrize(
        "name",
        ["spot_patches.npy", "counts/data.npy", "niches/lattice/boxes.npy", "spots.parquet"],
    )
    @pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
    def test_verify_names_file_and_slide(self, corpus, name, how):
        path = corpus.folder("a2") / name
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content[:-3] if how == "truncated" else content)
        if how == "missing":
            path.unlink()
        opened = Corpus.open(corpus.path)
        (problems,) = opened.verify().values()
        assert list(opened.verify()) == ["a2"]
        assert len(problems) == 1
        assert problems[0].startswith(f"slides/a2/{name} is")
        if how != "flipped":
            with pytest.raises(CorpusError, match="'a2' has a damaged column") as caught:
                opened.slide("a2")
            assert str(path) in str(caught.value)
        assert opened.slide("a1").n_spots == 16

    def test_what_to_do_helps(self, corpus, refs):
        (corpus.folder("a2") / "spot_patches.npy").unlink()
        shutil.rmtree(corpus.folder("a2"))
        assert build(refs, corpus.path).verify() == {}

    @pytest.mark.parametrize("content", [b"", b"no numpy", b"\x93NUMPY\x09\x00"])
    def test_not_an_array(self, tmp_path, content):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"npy|magic"):
            map_array(tmp_path / "x.npy")

    def test_pickled_arrays_are_not_loaded(self, tmp_path):
        np.save(tmp_path / "x.npy", np.array([{}], dtype=object))
        with pytest.raises(ValueError, match="bytes expected"):
            map_array(tmp_path / "x.npy")

    def test_another_schema_version(self, corpus, refs):
        path = corpus.path / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
        for use in (Corpus.open, functools.partial(build, refs)):
            with pytest.raises(CorpusError, match="another schema version") as caught:
                use(corpus.path)
            assert caught.value.found == "99"

    @pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
    def test_a_damaged_manifest(self, corpus, content):
        (corpus.path / "manifest.json").write_bytes(content)
        with pytest.raises(CorpusError, match=r"manifest.json is damaged"):
            Corpus.open(corpus.path)

    @pytest.mark.parametrize(
        ("place", "key"),
        [
            ((), "slides"),
            ((), "spot_px"),
            (("slides", "a2"), "sha256"),
            (("slides", "a2"), "n_spots"),
        ],
    )
    @pytest.mark.parametrize("how", ["missing", "of another type"])
    def test_a_manifest_of_other_keys(self, corpus, refs, place, key, how):
        path = corpus.path / "manifest.json"
        values = json.loads(path.read_text())
        inner = functools.reduce(dict.__getitem__, place, values)
        inner[key] = None
        if how == "missing":
            del inner[key]
        path.write_text(json.dumps(values))
        for use in (Corpus.open, functools.partial(build, refs)):
            with pytest.raises(CorpusError, match=r"manifest.json is damaged") as caught:
                use(corpus.path)
            assert key in caught.value.expected
            assert not place or "'a2'" in caught.value.expected

    @pytest.mark.parametrize("change", [{"request": 1}, {"slide": {"niches": []}}])
    def test_a_damaged_record(self, corpus, refs, change):
        path = corpus.folder("a2") / "slide.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(CorpusError, match=r"slide.json is damaged"):
            build(refs, corpus.path)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("spot_patches.npy", lambda a: a[:-1]),
            ("spot_patches.npy", lambda a: a[:, :-1]),
            ("spot_patches.npy", lambda a: a.astype(np.float32)),
            ("counts/data.npy", lambda a: a[:-1]),
            ("counts/data.npy", lambda a: a.astype(np.float32)),
            ("counts/indices.npy", lambda a: a[:-2]),
            ("counts/indices.npy", lambda a: np.stack([a, a])),
            ("counts/indptr.npy", lambda a: a[:-1]),
            ("counts/indptr.npy", lambda a: a + 1),
            ("counts/indptr.npy", lambda a: np.r_[0, a[-1], a[2:]]),
            ("niches/lattice/neighbors.npy", lambda a: a[1:]),
            ("niches/lattice/neighbors.npy", lambda a: a + 1),
            ("niches/lattice/neighbors.npy", lambda a: a - 1),
            ("niches/lattice/boxes.npy", lambda a: a[:, :2]),
            ("niches/lattice/patches.npy", lambda a: a[..., 0]),
        ],
    )
    def test_a_column_that_is_another(self, corpus, name, change):
        path = corpus.folder("a2") / name
        np.save(path, change(np.load(path)))
        opened = Corpus.open(corpus.path)
        assert opened.slide("a1").n_spots == 16
        with pytest.raises(CorpusError, match="'a2' has a damaged column") as caught:
            opened.slide("a2")
        assert "/slides/a2/counts/" in str(caught.value) or str(path) in str(caught.value)

    @pytest.mark.parametrize("name", ["spots.parquet", "genes.parquet"])
    @pytest.mark.parametrize("how", ["shorter", "lacks a column"])
    def test_a_table_that_is_another(self, corpus, name, how):
        path = corpus.folder("a2") / name
        table = pd.read_parquet(path)
        (table.iloc[:-1] if how == "shorter" else table.iloc[:, 1:]).to_parquet(path)
        with pytest.raises(CorpusError, match=f"'a2' has a damaged column(.|\n)*{name}"):
            Corpus.open(corpus.path).slide("a2")

    def test_no_corpus(self, tmp_path):
        (tmp_path / "file").touch()
        for path in (tmp_path, tmp_path / "file", tmp_path / "none"):
            with pytest.raises(CorpusError, match="is not a corpus"):
                Corpus.open(path)
            assert not is_corpus(path)

    def test_interrupted_before_the_first_slide(self, corpus):
        path = corpus.path / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"slides": {}}))
        with pytest.raises(CorpusError, match="holds no slides yet"):
            Corpus.open(corpus.path)


class TestExpression:
    PANEL = Panel(genes=("GENE3", "ELSE", "GENE1"), ensembl=("", "", ""))

    def test_cache_equals_the_slide_s_own(self, corpus):
        wanted = panel_expression(corpus.slide("a1"), self.PANEL)
        for _ in range(2):
            found = corpus.expression("a1", self.PANEL)
            np.testing.assert_array_equal(found.values, wanted.values)
            np.testing.assert_array_equal(found.measured, wanted.measured)
            np.testing.assert_array_equal(found.valid, wanted.valid)
            assert found.values.dtype == np.float16
        assert (corpus.path / "expression" / self.PANEL.hash / "a1.npy").is_file()

    def test_a_damaged_cache_is_made_again(self, corpus):
        wanted = np.array(corpus.expression("a1", self.PANEL).values)
        path = corpus.path / "expression" / self.PANEL.hash / "a1.npy"
        for content in (path.read_bytes()[:-7], b""):
            path.write_bytes(content)
            np.testing.assert_array_equal(corpus.expression("a1", self.PANEL).values, wanted)
        assert map_array(path).shape == wanted.shape

    def test_a_corpus_that_cannot_be_written_to(self, corpus):
        (corpus.path / "expression").write_text("in the way")
        found = corpus.expression("a1", self.PANEL)
        np.testing.assert_array_equal(
            found.values, panel_expression(corpus.slide("a1"), self.PANEL).values
        )

    def test_no_shared_gene(self, corpus):
        with pytest.raises(ModelError, match="none of the 1 genes"):
            corpus.expression("a1", Panel(genes=("GAPDH",), ensembl=("",)))

    def test_a_slide_without_counts(self, tmp_path):
        slide = toy_slide("x", counts=False)
        ref = dataclasses.replace(toy_ref("x"), read=lambda: slide)
        found = build([ref], tmp_path).expression("x", self.PANEL)
        assert not found.measured.any()
        assert found.values.shape == (16, 3)


def test_a_slide_that_is_held_is_not_read_again(corpus: Corpus, monkeypatch) -> None:
    held = corpus.slide("a1")
    reads: list[str] = []
    read = corpus._read
    monkeypatch.setattr(corpus, "_read", lambda id: reads.append(id) or read(id))
    assert corpus.slide("a1") is held
    assert corpus.slides(["a1"])[0] is held
    assert reads == []
    del held
    assert corpus.slide("a1").n_spots
    assert reads == ["a1"]
