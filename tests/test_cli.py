"""The command's contract: verbs, exit codes, JSON; bad input ends in one message and exit 2."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import typer

import sources
from st_align import cli


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
    (root / "small.toml").write_text(sources.SMALL)
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


def test_inspect_tells_of_a_slide_what_prepare_would(work: Path, run, tmp_path: Path) -> None:
    result = run("inspect", work / "slides" / "S3", "--json", tmp_path / "i.json")
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["um_per_px"] == pytest.approx(100 / sources.PITCH, rel=0.02)
    prepared = json.loads((work / "prepare.json").read_text())["slides"]["S3"]["warnings"]
    few = [text for text in prepared if "px per spot" in text]
    assert few == [text for text in found["warnings"] if "px per spot" in text]
    assert all(f"warning: {text}" in result.out.splitlines() for text in found["warnings"])


def test_inspect_of_what_is_not_there_names_the_models(run) -> None:
    result = run("inspect", "tiny-brian")
    assert result.code == 2
    assert "tiny-brain" in result.err
    assert "Traceback" not in result.err


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
        (["domains", "EMBEDDED", "--n-domains", "2", "--seed", "-1"], ["--seed", "equal to 0"]),
        (["domains", "EMBEDDED", "--n-domains", "2", "--out", "bad.toml/x"], ["not a directory"]),
        (["domains", "EMBEDDED", "EMBEDDED"], ["one file", "S3.h5ad"]),
        (["domains", "absent.h5ad"], ["missing"]),
        (["domains", f"{'long' * 80}.h5ad"], ["name too long"]),
        (["doctor", "--json", "bad.toml/x.json"], ["cannot write", "not a directory"]),
        (["doctor", "--json", f"{'long' * 80}.json"], ["cannot write", "name too long"]),
        (["doctor", "--json", "."], ["cannot write", "is a directory"]),
        (["embed", "CORPUS", "--model", "RUN", "--out", "x.h5ad"], ["S1, S2, S3", "::"]),
        (["embed", "CORPUS::S9", "--model", "RUN", "--out", "x.h5ad"], ["S9"]),
        (["embed", "CORPUS::S3", "--model", "nowhere", "--out", "x.h5ad"], ["nowhere"]),
        (["embed", "CORPUS::S3", "--model", "RUN", "--out", "x.csv"], [".h5ad"]),
        (
            ["embed", "CORPUS::S3", "--model", "RUN", "--out", "bad.toml/x.h5ad"],
            ["cannot write", "not a directory"],
        ),
        (["train", "CORPUS", "--out", "RUN"], ["not empty", "--resume"]),
        (["train", "CORPUS", "--out", "new", "--hold-out-slide", "S8"], ["S8"]),
        (["train", "CORPUS", "--out", "new", "--seed", "-3"], ["--seed", "equal to 0"]),
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


def test_a_full_disk_is_exit_2(embedded: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = embedded.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    fails(run("domains", embedded, "--n-domains", 2), "no space left", embedded.name)
    assert embedded.read_bytes() == before
    assert list(embedded.parent.iterdir()) == [embedded]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_place_is_found_before_the_work(run, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = run("doctor", "--json", tmp_path / "new" / "d.json")
    tmp_path.chmod(0o700)
    fails(result, "cannot write", "permission denied")
    assert not result.out


def test_results_may_go_to_new_folders(embedded: Path, run, tmp_path: Path) -> None:
    out, json_path = tmp_path / "a" / "b" / "S3.h5ad", tmp_path / "c" / "d.json"
    result = run("domains", embedded, "--n-domains", 2, "--out", out, "--json", json_path)
    assert result.code == 0, result.err
    assert anndata.read_h5ad(out).obs["stalign_domain"].nunique() == 2
    assert json_path.is_file()


def test_of_several_files_all_are_written_or_none(embedded: Path, run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.h5ad"
    bad.write_bytes(embedded.read_bytes()[:5000])
    before = embedded.read_bytes()
    fails(run("domains", embedded, bad, "--n-domains", 2), "bad.h5ad", "cannot be read")
    assert embedded.read_bytes() == before
    other = shutil.copy(embedded, tmp_path / "other.h5ad")
    result = run("domains", embedded, other, "--n-domains", 2, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["S3.h5ad", "other.h5ad"]
    assert embedded.read_bytes() == before


def no_spatial(adata: anndata.AnnData) -> None:
    del adata.obsm["spatial"]
    del adata.obs["array_col"]


def rows_only(adata: anndata.AnnData) -> None:
    del adata.obs["array_col"]


def text_rows(adata: anndata.AnnData) -> None:
    adata.obs["array_row"] = pd.Categorical([f"r{i}" for i in range(adata.n_obs)])


def lost_coordinates(adata: anndata.AnnData) -> None:
    adata.obsm["spatial"][3] = np.nan
    del adata.obs["array_row"]


def foreign_notes(adata: anndata.AnnData) -> None:
    adata.uns["stalign"] = "of another tool"


def bad_notes(adata: anndata.AnnData) -> None:
    adata.uns["stalign"]["warnings_json"] = "[not json"


@pytest.mark.parametrize(
    ("edit", "plain", "refined"),
    [
        (no_spatial, None, ["S3.h5ad", "no coordinates", "obsm['spatial']"]),
        (rows_only, None, None),
        (text_rows, None, None),
        (lost_coordinates, None, ["S3.h5ad", "no coordinates", "finite"]),
        (foreign_notes, ["S3.h5ad", "uns['stalign']", "str"], ["S3.h5ad", "uns['stalign']"]),
        (bad_notes, ["S3.h5ad", "warnings_json", "JSON"], ["S3.h5ad", "warnings_json"]),
    ],
)
def test_domains_of_foreign_and_edited_files(
    embedded: Path, run, edit, plain: list[str] | None, refined: list[str] | None
) -> None:
    adata = anndata.read_h5ad(embedded)
    edit(adata)
    adata.write_h5ad(embedded)
    before = embedded.read_bytes()
    for said, options in ((refined, ["--refine"]), (plain, [])):
        result = run("domains", embedded, "--n-domains", 2, "--runs", 1, *options)
        if said is None:
            assert result.code == 0, result.err
        else:
            fails(result, *said)
            assert embedded.read_bytes() == before


def test_of_two_ranks_the_first_alone_speaks(work: Path, tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    job = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    words = ["train", work / "corpus", "--out", tmp_path / "run", "--config", work / "small.toml"]
    ranks = []
    for rank in ("0", "1"):
        command = [sys.executable, "-m", "st_align.cli", *map(str, words)]
        ranks.append(
            subprocess.Popen(
                [*command, "--json", tmp_path / f"{rank}.json"],
                env=os.environ | job | {"RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert f"trained: {tmp_path / 'run'}" in said[0][0]
    assert said[1][0] == ""
    assert json.loads((tmp_path / "0.json").read_text())["finished"] is True
    assert not (tmp_path / "1.json").exists()


def test_help_lists_what_there_is() -> None:
    from st_align import keys
    from st_align.config import PRESETS
    from st_align.domains import METHODS
    from st_align.geometry import parse_niche_spec

    group = typer.main.get_command(cli.app)

    def said(verb: str, name: str) -> list[str]:
        option = next(p for p in group.commands[verb].params if p.name == name)
        return re.findall(r"[\w+<>-]+", option.help)

    assert set(METHODS) <= set(said("domains", "method"))
    assert set(keys.USES) <= set(said("domains", "use"))
    assert set(PRESETS) <= set(said("train", "preset"))
    for verb in ("prepare", "features"):
        kinds = [word.replace("<N>", "5") for word in said(verb, "niche")]
        assert {"lattice", "k3", "k5"} <= set(kinds)
        assert [parse_niche_spec(kind) for kind in ("lattice", "k3", "k5")] == [None, 3, 5]


def test_import_and_help_are_light() -> None:
    code = (
        "import sys, st_align, st_align.cli; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'anndata', 'sklearn', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
