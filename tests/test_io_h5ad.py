from __future__ import annotations

import pickle

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse

from sources import assert_reads_as, section, to_anndata, write_h5ad
from st_align.errors import SlideError
from st_align.io import ReadOptions, find_slides, read_one

NO_IMAGE = ReadOptions(no_image=True)


@pytest.fixture
def s():
    return section("S1")


def written(tmp_path, adata, name="S1"):
    path = tmp_path / f"{name}.h5ad"
    adata.write_h5ad(path)
    return path


def test_squidpy_convention(tmp_path, s):
    slide = read_one(write_h5ad(tmp_path / "S1.h5ad", s))
    assert_reads_as(slide, s)
    assert slide.genes.ensembl.tolist() == s.ensembl.tolist()
    assert slide.technology == "Visium"
    assert slide.image.scale == 0.5


@pytest.mark.parametrize("column", ["gene_symbols", "gene_name", "feature_name", "symbol"])
def test_symbol_columns(tmp_path, s, column):
    adata = to_anndata(s)
    adata.var = adata.var.rename(columns={"gene_symbol": column})
    assert_reads_as(read_one(written(tmp_path, adata)), s)


def test_symbols_as_index_with_ensembl_beside(tmp_path, s):
    adata = to_anndata(s)
    adata.var = pd.DataFrame({"gene_ids": s.ensembl}, index=list(s.symbols))
    slide = read_one(written(tmp_path, adata))
    assert_reads_as(slide, s)
    assert slide.genes.ensembl.tolist() == s.ensembl.tolist()


def test_ensembl_ids_without_symbols(tmp_path, s):
    adata = to_anndata(s)
    del adata.var["gene_symbol"]
    slide = read_one(written(tmp_path, adata))
    assert slide.genes.symbols.tolist() == s.ensembl.tolist()
    assert any("no column of gene symbols" in warning for warning in slide.warnings)


def test_ensembl_ids_lose_their_version(tmp_path, s):
    adata = to_anndata(s.with_(ensembl=np.array([f"{e}.5" for e in s.ensembl])))
    slide = read_one(written(tmp_path, adata))
    assert_reads_as(slide, s)
    assert slide.genes.ensembl.tolist() == s.ensembl.tolist()
    assert any("version" in warning for warning in slide.warnings)


def test_empty_and_repeated_gene_names(tmp_path, s):
    adata = to_anndata(s)
    symbols = s.symbols.astype(object)
    symbols[0], symbols[2] = np.nan, symbols[1]
    adata.var = pd.DataFrame({"gene_symbol": symbols}, index=[f"x{i}" for i in range(12)])
    slide = read_one(written(tmp_path, adata))
    assert slide.genes.symbols.tolist() == [*s.symbols[[1]], *s.symbols[3:]]
    np.testing.assert_array_equal(slide.counts.toarray()[:, 0], s.counts[:, [1, 2]].sum(axis=1))
    np.testing.assert_array_equal(slide.total_umi, s.counts.sum(axis=1))  # the unnamed one too
    assert any("without a name" in warning for warning in slide.warnings)


@pytest.mark.parametrize("column", ["total_umi", "nCount_RNA", "total_counts"])
def test_library_sizes_of_a_gene_subset(tmp_path, s, column):
    adata = to_anndata(s)
    adata.obs[column] = s.counts.sum(axis=1) * 3 + 5
    slide = read_one(written(tmp_path, adata))
    np.testing.assert_array_equal(slide.total_umi, s.counts.sum(axis=1) * 3 + 5)
    assert not any("library sizes" in warning for warning in slide.warnings)


def test_few_genes_without_library_sizes(tmp_path, s):
    slide = read_one(write_h5ad(tmp_path / "S1.h5ad", s))
    assert "library sizes are sums over 12 genes: no obs['total_umi']" in slide.warnings


@pytest.mark.parametrize("damage", ["smaller", "nan", "text"])
def test_library_sizes_that_cannot_be(tmp_path, s, damage):
    adata = to_anndata(s)
    total = s.counts.sum(axis=1).astype(float) + 7
    total[0] = {"smaller": 1, "nan": np.nan, "text": 0}[damage]
    adata.obs["total_umi"] = total.astype(str) if damage == "text" else total
    slide = read_one(written(tmp_path, adata))
    np.testing.assert_array_equal(slide.total_umi, s.counts.sum(axis=1))
    assert any("total_umi" in warning for warning in slide.warnings)


