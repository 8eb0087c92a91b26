from __future__ import annotations

import pickle
import shutil

import numpy as np
import pandas as pd
import pytest

from sources import section, to_anndata, write_h5ad, write_spaceranger, write_spatialdata
from st_align.errors import ConfigError, SlideError
from st_align.io import ReadOptions, find_slides, read_one
from st_align.io.check import check_id


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    write_spaceranger(folder / "c_ranger", section("c_ranger"))
    write_h5ad(folder / "a_anndata.h5ad", section("a_anndata", seed=1))
    write_spatialdata(folder / "b_spatial.zarr", section("b_spatial", seed=2))
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.h5ad").write_text("x")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def cohort(tmp_path, template):
    """A folder with one slide of each kind, and things that are no slides."""
    return shutil.copytree(template, tmp_path / "cohort")


def table(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


def ids(found):
    return [ref.id for ref in found.refs]


def test_a_folder_of_slides(cohort):
    found = find_slides([cohort])
    assert [(ref.id, ref.format) for ref in found.refs] == [
        ("a_anndata", "h5ad"),
        ("b_spatial", "spatialdata"),
        ("c_ranger", "visium"),
    ]
    assert all(ref.why for ref in found.refs)
    assert [ref.read().id for ref in found.refs] == ids(found)


def test_references_go_to_other_processes(cohort):
    found = pickle.loads(pickle.dumps(find_slides([cohort])))
    assert found.refs[2].read().n_spots == 42


def test_a_format_asked_for(cohort):
    assert ids(find_slides([cohort], ReadOptions(format="h5ad"))) == ["a_anndata"]
    with pytest.raises(SlideError, match=r"no slide in .*\n.*Space Ranger") as error:
        find_slides([cohort / "a_anndata.h5ad"], ReadOptions(format="visium"))
    assert "AnnData" not in str(error.value)


def test_one_of_a_folder(cohort):
    assert read_one(f"{cohort}::b_spatial").id == "b_spatial"
    with pytest.raises(SlideError, match=r"no slide 'b_spatal'(.|\n)*'b_spatial'"):
        read_one(f"{cohort}::b_spatal")


def test_what_was_looked_for_and_what_was_there(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(SlideError, match="an empty folder"):
        find_slides([tmp_path / "x"])
    (tmp_path / "x" / "slide.svs").write_text("x")
    with pytest.raises(SlideError) as error:
        find_slides([tmp_path / "x"])
    for word in ("Space Ranger", "AnnData", "SpatialData", "STimage-1K4M", "slide.svs"):
        assert word in str(error.value)
    with pytest.raises(SlideError, match="does not exist"):
        find_slides([tmp_path / "nowhere"])
    with pytest.raises(SlideError, match="a file of 1 bytes"):
        find_slides([tmp_path / "x" / "slide.svs"])
    with pytest.raises(SlideError, match="no source"):
        find_slides([])


def test_a_refused_slide_among_good_ones(cohort):
    (cohort / "hd" / "outs" / "binned_outputs").mkdir(parents=True)
    found = find_slides([cohort])
    assert len(found.refs) == 3
    assert "Visium HD" in found.absent["hd"]


def test_a_bad_slide_among_good_ones_fails_only_when_read(cohort):
    (cohort / "bad.h5ad").write_text("x")
    found = find_slides([cohort])
    assert ids(found) == ["a_anndata", "b_spatial", "bad", "c_ranger"]
    with pytest.raises(SlideError, match="not an h5ad"):
        found.refs[2].read()


def test_two_slides_with_one_id(cohort, tmp_path):
    write_h5ad(tmp_path / "c_ranger.h5ad", section("c_ranger"))
    with pytest.raises(SlideError, match=r"two slides have the id 'c_ranger'(.|\n)*h5ad"):
        find_slides([cohort, tmp_path / "c_ranger.h5ad"])


@pytest.mark.parametrize("id", ["", ".", "..", "a/b", "../x", "a\\b", "a::b", "a\nb", "x" * 201])
def test_ids_that_are_no_folder_names(id):
    with pytest.raises(SlideError, match="cannot be used"):
        check_id(id, "somewhere")


def test_an_id_picked_that_is_a_path(cohort):
    with pytest.raises(SlideError, match="cannot be used"):
        read_one(f"{cohort}::../x")


@pytest.mark.parametrize(
    "options",
    [
        {"format": "vizium"},
        {"technology": "visum"},
        {"min_spots": -1},
        {"image": "x.png", "no_image": True},
    ],
)
def test_options_that_contradict(options):
    with pytest.raises(ConfigError):
        ReadOptions(**options)


def test_one_image_for_several_slides(cohort, tmp_path):
    with pytest.raises(ConfigError, match="for several slides"):
        find_slides([cohort], ReadOptions(image=tmp_path / "x.png"))


def test_too_few_spots(cohort):
    ref = find_slides([cohort], ReadOptions(min_spots=43)).refs[0]
    with pytest.raises(SlideError, match=r"too few spots(.|\n)*43(.|\n)*42"):
        ref.read()


def test_the_species_given(cohort):
    found = find_slides([cohort], ReadOptions(species="mouse"))
    assert [ref.read().species for ref in found.refs] == ["mouse", "mouse", "human"]


# --- patients -----------------------------------------------------------------------------------


def test_the_table_comes_first(cohort, tmp_path):
    path = table(tmp_path, "p.csv", "Slide,Patient\na_anndata,P1\nb_spatial,P1\nc_ranger,P2\n")
    slides = [ref.read() for ref in find_slides([cohort], ReadOptions(patients=path)).refs]
    assert [s.patient for s in slides] == ["P1", "P1", "P2"]
    assert {s.patient_origin for s in slides} == {"table"}
    assert not any("no patient" in w for s in slides for w in s.warnings)


@pytest.mark.parametrize("column", ["subject", "patient", "donor"])
def test_one_constant_column_of_obs(tmp_path, column):
    adata = to_anndata(section("S1"))
    adata.obs[column] = "Br1"
    adata.write_h5ad(tmp_path / "S1.h5ad")
    slide = read_one(tmp_path / "S1.h5ad")
    assert (slide.patient, slide.patient_origin) == ("Br1", "obs")
    adata.obs[column] = ["Br1", "Br2"] * 21
    adata.write_h5ad(tmp_path / "S1.h5ad")
    slide = read_one(tmp_path / "S1.h5ad")
    assert (slide.patient, slide.patient_origin) == ("S1", "slide")
    assert any("a patient of its own" in warning for warning in slide.warnings)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a_anndata,P1\n", r"lacks 2 of 3 slides(.|\n)*b_spatial, c_ranger"),
        (
            "a_anndata,P1\nb_spatial,P1\nc_ranger,P2\nc_rangr,P2\n",
            r"names 1 unknown slides(.|\n)*did you mean 'c_ranger'",
        ),
        ("a_anndata,P1\na_anndata,P2\n", r"two patients(.|\n)*'P1' and 'P2'"),
        ("a_anndata,\n", "incomplete row"),
        ("a_anndata,NA\n", "incomplete row"),
        ("", "lacks 3 of 3"),
    ],
)
def test_a_table_that_does_not_fit(cohort, tmp_path, rows, message):
    path = table(tmp_path, "p.csv", "slide,patient\n" + rows)
    with pytest.raises(SlideError, match=message):
        find_slides([cohort], ReadOptions(patients=path))


