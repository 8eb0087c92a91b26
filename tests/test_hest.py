"""HEST folders as slides, and HEST-bench's regression against upstream's steps written out."""

from __future__ import annotations

import dataclasses
import json

import h5py
import numpy as np
import pytest
from sklearn.linear_model import Ridge

import toy_run
from hest_files import SIDE, UM_PER_PX, write_sample, write_task
from st_align import trained
from st_align.benchmarks import hest_rows
from st_align.benchmarks.hest import HestRequest, bench_hest
from st_align.benchmarks.hest_files import expression, image_slides, read_tasks
from st_align.benchmarks.hest_rows import cv_alpha, hest_a13, hest_readme
from st_align.benchmarks.image_rows import image_encoders
from st_align.checkpoint import load_run
from st_align.errors import ConfigError, ModelError, SlideError
from st_align.infer import Embedder, without_counts
from st_align.io import ReadOptions, find_slides, read_one
from st_align.io.hest import PatchMosaic, barcodes_of
from st_align.prepare import prepare_slide
from toys import toy_prepared

META = {
    "st_technology": "Visium",
    "pixel_size_um_estimated": UM_PER_PX,
    "patient": "Patient 1",
    "dataset_title": "a study",
    "organ": "Breast",
    "species": "Homo sapiens",
}
HEST = ReadOptions(format="hest")


def test_a_sample_is_a_slide(tmp_path) -> None:
    part = write_sample(tmp_path, "TENX1", counts="st", skip=3, meta=META)
    slide = read_one(tmp_path, HEST)
    assert slide.id == "TENX1"
    assert (slide.patient, slide.patient_origin) == ("a study: Patient 1", "obs")
    assert (slide.tissue, slide.species, slide.technology) == ("Breast", "Homo sapiens", "Visium")
    assert set(slide.barcodes) == set(barcodes_of(tmp_path / "patches" / "TENX1.h5"))
    assert any("3 spots have no patch" in text for text in slide.warnings)
    at = {b: i for i, b in enumerate(part.barcodes)}
    for i, barcode in enumerate(slide.barcodes[:5]):
        np.testing.assert_array_equal(slide.xy[i], part.xy[at[barcode]])
        np.testing.assert_array_equal(slide.counts[[i]].toarray()[0], part.counts[at[barcode]])


def test_it_is_found_without_a_format_and_by_id(tmp_path) -> None:
    write_sample(tmp_path, "A1", meta=META)
    write_sample(tmp_path, "A2", meta=META)
    assert [ref.format for ref in find_slides([tmp_path]).refs] == ["hest", "hest"]
    assert read_one(f"{tmp_path}::A2").id == "A2"


def test_crops_come_from_the_spots_own_patches(tmp_path) -> None:
    part = write_sample(tmp_path, "A1", meta=META)
    slide = read_one(tmp_path, HEST)
    at = {b: i for i, b in enumerate(part.barcodes)}
    red = np.clip(40 * part.counts[[at[b] for b in slide.barcodes], 0], 0, 255)
    near = np.c_[slide.xy - 3, slide.xy + 3]
    crops = slide.image.crops(near, 8)
    assert np.abs(crops[..., 0].mean(axis=(1, 2)) - red).max() < 1
    assert slide.image.scale == pytest.approx(UM_PER_PX / 0.5)
    side = SIDE / slide.image.scale
    far = np.array([[*(slide.xy.max(axis=0) + 40 * side), *(slide.xy.max(axis=0) + 41 * side)]])
    assert slide.image.crops(far, 4).shape == (1, 4, 4, 3)


def test_where_no_patch_is_the_mosaic_is_white(tmp_path) -> None:
    write_sample(tmp_path, "A1", meta=META)
    path = tmp_path / "patches" / "A1.h5"
    centres = np.full((len(barcodes_of(path)), 2), np.nan)
    centres[0], centres[1] = (100, 100), (300, 100)
    canvas = PatchMosaic(path, centres, 0.5).region(95, 105, 150, 250)
    assert (canvas == 255).all()