def test_obs_is_kept_less_what_the_slide_has(tmp_path, s):
    adata = to_anndata(s)
    adata.obs["layer"] = pd.Categorical(["L1", "NA"] * (adata.n_obs // 2))
    adata.obs["note"] = pd.Series([None, "x"] * (adata.n_obs // 2), adata.obs.index, object)
    adata.obs["x"] = 1.0
    slide = read_one(written(tmp_path, adata))
    assert list(slide.obs) == ["layer", "note"]
    assert slide.obs.index.tolist() == slide.barcodes.tolist()
    assert slide.obs["layer"].tolist() == ["L1", "NA"] * (adata.n_obs // 2)


@pytest.mark.parametrize("where", ["layer", "raw", "dense"])
def test_raw_counts_beside_normalised_ones(tmp_path, s, where):
    adata = to_anndata(s)
    if where == "raw":
        adata.raw = adata.copy()
    else:
        adata.layers["counts"] = s.counts if where == "dense" else adata.X.copy()
    adata.X = sparse.csr_matrix(np.log1p(s.counts / 2))
    if where == "raw":
        adata = adata[:, :5].copy()
    slide = read_one(written(tmp_path, adata))
    assert_reads_as(slide, s)
    assert any("X does not hold raw counts" in warning for warning in slide.warnings)


@pytest.mark.parametrize("as_type", [np.asarray, sparse.csc_matrix, sparse.csr_array])
def test_matrix_types(tmp_path, s, as_type):
    adata = to_anndata(s)
    adata.X = as_type(s.counts.astype(np.float32))
    assert_reads_as(read_one(written(tmp_path, adata)), s)


def test_no_matrix_is_an_image_only_slide(tmp_path, s):
    slide = read_one(written(tmp_path, to_anndata(s)[:, :0].copy()))
    assert slide.counts is None
    assert slide.image is not None


def test_spots_off_the_tissue_are_left_out(tmp_path, s):
    adata = to_anndata(s)
    adata.obs["in_tissue"] = [0, 0] + [1] * (adata.n_obs - 2)
    slide = read_one(written(tmp_path, adata))
    assert_reads_as(slide, s.rows(slice(2, None)))
    assert "2 spots are off the tissue: left out" in slide.warnings


# --- images -------------------------------------------------------------------------------------


def test_lowres_when_there_is_no_hires(tmp_path, s):
    assert_reads_as(read_one(write_h5ad(tmp_path / "S1.h5ad", s, image="lowres")), s)


def test_fullres_of_cellxgene(tmp_path, s):
    adata = to_anndata(s)
    adata.uns["spatial"]["S1"]["images"]["fullres"] = s.image
    adata.uns["spatial"]["is_single"] = True
    slide = read_one(written(tmp_path, adata))
    assert_reads_as(slide, s)
    assert slide.image.scale == 1.0


def test_a_path_to_the_image(tmp_path, s):
    Image.fromarray(s.image).save(tmp_path / "full.png")
    adata = to_anndata(s)
    adata.uns["spatial"]["S1"] = {"metadata": {"source_image_path": "full.png"}}
    assert_reads_as(read_one(written(tmp_path, adata)), s)
    adata.uns["spatial"]["S1"] = {
        "images": {"hires": str(tmp_path / "full.png")},
        "scalefactors": {"tissue_hires_scalef": 1.0},
    }
    assert_reads_as(read_one(written(tmp_path, adata, "S1")), s)
    (tmp_path / "full.png").unlink()
    with pytest.raises(SlideError, match="image is missing"):
        read_one(tmp_path / "S1.h5ad")


def test_an_image_given(tmp_path, s):
    Image.fromarray(s.image).save(tmp_path / "full.png")
    path = write_h5ad(tmp_path / "S1.h5ad", s, image=None)
    assert_reads_as(read_one(path, ReadOptions(image=tmp_path / "full.png")), s)


def test_no_image(tmp_path, s):
    path = write_h5ad(tmp_path / "S1.h5ad", s, image=None)
    with pytest.raises(SlideError, match=r"holds no image(.|\n)*--no-image"):
        read_one(path)
    assert_reads_as(read_one(path, NO_IMAGE), s, image=False)


@pytest.mark.parametrize("uns", [{"images": {}}, {"scalefactors": {"tissue_hires_scalef": 0.5}}])
def test_a_library_without_an_image(tmp_path, s, uns):
    adata = to_anndata(s)
    adata.uns["spatial"] = {"S1": {"metadata": {"a": 1}, **uns}}
    with pytest.raises(SlideError, match="holds no image for 'S1'"):
        read_one(written(tmp_path, adata))


@pytest.mark.parametrize(("factor", "message"), [(None, "cannot be read"), (0.0, "out of range")])
def test_scale_factors_that_are_none(tmp_path, s, factor, message):
    adata = to_anndata(s)
    factors = {} if factor is None else {"tissue_hires_scalef": factor}
    adata.uns["spatial"]["S1"]["scalefactors"] = factors
    with pytest.raises(SlideError, match=message):
        read_one(written(tmp_path, adata))


# --- several slides in one file -----------------------------------------------------------------


@pytest.fixture
def two(tmp_path, s):
    other = section("S2", seed=1)
    parts = {name: to_anndata(x) for name, x in (("S1", s), ("S2", other))}
    both = anndata.concat(parts, label="library_id", merge="same", uns_merge="unique")
    both.obs["odd"] = "same"
    return written(tmp_path, both, "both"), s, other


def test_several_libraries_are_listed(two):
    path, *_ = two
    with pytest.raises(SlideError, match=r"holds 2 slides(.|\n)*S1, S2(.|\n)*both.h5ad::S1"):
        read_one(path)


def test_one_library_is_picked(two):
    path, s, other = two
    assert_reads_as(read_one(f"{path}::S1"), s)
    assert_reads_as(read_one(f"{path}::S2"), other)
    with pytest.raises(SlideError, match="holds no slide 'S3'"):
        read_one(f"{path}::S3")


def test_libraries_that_no_column_tells_apart(two, tmp_path):
    adata = anndata.read_h5ad(two[0])
    del adata.obs["library_id"]
    path = written(tmp_path, adata, "mixed")
    with pytest.raises(SlideError, match="which spots belong to 'S1'"):
        read_one(f"{path}::S1")


# --- places and technology ----------------------------------------------------------------------


def test_places_as_row_and_col(tmp_path, s):
    adata = to_anndata(s)
    adata.obs.columns = ["row", "col"]
    assert_reads_as(read_one(written(tmp_path, adata)), s)


def test_columns_that_are_no_places(tmp_path, s):
    adata = to_anndata(s)
    adata.obs["array_row"] = adata.obs["array_row"] + 0.5
    slide = read_one(written(tmp_path, adata))
    assert slide.places is None
    assert any("are no places" in warning for warning in slide.warnings)


def test_places_off_the_hexagonal_lattice_are_not_visium_places(tmp_path, s):
    adata = to_anndata(s)
    adata.obs["array_col"] = adata.obs["array_col"] // 2
    slide = read_one(written(tmp_path, adata))
    assert slide.places is None
    assert any("not Visium places" in warning for warning in slide.warnings)


def test_two_spots_on_one_place(tmp_path, s):
    adata = to_anndata(s)
    for column in ("array_row", "array_col"):
        adata.obs.iloc[1, adata.obs.columns.get_loc(column)] = adata.obs[column].iloc[0]
    with pytest.raises(SlideError, match="share a place"):
        read_one(written(tmp_path, adata))


@pytest.mark.parametrize("technology", ["Visium", "ST"])
def test_barcodes_tell_the_technology_without_a_word(tmp_path, technology):
    slide = read_one(written(tmp_path, to_anndata(section("S1", technology=technology))))
    assert slide.technology == technology
    assert not any("technology" in warning for warning in slide.warnings)


@pytest.mark.parametrize(
    ("technology", "evidence", "reason"),
    [
        ("Visium", "places", "odd rows hold odd columns"),
        ("ST", "places", "odd and even columns"),
        ("Visium", "xy", "6 nearest"),
        ("ST", "xy", "4 nearest"),
    ],
)
def test_a_guessed_technology_is_said_with_its_reason(tmp_path, technology, evidence, reason):
    s = section("S1", technology=technology)
    s = s.with_(barcodes=np.array([f"spot{i}" for i in range(len(s.xy))]))
    adata = to_anndata(s)
    if evidence == "xy":
        adata.obs = adata.obs[[]]
    slide = read_one(written(tmp_path, adata))
    assert slide.technology == technology
    assert any(reason in warning for warning in slide.warnings)


def test_the_technology_given_wins(tmp_path, s):
    slide = read_one(write_h5ad(tmp_path / "S1.h5ad", s), ReadOptions(technology="ST"))
    assert slide.technology == "ST"
    assert not any("taken to be" in warning for warning in slide.warnings)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"spot,gene\n", b"\x89HDF\r\n\x1a\n" + b"\0" * 50])
def test_not_an_h5ad(tmp_path, content):
    path = tmp_path / "S1.h5ad"
    path.write_bytes(content)
    with pytest.raises(SlideError, match="truncated or not an h5ad file"):
        read_one(path)


def test_truncated(tmp_path, s):
    path = write_h5ad(tmp_path / "S1.h5ad", s)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SlideError, match="truncated or not an h5ad file"):
        read_one(path)


def test_hdf5_of_something_else(tmp_path):
    with h5py.File(tmp_path / "S1.h5ad", "w") as file:
        file["obs"] = np.zeros(3)
    with pytest.raises(SlideError, match="not an AnnData object"):
        read_one(tmp_path / "S1.h5ad")
    with h5py.File(tmp_path / "S1.h5ad", "a") as file:
        file["var"] = np.zeros(3)
    with pytest.raises(SlideError, match="obs"):
        read_one(tmp_path / "S1.h5ad")


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "NaN"), (-1.0, "negative"), (0.5, "fractions"), (2.0**40, r"values above 2\^31")],
)
def test_values_that_are_no_counts(tmp_path, s, value, message):
    adata = to_anndata(s)
    counts = s.counts.astype(np.float64)
    counts[3, 4] = value
    adata.X = sparse.csr_matrix(counts)
    with pytest.raises(SlideError, match=rf"raw counts(.|\n)*1 {message}"):
        read_one(written(tmp_path, adata))