@pytest.mark.parametrize("content", ["", "slide;patient\na;b\n", "id,donor\na,b\n"])
def test_a_table_that_is_none(cohort, tmp_path, content):
    path = table(tmp_path, "p.csv", content)
    with pytest.raises(SlideError, match="patient table"):
        find_slides([cohort], ReadOptions(patients=path))


def test_a_table_that_is_missing_or_binary(cohort, tmp_path):
    with pytest.raises(SlideError, match="patient table is missing"):
        find_slides([cohort], ReadOptions(patients=tmp_path / "none.csv"))
    (tmp_path / "p.csv").write_bytes(b"\xff\xfe\x00slide")
    with pytest.raises(SlideError, match="not a table"):
        find_slides([cohort], ReadOptions(patients=tmp_path / "p.csv"))


def test_a_table_of_the_cohort_serves_one_slide_of_it(cohort, tmp_path):
    path = table(tmp_path, "p.csv", "slide\tpatient\na_anndata\tP1\nb_spatial\tP1\n")
    assert read_one(f"{cohort}::b_spatial", ReadOptions(patients=path)).patient == "P1"


# --- columns for spots --------------------------------------------------------------------------


def test_columns_are_joined_by_barcode(tmp_path):
    s = section("S1")
    source = write_h5ad(tmp_path / "S1.h5ad", s)
    frame = pd.DataFrame({"Barcode": s.barcodes[::-1], "label": ["NA", *["x"] * 41], "score": 1.5})
    frame.iloc[:-1].to_csv(tmp_path / "obs.csv", index=False, encoding="utf-8-sig")
    slide = read_one(source, ReadOptions(obs=tmp_path / "obs.csv"))
    assert slide.obs["label"].iloc[-1] == "NA"
    assert slide.obs["label"].isna().sum() == 1
    assert slide.obs["score"].iloc[-1] == 1.5
    assert "1 of 42 spots have no row in obs.csv" in slide.warnings


