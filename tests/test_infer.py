from __future__ import annotations

import dataclasses
import json

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import toy_run
from st_align import keys, store
from st_align.checkpoint import load_run
from st_align.commands.domains import views_of
from st_align.embedded import to_anndata
from st_align.errors import CorpusError, ModelError, OutputError, SlideError
from st_align.infer import Embedder, run_hash, training_slides, without_counts, without_image
from st_align.io import ReadOptions
from st_align.io.detect import read_one
from st_align.mosaic import mosaic
from st_align.prepare import prepare_slide
from st_align.slide import Niche
from toys import toy_prepared

LETTERS = ("r", "u", "e", "t", "h_spot", "h_niche")


@pytest.fixture(scope="module")
def slides():
    rng = np.random.default_rng(0)
    return [toy_prepared(rng, id="a"), toy_prepared(rng, id="b", patient="p1", rows=5)]


@pytest.fixture(scope="module")
def run(slides):
    return toy_run.toy_run(slides)


@pytest.fixture(scope="module")
def reader(run):
    return Embedder(run)


@pytest.fixture
def fresh(rng):
    """A slide the run never saw."""
    return toy_prepared(rng, id="new", patient="p9", rows=7)


def emptied(slide, rows):
    """The slide with some spots without any count."""
    counts = slide.counts.toarray()
    counts[rows] = 0
    umi = counts.sum(axis=1).astype(float)
    spots = slide.spots.assign(total_umi=umi)
    return dataclasses.replace(slide, counts=sparse.csr_array(counts), spots=spots)


def test_shapes_and_readouts_of_a_new_slide(run, reader, fresh):
    found = reader.embed(fresh)
    n, d = fresh.n_spots, run.config.model.dim
    assert [getattr(found, x).shape for x in LETTERS] == [(n, d)] * 4 + [(n, 2 * d)] * 2
    assert set(found.readouts) == set(keys.USES)
    assert all(len(v) == n and np.isfinite(v).all() for v in found.readouts.values())
    assert found.panel_measured == 1.0
    np.testing.assert_allclose(found.readouts["gene"].mean(axis=0), 0, atol=1e-5)


def test_an_embedding_does_not_depend_on_other_slides_or_on_row_order(reader, fresh):
    first = reader.embed(fresh)
    order = np.random.default_rng(3).permutation(fresh.n_spots)
    place = np.argsort(order)
    niche = fresh.niches["lattice"]
    members = niche.neighbors[order]
    shuffled = dataclasses.replace(
        fresh,
        spots=fresh.spots.iloc[order].reset_index(drop=True),
        counts=fresh.counts[order],
        spot_patches=fresh.spot_patches[order],
        niches={
            "lattice": Niche(
                neighbors=np.where(members >= 0, place[members], -1).astype(np.int32),
                boxes=niche.boxes[order],
                patches=niche.patches[order],
            )
        },
    )
    second = reader.embed(shuffled)
    for letter in LETTERS:
        np.testing.assert_allclose(
            getattr(second, letter), getattr(first, letter)[order], atol=1e-5
        )


def test_one_modality_is_enough(reader, fresh):
    counts_only, image_only = (
        reader.embed(without_image(fresh)),
        reader.embed(without_counts(fresh)),
    )
    both = reader.embed(fresh)
    assert not counts_only.has_image.any()
    assert not image_only.has_counts.any()
    assert set(counts_only.readouts) == set(keys.USES) - {"image"}
    assert set(image_only.readouts) == set(keys.USES) - {"gene"}
    assert image_only.panel_measured == 0.0
    np.testing.assert_array_equal(image_only.r, both.r)
    np.testing.assert_allclose(counts_only.t, both.t, atol=1e-6)
    assert not counts_only.r.any()
    assert counts_only.h_spot.any(axis=1).all()
    assert image_only.h_niche.any(axis=1).all()


def test_spots_without_counts_are_masked_and_counted(run, reader, fresh):
    slide = emptied(fresh, [3, 10])
    found = reader.embed(slide)
    assert not found.readouts["gene"][[3, 10]].any()
    assert found.has_counts.sum() == slide.n_spots - 2
    assert all(np.isfinite(v).all() for v in found.readouts.values())
    assert store.notes(to_anndata(run, slide, found))["n_masked"] == 2


