from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from scipy import sparse

import toy_run
from st_align.colour import N_STATISTICS
from st_align.errors import ConfigError, ModelError, SlideError
from st_align.expression import log_normalise
from st_align.geometry import ring_mean
from st_align.image_blocks import image_blocks
from st_align.infer import Embedder, without_counts, without_image
from st_align.predict import NEW_PATIENT, Head, fit_head, predict, score, top_hvg
from st_align.slide import Niche
from st_align.targets import inner_folds
from toys import toy_prepared

GENES = ["GENE0", "GENE29", "GENE3"]


def textured(slide, rng):
    """The slide with a gene that follows the redness of the spots, beside its two halves."""
    red = slide.spot_patches[..., 0].mean(axis=(1, 2))
    lift = np.round(rng.uniform(-40, 40, slide.n_spots)).astype(int)
    shift = np.clip(slide.spot_patches.astype(int) + lift[:, None, None, None], 0, 255)
    niche = slide.niches["lattice"]
    shifted = np.clip(niche.patches.astype(int) + lift[:, None, None, None], 0, 255)
    counts = slide.counts.toarray()
    counts[:, 5] = rng.poisson(np.exp((red - red.mean() + lift) / 40) * 8)
    umi = counts.sum(axis=1).astype(float)
    return dataclasses.replace(
        slide,
        spots=slide.spots.assign(total_umi=umi),
        counts=sparse.csr_array(counts.astype(np.int32)),
        spot_patches=shift.astype(np.uint8),
        niches={
            "lattice": Niche(
                neighbors=niche.neighbors, boxes=niche.boxes, patches=shifted.astype(np.uint8)
            )
        },
    )


@pytest.fixture(scope="module")
def slides():
    rng = np.random.default_rng(1)
    return [
        textured(toy_prepared(rng, id=f"s{i}", patient=f"p{i // 2}", rows=8, cols=8), rng)
        for i in range(4)
    ]


@pytest.fixture(scope="module")
def run(slides):
    return toy_run.toy_run(slides)


@pytest.fixture(scope="module")
def reader(run):
    return Embedder(run)


@pytest.fixture(scope="module")
def head(run, slides):
    return fit_head(run, slides[:3], [*GENES, "GENE5"])


def test_it_beats_the_mean_on_a_new_slide(reader, slides, head):
    result = score(predict(head, reader, slides[3]), slides[3], head)
    assert result["mse"] < 0.8 * result["mse_mean_predictor"]
    assert all(result["genes"][g]["pcc"] > 0.5 for g in ("GENE0", "GENE29", "GENE5"))
    assert head.cv_error < 0.8
    json.dumps(result)


def test_counts_cannot_reach_a_prediction(reader, slides, head, rng):
    slide = slides[3]
    order = rng.permutation(slide.n_spots)
    shuffled = dataclasses.replace(
        slide,
        counts=slide.counts[order],
        spots=slide.spots.assign(total_umi=slide.total_umi[order]),
    )
    expected = predict(head, reader, slide)
    for other in (shuffled, without_counts(slide)):
        np.testing.assert_array_equal(predict(head, reader, other), expected)


def test_nothing_that_reads_counts_is_called(reader, slides, head, monkeypatch):
    def forbidden(*_args, **_options):
        raise AssertionError("counts were read")

    monkeypatch.setattr("st_align.infer.panel_expression", forbidden)
    monkeypatch.setattr("st_align.predict.targets", forbidden)
    assert len(predict(head, reader, slides[3])) == slides[3].n_spots


def test_a_prediction_is_never_below_zero(reader, slides, head):
    predicted = predict(head, reader, slides[3])
    assert list(predicted.columns) == [*GENES, "GENE5"]
    assert predicted.index.tolist() == slides[3].spots["barcode"].tolist()
    assert (predicted.to_numpy() >= 0).all()


def test_a_head_of_one_patient_trusts_itself_less_on_another(run, reader, slides, head):
    lone = fit_head(run, slides[:2], GENES)
    assert (lone.folds, set(lone.slides.values())) == ("slides", {"p0"})
    assert [lone.trust(p) for p in ("p0", "p1")] == [1.0, NEW_PATIENT]
    assert [head.trust(p) for p in ("p0", "p7")] == [1.0, 1.0]
    known = dataclasses.replace(slides[2], patient="p0")
    whole, less = (predict(lone, reader, s).to_numpy() for s in (known, slides[2]))
    seen = whole > 0
    means = np.broadcast_to(lone.means, whole.shape)[seen]
    expected = means + NEW_PATIENT * (whole[seen] - means)
    np.testing.assert_allclose(less[seen], expected, atol=1e-5)