def test_columns_for_several_slides(cohort, tmp_path):
    frames = [
        pd.DataFrame({"slide": id, "barcode": section(id, seed=seed).barcodes, "label": id})
        for id, seed in (("c_ranger", 0), ("a_anndata", 1))
    ]
    pd.concat(frames).to_csv(tmp_path / "obs.csv", index=False)
    found = find_slides([cohort], ReadOptions(obs=tmp_path / "obs.csv"))
    slides = {ref.id: ref.read() for ref in found.refs}
    assert set(slides["c_ranger"].obs["label"]) == {"c_ranger"}
    assert set(slides["a_anndata"].obs["label"]) == {"a_anndata"}
    assert "label" not in slides["b_spatial"].obs
    assert "obs.csv has no row for it" in slides["b_spatial"].warnings
    pd.concat(frames).drop(columns="slide").to_csv(tmp_path / "obs.csv", index=False)
    with pytest.raises(SlideError, match="does not name slides"):
        find_slides([cohort], ReadOptions(obs=tmp_path / "obs.csv"))


def test_columns_of_other_spots(tmp_path):
    source = write_h5ad(tmp_path / "S1.h5ad", section("S1"))
    path = table(tmp_path, "obs.csv", "barcode,label\nAAA-1,x\n")
    with pytest.raises(SlideError, match=r"fits no spot of slide 'S1'(.|\n)*AAA-1"):
        read_one(source, ReadOptions(obs=path))
    twice = "".join(f"{b},x\n" for b in section("S1").barcodes[[0, 0]])
    with pytest.raises(SlideError, match="names a spot twice"):
        read_one(source, ReadOptions(obs=table(tmp_path, "o.csv", "barcode,label\n" + twice)))


def test_a_joined_column_can_name_the_patient(tmp_path):
    s = section("S1")
    source = write_h5ad(tmp_path / "S1.h5ad", s)
    pd.DataFrame({"barcode": s.barcodes, "patient": "P7"}).to_csv(tmp_path / "o.csv", index=False)
    slide = read_one(source, ReadOptions(obs=tmp_path / "o.csv"))
    assert (slide.patient, slide.patient_origin) == ("P7", "obs")


def test_real_lung_with_its_annotation(data):
    lung = data / "visium_lung"
    slide = read_one(lung, ReadOptions(obs=lung / "healthy_sample_annotation.csv"))
    assert slide.obs["annotation"].notna().mean() > 0.9
    assert np.unique(slide.obs["annotation"].dropna()).size > 1


def test_all_real_slides(data):
    found = find_slides([data / "dlpfc", data / "visium_lung", data / "her2st"])
    assert len(found.refs) == 10
    assert {ref.format for ref in found.refs} == {"h5ad", "visium", "stimage"}
