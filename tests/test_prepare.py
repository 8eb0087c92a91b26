"""A slide is cut into spots and niches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from st_align.errors import ConfigError
from st_align.geometry import niche_boxes
from st_align.image import ArrayImage
from st_align.prepare import cut_niche, prepare_slide, slide_warnings
from toy_slides import PITCH, toy_slide

LOW = "px per spot"


def test_patches_are_crops_of_the_boxes():
    slide = toy_slide()
    found = prepare_slide(slide, ("lattice", "k3"), spot_px=11, niche_px=30)
    half = PITCH * 0.55 / 2
    squares = np.c_[slide.xy - half, slide.xy + half]
    np.testing.assert_array_equal(found.spot_patches, slide.image.crops(squares, 11))
    for spec, width in (("lattice", 7), ("k3", 4)):
        niche = found.niches[spec]
        assert niche.neighbors.shape == (16, width)
        np.testing.assert_allclose(niche.boxes, niche_boxes(niche.neighbors, squares))
        np.testing.assert_array_equal(niche.patches, slide.image.crops(niche.boxes, 30))
    assert found.um_per_px == pytest.approx(100 / PITCH)


def test_a_spot_is_seen_in_its_own_patch():
    slide = toy_slide()
    pixels = np.zeros((*slide.image.shape, 3), np.uint8)
    for i, (x, y) in enumerate(slide.xy):
        pixels[int(y) - 5 : int(y) + 5, int(x) - 5 : int(x) + 5] = 10 * i + 5
    found = prepare_slide(dataclasses.replace(slide, image=ArrayImage(pixels)), ("lattice",))
    centres = found.spot_patches[:, 26:30, 26:30].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(centres, 10 * np.arange(16) + 5)


def test_the_same_tissue_at_half_resolution_has_the_same_boxes():
    full, half = (
        prepare_slide(toy_slide(scale=scale), ("lattice",), spot_px=8, niche_px=8)
        for scale in (1.0, 0.5)
    )
    assert full.um_per_px == half.um_per_px
    np.testing.assert_array_equal(full.niches["lattice"].boxes, half.niches["lattice"].boxes)


def test_spots_hold_our_columns_and_then_the_source_s():
    slide = toy_slide()
    obs = slide.obs.assign(x=1.0, total_umi=2.0, last=3)
    spots = prepare_slide(dataclasses.replace(slide, obs=obs), ()).spots
    assert list(spots) == [
        *("barcode", "array_row", "array_col", "x", "y", "total_umi"),
        *("layer", "note", "last"),
    ]
    np.testing.assert_array_equal(spots[["x", "y"]], slide.xy)
    np.testing.assert_array_equal(spots["total_umi"], slide.total_umi)
    assert spots["barcode"].tolist() == slide.barcodes.tolist()
    assert spots["layer"].tolist() == slide.obs["layer"].tolist()


def test_without_image_counts_or_places():
    slide = dataclasses.replace(toy_slide(image=False), places=None)
    found = prepare_slide(slide, ("k3", "lattice"))
    assert found.spot_patches is None
    assert found.um_per_px is None
    assert found.niches["k3"].patches is None
    assert (found.spots[["array_row", "array_col"]] == -1).all(axis=None)
    image_only = prepare_slide(toy_slide(counts=False), ("k3",))
    assert image_only.counts is None
    assert image_only.genes is None
    assert image_only.spots["total_umi"].isna().all()
    assert image_only.has_image


def test_few_pixels_per_spot_are_told():
    (said,) = prepare_slide(toy_slide(scale=0.5), ("k3",)).warnings
    assert said.startswith(f"the image has {PITCH * 0.55 / 2:.1f} {LOW}")
    assert not prepare_slide(toy_slide(scale=2.0), ("k3",)).warnings
    assert not prepare_slide(toy_slide(image=False), ("k3",)).warnings


def test_fewer_spots_than_a_niche_are_told():
    slide = toy_slide(rows=1, cols=3, image=False)
    (said,) = prepare_slide(slide, ("k3", "k2", "lattice")).warnings
    assert said == "3 spots are fewer than the 4 of a niche k3"


def test_warnings_do_not_depend_on_the_order_of_specs():
    slide = dataclasses.replace(toy_slide(rows=1, cols=3), warnings=("from the reader",))
    assert slide_warnings(slide, ("k9", "k3")) == slide_warnings(slide, ("k3", "k9"))
    assert slide_warnings(slide, ())[0] == "from the reader"


def test_unknown_niche():
    with pytest.raises(ConfigError, match="no niche is called"):
        cut_niche(toy_slide(), "ring")