def test_its_slides_can_be_prepared(tmp_path) -> None:
    write_sample(tmp_path, "A1")  # without metadata: the pitch tells the scale
    prepared = prepare_slide(read_one(tmp_path, HEST), ["lattice"], spot_px=8, niche_px=12)
    assert prepared.spot_patches.shape[1:] == (8, 8, 3)
    assert prepared.niches["lattice"].patches.shape[1:] == (12, 12, 3)
    counts_only = read_one(tmp_path, ReadOptions(format="hest", no_image=True))
    assert counts_only.image is None


def test_what_cannot_be_a_slide_is_absent_with_the_reason(tmp_path) -> None:
    write_sample(tmp_path, "X1", meta=META | {"st_technology": "Xenium"})
    write_sample(tmp_path, "V1", meta=META)
    write_sample(tmp_path, "V2", meta=META)
    (tmp_path / "patches" / "V2.h5").unlink()
    found = find_slides([tmp_path], HEST)
    assert [ref.id for ref in found.refs] == ["V1"]
    assert "Xenium" in found.absent["X1"]
    assert "no patches/V2.h5" in found.absent["V2"]


def test_damaged_files(tmp_path) -> None:
    write_sample(tmp_path, "A1", meta=META)
    patches = tmp_path / "patches" / "A1.h5"
    with h5py.File(patches, "r+") as file:
        del file["barcode"]
    with pytest.raises(SlideError, match="no file of patches"):
        read_one(tmp_path, HEST)
    patches.write_bytes(b"nothing")
    with pytest.raises(SlideError, match="truncated"):
        read_one(tmp_path, HEST)
    (tmp_path / "metadata" / "A1.json").write_text("{")
    with pytest.raises(SlideError, match="damaged"):
        find_slides([tmp_path], HEST)


def test_patches_of_other_spots(tmp_path) -> None:
    write_sample(tmp_path, "A1", meta=META)
    with h5py.File(tmp_path / "patches" / "A1.h5", "r+") as file:
        n = len(file["barcode"])
        del file["barcode"]
        file["barcode"] = np.array([f"other-{i}".encode() for i in range(n)])[:, None]
    with pytest.raises(SlideError, match="no patch of"):
        read_one(tmp_path, HEST)


def test_targets_are_log_counts_without_a_library_size(tmp_path) -> None:
    part = write_sample(tmp_path, "A1")
    barcodes = barcodes_of(tmp_path / "patches" / "A1.h5")
    found = expression(tmp_path / "adata" / "A1.h5ad", barcodes, ["GENE3", "GENE0"])
    at = {b: i for i, b in enumerate(part.barcodes)}
    raw = part.counts[[at[b] for b in barcodes]][:, [3, 0]]
    np.testing.assert_allclose(found, np.log1p(raw))
    with pytest.raises(SlideError, match="GENE99"):
        expression(tmp_path / "adata" / "A1.h5ad", barcodes, ["GENE99"])


def test_protocols_against_upstreams_steps(rng) -> None:
    x, y = rng.normal(3, 2, (80, 10)), rng.normal(1, 1, (80, 4))
    test = rng.normal(3, 2, (9, 10))

    def ridge(a, b):
        model = Ridge(solver="lsqr", alpha=100 / (a.shape[1] * 4), fit_intercept=False,
                      max_iter=1000, random_state=1)  # fmt: skip
        return model.fit(a, y).predict(b)

    halves, targets = [x[:30], x[30:]], [y[:30], y[30:]]
    np.testing.assert_allclose(hest_a13(halves, targets, test), ridge(x, test))
    mean, spread = x.mean(axis=0), x.std(axis=0)
    scaled, other = (x - mean) / spread, (test - mean) / spread
    # All ten components are kept: PCA is a rotation, and ridge does not see it.
    np.testing.assert_allclose(hest_readme(halves, targets, test), ridge(scaled, other), atol=1e-4)


