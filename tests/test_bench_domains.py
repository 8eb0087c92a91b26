"""`st-align bench domains`: rows, protocol, audit, scores, resuming, wrong input."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from st_align import cli
from st_align.benchmarks import audit, domains_paper, peers, rows, stimage_clip
from st_align.benchmarks.clusterers import on_axes
from st_align.benchmarks.methods import Target, seeded, with_genes
from st_align.errors import ConfigError
from st_align.expression import choose_panel
from toy_run import save, toy_run
from toys import two_patients


def target(**changes) -> Target:
    first, *fit = two_patients(np.random.default_rng(0), **changes)
    labels = first.spots["domain"].to_numpy().astype(str)
    return Target(slide=first, labels=labels, fit=fit, protocol=audit.SECTION)


# --- rows -----------------------------------------------------------------------------------


def test_rows_without_weights_say_so_and_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ST_ALIGN_WEIGHTS", raising=False)
    there = target()
    said = {row.name: row.missing(there) for row in rows.built_in({})}
    for name in ("CTransPath", "UNI", "Prov-GigaPath", "Hibou", "CONCH", "scFoundation", "scGPT"):
        assert said[name].startswith("no weights"), name
        assert "--weights" in said[name]
    assert said["CLIP, trained elsewhere"].startswith("no weights")
    assert said["EfficientNet-Lite0"] == said["Scanpy-style PCA"] == said[rows.LINEAR] == ""


def test_rows_say_what_the_slide_lacks() -> None:
    no_image, no_counts = target(image=False), target(counts=False)
    by_name = {row.name: row for row in rows.built_in({})}
    assert "no image" in by_name["EfficientNet-Lite0"].missing(no_image)
    assert "no counts" in by_name[rows.LINEAR].missing(no_counts)
    alone = dataclasses.replace(target(), fit=[])
    assert "--protocol section" in by_name[rows.LINEAR].missing(alone)
    assert "no other slide" in by_name["EfficientNet-Lite0 as CLIP, trained elsewhere"].missing(
        alone
    )


def test_linear_rows_find_the_halves_and_are_fitted_where_they_say() -> None:
    there = target()
    by_name = {row.name: row for row in rows.built_in({})}
    for name in (rows.LINEAR, "linear niche, fitted per slide", "Scanpy-style PCA"):
        x = by_name[name].embed(there, 0).x
        assert adjusted_rand_score(x[:, 0] > 0, there.labels) > 0.9
    elsewhere = by_name[rows.LINEAR]
    other = dataclasses.replace(there, fit=there.fit[:1])
    assert elsewhere.key(there) != elsewhere.key(other)


def test_weights_are_named() -> None:
    assert rows.parse_weights(["uni=a=b"]) == {"uni": "a=b"}
    for wrong, said in (("uni", "NAME=PATH"), ("unni=x", "no encoder")):
        with pytest.raises(ConfigError, match=said):
            rows.parse_weights([wrong])


def test_wide_embeddings_are_read_on_30_axes_that_keep_the_variance() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 64))
    assert on_axes(x).shape == (200, 30)
    np.testing.assert_allclose(on_axes(x).var(axis=0).sum(), x.var(axis=0).sum())
    assert on_axes(x[:, :8]).shape == (200, 8)


def test_with_genes_keeps_library_sizes() -> None:
    slide = target().slide
    fewer = with_genes(slide, ["GENE3", "GENE1"])
    np.testing.assert_array_equal(fewer.counts.toarray(), slide.counts[:, [3, 1]].toarray())
    np.testing.assert_array_equal(fewer.total_umi, slide.total_umi)


def test_seeded_restores_the_global_generators() -> None:
    with seeded(3):
        first = np.random.random()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    with seeded(3):
        assert np.random.random() == first  # noqa: NPY002
    assert np.random.random() == expected  # noqa: NPY002


# --- CLIP after STimage-1K4M ------------------------------------------------------------------


def test_clip_follows_upstreams_settings() -> None:
    assert stimage_clip.DIM == 32
    assert (stimage_clip.SLIDE_GENES, stimage_clip.OVERLAP_GENES) == (128, 100)
    assert (stimage_clip.EPOCHS, stimage_clip.BATCH) == (15, 1024)
    assert (stimage_clip.LR, stimage_clip.BETAS, stimage_clip.DECAY) == (5e-5, (0.9, 0.98), 0.2)
    assert pytest.approx(2.6593, abs=1e-4) == stimage_clip.SCALE


def test_clip_learns_pairs_and_repeats_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    slide = target().slide
    panel = choose_panel([slide], 20)
    colours = slide.spot_patches.reshape(slide.n_spots, -1, 3).mean(axis=1) / 255
    pair = stimage_clip.pair(colours, slide, panel)
    monkeypatch.setattr(stimage_clip, "EPOCHS", 0)
    before = stimage_clip.train([pair], seed=0).embed(pair)
    monkeypatch.setattr(stimage_clip, "EPOCHS", 200)
    monkeypatch.setattr(stimage_clip, "LR", 1e-2)
    after = stimage_clip.train([pair], seed=0).embed(pair)
    assert after.shape == (slide.n_spots, 64)
    np.testing.assert_allclose(np.linalg.norm(after[:, :32], axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(stimage_clip.train([pair], seed=0).embed(pair), after)

    def matched(x: np.ndarray) -> float:
        cosine = x[:, :32] @ x[:, 32:].T
        return float(np.diag(cosine).mean() - cosine.mean())

    assert matched(after) > matched(before) + 0.1


def test_a_gene_that_was_not_measured_is_zero() -> None:
    slide = target().slide
    panel = choose_panel([slide], 30)
    fewer = with_genes(slide, ["GENE0", "GENE1"])
    assert (stimage_clip.pair(np.ones((slide.n_spots, 3)), fewer, panel).genes != 0).any(
        axis=0
    ).sum() == 2


# --- peers ------------------------------------------------------------------------------------


def test_absent_packages_make_rows_that_say_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    said = {row.name: row.missing(target()) for row in peers.peers({})}
    assert set(said) == {"BANKSY", "STAGATE", "GraphST", "CellCharter", "Novae"}
    assert all("pip install" in said[name] for name in set(said) - {"Novae"})
    assert said["Novae"].startswith("no weights")
    (novae,) = (row for row in peers.peers({"novae": "nowhere"}) if row.name == "Novae")
    assert "pip install" in novae.missing(target())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("BANKSY", "banksy"),
        ("STAGATE", "STAGATE_pyG"),
        ("GraphST", "GraphST"),
        ("CellCharter", "cellcharter"),
    ],
)
def test_peers_embed_every_spot(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extra `bench` is installed."""
    monkeypatch.setattr(peers, "STAGATE_EPOCHS", 2)
    monkeypatch.setattr(peers, "GRAPHST_EPOCHS", 2)
    if peers.importlib.util.find_spec(module) is None:
        pytest.skip(f"the bench extra is not installed: no {module}")
    there = target(n_genes=400)
    (row,) = (row for row in peers.peers({}) if row.name == name)
    found = row.embed(there, 0)
    assert found.x.shape[0] == there.slide.n_spots
    assert np.isfinite(found.x).all()
    if row.own is not None:
        assert [len(run.labels) for run in row.own.find(found, 2, 2, 0)] == [
            there.slide.n_spots
        ] * 2


