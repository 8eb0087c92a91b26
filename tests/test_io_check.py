from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from sources import coordinate_image, section
from st_align.errors import SlideError
from st_align.image import ArrayImage
from st_align.io import check_slide
from st_align.slide import Slide
from toys import toy_genes


@pytest.fixture
def slide() -> Slide:
    """A slide that a person builds without any reader."""
    s = section("S1")
    return Slide(
        id="S1",
        technology="Visium",
        source="memory",
        barcodes=s.barcodes,
        xy=s.xy,
        places=s.places,
        counts=sparse.csr_array(s.counts),
        genes=toy_genes(12),
        total_umi=None,
        image=ArrayImage(coordinate_image()),
        obs=pd.DataFrame(index=s.barcodes),
        patient="P1",
        patient_origin="table",
    )


def test_a_good_slide_passes(slide):
    checked = check_slide(slide)
    np.testing.assert_array_equal(checked.total_umi, slide.counts.sum(axis=1))
    assert checked.warnings == ()
    assert check_slide(checked).warnings == ()


def test_obs_becomes_what_parquet_holds(slide, tmp_path):
    mixed = pd.DataFrame(
        {"mixed": [1, "a", None] * 14, 7: 1, "x": 2.0, "total_umi": 3}, index=slide.barcodes
    )
    checked = check_slide(replace(slide, obs=mixed))
    assert list(checked.obs) == ["mixed", "7"]
    assert checked.obs["mixed"].iloc[:2].tolist() == ["1", "a"]
    assert checked.obs["mixed"].isna().sum() == 14
    checked.obs.to_parquet(tmp_path / "obs.parquet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "../S1"}, "cannot be used"),
        ({"counts": None, "image": None}, "neither counts nor an image"),
        ({"xy": np.zeros((3, 2))}, "differ in length"),
        ({"places": np.zeros((3, 2), np.int32)}, "differ in length"),
        ({"genes": None}, "0 genes are named, the matrix has 12"),
        ({"genes": toy_genes(11)}, "11 genes are named"),
        ({"total_umi": np.ones(42)}, "smaller than the counts"),
        ({"total_umi": np.full(42, np.nan)}, "smaller than the counts"),
        ({"counts": sparse.csr_array((42, 12))}, "all 42 spots are empty"),
        ({"counts": sparse.csr_array(np.full((42, 12), 0.5))}, "fractions"),
    ],
)
def test_what_contradicts_itself(slide, changes, message):
    with pytest.raises(SlideError, match=message):
        check_slide(replace(slide, **changes))


def test_an_error_says_expected_found_and_what_to_do(slide):
    with pytest.raises(SlideError) as error:
        check_slide(replace(slide, counts=sparse.csr_array(np.full((42, 12), 0.5))))
    assert all(word in str(error.value) for word in ("expected:", "found:", "to do:"))
    assert "\n" not in error.value.one_line()
