from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sources import assert_reads_as, section, write_stimage
from st_align.errors import ConfigError, SlideError
from st_align.io import ReadOptions, find_slides, read_one
from st_align.io.stimage import select_meta

META = """slide,species,tissue,pmid,tech,spot_num
GSE1_GSM1,human,breast,1,Visium,42
GSE1_GSM2,human,brain,1,Visium,20
GSE2_GSM9,mouse,brain,2,Visium,42
GSE3_X_A1,human,breast,3,ST,30
GSE4_GSM5,human,lung,4,Visium,900
GSE5_GSM6,human,lung,4,VisiumHD,9000
"""


@pytest.fixture
def st():
    return section("GSE3_X_A1", technology="ST")


@pytest.fixture
def root(tmp_path, st):
    write_stimage(tmp_path / "root", st, "ST")
    for id, image in (("GSE1_GSM1", "PNG"), ("GSE1_GSM2", "JPEG"), ("GSE2_GSM9", "PNG")):
        write_stimage(tmp_path / "root", section(id), "Visium", image=image)
    return tmp_path / "root"


@pytest.fixture
def meta(tmp_path):
    path = tmp_path / "meta.csv"
    path.write_text(META)
    return path


def ids(found):
    return [ref.id for ref in found.refs]


def test_a_root(root, st):
    found = find_slides([root])
    assert ids(found) == ["GSE1_GSM1", "GSE1_GSM2", "GSE2_GSM9", "GSE3_X_A1"]
    assert found.absent == {}
    slides = {ref.id: ref.read() for ref in found.refs}
    assert_reads_as(slides["GSE3_X_A1"], st)
    assert_reads_as(slides["GSE1_GSM1"], section("GSE1_GSM1"), places=False)
    assert slides["GSE1_GSM1"].technology == "Visium"
    assert slides["GSE1_GSM1"].places is None
    assert slides["GSE3_X_A1"].technology == "ST"


def test_one_of_its_folders(root):
    assert ids(find_slides([root / "ST"])) == ["GSE3_X_A1"]
    assert read_one(root / "ST").technology == "ST"
    assert ids(find_slides([root], ReadOptions(technology="ST"))) == ["GSE3_X_A1"]


def test_a_slide_is_picked(root):
    assert read_one(f"{root}::GSE1_GSM2").id == "GSE1_GSM2"
    with pytest.raises(SlideError, match=r"holds 4 slides(.|\n)*::GSE1_GSM1"):
        read_one(root)


@pytest.mark.parametrize("order", ["COLxROW", "ROWxCOL"])
def test_names_give_the_places_of_st(tmp_path, st, order):
    if order == "ROWxCOL":
        st = st.with_(barcodes=np.array([f"{st.id}_{r}x{c}" for r, c in st.places]))
    assert_reads_as(read_one(write_stimage(tmp_path, st, "ST")), st)


def test_measured_names_are_rounded(tmp_path, st):
    names = [f"{st.id}_{c - 0.06:.2f}x{r + 0.08:.2f}" for r, c in st.places]
    st = st.with_(barcodes=np.array(names))
    assert_reads_as(read_one(write_stimage(tmp_path, st, "ST")), st)


def test_names_without_numbers_give_no_places(tmp_path, st):
    st = st.with_(barcodes=np.array([f"spot{i}" for i in range(len(st.xy))]))
    assert read_one(write_stimage(tmp_path, st, "ST")).places is None


@pytest.mark.parametrize("technology", ["ST", "Visium"])
def test_a_folder_of_another_name_tells_by_its_barcodes(tmp_path, technology):
    folder = write_stimage(tmp_path, section("a_b", technology=technology), technology)
    folder = folder.rename(tmp_path / "mine")
    slide = read_one(folder)
    assert slide.technology == technology
    assert any("technology taken to be" in warning for warning in slide.warnings)
    assert read_one(folder, ReadOptions(technology="ST")).technology == "ST"


def test_the_study_is_the_patient(root):
    found = find_slides([root / "Visium"])
    slides = [ref.read() for ref in found.refs]
    assert [s.patient for s in slides] == ["GSE1", "GSE1", "GSE2"]
    assert {s.patient_origin for s in slides} == {"study"}
    assert any("whole study 'GSE1'" in warning for warning in slides[0].warnings)