def test_a_slide_of_empty_spots_alone_still_has_its_image(run, reader, fresh):
    slide = emptied(fresh, slice(None))
    adata = to_anndata(run, slide, reader.embed(slide))
    assert keys.embedding("gene") not in adata.obsm
    assert np.isfinite(adata.obsm[keys.EMBEDDING]).all()
    assert store.notes(adata)["use"] == "image"


def test_neither_image_nor_counts(reader, fresh):
    with pytest.raises(SlideError, match="nothing that the model can read"):
        reader.embed(without_image(without_counts(fresh)))


def test_a_model_without_images_ignores_them_and_says_so(slides, fresh):
    reader = Embedder(toy_run.toy_run([without_image(s) for s in slides]))
    found = reader.embed(fresh)
    assert "image" not in found.readouts
    assert any("trained without images" in text for text in found.warnings)
    with pytest.raises(SlideError, match="the image is ignored"):
        reader.embed(without_counts(fresh))


def test_missing_genes_count_as_average_and_are_reported(run, reader, fresh):
    kept = np.flatnonzero(~np.isin(fresh.genes.symbols, run.panel.genes[:15]))
    genes = dataclasses.replace(
        fresh.genes, symbols=fresh.genes.symbols[kept], ensembl=fresh.genes.ensembl[kept]
    )
    slide = dataclasses.replace(fresh, counts=fresh.counts[:, kept], genes=genes)
    found = reader.embed(slide)
    assert found.panel_measured == 0.25
    assert any("25% of the model's 20 genes" in text for text in found.warnings)
    assert store.notes(to_anndata(run, slide, found))["panel_measured"] == 0.25


def test_what_does_not_fit_is_named(run, reader, rng, fresh):
    with pytest.raises(CorpusError, match="--niche lattice"):
        reader.embed(dataclasses.replace(fresh, niches={}))
    with pytest.raises(ModelError, match=r"16 and 24 px\n.*20 and 24 px"):
        reader.embed(toy_prepared(rng, patch=20))
    unfinished = dataclasses.replace(run, provenance={"finished": False})
    with pytest.raises(ModelError, match="--resume"):
        Embedder(unfinished)
    use = dataclasses.replace(run.preprocess.frozen["niche_image"], fingerprint="f" * 12)
    other = dataclasses.replace(run.preprocess, frozen={"niche_image": use})
    with pytest.raises(ModelError, match="fingerprint ffff"):
        Embedder(dataclasses.replace(run, preprocess=other))
    mouse = dataclasses.replace(
        fresh.genes, symbols=np.char.capitalize(np.char.lower(fresh.genes.symbols)),
        ensembl=np.full(len(fresh.genes), ""),
    )  # fmt: skip
    with pytest.raises(ModelError, match="mouse"):
        reader.embed(dataclasses.replace(fresh, genes=mouse))


def test_a_saved_run_embeds_bit_for_bit_and_has_the_same_hash(run, reader, fresh, tmp_path):
    loaded = load_run(toy_run.save(run, tmp_path / "run"))
    assert run_hash(loaded) == run_hash(run)
    first, second = reader.embed(fresh), Embedder(loaded).embed(fresh)
    for letter in LETTERS:
        np.testing.assert_array_equal(getattr(first, letter), getattr(second, letter))
    next(loaded.model.parameters()).data += 1e-3
    assert run_hash(loaded) != run_hash(run)


def test_training_slides_include_those_of_the_run_it_started_from(run):
    earlier = {"slides": [{"id": "z", "patient": "p7"}], "init": None}
    later = dataclasses.replace(run, provenance={**run.provenance, "init": earlier})
    assert training_slides(later) == {"a": "p0", "b": "p1", "z": "p7"}


