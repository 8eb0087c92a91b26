from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
import tifffile
from PIL import Image

from sources import coordinate_image
from st_align import raster
from st_align.errors import SlideError
from st_align.image import ArrayImage, open_image, rgb_array
from st_align.raster import TiledImage


@pytest.fixture
def pixels(rng) -> np.ndarray:
    """Smooth, so that a JPEG keeps it; not symmetric, so that a flip or transposition shows."""
    smooth = coordinate_image(180, 260)
    smooth[40:80, 100:180] = (250, 20, 90)
    return smooth


@pytest.fixture
def by_tile(monkeypatch):
    """Read every TIFF as if it were larger than a gigabyte."""
    monkeypatch.setattr(raster, "WHOLE_BYTES", 100_000)


# --- crops --------------------------------------------------------------------------------------


def test_a_crop_at_whole_pixels_is_the_pixels(pixels):
    crop = ArrayImage(pixels).crops([[30, 50, 62, 82]], 32)
    np.testing.assert_array_equal(crop[0], pixels[50:82, 30:62])


def test_float_boxes_are_honoured():
    ramp = np.repeat(np.arange(0, 240, 4, np.uint8)[None, :, None], 50, 0).repeat(3, 2)
    crops = ArrayImage(ramp).crops([[20.0, 10, 30.0, 20], [20.5, 10, 30.5, 20]], 10)
    whole, shifted = crops[:, 5, :, 0].astype(int)
    np.testing.assert_array_equal(shifted - whole, 2)  # half of the 4 that a pixel adds


def test_a_crop_equals_the_box_of_the_whole_image_resampled(pixels):
    box = (33.3, 21.7, 151.9, 140.3)
    whole = Image.fromarray(pixels).resize((40, 40), Image.Resampling.BILINEAR, box=box)
    crop = ArrayImage(pixels).crops([box], 40)[0]
    assert np.abs(crop.astype(int) - np.asarray(whole)).max() <= 1


