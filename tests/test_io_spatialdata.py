from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
import zarr
from PIL import Image

from sources import assert_reads_as, consolidate, section, write_element, write_spatialdata
from st_align import raster
from st_align.errors import SlideError
from st_align.io import ReadOptions, find_slides, read_one
from st_align.raster import TiledImage


@pytest.fixture
def s():
    return section("S1")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return write_spatialdata(tmp_path_factory.mktemp("store") / "S1.zarr", section("S1"))


@pytest.fixture
def store(tmp_path, template):
    return shutil.copytree(template, tmp_path / "S1.zarr")


def change(store, path, **attributes):
    """Rewrite attributes of one element, without the consolidated copy."""
    root = zarr.open_group(store, mode="a", use_consolidated=False)
    (root[path] if path else root).attrs.update(attributes)
    consolidate(store)


def test_as_spatialdata_io_writes_it(store, s):
    slide = read_one(store)
    assert_reads_as(slide, s)
    assert slide.genes.ensembl.tolist() == s.ensembl.tolist()
    assert slide.image.scale == 0.5
    assert slide.technology == "Visium"
    assert list(slide.obs) == ["in_tissue"]
    assert "zarr" in find_slides([store]).refs[0].why


def test_the_full_image_is_the_finest(tmp_path, s):
    slide = read_one(write_spatialdata(tmp_path / "S1.zarr", s, full=True))
    assert slide.image.scale == 1.0
    assert_reads_as(slide, s)


def test_a_large_image_is_read_by_chunk(tmp_path, s, monkeypatch):
    store = write_spatialdata(tmp_path / "S1.zarr", s, full=True)
    monkeypatch.setattr(raster, "WHOLE_BYTES", 200_000)
    slide = read_one(store)
    assert isinstance(slide.image, TiledImage)
    assert_reads_as(slide, s)
    small, scale = slide.image.thumbnail(90)
    assert small.shape == (75, 90, 3)
    assert scale == pytest.approx(0.25)


def test_no_image(tmp_path, s):
    store = write_spatialdata(tmp_path / "S1.zarr", s, hires=False)
    with pytest.raises(SlideError, match=r"holds no image(.|\n)*--no-image"):
        read_one(store)
    assert_reads_as(read_one(store, ReadOptions(no_image=True)), s, image=False)
    Image.fromarray(s.image).save(tmp_path / "full.png")
    assert_reads_as(read_one(store, ReadOptions(image=tmp_path / "full.png")), s)


def test_an_image_turned_by_its_transformation_is_not_used(store):
    root = zarr.open_group(store, mode="r")
    for name in ("S1_hires_image", "S1_lowres_image"):
        ome = root[f"images/{name}"].attrs.asdict()["ome"]
        for row in ome["multiscales"][0]["coordinateTransformations"]:
            row["type"] = "affine"
        change(store, f"images/{name}", ome=ome)
    with pytest.raises(SlideError, match=r"holds no image for 'S1'(.|\n)*by scaling only"):
        read_one(store)


def test_several_regions(store):
    root = zarr.open_group(store, mode="a", use_consolidated=False)
    attributes = root["tables/table/uns/spatialdata_attrs"]
    del attributes["region"]
    write_element(attributes, "region", np.array(["S1", "S2"]))
    consolidate(store)
    with pytest.raises(SlideError, match=r"holds 2 slides(.|\n)*S1, S2"):
        read_one(store)
    assert read_one(f"{store}::S1").id == "S1"
    with pytest.raises(SlideError, match="no slide 'S3'"):
        read_one(f"{store}::S3")


def test_shapes_that_are_no_points(store):
    file = store / "shapes" / "S1" / "shapes.parquet"
    shapes = pd.read_parquet(file)
    shapes["geometry"] = [b"\1\3\0\0\0" + point[5:] for point in shapes["geometry"]]
    shapes["geometry"] = [point + b"\0" for point in shapes["geometry"]]
    shapes.to_parquet(file)
    with pytest.raises(SlideError, match="shapes other than points"):
        read_one(store)


def test_spots_without_a_shape(store):
    file = store / "shapes" / "S1" / "shapes.parquet"
    pd.read_parquet(file).iloc[1:].to_parquet(file)
    with pytest.raises(SlideError, match=r"no shape in 'S1'(.|\n)*1 without one"):
        read_one(store)


def test_shapes_that_are_absent(store):
    (store / "shapes" / "S1" / "shapes.parquet").write_text("x")
    with pytest.raises(SlideError, match="not a shapes element"):
        read_one(store)


def test_no_table(store):
    shutil.rmtree(store / "tables" / "table")
    consolidate(store)
    with pytest.raises(SlideError, match="no table of spots"):
        read_one(store)


def test_a_store_of_something_else(tmp_path):
    zarr.open_group(tmp_path / "x.zarr", mode="w").create_array("a", data=np.zeros(3))
    with pytest.raises(SlideError, match=r"no table of spots(.|\n)*groups: a"):
        read_one(tmp_path / "x.zarr")


def test_a_damaged_store(store):
    (store / "zarr.json").write_text("{")
    with pytest.raises(SlideError, match="not a readable zarr store"):
        read_one(store)


def test_a_damaged_chunk(store):
    chunk = next(p for p in (store / "images" / "S1_hires_image").rglob("c/0/0/0"))
    chunk.write_bytes(chunk.read_bytes()[:10])
    with pytest.raises(SlideError):
        read_one(store)
