from __future__ import annotations

import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from sources import assert_reads_as, section, write_matrix, write_positions, write_spaceranger
from st_align.errors import SlideError
from st_align.image import ArrayImage
from st_align.io import ReadOptions, read_one

VERSIONS = {
    "v1": {"positions": "list", "matrix": "h5"},
    "v1 mtx": {"positions": "list", "matrix": "mtx.gz"},
    "v2": {"positions": "csv", "matrix": "h5"},
    "v3 CytAssist": {"positions": "csv", "matrix": "h5", "antibodies": 4},
    "v4": {"positions": "parquet", "matrix": "mtx"},
    "10x layout 2": {"positions": "list", "matrix": "h5v2"},
}


@pytest.fixture
def s():
    return section("sample")


@pytest.fixture
def outs(tmp_path, s):
    return write_spaceranger(tmp_path / "sample", s)


@pytest.mark.parametrize("version", VERSIONS)
def test_versions(tmp_path, s, version):
    outs = write_spaceranger(tmp_path / "sample", s, **VERSIONS[version])
    slide = read_one(outs)
    assert_reads_as(slide, s)
    assert slide.technology == "Visium"
    assert slide.genes.ensembl.tolist() == s.ensembl.tolist()
    np.testing.assert_array_equal(slide.total_umi, slide.counts.sum(axis=1))


def test_the_species_of_the_reference(outs):
    assert read_one(outs).species == "human"


def test_outs_its_parent_and_a_bare_folder(tmp_path, outs, s):
    assert_reads_as(read_one(outs), s)
    assert_reads_as(read_one(outs.parent), s)
    bare = tmp_path / "elsewhere" / "sample"
    shutil.copytree(outs, bare)
    assert_reads_as(read_one(bare), s)


def test_a_downloaded_matrix_with_a_prefix(outs, s):
    (outs / "filtered_feature_bc_matrix.h5").rename(outs / "V1_x_filtered_feature_bc_matrix.h5")
    assert_reads_as(read_one(outs), s)


def test_eleven_mm_slides_have_more_places(tmp_path, s):
    far = s.with_(places=s.places + np.array([100, 180], np.int32))
    slide = read_one(write_spaceranger(tmp_path / "sample", far, positions="csv"))
    assert_reads_as(slide, far)
    assert slide.places.max() > 127


def test_hires_before_lowres(tmp_path, s):
    assert read_one(write_spaceranger(tmp_path / "a", s)).image.scale == 0.5
    lowres = read_one(write_spaceranger(tmp_path / "b", s, images=("lowres",)))
    assert lowres.image.scale == 0.25


@pytest.mark.parametrize("name", ["full.tif", "full.btf", "full.jpg"])
def test_a_full_resolution_image(tmp_path, outs, s, name):
    path = tmp_path / name
    if name.endswith("jpg"):
        Image.fromarray(s.image).save(path, quality=95)
    else:
        tifffile.imwrite(path, s.image, photometric="rgb", tile=(64, 64))
    slide = read_one(outs, ReadOptions(image=path))
    assert slide.image.scale == 1.0
    assert slide.image.shape == s.image.shape[:2]
    assert_reads_as(slide, s)


def test_no_image(tmp_path, s):
    outs = write_spaceranger(tmp_path / "sample", s, images=())
    with pytest.raises(SlideError, match=r"no image in .*\n.*tissue_hires_image.*\n.*--no-image"):
        read_one(outs)
    slide = read_one(outs, ReadOptions(no_image=True))
    assert slide.image is None
    assert_reads_as(slide, s, image=False)


def test_an_image_without_counts_is_a_slide(outs, s):
    (outs / "filtered_feature_bc_matrix.h5").unlink()
    slide = read_one(outs)
    assert slide.counts is None
    assert slide.total_umi is None
    assert set(slide.barcodes) == set(s.barcodes)
    assert any("image only" in warning for warning in slide.warnings)
    with pytest.raises(SlideError, match="neither counts nor an image"):
        read_one(outs, ReadOptions(no_image=True))


def test_spots_off_the_tissue_are_left_out(outs, s):
    (outs / "spatial" / "tissue_positions_list.csv").unlink()
    write_positions(outs / "spatial", s.rows(slice(3, None)), "csv")
    path = outs / "spatial" / "tissue_positions.csv"
    table = pd.read_csv(path)
    off = table.iloc[:3].assign(barcode=s.barcodes[:3], in_tissue=0, array_row=[60, 62, 64])
    pd.concat([table, off]).to_csv(path, index=False)
    slide = read_one(outs)
    assert_reads_as(slide, s.rows(slice(3, None)))
    assert "3 spots of the matrix are off the tissue: left out" in slide.warnings


def test_spots_without_counts_are_left_out(outs, s):
    (outs / "filtered_feature_bc_matrix.h5").unlink()
    write_matrix(outs, s.rows(slice(0, -2)), "h5")
    slide = read_one(outs)
    assert_reads_as(slide, s.rows(slice(0, -2)))
    assert "2 spots in tissue have no counts: left out" in slide.warnings