def test_repeated_and_empty_symbols(tmp_path, st):
    symbols = st.symbols.copy()
    symbols[2], symbols[5] = symbols[1], ""
    folder = write_stimage(tmp_path, st.with_(symbols=symbols), "ST")
    slide = read_one(folder)
    assert len(slide.genes) == 10
    assert slide.counts.sum() == st.counts.sum() - st.counts[:, 5].sum()


# --- curation by the index ----------------------------------------------------------------------


def test_curation(root, meta):
    options = ReadOptions(meta=meta, species="human", technology="Visium", min_spots=30)
    found = find_slides([root], options)
    assert ids(found) == ["GSE1_GSM1"]
    assert list(found.absent) == ["GSE4_GSM5"]
    assert "coord/GSE4_GSM5_coord.csv" in found.absent["GSE4_GSM5"]
    slide = found.refs[0].read()
    assert (slide.tissue, slide.species) == ("breast", "human")
    assert slide.licence == "MIT, as part of STimage-1K4M"
    assert find_slides([root], ReadOptions()).refs[0].read().licence == ""


def test_curation_over_both_technologies(root, meta):
    found = find_slides([root], ReadOptions(meta=meta, species="Human"))
    assert ids(found) == ["GSE1_GSM1", "GSE1_GSM2", "GSE3_X_A1"]
    assert list(found.absent) == ["GSE4_GSM5"]


def test_curation_of_a_folder_alone(root, meta):
    found = find_slides([root / "Visium"], ReadOptions(meta=meta))
    assert ids(found) == ["GSE1_GSM1", "GSE1_GSM2", "GSE2_GSM9"]
    assert found.absent["GSE3_X_A1"] == "no folder ST/"


def test_nothing_left(root, meta):
    with pytest.raises(SlideError, match=r"passes the curation(.|\n)*human, mouse"):
        find_slides([root], ReadOptions(meta=meta, species="plant"))
    options = ReadOptions(meta=meta, species="human", min_spots=500)
    with pytest.raises(SlideError, match=r"no slide to read(.|\n)*GSE4_GSM5: no coord"):
        find_slides([root], options)


def test_an_index_for_something_else(tmp_path, meta, root):
    from sources import write_h5ad

    write_h5ad(tmp_path / "S1.h5ad", section("S1"))
    with pytest.raises(ConfigError, match="not STimage-1K4M"):
        find_slides([tmp_path / "S1.h5ad"], ReadOptions(meta=meta))


def test_an_index_without_its_columns(root, tmp_path):
    path = tmp_path / "meta.csv"
    path.write_text("slide,species,tissue,technology,spot_num\na,human,skin,ST,1\n")
    with pytest.raises(SlideError, match=r"no column 'tech'(.|\n)*technology"):
        find_slides([root], ReadOptions(meta=path))


@pytest.mark.parametrize("id", ["../../etc", "a/b", ""])
def test_ids_of_the_index_are_no_paths(root, tmp_path, id):
    path = tmp_path / "meta.csv"
    path.write_text(f"slide,species,tissue,tech,spot_num\n{id},human,skin,ST,60\n")
    with pytest.raises(SlideError, match="cannot be used"):
        find_slides([root], ReadOptions(meta=path))


def test_the_real_index(data):
    path = data / "stimage1k4m" / "meta" / "meta_all_gene02122025.csv"
    rows = select_meta(path, species="human", technology="Visium", min_spots=50)
    assert len(rows) == 531
    assert rows["spot_num"].sum() == 1_301_755


def test_the_real_index_on_the_slides_at_hand(data):
    path = data / "stimage1k4m" / "meta" / "meta_all_gene02122025.csv"
    options = ReadOptions(meta=path, species="human", technology="ST", min_spots=50)
    found = find_slides([data / "her2st"], options)
    assert len(found.refs) == 6
    assert len(found.absent) > 50


# --- bad input ----------------------------------------------------------------------------------


