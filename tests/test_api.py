"""pp, tl, pl: what is written into objects in memory, and sentences for what is missing."""

from __future__ import annotations

import subprocess
import sys

import anndata
import numpy as np
import pytest

import st_align as sta
import toy_run
from sources import section
from st_align import keys, store
from st_align.errors import ConfigError, SlideError
from st_align.trained import STAlign
from toys import toy_prepared


def as_anndata(id: str, *, seed: int = 0) -> anndata.AnnData:
    """A section as squidpy keeps it."""
    s = section(id, seed=seed)
    adata = anndata.AnnData(s.counts.astype(np.float32))
    adata.obs_names, adata.var_names = s.barcodes, s.symbols
    adata.obs["array_row"], adata.obs["array_col"] = s.places.T
    adata.obs["layer"] = np.where(s.places[:, 0] < 3, "upper", "lower")
    adata.obsm["spatial"] = s.xy
    factors = {"tissue_hires_scalef": 1.0, "spot_diameter_fullres": 26.0}
    adata.uns["spatial"] = {id: {"images": {"hires": s.image}, "scalefactors": factors}}
    return adata


@pytest.fixture(scope="module")
def model() -> STAlign:
    rng = np.random.default_rng(0)
    return STAlign(toy_run.toy_run([toy_prepared(rng, id=f"t{i}", n_genes=12) for i in range(2)]))


@pytest.fixture
def adata() -> anndata.AnnData:
    return as_anndata("s1")


@pytest.fixture
def embedded(adata, model) -> anndata.AnnData:
    sta.tl.embed(adata, model=model)
    return adata