def test_the_mean_of_a_gene_is_that_of_the_training_spots(slides, head):
    values = [
        log_normalise(s.counts[:, [0, 29, 3, 5]], s.total_umi)[0].toarray() for s in slides[:3]
    ]
    np.testing.assert_allclose(head.means, np.concatenate(values).mean(axis=0), rtol=1e-5)


def test_every_block_is_standardised_by_the_slides_own_image(reader, slides):
    blocks = image_blocks(reader, slides[0])
    features, widths = blocks.features(), [6, N_STATISTICS, 6, N_STATISTICS, 6]
    assert features.shape == (slides[0].n_spots, sum(widths))
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-4)
    spread = np.repeat(widths, widths) ** -0.5
    np.testing.assert_allclose(features.std(axis=0), spread, rtol=1e-3)


def test_the_encoder_of_the_niche_also_sees_the_spot(reader, slides):
    blocks = image_blocks(reader, slides[0])
    seen = toy_run.ColourEncoder().encode_images(slides[0].spot_patches).pooled.numpy()
    np.testing.assert_allclose(blocks.ringed[0], seen, atol=1e-3)
    assert not np.allclose(blocks.plain[0], seen, atol=1e-3)
    mean = ring_mean(seen, slides[0].niches["lattice"].neighbors)
    scaled = (mean - mean.mean(axis=0)) / mean.std(axis=0) / np.sqrt(6)
    at = 6 + N_STATISTICS
    np.testing.assert_allclose(blocks.features()[:, at : at + 6], scaled, atol=0.02)


def test_without_a_frozen_encoder_the_runs_own_embeddings_are_read(
    run, reader, slides, monkeypatch
):
    monkeypatch.setattr("st_align.image_blocks._frozen", lambda *_: None)
    blocks, found = image_blocks(reader, slides[0]), reader.embed(without_counts(slides[0]))
    np.testing.assert_array_equal(blocks.ringed[0], found.r)
    np.testing.assert_array_equal(blocks.plain[0], found.e)
    head = fit_head(run, slides[:3], GENES)
    assert score(predict(head, reader, slides[3]), slides[3], head)["pcc"] > 0.4


def test_constant_columns_are_left_out(reader, slides):
    flat = slides[0].spot_patches.copy()
    flat[..., 2] = 7
    slide = dataclasses.replace(slides[0], spot_patches=flat)
    features = image_blocks(reader, slide).features()
    assert np.isfinite(features).all()
    assert (features[:, 6 + 2] == 0).all()
    assert features.var(axis=0).sum() == pytest.approx(5, rel=1e-2)


def test_a_head_is_one_file(reader, slides, head, tmp_path):
    path = tmp_path / "head.safetensors"
    head.save(path)
    loaded = Head.load(path)
    for field in dataclasses.fields(Head):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(head, field.name))
    np.testing.assert_array_equal(
        predict(loaded, reader, slides[3]), predict(head, reader, slides[3])
    )
    before = path.read_bytes()
    head.save(path)
    assert path.read_bytes() == before
    assert loaded.slides == {"s0": "p0", "s1": "p0", "s2": "p1"}


def test_a_file_that_is_no_head(tmp_path):
    path = tmp_path / "head.safetensors"
    with pytest.raises(ModelError, match="missing"):
        Head.load(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="is no gene head"):
        Head.load(path)
    from safetensors.numpy import save_file

    save_file({"weights": np.zeros((2, 2))}, path)
    with pytest.raises(ModelError, match="is no gene head"):
        Head.load(path)


@pytest.mark.parametrize("version", [2, 4])
def test_a_head_of_another_version_says_so(head, tmp_path, version):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = tmp_path / "head.safetensors"
    head.save(path)
    with safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["st-align-head"])
    facts |= {"schema_version": version, "a new fact": 0}
    save_file({"other": np.zeros(2)}, path, metadata={"st-align-head": json.dumps(facts)})
    with pytest.raises(ModelError, match=rf"expected: schema version 3\n.*found: +{version}\n"):
        Head.load(path)


