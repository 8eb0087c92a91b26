"""`bench ablation`: its configurations are those of the paper's table; a crash costs one cell."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

import toy_run
from st_align.benchmarks import ablation
from st_align.benchmarks.ablation import RUNS, AblationRequest, bench_ablation
from st_align.benchmarks.ablation_cells import FULL, SIMPLEX, sensitivity, table_3
from st_align.benchmarks.table import Row
from st_align.config import OptimConfig, override, preset, read_toml
from st_align.corpus_build import build_corpus
from st_align.errors import ConfigError, TrainingError
from toy_slides import toy_ref

EXAMPLES = Path(__file__).parents[1] / "examples" / "ablations"
BASE = dataclasses.replace(toy_run.CONFIG, optim=OptimConfig(batch=16, epochs=1))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    refs = [toy_ref(id, rows=4) for id in ("a1", "a2", "b1")]
    out = tmp_path_factory.mktemp("ablation") / "corpus"
    return build_corpus(refs, out, spot_px=16, niche_px=24, progress=False)


def request(**changes) -> AblationRequest:
    plain = AblationRequest(
        config=BASE, hold_out_patients=["b"], label_key="layer", genes=["GENE0"], n_seeds=1
    )
    return dataclasses.replace(plain, **changes)


def results(out: Path) -> list[Row]:
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [Row(**(r | {"value": float(r["value"]) if r["value"] else None})) for r in rows]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("simple concatenation", "concat"),
        ("ABFN + L_NS (w/o AEs)", "no-adaptive-encoders"),
        ("AE + ABFN (w/o L_NS)", "no-cross-scale-loss"),
    ],
)
def test_rows_of_table_3_are_the_configs_of_the_examples(name, file) -> None:
    base = preset("tiny")
    (row,) = [one for one in table_3(base) if one.name == name]
    assert override(base, dict(row.changes)) == read_toml(EXAMPLES / f"{file}.toml", base)


def test_the_full_row_is_the_base_and_seeds_differ_alone() -> None:
    base = preset("tiny")
    (full,) = [one for one in table_3(base) if one.name == FULL]
    assert override(base, dict(full.changes)) == base
    first, second = (full.config(base, seed) for seed in (0, 1))
    assert first == override(second, {"optim": {"seed": 0}})
    assert second.optim.seed == 1


def test_without_adaptive_encoders_the_paper_preset_reads_with_its_own() -> None:
    (row,) = [one for one in table_3(preset("paper")) if "w/o AEs" in one.name]
    assert row.changes["model"] == {"spot_image": "uni", "niche_gene": "scgpt"}


def test_sensitivity_leaves_out_what_the_base_is() -> None:
    names = [one.name for one in sensitivity(preset("tiny"))]
    assert {"niche k3", "niche k6", "niche k18", "fusion vector"} <= set(names)
    assert {"neighbours not masked", "niche without its centre"} <= set(names)
    assert not {"niche lattice", "fusion tokens", "neighbours masked"} & set(names)
    assert sum(name.startswith("lambda") for name in names) == len(SIMPLEX)
    assert "niche lattice" in [one.name for one in sensitivity(preset("paper"))]


def test_a_crashed_cell_is_named_and_the_same_command_goes_on(
    corpus, tmp_path, monkeypatch
) -> None:
    out, trained = tmp_path / "out", []
    plain = ablation.train

    def train(corpus, config, folder, **options):
        trained.append(config)
        if config.model.fusion == "concat" and len(trained) < 5:
            raise TrainingError("the loss is not finite")
        return plain(corpus, config, folder, **options)

    monkeypatch.setattr(ablation, "train", train)
    first, failed_cells = bench_ablation(corpus.path, out, request())
    assert failed_cells == ["simple concatenation seed 0: the loss is not finite"]
    rows = results(out)
    failed = {row.method: row.note for row in rows if row.note}
    assert failed.pop("simple concatenation") == "failed: the loss is not finite"
    assert failed == {"gene only (scgpt, frozen)": "no weights"}
    text = (out / "results.md").read_text()
    assert "- simple concatenation seed 0: the loss is not finite" in text
    scored = {row.method for row in rows if row.metric == "ari" and row.value is not None}
    image = "image only (toy-colour, frozen)"
    assert scored == {image, "ABFN + L_NS (w/o AEs)", "AE + ABFN (w/o L_NS)", FULL}
    assert {r.protocol for r in rows if r.value is not None} == {"donor-held-out"}
    assert len(list((out / RUNS).iterdir())) == 3

    second, _ = bench_ablation(corpus.path, out, request())
    assert len(trained) == 5, "only the cell that crashed is trained again"
    assert second["headline"]["simple concatenation"]["mse"] is not None
    assert second["headline"][FULL] == first["headline"][FULL]
    assert "failed" not in (out / "results.md").read_text().lower()
    assert "| 0.340 | 0.168 |" in text
    assert (out / "table-3.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "sensitivity.png").exists()


def test_a_finished_run_is_not_trained_again_when_its_scores_are_lost(
    corpus, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(ablation, "table_3", lambda base: table_3(base)[-1:])
    out = tmp_path / "out"
    first, _ = bench_ablation(corpus.path, out, request())
    for path in (out / "cells").iterdir():
        path.unlink()
    monkeypatch.setattr(ablation, "train", lambda *_, **__: pytest.fail("trained again"))
    assert bench_ablation(corpus.path, out, request())[0]["headline"] == first["headline"]


def test_a_niche_that_was_not_prepared_is_one_failed_row(corpus, tmp_path, monkeypatch) -> None:
    k3 = [one for one in sensitivity(BASE) if one.name == "niche k3"]
    monkeypatch.setattr(ablation, "table_3", lambda base: [])
    monkeypatch.setattr(ablation, "sensitivity", lambda base: k3)
    bench_ablation(corpus.path, tmp_path / "out", request(sensitivity=True))
    (row,) = [r for r in results(tmp_path / "out") if r.method == "niche k3"]
    assert "k3" in row.note
    assert "## Sensitivity" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hold_out_patients": []}, "no slide is held out"),
        ({"label_key": "layers"}, "layer"),
        ({"genes": ["GENE00"]}, "GENE0"),
        ({"hold_out_patients": ["B"]}, "no patient to hold out"),
    ],
)
def test_wrong_input_is_refused_before_any_training(corpus, tmp_path, changes, text) -> None:
    with pytest.raises(ConfigError, match=text):
        bench_ablation(corpus.path, tmp_path / "out", request(**changes))
    assert not (tmp_path / "out").exists()