def test_cv_alpha_finds_a_linear_map_with_an_offset(rng) -> None:
    w = rng.normal(size=(6, 3))
    x = [rng.normal(4, 1, (60, 6)) for _ in range(3)]
    y = [v @ w + 7 + rng.normal(0, 0.1, (60, 3)) for v in x]
    found = cv_alpha(x[:2], y[:2], x[2])
    assert np.mean((found - y[2]) ** 2) < 0.05 * np.var(y[2])
    assert np.mean((cv_alpha(x[:1], y[:1], x[2]) - y[2]) ** 2) < 0.1 * np.var(y[2])


@pytest.fixture
def small_encoders(monkeypatch):
    """The ungated encoder would be most of these tests' time."""
    found = [(name, e) for name, e in image_encoders({}) if name != "efficientnet-lite0"]
    monkeypatch.setattr(hest_rows, "image_encoders", lambda weights: iter(found))


@pytest.fixture
def run_elsewhere(rng, tmp_path):
    """A run whose training slides are none of the task's."""
    slides = [toy_prepared(rng, id=f"t{i}", patient="elsewhere") for i in (1, 2)]
    return toy_run.save(toy_run.toy_run(slides), tmp_path / "run")


@pytest.mark.usefixtures("small_encoders")
@pytest.mark.parametrize("protocol", ["hest-readme", "hest-a13", "cv-alpha"])
def test_the_whole_bench(tmp_path, protocol) -> None:
    write_task(tmp_path / "bench" / "IDC", ["S1", "S2", "S3"], ["GENE0", "GENE5"])
    result, _ = bench_hest(tmp_path / "bench", tmp_path / "out", HestRequest(protocol=protocol))
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| uni |" in text
    assert "no weights" in text
    assert (tmp_path / "out" / "hest.png").read_bytes().startswith(b"\x89PNG")
    rows = [r for r in result["rows"] if r["method"] == "colour statistics"]
    by_gene = {r["item"]: r["mean"] for r in rows if r["metric"] == "pcc by gene"}
    assert len(by_gene) == 6
    assert min(v for k, v in by_gene.items() if k.endswith("GENE0")) > 0.8  # painted in red
    assert max(v for k, v in by_gene.items() if k.endswith("GENE5")) < 0.8
    splits = [r["mean"] for r in rows if r["metric"] == "pcc"]
    assert result["headline"]["colour statistics"] == pytest.approx(np.mean(splits))


@pytest.mark.usefixtures("small_encoders")
def test_the_mean_predictor_is_the_training_mean_of_the_split(tmp_path) -> None:
    task = write_task(tmp_path / "T", ["S1", "S2", "S3"], ["GENE0"])
    result, _ = bench_hest(task, tmp_path / "out", HestRequest())
    own = [r for r in result["rows"] if r["method"] == "mean predictor"]
    logs = {}
    for id in ("S1", "S2", "S3"):
        barcodes = barcodes_of(task / "patches" / f"{id}.h5")
        logs[id] = expression(task / "adata" / f"{id}.h5ad", barcodes, ["GENE0"])
    mean = np.concatenate([logs["S2"], logs["S3"]]).mean()
    mse = {r["item"]: r["mean"] for r in own if r["metric"] == "mse"}
    assert mse["split 0"] == pytest.approx(((logs["S1"] - mean) ** 2).mean())
    assert [r["mean"] for r in own if r["metric"] == "pcc"] == [None] * 3, "a constant has none"
    assert "mean predictor" not in result["headline"]


@pytest.mark.usefixtures("small_encoders")
def test_rows_of_a_model_read_images_alone(tmp_path, run_elsewhere, monkeypatch) -> None:
    task = write_task(tmp_path / "T", ["S1", "S2"], ["GENE0"])
    seen = []
    plain = trained.prepare_slide
    monkeypatch.setattr(
        trained,
        "prepare_slide",
        lambda slide, *a, **k: seen.append(slide) or plain(slide, *a, **k),
    )
    request = HestRequest(protocol="cv-alpha", models=[f"ours={run_elsewhere}"])
    result, failed = bench_hest(task, tmp_path / "out", request)
    assert failed == []
    assert {"ours, r", "ours, e", "ours, r+e"} <= set(result["headline"])
    assert sorted(slide.id for slide in seen) == ["S1", "S2"], "each is embedded once"
    assert all(slide.counts is None and slide.genes is None for slide in seen)
    text = (tmp_path / "out" / "results.md").read_text()
    assert "ours on S1: held out, patient unknown" in text
    assert "official split, held out, patient unknown" in text
    kept = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert list(kept["models"]) == ["ours"]
    assert {id: len(files) for id, files in kept["tasks"]["T"].items()} == {"S1": 2, "S2": 2}


