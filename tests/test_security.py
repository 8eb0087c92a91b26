"""What SECURITY.md promises. Names in the view and the report: test_view.py, test_report.py."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
import sys
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from PIL import Image

import fuzz_cases
import sources
from st_align import cli, keys
from st_align.corpus import Corpus, map_array
from st_align.corpus_build import build_corpus
from st_align.errors import SlideError, StAlignError
from st_align.files import replace_file
from st_align.image import open_image
from st_align.inflation import require_plausible
from st_align.io import ReadOptions, find_slides
from st_align.io.detect import read_one
from st_align.report import build_report
from st_align.view import build_view

BOMB = "claims more than it can hold"


@pytest.fixture
def section():
    return sources.section()


# --- decompression bombs ------------------------------------------------------------------------


def test_a_bomb_in_a_png(tmp_path):
    path = fuzz_cases.bomb(tmp_path / "white.png", 12_000)
    assert path.stat().st_size < 1e6
    with fuzz_cases.bounded(), pytest.raises(SlideError, match=BOMB):
        open_image(path)
    assert open_image(fuzz_cases.bomb(tmp_path / "small.png", 2_000)).shape == (2_000, 2_000)


def test_a_sound_jpeg_may_shrink_more_than_counts_do(tmp_path, monkeypatch):
    # A real section of 184 million pixels lies in 4 MB of JPEG: 138 to 1.
    monkeypatch.setattr("st_align.inflation.ALWAYS", 1 << 20)
    path = tmp_path / "section.png"  # as STimage-1K4M names its JPEG files
    Image.new("RGB", (2_000, 2_000), (230, 220, 225)).save(path, "JPEG", quality=60)
    assert 12_000_000 / path.stat().st_size > 100
    assert open_image(path).shape[:2] == (2_000, 2_000)


def test_the_real_sections_of_her2st_are_no_bombs():
    folder = Path(__file__).parents[2] / "shared/data/her2st/ST/image"
    if not folder.is_dir():
        pytest.skip("the her2st sections are not here")
    shape = open_image(folder / "Human_Breast_Andersson_10142021_ST_C2.png").shape
    assert min(shape[:2]) > 9_000


def test_a_bomb_in_a_tiff(tmp_path):
    path = tmp_path / "white.tif"
    white = Image.new("L", (20_000, 20_000), 255)
    white.save(path, compression="tiff_adobe_deflate")
    with fuzz_cases.bounded(), pytest.raises(SlideError, match=BOMB):
        open_image(path)


@pytest.mark.parametrize("name", ["features.tsv.gz", "barcodes.tsv.gz", "matrix.mtx.gz"])
def test_a_bomb_in_gzip(tmp_path, section, name):
    outs = sources.write_spaceranger(tmp_path / "S1", section, matrix="mtx.gz")
    with gzip.open(outs / "filtered_feature_bc_matrix" / name, "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(b"\n" * (1 << 20))
    with fuzz_cases.bounded(), pytest.raises(SlideError, match=BOMB):
        read_one(tmp_path / "S1")


def test_a_matrix_that_states_a_size_it_has_not(tmp_path, section):
    outs = sources.write_spaceranger(tmp_path / "S1", section, matrix="mtx")
    path = outs / "filtered_feature_bc_matrix" / "matrix.mtx"
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if not line.startswith("%"))
    rows, columns, _ = lines[at].split()
    for stated in (f"{rows} {columns} 99999999999", f"{rows} 9999999999 10"):
        lines[at] = stated
        path.write_text("\n".join(lines) + "\n")
        with fuzz_cases.bounded(), pytest.raises(SlideError, match=r"truncated|inconsistent"):
            read_one(tmp_path / "S1")


def test_a_bomb_in_hdf5(tmp_path, section):
    path = sources.write_h5ad(tmp_path / "S1.h5ad", section)
    with h5py.File(path, "a") as file:
        del file["obsm/spatial"]
        file["obsm"].create_dataset(
            "spatial", shape=(1 << 28, 2), dtype="f8", chunks=(1 << 16, 2), compression="gzip"
        )
    out = tmp_path / "page.html"
    for read in (
        lambda: read_one(path),
        lambda: build_view(path, out),
        lambda: build_report(out, files=[path]),
    ):
        with fuzz_cases.bounded(), pytest.raises(SlideError, match=BOMB):
            read()
    assert not out.exists()
    outs = sources.write_spaceranger(tmp_path / "S2", section)
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "a") as file:
        del file["matrix/data"]
        file["matrix"].create_dataset("data", shape=(1 << 30,), dtype="i4", chunks=(1 << 16,))
    with fuzz_cases.bounded(), pytest.raises(SlideError, match=BOMB):
        read_one(tmp_path / "S2")


def test_a_bomb_in_zarr(tmp_path, section):
    path = sources.write_spatialdata(tmp_path / "S1.zarr", section)
    for name in ("S1_hires_image", "S1_lowres_image"):
        group = zarr.open_group(path / "images" / name, mode="a")
        del group["s0"]
        group.create_array("s0", shape=(3, 12_000, 12_000), chunks=(3, 512, 512), dtype="u1")
    sources.consolidate(path)
    with fuzz_cases.bounded(), pytest.raises(SlideError, match=BOMB):
        read_one(path)
    for name in ("S1_hires_image", "S1_lowres_image"):
        group = zarr.open_group(path / "images" / name, mode="a")
        del group["s0"]
        group.create_array("s0", shape=(3, 60_000, 60_000), chunks=(3, 60_000, 60_000), dtype="u1")
    sources.consolidate(path)
    with fuzz_cases.bounded(), pytest.raises(SlideError, match="cannot be read by region"):
        read_one(path)


def test_a_bomb_in_parquet(tmp_path, section):
    outs = sources.write_spaceranger(tmp_path / "S1", section, positions="parquet")
    path = outs / "spatial" / "tissue_positions.parquet"
    one = pa.table({f"c{i}": pa.array(np.zeros(1 << 20, np.int8)) for i in range(6)})
    with pq.ParquetWriter(path, one.schema) as writer:
        for _ in range(8):
            writer.write_table(one)
    with fuzz_cases.bounded(), pytest.raises(SlideError, match=BOMB):
        read_one(tmp_path / "S1")


def test_what_is_plausible():
    require_plausible("a white image", 1 << 28, 0)
    require_plausible("an array", 100 << 23, 1 << 23)
    with pytest.raises(SlideError, match=BOMB):
        require_plausible("an array", (100 << 23) + 1, 1 << 23)


def test_an_hdf5_file_on_which_the_library_goes_round_for_ever(tmp_path, section):
    path = sources.write_h5ad(tmp_path / "S1.h5ad", section)
    data = bytearray(path.read_bytes())
    heap = data.index(b"GCOL")
    (size,) = struct.unpack_from("<Q", data, heap + 24)  # of the first object
    second = heap + 32 + (size + 7) // 8 * 8
    data[second : second + 16] = bytes(16)
    path.write_bytes(bytes(data))
    with fuzz_cases.bounded(), pytest.raises(SlideError, match="the heap at byte"):
        read_one(path)
    with fuzz_cases.bounded(), pytest.raises(SlideError, match="the heap at byte"):
        build_view(path, tmp_path / "view.html")


# --- names as paths -----------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["../evil", "..", ".hidden", "a/b", "a\\b", "/etc", "x" * 201])
def test_slide_ids_are_plain_names(tmp_path, section, id):
    root = tmp_path / "root"
    sources.write_stimage(root, section, "Visium")
    row = f"{id},human,brain,1,t,a,no,Visium,60,9\n"
    meta = tmp_path / "meta.csv"
    meta.write_text(
        "slide,species,tissue,pmid,title,abstract,involve_cancer,tech,spot_num,gene_num\n" + row
    )
    with pytest.raises(SlideError, match="slide id"):
        find_slides([root], ReadOptions(meta=meta))
    with pytest.raises(SlideError):
        find_slides([f"{root}::{id}"])


def test_a_region_of_spatialdata_is_a_plain_name(tmp_path, section):
    path = sources.write_spatialdata(tmp_path / "S1.zarr", section)
    table = zarr.open_group(path / "tables" / "table", mode="a")
    del table["uns/spatialdata_attrs"]
    facts = {"region": "../../outside", "region_key": "region", "instance_key": "spot_id"}
    sources.write_element(table, "uns/spatialdata_attrs", facts)
    sources.consolidate(path)
    with pytest.raises(SlideError, match=r"slide id '\.\./\.\./outside'"):
        read_one(path)


@pytest.mark.parametrize("place", ["../../secret", "/", "s0/../../../../secret"])
def test_arrays_of_zarr_lie_inside_the_store(tmp_path, section, place):
    path = sources.write_spatialdata(tmp_path / "S1.zarr", section)
    (tmp_path / "secret").mkdir()
    for name in ("S1_hires_image", "S1_lowres_image"):
        group = zarr.open_group(path / "images" / name, mode="a")
        ome = dict(group.attrs["ome"])
        ome["multiscales"][0]["datasets"][0]["path"] = place
        group.attrs["ome"] = ome
    sources.consolidate(path)
    with pytest.raises(SlideError):
        read_one(path)


def test_a_file_names_images_of_its_own_folder_only(tmp_path, section):
    Image.new("RGB", (2000, 2000)).save(tmp_path / "secret.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "link.png").symlink_to(tmp_path / "secret.png")
    adata = sources.to_anndata(section)
    for named in (str(tmp_path / "secret.png"), "../secret.png", "link.png"):
        adata.uns["spatial"]["S1"] = {"metadata": {"source_image_path": named}}
        adata.write_h5ad(tmp_path / "mine" / "S1.h5ad")
        with pytest.raises(SlideError, match="outside its folder"):
            read_one(tmp_path / "mine" / "S1.h5ad")


# --- pickles ------------------------------------------------------------------------------------


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_in_uns_stay_bytes(tmp_path, section):
    mark = tmp_path / "was-here"
    pickled = pickle.dumps(Touch(mark))
    path = sources.write_h5ad(tmp_path / "S1.h5ad", section)
    with h5py.File(path, "a") as file:
        file["uns"].create_dataset("model", data=np.void(pickled))
        file["uns"].create_dataset("text", data=np.frombuffer(pickled, np.uint8))
        file["uns"].create_group(keys.UNS).create_dataset("note", data=np.frombuffer(pickled, "u1"))
    assert read_one(path).n_spots
    for page in (build_view, lambda path, out: build_report(out, files=[path])):
        with suppress(StAlignError):
            page(path, tmp_path / "page.html")
    assert not mark.exists()
    pickle.loads(pickled)
    assert mark.exists()  # it would have shown


def test_arrays_of_objects_are_not_loaded(tmp_path):
    mark = tmp_path / "was-here"
    np.save(tmp_path / "a.npy", np.array([Touch(mark)], object), allow_pickle=True)
    with pytest.raises(ValueError, match="expected"):
        map_array(tmp_path / "a.npy")
    assert not mark.exists()


# --- symbolic links -----------------------------------------------------------------------------


def test_links_are_followed_and_loops_end(tmp_path, section):
    outs = sources.write_spaceranger(tmp_path / "real", section)
    linked = tmp_path / "cohort" / "S1"
    linked.parent.mkdir()
    linked.symlink_to(outs.parent)
    (tmp_path / "cohort" / "loop").symlink_to(tmp_path / "cohort")
    (tmp_path / "cohort" / "self").symlink_to(tmp_path / "cohort" / "self")
    with fuzz_cases.bounded():
        refs = find_slides([tmp_path / "cohort"]).refs
        assert [ref.format for ref in refs] == ["visium"]
        assert refs[0].read().n_spots == len(section.barcodes)
    store_path = sources.write_spatialdata(tmp_path / "S2.zarr", section)
    (store_path / "tables" / "loop").symlink_to(store_path)
    with fuzz_cases.bounded():
        assert find_slides([store_path]).refs[0].read().n_spots


def test_an_output_replaces_a_link_and_not_what_it_points_to(tmp_path):
    precious = tmp_path / "precious.html"
    precious.write_text("mine")
    out = tmp_path / "out.html"
    out.symlink_to(precious)
    replace_file(out, b"page")
    assert precious.read_text() == "mine"
    assert out.read_bytes() == b"page"
    assert not out.is_symlink()


def test_a_source_is_only_read(tmp_path, section, monkeypatch, capsys):
    outs = sources.write_spaceranger(tmp_path / "S1", section)
    files = [p for p in outs.rglob("*") if p.is_file()]
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
    words = ["st-align", "prepare", str(tmp_path / "S1"), "--out", str(tmp_path / "corpus")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    capsys.readouterr()
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files} == before
    assert sorted(p for p in outs.rglob("*") if p.is_file()) == sorted(files)


def test_ids_in_a_corpus_of_somebody_else(tmp_path, section):
    outs = sources.write_spaceranger(tmp_path / "S1", section)
    corpus = build_corpus(find_slides([outs]).refs, tmp_path / "corpus")
    manifest = json.loads((corpus.path / "manifest.json").read_text())
    manifest["slides"] = {"../../S1": manifest["slides"]["S1"]}
    (corpus.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StAlignError, match=r"slide id '\.\./\.\./S1'"):
        Corpus.open(corpus.path)
    assert outs.is_dir()