def test_anndata_survives_h5ad(run, reader, fresh, tmp_path):
    mixed = pd.Series(["x", None, 3, np.nan] * fresh.n_spots)[: fresh.n_spots]
    spots = fresh.spots.assign(mixed=mixed, stalign_domain="old", **{"cell/type": "c"})
    slide = dataclasses.replace(fresh, spots=spots)
    adata = to_anndata(run, slide, reader.embed(slide))
    store.write_h5ad(adata, tmp_path / "out.h5ad")
    back = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert back.obsm[keys.EMBEDDING].shape == (slide.n_spots, 4)
    np.testing.assert_array_equal(
        back.obsm[keys.EMBEDDING], adata.obsm[keys.embedding("gene")][:, :4]
    )
    np.testing.assert_array_equal(back.X.toarray(), slide.counts.toarray())
    np.testing.assert_array_equal(back.obsm[keys.SPATIAL], slide.spots[["x", "y"]])
    for use, spots in back.uns[keys.TRAINING].items():
        np.testing.assert_array_equal(spots, run.readouts.linear[use].spots)
        assert spots.shape[1] == back.obsm[keys.embedding(use)].shape[1]
    assert back.obs["domain"].tolist() == slide.spots["domain"].tolist()
    assert back.obs["mixed"].isna().sum() == mixed.isna().sum()
    own = {"array_row", "array_col", "total_umi"}
    assert set(back.obs) == own | {"domain", "mixed", "cell_type", "patient"}
    library = back.uns[keys.SPATIAL]["new"]
    assert library["images"]["hires"].dtype == np.uint8
    assert library["scalefactors"]["spot_diameter_fullres"] == pytest.approx(55 / 5)
    notes = store.notes(back)
    assert notes["trained_on"] == {"a": "p0", "b": "p1"}
    assert notes["model_hash"] == run_hash(run)
    assert notes["provenance"]["encoders"]["niche_image"]["licence"] == "BSD-3-Clause"
    json.dumps(notes)


@pytest.mark.parametrize("strip", [without_counts, without_image])
def test_anndata_of_one_modality(run, reader, fresh, tmp_path, strip):
    slide = strip(fresh)
    adata = to_anndata(run, slide, reader.embed(slide))
    store.write_h5ad(adata, tmp_path / "out.h5ad")
    back = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert back.shape == (fresh.n_spots, 0 if slide.counts is None else 30)
    assert (keys.SPATIAL in back.uns) == slide.has_image
    _, use, views = views_of(back, None, "consensus")
    seen = ("+".join(use), [view.training is not None for view in views])
    linear = ("linear+linear-scaled", [True, True])
    assert seen == (("image", [False]) if slide.has_image else linear)


def test_domains_look_at_all_views_of_a_slide_with_both(run, reader, fresh):
    adata = to_anndata(run, fresh, reader.embed(fresh))
    _, use, views = views_of(adata, None, "consensus")
    assert use == [run.config.readout.use, "linear", "linear-scaled"]
    assert [view.training is None for view in views] == [True, False, False]
    _, use, (alone,) = views_of(adata, "linear", "consensus")
    assert (use, alone.training is None) == (["linear"], False)
    assert views_of(adata, "linear", "gmm")[2] == []
    adata.uns[keys.TRAINING]["linear"] = np.zeros((5, 2))
    with pytest.raises(SlideError, match=r"(?s)training spots do not fit.*\(5, 2\)"):
        views_of(adata, None, "consensus")
    del adata.uns[keys.TRAINING]
    assert not any(view.training is not None for view in views_of(adata, None, "consensus")[2])


def test_our_file_is_a_slide_again(run, reader, fresh, tmp_path):
    # Patches as wide as the niche's box in pixels: the stitched picture loses nothing.
    adata = to_anndata(run, fresh, reader.embed(fresh))
    path = store.write_h5ad(adata, tmp_path / "new.h5ad")
    slide = read_one(path, ReadOptions())
    assert slide.id == "new"
    assert slide.patient == "p9"
    np.testing.assert_array_equal(slide.counts.toarray(), fresh.counts.toarray())
    np.testing.assert_array_equal(slide.places, fresh.spots[["array_row", "array_col"]])
    again = prepare_slide(slide, ("lattice",), spot_px=16, niche_px=24)
    np.testing.assert_array_equal(
        again.niches["lattice"].neighbors[:, 0], fresh.niches["lattice"].neighbors[:, 0]
    )
    second = reader.embed(again)
    np.testing.assert_allclose(second.t, reader.embed(fresh).t, atol=1e-5)


def test_columns_that_h5ad_would_take_for_folders(run, reader, fresh, tmp_path):
    added = {"dir/a": 1, "a/b/c": 2, "dir_a": 3, "dir_a_2": 4, "a_b/c": 5}
    slide = dataclasses.replace(fresh, spots=fresh.spots.assign(**added))
    adata = to_anndata(run, slide, reader.embed(slide))
    back = anndata.read_h5ad(store.write_h5ad(adata, tmp_path / "out.h5ad"))
    expected = {"dir_a": 3, "dir_a_2": 4, "dir_a_3": 1, "a_b_c": 2, "a_b_c_2": 5}
    assert {name: back.obs[name].iloc[0] for name in expected} == expected