def test_files_that_are_absent(root):
    (root / "Visium" / "image" / "GSE1_GSM1.png").unlink()
    (root / "Visium" / "coord" / "GSE2_GSM9_coord.csv").unlink()
    found = find_slides([root])
    assert ids(found) == ["GSE1_GSM2", "GSE3_X_A1"]
    assert "no image/GSE1_GSM1.png" in found.absent["GSE1_GSM1"]
    assert "no coord/" in found.absent["GSE2_GSM9"]
    assert "GSE1_GSM1" in ids(find_slides([root], ReadOptions(no_image=True)))
    with pytest.raises(SlideError, match=r"GSE1_GSM1 cannot be read(.|\n)*no image/"):
        read_one(f"{root}::GSE1_GSM1")


def test_visium_hd_alone(tmp_path):
    write_stimage(tmp_path, section("a_b"), "VisiumHD")
    with pytest.raises(SlideError, match=r"VisiumHD is not supported"):
        find_slides([tmp_path])


@pytest.mark.parametrize("content", ["", "\x00\x01", "spot,a,b\ns,x,y\n", "a\n1,2,3\n"])
def test_counts_that_are_none(root, content):
    (root / "ST" / "gene_exp" / "GSE3_X_A1_count.csv").write_text(content)
    with pytest.raises(SlideError):
        read_one(root / "ST")


@pytest.mark.parametrize("content", ["", "spot,x,y\na,1,2\n", "s,yaxis,xaxis,r\na,b,c,d\n"])
def test_coordinates_that_are_none(root, content):
    (root / "ST" / "coord" / "GSE3_X_A1_coord.csv").write_text(content)
    with pytest.raises(SlideError, match="not a table of coordinates"):
        read_one(root / "ST")


@pytest.mark.parametrize(("value", "message"), [(0.5, "fractions"), (-2, "neg"), (None, "NaN")])
def test_values_that_are_no_counts(root, value, message):
    path = root / "ST" / "gene_exp" / "GSE3_X_A1_count.csv"
    table = pd.read_csv(path, index_col=0).astype(float)
    table.iloc[2, 3] = np.nan if value is None else value
    table.to_csv(path)
    with pytest.raises(SlideError, match=rf"raw counts(.|\n)*{message}"):
        read_one(root / "ST")


def test_spots_that_do_not_match(root, st):
    write_stimage(root, st.rows(slice(5)), "ST")
    coordinates = root / "ST" / "coord" / "GSE3_X_A1_coord.csv"
    table = pd.read_csv(coordinates, index_col=0)
    table.rename(index={table.index[0]: "other"}).to_csv(coordinates)
    with pytest.raises(SlideError, match=r"do not match(.|\n)*1 without one"):
        read_one(root / "ST")


def test_spots_without_counts(root, st):
    path = root / "ST" / "gene_exp" / "GSE3_X_A1_count.csv"
    pd.read_csv(path, index_col=0).iloc[:-2].to_csv(path)
    slide = read_one(root / "ST")
    assert_reads_as(slide, st.rows(slice(0, -2)))
    assert "2 spots have no counts: left out" in slide.warnings


def test_a_radius_that_does_not_fit(root):
    path = root / "ST" / "coord" / "GSE3_X_A1_coord.csv"
    pd.read_csv(path, index_col=0).assign(r=200.0).to_csv(path)
    slide = read_one(root / "ST")
    assert any("stated radius" in warning for warning in slide.warnings)


def test_an_image_of_another_slide(root, st):
    Image.fromarray(st.image[:50, :50]).save(root / "ST" / "image" / "GSE3_X_A1.png")
    with pytest.raises(SlideError, match="outside the image"):
        read_one(root / "ST")


def test_real_her2st_agrees_with_the_study(data):
    mine = read_one(f"{data / 'her2st'}::Human_Breast_Andersson_10142021_ST_A1")
    study = read_one(data / "her2st_counts" / "A1.h5ad", ReadOptions(no_image=True))
    names = [b.removeprefix("Human_Breast_Andersson_10142021_ST_") for b in mine.barcodes]
    rows = pd.Index(study.barcodes).get_indexer(names)
    assert (rows >= 0).all()
    np.testing.assert_array_equal(mine.places, study.places[rows])
    np.testing.assert_array_equal(mine.total_umi, study.total_umi[rows])
    assert (mine.counts != study.counts[rows]).nnz == 0
