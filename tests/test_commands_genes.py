"""`genes predict` reads the image alone: whatever the counts are, there is a prediction."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pytest

import toy_run
from sources import section, write_h5ad
from st_align import keys, store
from st_align.commands.genes import predict_genes
from st_align.errors import ModelError, OutputError
from st_align.io import ReadOptions
from st_align.predict import fit_head
from toys import toy_prepared

GENES = ["GENE0", "GENE3"]
SCORES = ("mse", "mse_mean_predictor", "pcc")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The folder of a run and the file of a head."""
    root = tmp_path_factory.mktemp("fitted")
    rng = np.random.default_rng(0)
    slides = [toy_prepared(rng, id=f"t{i}", patient=f"p{i}", n_genes=12) for i in range(2)]
    run = toy_run.toy_run(slides)
    fit_head(run, slides, GENES).save(root / "head.safetensors")
    return toy_run.save(run, root / "run"), root / "head.safetensors"


@pytest.fixture
def predicted(fitted, tmp_path):
    """Predict the genes of a section; the result, and what was written."""
    run, head = fitted

    def call(part):
        slide = write_h5ad(tmp_path / f"{part.id}.h5ad", part)
        result = predict_genes(str(slide), str(run), head, tmp_path / "out.h5ad", ReadOptions())
        return result, anndata.read_h5ad(tmp_path / "out.h5ad")

    return call


def test_a_slide_with_counts_is_scored(predicted):
    result, adata = predicted(section())
    assert set(result["genes"]) == set(GENES)
    assert not any("to score" in text or "left out" in text for text in result["warnings"])
    assert result["absent"] == []
    assert store.notes(adata)["genes"] == {name: result[name] for name in SCORES}
    assert list(adata.obsm[keys.PREDICTED]) == GENES


def test_a_slide_that_measured_no_gene_of_the_head(predicted, capsys):
    part = section()
    kept = [j for j, gene in enumerate(part.symbols) if gene not in GENES]
    names = {name: getattr(part, name)[kept] for name in ("symbols", "ensembl")}
    result, adata = predicted(part.with_(counts=part.counts[:, kept], **names))
    assert [result[name] for name in SCORES] == [None] * 3
    assert json.loads(json.dumps(result))["mse"] is None
    assert result["absent"] == GENES
    assert any("nothing to score" in text for text in result["warnings"])
    assert "MSE none, mean predictor none, PCC none" in capsys.readouterr().out
    assert list(adata.obsm[keys.PREDICTED]) == GENES


def mouse(part):
    """The section with gene names of another species."""
    symbols = np.char.capitalize(np.char.lower(part.symbols))
    return part.with_(symbols=symbols, ensembl=np.char.replace(part.ensembl, "ENSG", "ENSMUSG"))


def test_counts_that_do_not_fit_the_model(predicted):
    part = section()
    plain = predicted(part)[1]
    result, adata = predicted(mouse(part))
    np.testing.assert_array_equal(adata.obsm[keys.PREDICTED], plain.obsm[keys.PREDICTED])
    assert any("the counts are left out" in text for text in result["warnings"])
    assert any("the counts are left out" in text for text in store.notes(adata)["warnings"])
    assert keys.embedding("image") in adata.obsm
    assert keys.embedding("gene") not in adata.obsm
    assert adata.n_vars == 12
    assert store.notes(adata)["n_masked"] == 0


def test_spots_without_counts_are_predicted_and_leave_the_score(predicted):
    part = section()
    counts = part.counts.copy()
    counts[3:] = 0
    result, adata = predicted(part.with_(counts=counts))
    assert result["n_spots"] == 3
    assert store.notes(adata)["n_masked"] == 39
    assert np.isfinite(adata.obsm[keys.PREDICTED]).all().all()


def test_encoders_are_loaded_once_and_see_a_slide_once(predicted, monkeypatch):
    loaded, seen = [], []

    class Counting(toy_run.ColourEncoder):
        def __init__(self):
            loaded.append(self)

        def encode_images(self, patches):
            seen.append(len(patches))
            return super().encode_images(patches)

    monkeypatch.setattr(toy_run, "ColourEncoder", Counting)
    predicted(section())
    assert len(loaded) == 1
    assert sum(seen) == 2 * 42  # its spots and its niches


def test_bad_input_is_found_before_any_work(fitted, tmp_path, monkeypatch):
    _, head = fitted
    slide = write_h5ad(tmp_path / "mine.h5ad", section())
    before = slide.read_bytes()
    with pytest.raises(OutputError, match="would overwrite"):
        predict_genes(str(slide), "no-model-is-looked-for", head, slide, ReadOptions())
    assert slide.read_bytes() == before
    rng = np.random.default_rng(5)
    other = toy_run.save(toy_run.toy_run([toy_prepared(rng, id="z", n_genes=8)]), tmp_path / "z")
    monkeypatch.setattr("st_align.commands.genes.open_slide", None)
    with pytest.raises(ModelError, match="fitted on another model"):
        predict_genes(str(slide), str(other), head, tmp_path / "out.h5ad", ReadOptions())