def test_all_spots_empty(tmp_path, s):
    with pytest.raises(SlideError, match="all 42 spots are empty"):
        read_one(write_h5ad(tmp_path / "S1.h5ad", s.with_(counts=s.counts * 0)))


def test_some_spots_empty(tmp_path, s):
    counts = s.counts.copy()
    counts[:4] = 0
    slide = read_one(write_h5ad(tmp_path / "S1.h5ad", s.with_(counts=counts)))
    assert (slide.total_umi == 0).sum() == 4
    assert "4 of 42 spots (9.5%) have no counts: masked" in slide.warnings


def test_no_coordinates(tmp_path, s):
    adata = to_anndata(s)
    adata.obsm["X_pca"] = adata.obsm.pop("spatial")
    with pytest.raises(SlideError, match=r"no coordinates(.|\n)*X_pca"):
        read_one(written(tmp_path, adata))


def test_coordinates_in_obs(tmp_path, s):
    adata = to_anndata(s)
    adata.obs["pxl_col_in_fullres"], adata.obs["pxl_row_in_fullres"] = adata.obsm["spatial"].T
    del adata.obsm["spatial"]
    assert_reads_as(read_one(written(tmp_path, adata)), s)


def test_coordinates_in_three_dimensions(tmp_path, s):
    adata = to_anndata(s)
    adata.obsm["spatial"] = np.c_[s.xy, s.xy[:, 0]]
    with pytest.raises(SlideError, match=r"holds no coordinates(.|\n)*42, 3"):
        read_one(written(tmp_path, adata))


