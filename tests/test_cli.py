"""The command's contract: verbs, exit codes, JSON; bad input ends in one message and exit 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

import sources
from st_align import cli

SMALL = """
[model]
dim = 16
heads = 2
tokens = 4
gene_layers = 1
[data]
panel = 10
[optim]
batch = 16
epochs = 1
[readout]
dims = 4
"""


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command in this process."""

    def call(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["st-align", *map(str, words)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return Result(code, *capsys.readouterr())

    return call


def fails(result: Result, *words: str) -> None:
    assert result.code == 2, result.err + result.out
    assert "Traceback" not in result.err + result.out
    said = result.err.lower()
    for word in words:
        assert word.lower() in said, result.err


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides, a corpus, a run of one epoch: made once, through the command."""
    root = tmp_path_factory.mktemp("with spaces é")
    (root / "small.toml").write_text(SMALL)
    for number in (1, 2, 3):
        part = sources.section(f"S{number}", seed=number)
        sources.write_spaceranger(root / "slides" / f"S{number}", part)
    table = pd.DataFrame({"slide": ["S1", "S2", "S3"], "patient": ["A", "A", "B"]})
    table.to_csv(root / "patients.csv", index=False)
    corpus, model = root / "corpus", root / "run"
    patient = ["--patients", root / "patients.csv"]
    held = ["--hold-out-patient", "B", "--config", root / "small.toml"]
    for words in (
        ["prepare", root / "slides", "--out", corpus, *patient, "--json", root / "prepare.json"],
        ["train", corpus, "--out", model, *held, "--json", root / "train.json"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "st_align.cli", *map(str, words)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def embedded(work: Path, run, tmp_path: Path) -> Path:
    out = tmp_path / "S3.h5ad"
    assert run("embed", f"{work / 'corpus'}::S3", "--model", work / "run", "--out", out).code == 0
    return out


def test_prepare_and_inspect_say_what_is_in_a_corpus(work: Path, run, tmp_path: Path) -> None:
    result = run("inspect", work / "corpus", "--verify", "--json", tmp_path / "i.json")
    assert result.code == 0
    assert "every column agrees" in result.out
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["kind"] == "corpus"
    assert found["n_slides"] == 3
    assert found["slides"]["S3"]["patient"] == "B"
    assert found["slides"]["S3"]["n_spots"] == 42
    assert found["slides"]["S1"]["um_per_px"] == pytest.approx(100 / sources.PITCH, rel=0.02)
    assert found["quarantined"] == {}
    prepared = json.loads((work / "prepare.json").read_text())
    assert prepared == {k: v for k, v in found.items() if k != "damaged"}


def test_train_holds_the_patient_out(work: Path, run) -> None:
    result = json.loads((work / "train.json").read_text())
    assert result["slides"] == ["S1", "S2"]
    assert result["finished"] is True
    shown = run("inspect", work / "run")
    assert "S1, S2" in shown.out


def test_a_loose_slide_and_its_corpus_copy_embed_alike(work: Path, run, tmp_path: Path) -> None:
    outs = [tmp_path / "loose.h5ad", tmp_path / "corpus.h5ad"]
    places = [work / "slides" / "S3", f"{work / 'corpus'}::S3"]
    for place, out in zip(places, outs, strict=True):
        result = run("embed", place, "--model", work / "run", "--out", out)
        assert result.code == 0, result.err
    loose, cached = (anndata.read_h5ad(out) for out in outs)
    at = cached.obs_names.get_indexer(loose.obs_names)
    for name in ("X_stalign", "X_stalign_image", "X_stalign_niche"):
        np.testing.assert_allclose(loose.obsm[name], cached.obsm[name][at], atol=2e-2)


def test_domains_are_written_into_the_file_and_scored(embedded: Path, run, tmp_path: Path) -> None:
    adata = anndata.read_h5ad(embedded)
    adata.obs["layer"] = np.where(adata.obsm["spatial"][:, 0] > 150, "right", "left")
    adata.write_h5ad(embedded)
    words = ["domains", embedded, "--n-domains", 2, "--label-key", "layer", "--runs", 2]
    result = run(*words, "--json", tmp_path / "d.json")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "d.json").read_text())["slides"]["S3"]
    assert found["n_domains"] == 2
    assert len(found["ari"]["runs"]) == 2
    assert found["ari"]["mean"] == pytest.approx(found["ari_unrefined"])
    assert {"ari_refined", "nmi", "method", "use"} <= set(found)
    again = anndata.read_h5ad(embedded)
    assert again.obs["stalign_domain"].nunique() == 2
    assert "layer" in again.obs


def test_genes_are_fitted_predicted_and_scored(work: Path, run, tmp_path: Path) -> None:
    head, out = tmp_path / "head.safetensors", tmp_path / "S3.h5ad"
    fit = run(
        "genes", "fit", work / "corpus", "--model", work / "run", "--top-hvg", 3, "--out", head
    )
    assert fit.code == 0, fit.err
    words = ["--model", work / "run", "--head", head, "--out", out, "--json", tmp_path / "g.json"]
    result = run("genes", "predict", f"{work / 'corpus'}::S3", *words)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "g.json").read_text())
    assert len(found["genes"]) == 3
    assert set(next(iter(found["genes"].values()))) == {"mse", "mse_mean_predictor", "pcc"}
    assert found["fitted_on_patient"] is False
    assert list(anndata.read_h5ad(out).obsm["stalign_predicted"]) == list(found["genes"])


def test_report_of_a_run_and_of_a_file(work: Path, embedded: Path, run, tmp_path: Path) -> None:
    for what in (work / "run", embedded):
        assert run("report", what, "--out", tmp_path / "r.html").code == 0
        assert "<html" in (tmp_path / "r.html").read_text()


def test_doctor_knows_every_encoder(run, tmp_path: Path) -> None:
    result = run("doctor", "--json", tmp_path / "d.json")
    assert result.code == 0
    found = json.loads((tmp_path / "d.json").read_text())["encoders"]
    assert found["efficientnet-lite0"]["usable"] is True
    assert {"usable", "gated", "weights", "reason"} <= set(found["efficientnet-lite0"])


def test_counts_only_slides_need_to_be_asked_for(work: Path, run, tmp_path: Path) -> None:
    part = sources.section("bare")
    file = sources.write_h5ad(tmp_path / "bare.h5ad", part, image=None)
    out = tmp_path / "o.h5ad"
    fails(run("embed", file, "--model", work / "run", "--out", out), "image", "--no-image")
    result = run("embed", file, "--model", work / "run", "--out", out, "--no-image")
    assert result.code == 0, result.err
    adata = anndata.read_h5ad(out)
    assert "X_stalign_image" not in adata.obsm
    assert np.isfinite(adata.obsm["X_stalign"]).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["domains", "EMBEDDED", "--n-domains", "0"], ["out of range", "'0'|0"]),
        (["domains", "EMBEDDED", "--n-domains", "1"], ["out of range"]),
        (["domains", "EMBEDDED", "--n-domains", "1000"], ["out of range", "42"]),
        (["domains", "EMBEDDED", "--n-domains", "few"], ["auto", "few"]),
        (["domains", "EMBEDDED", "--n-domains", "2", "--label-key", "laier"], ["laier"]),
        (["domains", "EMBEDDED", "--n-domains", "2", "--use", "nich"], ["niche"]),
        (["domains", "EMBEDDED", "--n-domains", "2", "--method", "gmn"], ["gmm"]),
        (["domains", "absent.h5ad"], ["missing"]),
        (["embed", "CORPUS", "--model", "RUN", "--out", "x.h5ad"], ["S1, S2, S3", "::"]),
        (["embed", "CORPUS::S9", "--model", "RUN", "--out", "x.h5ad"], ["S9"]),
        (["embed", "CORPUS::S3", "--model", "nowhere", "--out", "x.h5ad"], ["nowhere"]),
        (["embed", "CORPUS::S3", "--model", "RUN", "--out", "x.csv"], [".h5ad"]),
        (["train", "CORPUS", "--out", "RUN"], ["not empty", "--resume"]),
        (["train", "CORPUS", "--out", "new", "--hold-out-slide", "S8"], ["S8"]),
        (["train", "CORPUS", "--out", "new", "--preset", "tinny"], ["tiny"]),
        (["train", "CORPUS", "--out", "new", "--config", "BAD"], ["panell", "panel"]),
        (["train", "nowhere", "--out", "new"], ["nowhere"]),
        (["prepare", "nowhere", "--out", "new"], ["nowhere"]),
        (["prepare", "SLIDES", "--out", "new", "--niche", "ring"], ["ring"]),
        (["prepare", "SLIDES", "--out", "new", "--format", "visum"], ["visium"]),
        (["genes", "fit", "CORPUS", "--model", "RUN", "--out", "h.safetensors"], ["--top-hvg"]),
        (
            ["genes", "fit", "CORPUS", "--model", "RUN", "--genes", "GENE99",
             "--out", "h.safetensors"],
            ["GENE99"],
        ),
        (["features", "CORPUS", "--encoder", "lite0"], ["lite0"]),
        (["features", "CORPUS", "--encoder", "ae-gene"], ["trained with the model"]),
        (["doctor", "--weights", "uni"], ["NAME=PATH"]),
        (["report", "nowhere", "--out", "r.html"], ["nowhere"]),
        (["frobnicate"], ["frobnicate"]),
        (["simulate", "--out", "SLIDES"], ["not empty"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_exit_2(
    work: Path,
    embedded: Path,
    run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    said: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("[data]\npanell = 3\n")
    places = {
        "EMBEDDED": embedded, "CORPUS": work / "corpus", "RUN": work / "run",
        "SLIDES": work / "slides", "BAD": tmp_path / "bad.toml",
    }  # fmt: skip
    before = sorted(p.name for p in tmp_path.iterdir())

    def filled(word: str) -> str:
        name, found, rest = word.partition("::")
        return f"{places.get(name, name)}{found}{rest}"

    fails(run(*map(filled, words)), *[part.split("|")[-1] for part in said])
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_damaged_column_is_named(work: Path, run, tmp_path: Path) -> None:
    corpus = shutil.copytree(work / "corpus", tmp_path / "corpus")
    column = corpus / "slides" / "S2" / "spot_patches.npy"
    content = bytearray(column.read_bytes())
    content[-1] ^= 255
    column.write_bytes(content)
    result = run("inspect", corpus, "--verify")
    assert result.code == 2
    assert "S2" in result.out
    assert "spot_patches.npy" in result.out


def test_an_unforeseen_error_is_exit_1_without_a_traceback(run, monkeypatch) -> None:
    import st_align.doctor

    def broken(*_: object) -> None:
        raise RuntimeError("the unforeseen")

    monkeypatch.setattr(st_align.doctor, "check", broken)
    result = run("doctor")
    assert result.code == 1
    assert "the unforeseen" in result.err
    assert "Traceback" not in result.err


def test_a_full_disk_is_exit_2(run, monkeypatch) -> None:
    import errno

    import st_align.doctor

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "corpus/slides")

    monkeypatch.setattr(st_align.doctor, "check", full)
    fails(run("doctor"), "no space left", "corpus/slides")


def test_import_and_help_are_light() -> None:
    code = (
        "import sys, st_align, st_align.cli; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'anndata', 'sklearn', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
