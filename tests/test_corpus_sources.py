"""What a corpus knows of the files its slides come from."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from sources import (
    consolidate,
    section,
    to_anndata,
    write_element,
    write_h5ad,
    write_matrix,
    write_spaceranger,
    write_spatialdata,
    write_stimage,
)
from st_align.corpus import Corpus
from st_align.corpus_build import build_corpus
from st_align.errors import CorpusError
from st_align.io import ReadOptions, find_slides

ONE, TWO = section("S1"), section("S1", seed=0).with_(counts=section("S1", seed=5).counts)
OTHER = ONE.with_(image=255 - ONE.image)


def prepare(out: Path, *sources: Path, **options) -> Corpus:
    found = find_slides(sources, ReadOptions(**options))
    return build_corpus(found.refs, out, spot_px=4, niche_px=6, absent=found.absent, progress=False)


def change_matrix(root: Path, kind: str) -> None:
    outs = root / "S1" / "outs"
    if kind != "h5":
        shutil.rmtree(outs / "filtered_feature_bc_matrix")
    write_matrix(outs, TWO, kind)


def change_zarr_counts(root: Path) -> None:
    import zarr

    table = zarr.open_group(root / "S1.zarr", use_consolidated=False)["tables"]["table"]
    write_element(table, "X", to_anndata(TWO, image=None).X)
    consolidate(root / "S1.zarr")


def change_zarr_image(root: Path) -> None:
    shutil.rmtree(root / "S1.zarr")
    write_spatialdata(root / "S1.zarr", OTHER)


SOURCES = {
    "visium": (
        lambda root: write_spaceranger(root / "S1", ONE, matrix="h5"),
        functools.partial(change_matrix, kind="h5"),
    ),
    "visium, mtx": (
        lambda root: write_spaceranger(root / "S1", ONE, matrix="mtx"),
        functools.partial(change_matrix, kind="mtx"),
    ),
    "visium, image": (
        lambda root: write_spaceranger(root / "S1", ONE),
        lambda root: Image.fromarray(OTHER.image[::2, ::2]).save(
            root / "S1" / "outs" / "spatial" / "tissue_hires_image.png"
        ),
    ),
    "stimage": (
        lambda root: write_stimage(root, ONE, "Visium"),
        lambda root: write_stimage(root, TWO, "Visium"),
    ),
    "stimage, image": (
        lambda root: write_stimage(root, ONE, "Visium"),
        lambda root: Image.fromarray(OTHER.image).save(root / "Visium" / "image" / "S1.png"),
    ),
    "h5ad": (
        lambda root: write_h5ad(root / "S1.h5ad", ONE),
        lambda root: write_h5ad(root / "S1.h5ad", TWO),
    ),
    "spatialdata": (lambda root: write_spatialdata(root / "S1.zarr", ONE), change_zarr_counts),
    "spatialdata, image": (
        lambda root: write_spatialdata(root / "S1.zarr", ONE),
        change_zarr_image,
    ),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_new_content_is_prepared_anew(tmp_path, kind):
    write, change = SOURCES[kind]
    root = tmp_path / "sources"
    root.mkdir()
    write(root)
    before = prepare(tmp_path / "corpus", root).entry("S1")
    record = (tmp_path / "corpus" / "slides" / "S1" / "slide.json").read_bytes()
    prepare(tmp_path / "corpus", root)
    assert (tmp_path / "corpus" / "slides" / "S1" / "slide.json").read_bytes() == record
    change(root)
    after = prepare(tmp_path / "corpus", root).entry("S1")
    column = "spot_patches.npy" if kind.endswith(", image") else "counts/data.npy"
    assert after["sha256"][column] != before["sha256"][column]
    assert str(tmp_path) not in (tmp_path / "corpus" / "manifest.json").read_text()


def test_another_source_of_an_id_is_refused(tmp_path):
    write_spaceranger(tmp_path / "S1", ONE)
    write_h5ad(tmp_path / "S1.h5ad", TWO)
    corpus = prepare(tmp_path / "corpus", tmp_path / "S1")
    manifest = (corpus.path / "manifest.json").read_bytes()
    with pytest.raises(CorpusError, match="'S1' from another source") as caught:
        prepare(corpus.path, tmp_path / "S1.h5ad")
    assert caught.value.expected == "S1 (visium)"
    assert caught.value.found == f"{tmp_path / 'S1.h5ad'} (h5ad)"
    assert (corpus.path / "manifest.json").read_bytes() == manifest
    shutil.rmtree(corpus.folder("S1"))  # what the message says
    counts = prepare(corpus.path, tmp_path / "S1.h5ad").slide("S1").counts
    assert counts.sum() == TWO.counts.sum()


def test_however_its_path_is_written_a_source_is_the_same(tmp_path, monkeypatch):
    outs = write_spaceranger(tmp_path / "S1", ONE)
    corpus = prepare(tmp_path / "corpus", tmp_path / "S1")
    record = json.loads((corpus.folder("S1") / "slide.json").read_text())
    monkeypatch.chdir(tmp_path)
    for source in (outs, Path("S1"), Path("S1/outs"), tmp_path):
        prepare(corpus.path, source)
        assert json.loads((corpus.folder("S1") / "slide.json").read_text()) == record
    shutil.copytree(tmp_path / "S1", tmp_path / "moved" / "S1")  # times are kept
    prepare(corpus.path, tmp_path / "moved")
    assert json.loads((corpus.folder("S1") / "slide.json").read_text()) == record


def test_a_held_out_patient_is_not_hidden_by_an_old_preparation(tmp_path):
    """Prepared without a table; then one slide is damaged and the patients are given."""
    for id, seed in (("S1", 0), ("S2", 1)):
        write_h5ad(tmp_path / f"{id}.h5ad", section(id, seed=seed))
    sources = [tmp_path / "S1.h5ad", tmp_path / "S2.h5ad"]
    prepare(tmp_path / "corpus", *sources)
    content = sources[0].read_bytes()
    sources[0].write_bytes(content[: len(content) // 2])
    (tmp_path / "patients.csv").write_text("slide,patient\nS1,P1\nS2,P1\n")
    corpus = prepare(tmp_path / "corpus", *sources, patients=tmp_path / "patients.csv")
    assert {id: corpus.entry(id)["patient"] for id in corpus.ids} == {"S2": "P1"}
    assert "not listed" in corpus.quarantined["S1"]


@pytest.mark.parametrize("typed", ["relative", "absolute"])
def test_reasons_hold_paths_as_typed_and_none_of_the_machine(tmp_path, monkeypatch, typed):
    outs = write_spaceranger(tmp_path / "in" / "S1", ONE)
    write_spaceranger(tmp_path / "in" / "S2", section("S2", seed=1))
    (outs / "spatial" / "scalefactors_json.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    root = Path("in") if typed == "relative" else tmp_path / "in"
    corpus = prepare(tmp_path / "corpus", root)
    shown = "in/S1" if typed == "relative" else "S1"
    assert corpus.quarantined["S1"].startswith(f"{shown}/outs/spatial/scalefactors_json.json")
    assert str(tmp_path) not in (corpus.path / "quarantine.json").read_text()


def test_a_source_named_by_a_dot(tmp_path, monkeypatch):
    write_spaceranger(tmp_path / "S1", ONE)
    write_spaceranger(tmp_path / "S2", section("S2", seed=1))
    prepare(tmp_path / "corpus", tmp_path / "S2")
    (tmp_path / "S1" / "outs" / "spatial" / "scalefactors_json.json").write_text("{")
    monkeypatch.chdir(tmp_path / "S1")
    reason = prepare(tmp_path / "corpus", Path()).quarantined["S1"]
    assert reason.startswith("outs/spatial/scalefactors_json.json does not give")


def test_the_time_of_a_file_counts(tmp_path):
    """Sizes alone say nothing: another count may have as many digits."""
    root = write_stimage(tmp_path / "in", ONE, "Visium")
    prepare(tmp_path / "corpus", root)
    path = root / "gene_exp" / "S1_count.csv"
    before, text = path.stat(), path.read_text()
    path.write_text(text.replace(",0,", ",1,", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size
    counts = prepare(tmp_path / "corpus", root).slide("S1").counts
    assert counts.sum() == ONE.counts.sum() + 1