def test_coordinates_that_are_nan(tmp_path, s):
    xy = s.xy.astype(float)
    xy[5] = np.nan
    with pytest.raises(SlideError, match=r"not finite(.|\n)*1 spots"):
        read_one(write_h5ad(tmp_path / "S1.h5ad", s.with_(xy=xy)))


def test_coordinates_outside_the_image(tmp_path, s):
    with pytest.raises(SlideError, match="outside the image") as error:
        read_one(write_h5ad(tmp_path / "S1.h5ad", s.with_(xy=s.xy * 3)))
    assert "swapped" not in str(error.value)


def test_x_and_y_swapped(tmp_path, s):
    wide = s.with_(image=s.image[:, :].repeat(3, axis=1)[:260], xy=s.xy * [3, 1])
    read_one(write_h5ad(tmp_path / "S1.h5ad", wide))
    swapped = wide.with_(xy=wide.xy[:, ::-1])
    with pytest.raises(SlideError, match=r"outside the image(.|\n)*swapped"):
        read_one(write_h5ad(tmp_path / "S1.h5ad", swapped))


def test_spots_just_beyond_the_border(tmp_path, s):
    slide = read_one(write_h5ad(tmp_path / "S1.h5ad", s.with_(xy=s.xy - [45, 0])))
    assert any("just outside the image" in warning for warning in slide.warnings)