def test_shrinking_is_antialiased():
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    crop = ArrayImage(stripes).crops([[16, 16, 112, 112]], 12)
    assert np.abs(crop.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("box", [[-20, -20, 20, 20], [240, 160, 280, 200], [300, 200, 340, 240]])
def test_beyond_the_border_the_edge_goes_on(pixels, box):
    padded = np.pad(pixels, ((60, 60), (80, 80), (0, 0)), mode="edge")
    shifted = np.add(box, [80, 60, 80, 60])
    np.testing.assert_array_equal(
        ArrayImage(pixels).crops([box], 40), ArrayImage(padded).crops([shifted], 40)
    )


def test_boxes_are_full_resolution_pixels(pixels):
    half = ArrayImage(pixels, scale=0.5)
    np.testing.assert_array_equal(
        half.crops([[60, 100, 124, 164]], 32), ArrayImage(pixels).crops([[30, 50, 62, 82]], 32)
    )


def test_no_boxes(pixels):
    assert ArrayImage(pixels).crops(np.empty((0, 4)), 8).shape == (0, 8, 8, 3)


def test_thumbnail(pixels):
    small, scale = ArrayImage(pixels, scale=0.5).thumbnail(65)
    assert small.shape == (45, 65, 3)
    assert scale == pytest.approx(0.125)
    whole, scale = ArrayImage(pixels).thumbnail(10_000)
    assert scale == 1.0
    np.testing.assert_array_equal(whole, pixels)


def test_thumbnail_in_bands_has_no_seams(pixels, monkeypatch):
    once, _ = ArrayImage(pixels).thumbnail(65)
    monkeypatch.setattr(raster, "CACHE_BYTES", 20_000)
    banded, _ = ArrayImage(pixels).thumbnail(65)
    assert np.abs(once.astype(int) - banded).max() <= 1


def test_crops_are_fast_enough(rng):
    image = ArrayImage(
        np.broadcast_to(rng.integers(0, 255, (1, 10_000, 3), np.uint8), (10_000,) * 2 + (3,))
    )
    xy = rng.uniform(100, 9_900, (400, 2))
    start = time.process_time()
    image.crops(np.c_[xy - 73, xy + 73], 56)
    image.crops(np.c_[xy - 219, xy + 219], 112)
    assert time.process_time() - start < 1.5  # 15 s for the 4,000 spots of a slide


# --- formats ------------------------------------------------------------------------------------


def test_the_content_tells_the_format(tmp_path, pixels):
    path = tmp_path / "really_a_jpeg.png"
    Image.fromarray(pixels).save(path, format="JPEG", quality=95)
    assert np.abs(open_image(path).region(0, 180, 0, 260).astype(int) - pixels).mean() < 3


@pytest.mark.parametrize(
    ("mode", "tolerance"), [("L", 1), ("P", 60), ("RGBA", 0), ("LA", 1), ("1", 255), ("CMYK", 2)]
)
def test_other_modes_become_rgb(tmp_path, pixels, mode, tolerance):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    source = Image.fromarray(pixels)
    if mode in ("L", "LA", "1"):
        source = source.convert("L")
    source.convert(mode).save(path)
    read = open_image(path).region(0, 180, 0, 260)
    assert read.dtype == np.uint8
    assert np.abs(read.astype(int) - np.asarray(source.convert("RGB"))).max() <= tolerance


def test_transparent_is_white(tmp_path, pixels):
    alpha = np.full(pixels.shape[:2], 255, np.uint8)
    alpha[:90] = 0
    path = tmp_path / "image.png"
    Image.fromarray(np.dstack([pixels, alpha])).save(path)
    read = open_image(path).region(0, 180, 0, 260)
    assert (read[:90] == 255).all()
    np.testing.assert_array_equal(read[90:], pixels[90:])


@pytest.mark.parametrize("bits", [12, 16])
def test_sixteen_bits_are_scaled_by_the_range_used(tmp_path, pixels, bits):
    grey = pixels[..., 0].astype(np.uint16) << (bits - 8)
    Image.fromarray(grey).save(tmp_path / "image.png")
    tifffile.imwrite(tmp_path / "image.tif", grey)
    for name in ("image.png", "image.tif"):
        read = open_image(tmp_path / name).region(0, 180, 0, 260)
        assert np.abs(read[..., 0].astype(int) - pixels[..., 0]).max() <= 1


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_float_arrays(pixels, white):
    np.testing.assert_array_equal(rgb_array(pixels / 255 * white), pixels)


@pytest.mark.parametrize("shape", [(4, 4, 2), (4,), (0, 4, 3), (2, 4, 4, 3)])
def test_arrays_that_are_no_image(shape):
    with pytest.raises(SlideError, match="image"):
        rgb_array(np.zeros(shape, np.uint8))


def test_nan_is_no_pixel():
    with pytest.raises(SlideError, match="NaN"):
        rgb_array(np.full((4, 4), np.nan))


# --- TIFF by region -----------------------------------------------------------------------------

TIFFS = {
    "tiles": {"tile": (64, 64)},
    "jpeg tiles": {"tile": (64, 64), "compression": "jpeg"},
    "bigtiff": {"tile": (64, 64), "bigtiff": True},
    "strips": {"rowsperstrip": 16, "compression": "zlib"},
    "one strip": {},
    "planar tiles": {"tile": (64, 64), "planarconfig": "separate"},
    "planar strips": {"rowsperstrip": 16, "planarconfig": "separate"},
    "big endian": {"tile": (64, 64), "byteorder": ">"},
}


def write_tiff(path, pixels, **options):
    planar = options.get("planarconfig") == "separate"
    data = np.ascontiguousarray(np.moveaxis(pixels, -1, 0)) if planar else pixels
    tifffile.imwrite(path, data, photometric="rgb", **options)
    return path


@pytest.mark.parametrize("kind", TIFFS)
def test_by_region_equals_whole(tmp_path, pixels, monkeypatch, kind):
    path = write_tiff(tmp_path / "image.btf", pixels, **TIFFS[kind])
    whole = open_image(path, 0.5)
    assert isinstance(whole, ArrayImage)
    monkeypatch.setattr(raster, "WHOLE_BYTES", 100_000)
    parts = open_image(path, 0.5)
    assert isinstance(parts, TiledImage) or kind == "one strip"
    assert parts.shape == (180, 260)
    boxes = [[20, 20, 180, 180], [-40, -40, 60, 60], [460, 300, 540, 380]]
    np.testing.assert_array_equal(parts.crops(boxes, 24), whole.crops(boxes, 24))
    np.testing.assert_array_equal(parts.thumbnail(40)[0], whole.thumbnail(40)[0])


def test_tiles_of_sixteen_bits(tmp_path, pixels, by_tile):
    path = write_tiff(tmp_path / "image.tif", pixels.astype(np.uint16) * 257, tile=(64, 64))
    read = open_image(path)
    assert isinstance(read, TiledImage)
    np.testing.assert_array_equal(read.region(0, 180, 0, 260), pixels)


def test_the_pyramid_gives_the_thumbnail(tmp_path, pixels, by_tile):
    path = tmp_path / "pyramid.tif"
    with tifffile.TiffWriter(path) as tif:
        tif.write(pixels, tile=(64, 64), photometric="rgb", subifds=1)
        marked = np.full((90, 130, 3), (1, 2, 3), np.uint8)
        tif.write(marked, tile=(64, 64), photometric="rgb", subfiletype=1)
    small, scale = open_image(path, 0.5).thumbnail(65)
    assert (small == (1, 2, 3)).all()
    assert scale == pytest.approx(0.125)


def test_few_tiles_are_kept(tmp_path, pixels, by_tile, monkeypatch):
    path = write_tiff(tmp_path / "image.tif", pixels, tile=(16, 16))
    monkeypatch.setattr(raster, "CACHE_BYTES", 4 * 16 * 16 * 3)
    read = open_image(path)
    np.testing.assert_array_equal(read.region(0, 180, 0, 260), pixels)
    assert len(read._cache) == 4


def test_a_stack_of_pages_is_no_image(tmp_path):
    tifffile.imwrite(tmp_path / "z.tif", np.zeros((5, 20, 20), np.uint8))
    with pytest.raises(SlideError, match="not one RGB or greyscale image"):
        open_image(tmp_path / "z.tif")


def test_one_huge_block_cannot_be_read_by_region(tmp_path, pixels, by_tile):
    path = write_tiff(tmp_path / "image.tif", pixels, compression="zlib", rowsperstrip=180)
    with pytest.raises(SlideError, match="tiled RGB TIFF"):
        open_image(path)


# --- what is no image ---------------------------------------------------------------------------


def test_missing(tmp_path):
    with pytest.raises(SlideError, match="nothing there"):
        open_image(tmp_path / "none.png")


@pytest.mark.parametrize("content", [b"", b"x", b"yaxis,xaxis,r\n1,2,3\n", b"II*\0\1\2\3"])
def test_not_an_image(tmp_path, content):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(SlideError, match="PNG, JPEG, TIFF"):
        open_image(path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_truncated(tmp_path, pixels, format):
    path = tmp_path / "image"
    Image.fromarray(pixels).save(path, format=format)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SlideError, match="truncated"):
        open_image(path)
    assert path.read_bytes() == whole[: len(whole) // 2]


def test_a_tiff_cut_off_is_not_black(tmp_path, pixels, by_tile):
    path = write_tiff(tmp_path / "image.tif", pixels, tile=(64, 64))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(SlideError, match="truncated"):
        open_image(path)


def test_a_damaged_tile_is_named(tmp_path, pixels, by_tile):
    path = write_tiff(tmp_path / "image.tif", pixels, tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path) as tif:
        at = tif.pages[0].dataoffsets[3]
    content = bytearray(path.read_bytes())
    content[at : at + 20] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(SlideError, match=r"image\.tif is truncated or damaged"):
        open_image(path).region(0, 180, 0, 260)


def test_pil_limit_is_lifted_for_us_alone(tmp_path, pixels, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(path).shape == (180, 260)
    assert Image.MAX_IMAGE_PIXELS == 1000
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(SlideError, match="truncated"):
        open_image(path)
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, pixels, monkeypatch, name):
    Image.fromarray(pixels).save(tmp_path / name)
    monkeypatch.setattr(raster, "MAX_PIXELS", 10_000)
    with pytest.raises(SlideError, match="too large"):
        open_image(tmp_path / name)