def test_the_package_is_imported_without_anything_heavy():
    code = (
        "import sys, st_align; assert st_align.__version__;"
        "heavy = {'torch', 'numpy', 'anndata', 'scanpy', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy; assert 'tl' in dir(st_align)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sta.nothing


def test_what_is_written_survives_a_file(embedded, tmp_path):
    sta.pp.niches(embedded)
    sta.pp.normalise(embedded)
    sta.pp.patches(embedded, side=8)
    sta.tl.domains(embedded, n_domains=2, label_key="layer", refine=True)
    embedded.write_h5ad(tmp_path / "a.h5ad")
    again = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert again.obsm[keys.PATCHES].shape == (again.n_obs, 8, 8, 3)
    np.testing.assert_array_equal(again.obsm[keys.EMBEDDING], embedded.obsm[keys.EMBEDDING])
    notes = store.notes(again)
    assert notes["slide"] == "s1"
    assert notes["domains"]["n_domains"] == 2
    assert notes["domains"]["ari_stored"] + 1 >= 0
    sta.tl.domains(again, n_domains=3, key_added="mine")
    assert again.obs["mine"].nunique() == 3


def test_rows_keep_their_order_and_off_tissue_ones_hold_nothing(adata, model):
    whole = sta.tl.embed(adata, model=model, copy=True)
    assert keys.EMBEDDING not in adata.obsm
    adata.obs["in_tissue"] = 1
    adata.obs.iloc[[0, 5], adata.obs.columns.get_loc("in_tissue")] = 0
    sta.tl.embed(adata, model=model)
    off = np.isnan(adata.obsm[keys.EMBEDDING]).all(axis=1)
    assert np.flatnonzero(off).tolist() == [0, 5]
    kept = whole.obsm[keys.EMBEDDING][~off]
    correlation = np.corrcoef(kept[:, 0], adata.obsm[keys.EMBEDDING][~off, 0])[0, 1]
    assert abs(correlation) > 0.9
    sta.tl.domains(adata, n_domains=2)
    assert adata.obs[keys.DOMAIN].isna().to_numpy().tolist() == off.tolist()


def test_a_dict_and_a_table_of_several_libraries_agree(model):
    slides = {name: as_anndata(name, seed=i) for i, name in enumerate(("s1", "s2"))}
    table = anndata.concat(slides, label="library_id", index_unique="-", uns_merge="unique")
    sta.tl.embed(slides, model=model)
    sta.tl.embed(table, model=model)
    rows = np.concatenate([a.obsm[keys.EMBEDDING] for a in slides.values()])
    np.testing.assert_allclose(table.obsm[keys.EMBEDDING], rows, atol=1e-5)
    sta.tl.domains(table, n_domains=2)
    assert set(table.obs[keys.DOMAIN]) == {"s1:0", "s1:1", "s2:0", "s2:1"}
    assert set(store.notes(table)["slides"]) == {"s1", "s2"}
    shares = sta.tl.joint_domains(table, n_domains=2)
    assert shares.groupby("slide")["share"].sum().tolist() == pytest.approx([1, 1])
    chances = table.obsm[keys.probability(keys.DOMAIN)]
    np.testing.assert_allclose(chances.sum(axis=1), 1, atol=1e-5)


def test_a_cohort_whose_slides_lack_images_in_part_is_joined_on_what_all_have(model):
    slides = {name: as_anndata(name, seed=i) for i, name in enumerate(("s1", "s2"))}
    sta.tl.embed(slides["s1"], model=model)
    sta.tl.embed(slides["s2"], model=model, no_image=True)
    sta.tl.joint_domains(slides, n_domains=2)
    uses = {store.notes(slide)["domains"]["use"] for slide in slides.values()}
    assert uses == {"linear+linear-scaled"}


def test_slides_without_counts_are_joined_on_the_learned_view(model):
    slides = {name: as_anndata(name, seed=i) for i, name in enumerate(("s1", "s2"))}
    for slide in slides.values():
        sta.tl.embed(slide, model=model)
    for use in keys.LINEAR_USES:
        del slides["s2"].obsm[keys.embedding(use)]
    shares = sta.tl.joint_domains(slides, n_domains=2, runs=1)
    assert shares.groupby("slide")["share"].sum().tolist() == pytest.approx([1, 1])
    assert store.notes(slides["s1"])["domains"]["use"] == "gene"
    store.note(slides["s2"], use="image")
    for method in ("consensus", "gmm"):
        with pytest.raises(SlideError, match=r"(?s)same modalities.*s1: gene.*s2: image"):
            sta.tl.joint_domains(slides, n_domains=2, method=method)


def test_niches_are_a_graph(adata):
    sta.pp.niches(adata, niche="k3")
    graph = adata.obsp[keys.connectivities(keys.NICHE)]
    assert graph.sum(axis=1).A1.tolist() == [3.0] * adata.n_obs
    assert not graph.diagonal().any()


def test_normalise_uses_the_library_of_all_genes(adata):
    adata.obs["total_umi"] = 100.0
    sta.pp.normalise(adata)
    np.testing.assert_allclose(
        adata.layers[keys.NORMALISED].toarray(), np.log1p(adata.X / 100 * 1e4), rtol=1e-5
    )
    del adata.layers[keys.NORMALISED]
    adata.X = adata.X + 0.5
    with pytest.raises(SlideError, match="does not hold raw counts"):
        sta.pp.normalise(adata)


def test_annotation_and_retrieval(embedded, model):
    other = as_anndata("s2", seed=1)
    sta.tl.annotate(other, reference=embedded, label_key="layer", model=model)
    assert set(other.obs[keys.LABEL]) <= {"upper", "lower", keys.UNKNOWN}
    assert list(other.obsm[keys.probability(keys.LABEL)]) == ["lower", "upper"]
    sta.tl.embed(other, model=model)
    spot = embedded.obs_names[3]
    hits = sta.tl.retrieve(
        embedded, spot=spot, within={"s1": embedded, "s2": other}, by="gene", n=5
    )
    assert len(hits) == 5
    assert not ((hits["slide"] == "s1") & (hits["barcode"] == spot)).any()
    assert hits["similarity"].is_monotonic_decreasing
    with pytest.raises(ConfigError, match="is no spot of the query"):
        sta.tl.retrieve(embedded, spot="nowhere", within=embedded)


def test_sentences_for_what_is_missing(adata, model):
    bare = anndata.AnnData(adata.X, obs=adata.obs, var=adata.var)
    with pytest.raises(SlideError, match=r"obsm\['spatial'\] not found") as caught:
        sta.tl.embed(bare, model=model)
    assert "coordinates=" in caught.value.fix
    sta.tl.embed(bare, model=model, coordinates=adata.obsm["spatial"], no_image=True)
    assert keys.EMBEDDING in bare.obsm
    with pytest.raises(SlideError, match=r"obsm\['X_stalign'\] not found"):
        sta.tl.domains(adata)
    with pytest.raises(SlideError, match="this is no slide"):
        sta.pp.niches(adata.X)
    with pytest.raises(ConfigError, match=r"obs\['library'\] not found"):
        sta.pp.niches(adata, library_key="library")
    with pytest.raises(ConfigError, match="holds no coordinates"):
        sta.pp.niches(adata, coordinates=np.zeros((3, 2)))
    with pytest.raises(SlideError, match="there is no slide"):
        sta.pp.niches({})


def test_figures(embedded, model, tmp_path):
    sta.pp.niches(embedded)
    sta.tl.domains(embedded, n_domains=2)
    sta.pl.domains(embedded, label_key="layer", save=tmp_path / "domains.png")
    sta.pl.genes(embedded, ["GENE1", "GENE2"], save=tmp_path / "genes.png")
    sta.pl.embedding(embedded, save=tmp_path / "embedding.png")
    sta.pl.niche(embedded, spot=4, save=tmp_path / "niche.png")
    sta.tl.attention(embedded, model=model)
    np.testing.assert_allclose(embedded.obsm[keys.ATTENTION].sum(axis=1), 1, rtol=1e-5)
    sta.pl.attention(embedded, spots=2, save=tmp_path / "attention.png")
    assert {p.stem for p in tmp_path.glob("*.png")} == {
        "domains", "genes", "embedding", "niche", "attention",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="has no gene 'GENE99'"):
        sta.pl.genes(embedded, "GENE99")


def test_simulated_slides_are_the_same_twice():
    first, again = (sta.datasets.simulated(slides=1, spots=60, seed=3) for _ in range(2))
    [name] = first
    assert first[name].obs["domain"].notna().all()
    np.testing.assert_array_equal(first[name].X.toarray(), again[name].X.toarray())
    assert "spatial" in first[name].uns