def test_duplicate_barcodes(tmp_path, s):
    names = s.barcodes.copy()
    names[1] = names[0]
    with pytest.warns(UserWarning, match="not unique"):
        path = write_h5ad(tmp_path / "S1.h5ad", s.with_(barcodes=names))
    with pytest.raises(SlideError, match="barcodes occur twice"):
        read_one(path)


@pytest.mark.parametrize(("n", "message"), [(0, "no spots"), (1, "one spot")])
def test_too_few_spots(tmp_path, s, n, message):
    path = write_h5ad(tmp_path / "S1.h5ad", s.rows(slice(0, n)))
    with pytest.raises(SlideError, match=message):
        read_one(path)


def test_three_spots_are_a_slide(tmp_path, s):
    assert_reads_as(read_one(write_h5ad(tmp_path / "S1.h5ad", s.rows(slice(3)))), s.rows(slice(3)))


class Exploit:
    def __reduce__(self):
        raise AssertionError("a pickle was made")


def test_a_pickle_in_uns_is_never_loaded(tmp_path, s, monkeypatch):
    path = write_h5ad(tmp_path / "S1.h5ad", s)
    with h5py.File(path, "a") as file:
        file["uns/model"] = np.void(pickle.dumps({"a": 1}))
        file["uns/odd"] = np.zeros(2, dtype=[("a", "i4"), ("b", "S3")])
        file["obsm/odd"] = np.void(b"x")
    monkeypatch.setattr(pickle, "loads", lambda *a, **k: pytest.fail("a pickle was loaded"))
    monkeypatch.setattr(pickle, "load", lambda *a, **k: pytest.fail("a pickle was loaded"))
    assert_reads_as(read_one(path), s)


def test_an_image_that_is_a_pickle(tmp_path, s):
    path = write_h5ad(tmp_path / "S1.h5ad", s)
    with h5py.File(path, "a") as file:
        del file["uns/spatial/S1/images/hires"]
        file["uns/spatial/S1/images/hires"] = np.void(pickle.dumps(s.image[:2, :2]))
    with pytest.raises(SlideError):
        read_one(path)


# --- real slides --------------------------------------------------------------------------------


def test_real_dlpfc(data):
    slide = read_one(data / "dlpfc" / "151674.h5ad")
    assert (slide.n_spots, len(slide.genes)) == (3673, 5000)
    assert slide.patient == "Br8100"
    assert slide.patient_origin == "obs"
    assert slide.total_umi.mean() > slide.counts.sum() / slide.n_spots
    assert set(slide.obs["layer"].astype(str)) >= {"L1", "WM"}
    assert slide.image.shape == (600, 600)


def test_real_counts_only(data):
    for folder, n in (("counts_only", 5), ("her2st_counts", 23)):
        refs = find_slides([data / folder], NO_IMAGE).refs
        assert len(refs) == n
    hcc = read_one(data / "counts_only" / "HCC1.h5ad", NO_IMAGE)
    assert hcc.technology == "Visium"
    assert hcc.places is not None
    assert (hcc.total_umi >= hcc.counts.sum(axis=1)).all()
    bcl = read_one(data / "counts_only" / "BCL1.h5ad", NO_IMAGE)
    assert bcl.technology == "ST"
    assert bcl.places is None
    with pytest.raises(SlideError, match="holds no image"):
        read_one(data / "counts_only" / "BCL1.h5ad")