# --- the paper --------------------------------------------------------------------------------


def test_printed_values_stand_at_their_rows() -> None:
    columns = domains_paper.printed_columns(["151674", "Human_Visium_151507"], ["ours"])
    assert list(columns) == ["paper, 151507"]
    assert columns["paper, 151507"]["ours"] == ".310±.016"
    assert columns["paper, 151507"]["Scanpy-style PCA"] == ".218±.031"
    means = {
        name: np.mean([float(v.split("±")[0]) for v in printed.values()])
        for name, printed in domains_paper.PRINTED.items()
    }
    expected = {"CTransPath": 0.082, "UNI": 0.109, "Prov-GigaPath": 0.111, "Hibou": 0.087,
                "CONCH": 0.128, "Scanpy": 0.264, "scFoundation": 0.262, "scGPT": 0.262,
                "CLIP": 0.256, "PLIP": 0.248, "ST-Align": 0.340}  # fmt: skip
    assert means == pytest.approx(expected, abs=0.0006)


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run `st-align bench domains` in this process: exit code, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["st-align", "bench", "domains", *map(str, words)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labelled h5ad files, and two runs: one that saw a2 and b1, one that saw b1."""
    from st_align.embedded import to_anndata
    from st_align.store import write_h5ad

    root = tmp_path_factory.mktemp("bench")
    made = two_patients(np.random.default_rng(0))
    run = toy_run(made[1:])
    from st_align.infer import Embedder

    for slide in made:
        slide.spots.loc[:2, "domain"] = "NA"
        write_h5ad(to_anndata(run, slide, Embedder(run).embed(slide)),
                   root / "h5ad" / f"{slide.id}.h5ad")  # fmt: skip
    save(run, root / "run-a1")
    save(toy_run(made[2:]), root / "run-b")
    return root


FAST = ("--label-key", "domain", "--runs", 2)
ROWS = ("--rows", "UNI", "--rows", "Scanpy-style PCA", "--rows", rows.LINEAR)


def test_the_whole_way(data: Path, tmp_path: Path, command) -> None:
    out = tmp_path / "out"
    words = (data / "h5ad", "--out", out, *FAST, *ROWS, "--slices", "a1",
             "--model", data / "run-b", "--json", tmp_path / "r.json")  # fmt: skip
    code, said, err = command(*words)
    assert code == 0, err
    assert "run-b on a1: donor-held-out" in said
    with (out / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert {row["method"] for row in table} == {
        "truth", "run-b", "run-b, consensus", "UNI", "Scanpy-style PCA",
        "Scanpy-style PCA, k-means", rows.LINEAR, f"{rows.LINEAR}, consensus",
    }  # fmt: skip
    for method in ("run-b", "run-b, consensus", "Scanpy-style PCA, k-means"):
        tracks = {row["track"] for row in table if row["method"] == method}
        assert tracks == {"oracle K", "oracle K, refined", "blind K", "blind K, refined"}
    result = json.loads((tmp_path / "r.json").read_text())
    (uni,) = (row for row in result["rows"] if row["method"] == "UNI")
    assert uni["mean"] is None
    assert uni["note"].startswith("no weights")
    ari = [r for r in result["rows"] if r["metric"] == "ari" and r["method"] == rows.LINEAR]
    assert ari[0]["mean"] > 0.8
    assert len(ari[0]["runs"]) == 2
    assert result["headline"]["reference"] == rows.LINEAR
    assert {"Scanpy-style PCA", "run-b, consensus"} <= result["headline"]["differences"].keys()
    with (out / "differences.csv").open(newline="") as file:
        apart = {(r["method"], r["reference"], r["track"]): r for r in csv.DictReader(file)}
    ours = apart["run-b, consensus", f"{rows.LINEAR}, consensus", "blind K"]
    assert float(ours["low"]) <= float(ours["difference"]) <= float(ours["high"])
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["targets"]["a1"]["axes_fitted_on"] == ["b1"]
    assert facts["targets"]["a1"]["n_labelled"] == 61
    assert facts["slides"]["a1"]["patient"] == "A"
    assert facts["peak_memory_gib"] > 0
    assert facts["seconds"]["cells"]["a1 run-b embedding"].keys() == {"wall", "cpu"}
    assert facts["packages"]["scikit-learn"]
    assert (out / "a1.png").read_bytes()[:4] == b"\x89PNG"
    page = (out / "results.md").read_text()
    assert page.index("Leakage audit") < page.index("## ARI")
    assert "| UNI |" in page
    assert "| run-b, consensus |" in page[page.index("## Time") :]
    before = {p: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}
    assert command(*words)[0] == 0
    assert before == {p: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}


def test_an_embedding_is_kept_when_it_is_scored_anew(data: Path, tmp_path: Path, command) -> None:
    words = (data / "h5ad", "--out", tmp_path, "--label-key", "domain", "--slices", "a1",
             "--rows", "Scanpy-style PCA", "--reference", "Scanpy-style PCA, k-means")  # fmt: skip

    def made(kind: str) -> dict[Path, int]:
        found = (tmp_path / "cells").glob("*.json")
        return {p: p.stat().st_mtime_ns for p in found if ("embedding" in p.name) == (kind == "x")}

    assert command(*words, "--runs", 1)[0] == 0
    kept, scored = made("x"), made("scores")
    assert command(*words, "--runs", 2)[0] == 0
    assert made("x") == kept
    assert len(made("scores")) == len(scored) + 1
    with (tmp_path / "differences.csv").open(newline="") as file:
        assert {r["reference"] for r in csv.DictReader(file)} == {"Scanpy-style PCA, k-means"}


def test_the_consensus_row_is_what_the_verb_domains_finds(
    data: Path, tmp_path: Path, command
) -> None:
    from st_align.commands.domains import DomainRequest, find_domains

    code, _, err = command(
        data / "h5ad", "--out", tmp_path / "out", *FAST, "--rows", rows.LINEAR, "--slices", "a1",
        "--model", f"ours={data / 'run-a1'}", "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "r.json").read_text())["rows"]
    for track, number in (("oracle K", "2"), ("blind K", "auto")):
        request = DomainRequest(n_domains=number, label_key="domain", runs=2)
        alone = find_domains([data / "h5ad" / "a1.h5ad"], request, out=tmp_path / "a1.h5ad")
        (ours,) = (
            r for r in found
            if (r["method"], r["track"], r["metric"]) == ("ours, consensus", track, "ari")
        )  # fmt: skip
        assert ours["runs"] == alone["slides"]["a1"]["ari"]["runs"]


def test_the_papers_column_stands_in_the_page_of_its_slices(
    data: Path, tmp_path: Path, command
) -> None:
    (tmp_path / "h5ad").mkdir()
    shutil.copy(data / "h5ad" / "a1.h5ad", tmp_path / "h5ad" / "151507.h5ad")
    code, page, err = command(
        tmp_path / "h5ad", "--out", tmp_path / "out", *FAST, "--runs", 1, "--protocol", "section",
        "--rows", "Scanpy-style PCA", "--rows", "UNI",
        "--reference", "Scanpy-style PCA", "--model", f"ours={data / 'run-a1'}",
    )  # fmt: skip
    assert code == 0, err
    assert "| protocol | paper, 151507 |" in page
    for method, printed in (("ours", ".310±.016"), ("UNI", ".106±.044")):
        (line,) = (at for at in page.splitlines() if at.startswith(f"| {method} |")
                   and "±" in at.rsplit("|", 2)[1])  # fmt: skip
        assert line.endswith(f"| {printed} |")


def test_a_leak_is_refused_unless_allowed_and_then_branded(
    data: Path, tmp_path: Path, command
) -> None:
    words = (data / "h5ad", "--out", tmp_path / "out", *FAST, "--rows", rows.LINEAR,
             "--slices", "a2", "--model", f"ours={data / 'run-a1'}")  # fmt: skip
    code, _, err = command(*words)
    assert code == 2
    assert "ours was trained on a2" in err
    assert not (tmp_path / "out").exists()
    code, said, err = command(*words, "--allow-leak")
    assert code == 0, err
    assert said.count(audit.LEAK) >= 4
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        ours = [row for row in csv.DictReader(file) if row["method"] == "ours"]
    assert {row["protocol"] for row in ours} == {audit.LEAK}


def test_a_failing_row_leaves_the_others_and_exits_with_1(
    data: Path, tmp_path: Path, command
) -> None:
    (tmp_path / "bad.bin").write_text("no weights at all")
    code, said, err = command(
        data / "h5ad", "--out", tmp_path / "out", *FAST, *ROWS, "--slices", "a1",
        "--weights", f"uni={tmp_path / 'bad.bin'}",
    )  # fmt: skip
    assert code == 1
    assert "Traceback" not in err
    assert "| UNI |" in said
    assert "failed: " in said
    assert rows.LINEAR in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--label-key", "domian"), "'domain'"),
        (("--label-key", "domain", "--slices", "a9"), "a9"),
        (("--label-key", "domain", "--rows", "Scanpi"), "no row"),
        (("--label-key", "domain", "--reference", "nothing"), "no row"),
        (("--label-key", "domain", "--protocol", "patient"), "--protocol"),
        (("--label-key", "domain", "--weights", "uni"), "NAME=PATH"),
        (("--label-key", "domain", "--model", "nowhere"), "no model"),
    ],
)
def test_wrong_input_exits_with_2(data: Path, tmp_path: Path, command, words, said) -> None:
    code, _, err = command(data / "h5ad", "--out", tmp_path / "out", *words)
    assert code == 2, err
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