def test_visium_hd_without_bins_that_can_be_read_is_refused(outs):
    (outs / "binned_outputs" / "square_002um").mkdir(parents=True)
    with pytest.raises(SlideError, match="no bins of Visium HD") as caught:
        read_one(outs)
    assert "square_016um" in caught.value.expected
    assert caught.value.found == "square_002um"


# --- bad input ----------------------------------------------------------------------------------


def test_truncated_matrix(outs):
    path = outs / "filtered_feature_bc_matrix.h5"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(SlideError, match="truncated or not a 10x matrix"):
        read_one(outs)


def test_a_text_file_named_h5(outs):
    (outs / "filtered_feature_bc_matrix.h5").write_text("barcode,gene\n")
    with pytest.raises(SlideError, match="truncated or not a 10x matrix"):
        read_one(outs)


def test_an_h5_of_something_else(outs):
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "w") as file:
        file["pixels"] = np.zeros(3)
    with pytest.raises(SlideError, match=r"not a 10x matrix(.|\n)*found: +pixels"):
        read_one(outs)


def test_a_matrix_whose_parts_disagree(outs):
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "a") as file:
        shorter = file["matrix/barcodes"][:-1]
        del file["matrix/barcodes"]
        file["matrix/barcodes"] = shorter
    with pytest.raises(SlideError, match="inconsistent"):
        read_one(outs)


def test_a_damaged_mtx(tmp_path, s):
    outs = write_spaceranger(tmp_path / "sample", s, matrix="mtx.gz")
    path = outs / "filtered_feature_bc_matrix" / "matrix.mtx.gz"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(SlideError, match="damaged"):
        read_one(outs)
    path.unlink()
    with pytest.raises(SlideError, match="count matrix is missing"):
        read_one(outs)


def test_only_antibodies(outs, s):
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "a") as file:
        del file["matrix/features/feature_type"]
        file["matrix/features/feature_type"] = np.array(["Antibody Capture"] * 12, "S")
    with pytest.raises(SlideError, match=r"no gene expression(.|\n)*Antibody Capture"):
        read_one(outs)


def test_barcodes_of_another_slide(outs, s):
    (outs / "filtered_feature_bc_matrix.h5").unlink()
    write_matrix(outs, s.with_(barcodes=section(seed=5).barcodes), "h5")
    with pytest.raises(SlideError, match="barcodes of counts and positions do not match"):
        read_one(outs)


def test_duplicate_barcodes(outs, s):
    barcodes = s.barcodes.copy()
    barcodes[1] = barcodes[0]
    (outs / "filtered_feature_bc_matrix.h5").unlink()
    write_matrix(outs, s.with_(barcodes=barcodes), "h5")
    with pytest.raises(SlideError, match="barcodes occur twice"):
        read_one(outs)


def test_no_positions(outs):
    (outs / "spatial" / "tissue_positions_list.csv").unlink()
    with pytest.raises(SlideError, match=r"no positions in .*spatial"):
        read_one(outs)


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "\x00\xff\n", "A-1,1,0,zero,3,4\n"])
def test_positions_that_are_none(outs, content):
    (outs / "spatial" / "tissue_positions_list.csv").write_text(content)
    with pytest.raises(SlideError, match="not a table of positions"):
        read_one(outs)


def test_positions_whose_places_are_fractions(outs):
    path = outs / "spatial" / "tissue_positions_list.csv"
    table = pd.read_csv(path, header=None)
    table[2] = table[2] + 0.5  # what pixels look like when columns are in another order
    table.to_csv(path, header=False, index=False)
    with pytest.raises(SlideError, match="not whole numbers"):
        read_one(outs)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"tissue_hires_scalef": "x"}', "{"])
def test_scale_factors_that_are_none(outs, content):
    (outs / "spatial" / "scalefactors_json.json").write_text(content)
    with pytest.raises(SlideError, match="does not give the image's scale"):
        read_one(outs)


def test_a_scale_factor_of_zero(outs):
    path = outs / "spatial" / "scalefactors_json.json"
    path.write_text(json.dumps({"tissue_hires_scalef": 0}))
    with pytest.raises(SlideError, match="out of range"):
        read_one(outs)
    path.unlink()
    with pytest.raises(SlideError, match="scale factors is missing"):
        read_one(outs)


def test_an_image_that_is_text(outs):
    (outs / "spatial" / "tissue_hires_image.png").write_text("see the other disk")
    with pytest.raises(SlideError, match=r"not an image(.|\n)*see the other"):
        read_one(outs)


def test_zero_spots_and_one(outs, s):
    matrix = outs / "filtered_feature_bc_matrix.h5"
    for rows, message in ((slice(0, 0), "no spots"), (slice(0, 1), "one spot")):
        matrix.unlink()
        write_matrix(outs, s.rows(rows), "h5")
        with pytest.raises(SlideError, match=message):
            read_one(outs)


def test_the_source_is_not_touched(outs):
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in outs.rglob("*")}
    read_one(outs)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in outs.rglob("*")} == before


def test_real_lung(data):
    slide = read_one(data / "visium_lung")
    assert slide.id == "visium_lung"
    assert slide.n_spots == 3643
    assert slide.image.scale == pytest.approx(0.05)
    assert isinstance(slide.image, ArrayImage)
    assert slide.species == "human"