def test_the_source_is_named_without_its_folders(run, reader, fresh):
    slide = dataclasses.replace(fresh, source="/home/someone/secret study/new.h5ad")
    notes = store.notes(to_anndata(run, slide, reader.embed(slide)))
    assert notes["source"] == "new.h5ad"
    assert "someone" not in json.dumps(notes)


@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_the_model_runs_on_the_gpu_where_there_is_one(run, monkeypatch, there, device):
    moved = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr(type(run.model), "to", lambda _, place: moved.append(place))
    Embedder(run)
    assert moved == [device]


def test_features_at_hand_are_not_computed_again(reader, fresh, monkeypatch):
    features, expected = reader.image_features(fresh), reader.embed(fresh)
    monkeypatch.setattr("st_align.infer.slide_features", None)
    np.testing.assert_array_equal(reader.embed(fresh, features=features).e, expected.e)


def test_embedding_leaves_the_slide_as_it_is(run, reader, fresh):
    before = fresh.spots.copy()
    to_anndata(run, fresh, reader.embed(fresh))
    pd.testing.assert_frame_equal(fresh.spots, before)


def test_an_embedder_serves_several_slides(run, slides, fresh):
    reader = Embedder(run)
    for slide in (slides[0], fresh, slides[0]):
        np.testing.assert_array_equal(reader.embed(slide).r, Embedder(run).embed(slide).r)


def test_mosaic_puts_each_niche_where_it_lies():
    patches = np.zeros((2, 4, 4, 3), np.uint8)
    patches[0], patches[1] = (200, 0, 0), (0, 0, 200)
    boxes = np.array([[10, 10, 20, 20], [30, 10, 40, 20]], float)
    niche = Niche(neighbors=np.array([[0], [1]], np.int32), boxes=boxes, patches=patches)
    picture, scale = mosaic(niche)
    assert scale == pytest.approx(0.4)
    assert picture.shape == (8, 16, 3)
    assert picture[6, 6].tolist() == [200, 0, 0]
    assert picture[6, 14].tolist() == [0, 0, 200]
    assert picture[6, 10].tolist() == [255, 255, 255]
    small, scale = mosaic(niche, max_side=8)
    assert small.shape[1] == 8
    assert scale == pytest.approx(0.2)


def test_notes_keep_what_h5ad_cannot(tmp_path):
    adata = anndata.AnnData(np.zeros((2, 1), np.float32))
    values = {"text": "[x]", "n": 3, "share": 0.5, "none": None, "nested": {"a": [1, {"b": None}]}}
    store.note(adata, **values)
    store.note(adata, n=[1], none=2)
    path = store.write_h5ad(adata, tmp_path / "a.h5ad")
    assert store.notes(store.read_h5ad(path)) == {**values, "n": [1], "none": 2}
    assert store.notes(anndata.AnnData(np.zeros((2, 1), np.float32))) == {}


def test_files_that_are_none(tmp_path):
    bad = tmp_path / "bad.h5ad"
    bad.write_text("no")
    with pytest.raises(SlideError, match=r"bad\.h5ad cannot be read"):
        store.read_h5ad(bad)
    with pytest.raises(SlideError, match="is missing"):
        store.read_h5ad(tmp_path / "none.h5ad")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    adata = anndata.AnnData(np.zeros((2, 1), np.float32))
    with pytest.raises(OutputError, match="cannot write"):
        store.write_h5ad(adata, tmp_path)
    path = store.write_h5ad(adata, tmp_path / "new" / "a.h5ad")
    before = path.read_bytes()
    adata.uns["bad"] = object()
    with pytest.raises(Exception, match="bad"):
        store.write_h5ad(adata, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.h5ad"]


def test_a_slide_that_varies_along_other_axes_is_said_to_be_unlike(run, reader, fresh):
    like = reader.embed(fresh)
    here, there = like.shares
    assert 0 < here <= 1
    assert there == run.readouts.linear["linear"].explained
    assert not [w for w in like.warnings if "unlike" in w]
    # Axes of another tissue: those on which this slide hardly varies.
    axes = run.readouts.linear["linear"]
    away = dataclasses.replace(axes, axes=axes.axes[:, -1:], variances=axes.variances[-1:])
    readouts = dataclasses.replace(run.readouts, linear={"linear": away})
    other = Embedder(dataclasses.replace(run, readouts=readouts)).embed(fresh)
    assert other.shares[0] < 0.5 * there
    assert any("unlike those of training" in w and f"{there:.0%}" in w for w in other.warnings)
    assert reader.embed(without_counts(fresh)).shares is None
