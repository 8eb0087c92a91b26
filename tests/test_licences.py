"""The licences of weights and data go with everything that is made from them."""

from __future__ import annotations

import dataclasses
import json

import anndata
import h5py
import numpy as np
import pytest

import toy_run
from st_align import store
from st_align.corpus_build import build_corpus
from st_align.corpus_overview import describe
from st_align.embedded import to_anndata
from st_align.features import cached_features, feature_folder
from st_align.infer import Embedder
from st_align.io import ReadOptions
from st_align.io.detect import read_one
from st_align.overview import overview
from st_align.predict import Head, fit_head
from st_align.provenance import licence_words, licences
from st_align.report import build_report
from toy_slides import toy_ref
from toys import toy_prepared

UNI = {"name": "uni", "licence": "CC-BY-NC-ND-4.0"}
SCGPT = {"name": "scgpt", "licence": "MIT"}
FACTS = {
    "encoders": {"niche_image": UNI, "spot_gene": SCGPT},
    "slides": [{"id": "a", "licence": "MIT, as part of STimage-1K4M"}, {"id": "b"}, {"id": "c"}],
    "init": None,
}
NON_COMMERCIAL = "use non-commercial only, by the terms of uni"


def plain(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def slides():
    rng = np.random.default_rng(3)
    made = [toy_prepared(rng, id=f"s{i}", patient=f"p{i}") for i in range(2)]
    return [dataclasses.replace(made[0], licence="CC0-1.0"), made[1]]


@pytest.fixture(scope="module")
def run(slides):
    """A run that says it was trained through UNI."""
    run = toy_run.toy_run(slides)
    facts = [
        {"id": s.id, "patient": s.patient, "n_spots": 36, "licence": s.licence} for s in slides
    ]
    encoders = {"niche_image": run.provenance["encoders"]["niche_image"] | UNI}
    return dataclasses.replace(
        run, provenance={**run.provenance, "encoders": encoders, "slides": facts}
    )


def test_weights_and_data_are_counted_and_what_is_non_commercial_is_named():
    assert licences(FACTS) == {
        "weights": {"uni": "CC-BY-NC-ND-4.0", "scgpt": "MIT"},
        "data": {"MIT, as part of STimage-1K4M": 1, "not stated": 2},
        "non_commercial": ["uni"],
    }


def test_what_a_run_started_from_counts_too():
    later = {"encoders": {}, "slides": [{"id": "c"}, {"id": "d"}], "init": FACTS}
    found = licences(later)
    assert found["non_commercial"] == ["uni"]
    assert found["data"] == {"MIT, as part of STimage-1K4M": 1, "not stated": 3}


@pytest.mark.parametrize(
    ("licence", "barred"),
    [
        ("Apache-2.0, by its access form for research only", True),
        ("non-commercial (scFoundation model licence)", True),
        ("CC-BY-NC-4.0", True),
        ("CC-BY-4.0", False),
        ("BSD-3-Clause", False),
        ("SYNC licence", False),
    ],
)
def test_terms_are_told_by_the_licence_of_weights_and_of_data(licence, barred):
    assert licences({"encoders": {"x": {"name": "n", "licence": licence}}})["non_commercial"] == (
        ["n"] if barred else []
    )
    of_data = licences({"slides": [{"id": "a", "licence": licence}]})
    assert of_data["non_commercial"] == ([licence] if barred else [])
    assert licences({}, licence)["non_commercial"] == ([licence] if barred else [])


def test_words():
    assert licence_words(licences(FACTS, "")) == {
        "weights licence": "uni: CC-BY-NC-ND-4.0; scgpt: MIT",
        "data licence": "MIT, as part of STimage-1K4M (1 slide); not stated (2 slides)",
        "slide licence": "not stated",
        "use": "non-commercial only, by the terms of uni",
    }
    assert licence_words(licences({}))["use"] == "none of these licences says non-commercial"
    assert "earlier version" in licence_words({})["licences"]


def test_a_run_its_files_and_the_report_say_it(run, slides, tmp_path):
    folder, file = toy_run.save(run, tmp_path / "run"), tmp_path / "s.h5ad"
    store.write_h5ad(to_anndata(run, slides[0], Embedder(run).embed(slides[0])), file)
    fit_head(run, slides, ["GENE1"]).save(tmp_path / "head.safetensors")
    for path in (folder, file, tmp_path / "head.safetensors"):
        said = plain(describe(overview(str(path), verify=False, no_image=False)))
        assert NON_COMMERCIAL in said, path
        assert "data licence CC0-1.0 (1 slide); not stated (1 slide)" in said
        assert "weights licence uni: CC-BY-NC-ND-4.0" in said
    assert store.read_notes(file)["licences"] == licences(run.provenance, "CC0-1.0")
    assert Head.load(tmp_path / "head.safetensors").licences == licences(run.provenance)
    card = (folder / "MODEL_CARD.md").read_text()
    assert "Training slides 2, patients 2, spots 72; 6 of 6 steps, finished" in card
    assert "- use: non-commercial only, by the terms of uni" in card
    for given in ({"run": folder}, {"files": [file]}):
        page = build_report(tmp_path / "page.html", **given).read_text()
        assert "non-commercial only, by the terms of uni" in page


def test_a_slide_keeps_its_licence_through_our_own_file(run, slides, tmp_path):
    file = tmp_path / "s.h5ad"
    store.write_h5ad(to_anndata(run, slides[0], Embedder(run).embed(slides[0])), file)
    assert read_one(file, ReadOptions()).licence == "CC0-1.0"


def test_an_h5ad_states_its_licence_in_either_spelling(run, slides, tmp_path):
    file = tmp_path / "s.h5ad"
    store.write_h5ad(to_anndata(run, slides[1], Embedder(run).embed(slides[1])), file)
    assert read_one(file, ReadOptions()).licence == ""
    with h5py.File(file, "a") as opened:
        anndata.io.write_elem(opened["uns"], "license", "CC-BY-4.0 ")
    assert read_one(file, ReadOptions()).licence == "CC-BY-4.0"


def test_features_of_a_corpus_lie_beside_their_licences(tmp_path):
    corpus = build_corpus([toy_ref("a")], tmp_path, progress=False)
    encoder = toy_run.ColourEncoder()
    cached_features(corpus, "a", encoder, "spot", niche_spec="lattice")
    path = feature_folder(corpus, "a", encoder, "spot", "lattice") / "encoder.json"
    found = json.loads(path.read_text())
    assert found["name"] == "toy-colour"
    assert found["fingerprint"] == encoder.fingerprint
    assert found["licences"] == {
        "weights": {"toy-colour": "BSD-3-Clause"},
        "data": {},
        "slide": "not stated",
        "non_commercial": [],
    }


def test_inspect_of_a_file_of_an_earlier_version(run, slides, tmp_path):
    adata = to_anndata(run, slides[0], Embedder(run).embed(slides[0]))
    del adata.uns["stalign"]["licences_json"]
    store.write_h5ad(adata, tmp_path / "s.h5ad")
    said = overview(str(tmp_path / "s.h5ad"), verify=False, no_image=False)
    assert "not recorded" in said["licences"]