@pytest.mark.usefixtures("small_encoders")
def test_features_of_a_model_are_those_of_the_spots_that_the_patches_name(
    tmp_path, run_elsewhere
) -> None:
    task = write_task(tmp_path / "T", ["S1", "S2"], ["GENE0"])
    (found,) = read_tasks(task).values()
    run = load_run(run_elsewhere)
    seen = hest_rows.RunImages(run=run, sections=image_slides(found))
    sample = found.samples()["S1"]
    r = seen.reader("r")(sample)
    slide = prepare_slide(read_one(f"{task}::S1", HEST), ["lattice"], spot_px=16, niche_px=24)
    whole = Embedder(run).embed(without_counts(slide)).r
    place = {b: i for i, b in enumerate(slide.spots["barcode"])}
    rows = [place[b] for b in barcodes_of(sample.patches)]
    np.testing.assert_allclose(r, whole[rows], atol=1e-5)
    assert seen.reader("r+e")(sample).shape[1] == r.shape[1] + seen.reader("e")(sample).shape[1]


@pytest.mark.usefixtures("small_encoders")
def test_a_model_that_saw_a_test_sample_is_refused_or_branded(rng, tmp_path) -> None:
    task = write_task(tmp_path / "T", ["S1", "S2"], ["GENE0"])
    run = toy_run.save(toy_run.toy_run([toy_prepared(rng, id="S2")]), tmp_path / "run")
    request = HestRequest(models=[str(run)])
    with pytest.raises(ModelError, match="was trained on S2"):
        bench_hest(task, tmp_path / "out", request)
    bench_hest(task, tmp_path / "out", dataclasses.replace(request, allow_leak=True))
    text = (tmp_path / "out" / "results.md").read_text()
    assert "LEAK: trained on the slide" in text


@pytest.mark.usefixtures("small_encoders")
def test_a_sample_that_is_no_slide_of_spots_costs_the_models_rows_alone(
    tmp_path, run_elsewhere
) -> None:
    task = write_task(tmp_path / "T", ["S1", "S2"], ["GENE0"])
    (task / "metadata").mkdir(exist_ok=True)
    (task / "metadata" / "S2.json").write_text(json.dumps({"st_technology": "Xenium"}))
    result, failed = bench_hest(task, tmp_path / "out", HestRequest(models=[f"m={run_elsewhere}"]))
    assert failed == []
    notes = {r.get("note") for r in result["rows"] if r["method"] == "m, r"}
    assert notes == {"S2 is no slide of spots that a model can read"}
    assert "colour statistics" in result["headline"]


def test_wrong_input(tmp_path) -> None:
    with pytest.raises(ConfigError, match="hest-readme"):
        bench_hest(tmp_path, tmp_path / "out", HestRequest(protocol="hest-readm"))
    with pytest.raises(ConfigError, match="no task"):
        bench_hest(tmp_path, tmp_path / "out", HestRequest(protocol="cv-alpha"))
    task = write_task(tmp_path / "T", ["S1", "S2"], ["GENE0"])
    (task / "var_50genes.json").write_text(json.dumps(["GENE0"]))
    with pytest.raises(SlideError, match="no list of genes"):
        bench_hest(task, tmp_path / "out", HestRequest(protocol="cv-alpha"))
    (task / "patches" / "S1.h5").unlink()
    with pytest.raises(SlideError, match="S1"):
        bench_hest(task, tmp_path / "out", HestRequest(protocol="cv-alpha"))
    (task / "splits" / "test_0.csv").write_bytes((task / "splits" / "train_0.csv").read_bytes())
    with pytest.raises(SlideError):
        bench_hest(task, tmp_path / "out", HestRequest(protocol="cv-alpha"))