def test_a_head_whose_parts_disagree(head, tmp_path):
    path = tmp_path / "head.safetensors"
    dataclasses.replace(head, weights=head.weights[:, :2]).save(path)
    with pytest.raises(ModelError, match=r"is no gene head(.|\n)*2 columns, 4 genes"):
        Head.load(path)


def test_a_truncated_head(head, tmp_path):
    path = tmp_path / "head.safetensors"
    head.save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ModelError, match="is no gene head"):
        Head.load(path)


def test_a_head_of_another_model(run, slides, head):
    other = dataclasses.replace(
        run, panel=dataclasses.replace(run.panel, genes=run.panel.genes[::-1])
    )
    with pytest.raises(ModelError, match="fitted on another model"):
        predict(head, Embedder(other), slides[3])


def test_what_cannot_be_fitted(run, slides):
    with pytest.raises(ConfigError, match=r"GNE29(.|\n)*did you mean 'GENE29'"):
        fit_head(run, slides[:1], ["GNE29"])
    with pytest.raises(ConfigError, match="no gene was given"):
        fit_head(run, slides[:1], [])
    for useless in ([], [without_image(slides[0])], [without_counts(slides[0])]):
        with pytest.raises(SlideError, match="no slide to fit genes on"):
            fit_head(run, useless, GENES)


def test_what_cannot_be_predicted(reader, slides, head, rng):
    with pytest.raises(SlideError, match=r"no image(.|\n)*--image"):
        predict(head, reader, without_image(slides[3]))
    with pytest.raises(SlideError, match="too few spots"):
        predict(head, reader, toy_prepared(rng, rows=1, cols=1))
    with pytest.raises(SlideError, match="no counts to score"):
        score(predict(head, reader, slides[3]), without_counts(slides[3]), head)


def renamed(slide, gene):
    """The slide with another symbol for `gene`."""
    symbols = np.where(slide.genes.symbols == gene, "OTHER", slide.genes.symbols)
    return dataclasses.replace(slide, genes=dataclasses.replace(slide.genes, symbols=symbols))


def unknown(slide, gene):
    """The slide without the Ensembl id of `gene`."""
    ensembl = np.where(slide.genes.symbols == gene, "", slide.genes.ensembl)
    return dataclasses.replace(slide, genes=dataclasses.replace(slide.genes, ensembl=ensembl))


def test_a_renamed_gene_is_found_by_its_ensembl_id(run, reader, slides, head):
    assert head.panel.ensembl[0] == "ENSG00000000000"
    other = renamed(slides[3], "GENE0")
    assert score(predict(head, reader, other), other, head) == score(
        predict(head, reader, slides[3]), slides[3], head
    )
    nameless = unknown(slides[0], "GENE29")
    fitted = fit_head(run, [nameless, renamed(slides[1], "GENE0"), slides[2]], head.panel.genes)
    np.testing.assert_array_equal(fitted.weights, head.weights)


def test_counts_that_share_no_gene_with_the_head_have_no_score(reader, slides, head):
    genes = slides[3].genes
    foreign = dataclasses.replace(
        genes, symbols=np.char.lower(genes.symbols), ensembl=np.full(len(genes), "")
    )
    slide = dataclasses.replace(slides[3], genes=foreign)
    result = score(predict(head, reader, slide), slide, head)
    assert result["genes"] == {}
    assert result["mse"] is result["mse_mean_predictor"] is result["pcc"] is None


def test_features_at_hand_bring_no_counts_in(reader, slides, head):
    features = reader.image_features(slides[3])
    features["spot_gene"] = features["niche_gene"] = features["niche_image"]
    np.testing.assert_array_equal(
        predict(head, reader, slides[3], features=features), predict(head, reader, slides[3])
    )


def test_a_gene_that_some_slides_did_not_measure(run, reader, slides):
    partly = [renamed(unknown(slides[0], "GENE0"), "GENE0"), *slides[1:3]]
    head = fit_head(run, partly, GENES)
    values, _ = log_normalise(slides[1].counts[:, [0]], slides[1].total_umi)
    more, _ = log_normalise(slides[2].counts[:, [0]], slides[2].total_umi)
    both = np.concatenate([values.toarray(), more.toarray()])
    assert head.means[0] == pytest.approx(both.mean(), rel=1e-5)
    lacking = renamed(unknown(slides[3], "GENE0"), "GENE0")
    result = score(predict(head, reader, lacking), lacking, head)
    assert result["absent"] == ["GENE0"]
    assert set(result["genes"]) == {"GENE29", "GENE3"}
    full = score(predict(head, reader, slides[3]), slides[3], head)
    assert full["genes"]["GENE0"]["pcc"] > 0.4


def test_a_gene_that_never_varies_has_no_correlation(run, reader, slides):
    silent = slides[3].counts.toarray()
    silent[:, 0] = 0
    slide = dataclasses.replace(slides[3], counts=sparse.csr_array(silent))
    head = fit_head(run, slides[:2], GENES)
    result = score(predict(head, reader, slide), slide, head)
    assert result["genes"]["GENE0"]["pcc"] is None
    assert np.isfinite(result["pcc"])


def test_a_slide_of_empty_spots_is_passed_over(run, reader, slides):
    nothing = sparse.csr_array(slides[1].counts.shape, dtype=np.int32)
    empty = dataclasses.replace(
        slides[1], counts=nothing, spots=slides[1].spots.assign(total_umi=0.0)
    )
    head = fit_head(run, [slides[0], empty], GENES)
    np.testing.assert_array_equal(head.weights, fit_head(run, slides[:1], GENES).weights)
    with pytest.raises(SlideError, match="no spot of slide"):
        score(predict(head, reader, empty), empty, head)


def test_folds_are_patients_else_slides_else_strips(slides):
    folds, what = inner_folds(slides)
    assert what == "patients"
    assert [int(folds[s.id][0]) for s in slides] == [0, 0, 1, 1]
    folds, what = inner_folds(slides[:2])
    assert what == "slides"
    assert folds["s0"][0] != folds["s1"][0]
    folds, what = inner_folds(slides[:1])
    assert what == "blocks"
    along = slides[0].spots["x"].to_numpy()
    strips = folds["s0"][np.argsort(along, kind="stable")]
    assert (np.diff(strips) >= 0).all()
    assert np.bincount(strips).tolist() == [13, 13, 13, 13, 12]


def test_one_slide_is_enough_to_fit(run, slides):
    head = fit_head(run, slides[:1], GENES)
    assert head.folds == "blocks"
    assert np.isfinite(head.weights).all()


def test_spots_without_neighbours_are_fitted_and_predicted(run, reader, slides):
    def lone(slide):
        niche = slide.niches["lattice"]
        alone = np.full_like(niche.neighbors, -1)
        alone[:, 0] = np.arange(slide.n_spots)
        apart = dataclasses.replace(niche, neighbors=alone)
        return dataclasses.replace(slide, niches={"lattice": apart})

    head = fit_head(run, [lone(s) for s in slides[:2]], GENES)
    result = score(predict(head, reader, lone(slides[3])), lone(slides[3]), head)
    assert result["mse"] < result["mse_mean_predictor"]
    assert result["pcc"] > 0.4


def test_two_spots_are_enough_to_predict(reader, head, rng):
    pair = toy_prepared(rng, id="pair", rows=1, cols=2)
    assert np.isfinite(predict(head, reader, pair).to_numpy()).all()


def test_predictions_do_not_depend_on_the_order_of_the_spots(reader, slides, head, rng):
    slide, order = slides[3], rng.permutation(slides[3].n_spots)
    place, niche = np.argsort(order), slides[3].niches["lattice"]
    members = niche.neighbors[order]
    moved = Niche(
        neighbors=np.where(members >= 0, place[members], -1).astype(np.int32),
        boxes=niche.boxes[order],
        patches=niche.patches[order],
    )
    shuffled = dataclasses.replace(
        without_counts(slide),
        spots=slide.spots.iloc[order].reset_index(drop=True),
        spot_patches=slide.spot_patches[order],
        niches={"lattice": moved},
    )
    found = predict(head, reader, shuffled)
    expected = predict(head, reader, slide).loc[found.index]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_top_genes_are_those_of_a_panel(slides):
    chosen = top_hvg(slides[:2], 4)
    assert len(chosen) == 4
    assert set(chosen) <= set(slides[0].genes.symbols)
