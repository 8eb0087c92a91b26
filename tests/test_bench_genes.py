"""`bench genes`: splits, scores and ceilings against literal sums; no count reaches an answer."""

from __future__ import annotations

import csv
import dataclasses
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

import toy_run
from st_align.benchmarks.bootstrap import compare
from st_align.benchmarks.genes import GenesRequest, bench_genes
from st_align.benchmarks.genes_data import patient_folds, usable
from st_align.benchmarks.genes_models import (
    BY_TRAINING,
    PER_SLIDE,
    MeanPredictor,
    RidgePredictor,
    Scaling,
    Task,
)
from st_align.benchmarks.genes_scores import correlation, gene_scores
from st_align.benchmarks.image_rows import colours, image_encoders, parse_image_weights
from st_align.benchmarks.reliability import reliability
from st_align.cli import app
from st_align.corpus_build import build_corpus
from st_align.encoders.base import registered
from st_align.errors import ConfigError, ModelError, SlideError
from st_align.expression import Panel
from st_align.infer import without_counts
from st_align.targets import gene_panel, targets
from toy_slides import toy_ref
from toys import toy_prepared

GENES = ("GENE0", "GENE3", "GENE20")


@pytest.fixture(scope="module")
def slides():
    rng = np.random.default_rng(0)
    return [toy_prepared(rng, id=f"{p}{i}", patient=p, rows=8) for p in "ab" for i in (1, 2)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    refs = [toy_ref(f"{p}{i}", rows=6) for p in "ab" for i in (1, 2)]
    out = tmp_path_factory.mktemp("genes") / "corpus"
    return build_corpus(refs, out, spot_px=16, niche_px=24, progress=False)


@pytest.fixture(scope="module")
def run_without_b(corpus, tmp_path_factory):
    run = toy_run.toy_run(corpus.slides(["a1", "a2"]), config=toy_run.CONFIG)
    return toy_run.save(run, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(autouse=True)
def no_large_encoder(monkeypatch):
    """The ungated encoder would be most of these tests' time."""
    found = [(name, e) for name, e in image_encoders({}) if name != "efficientnet-lite0"]
    monkeypatch.setattr("st_align.benchmarks.genes.image_encoders", lambda weights: iter(found))


def test_few_patients_are_left_out_one_by_one(rng) -> None:
    folds = patient_folds({"s1": "a", "s2": "a", "s3": "b", "s4": "c"}, rng=rng)
    assert [f.test for f in folds] == [("s1", "s2"), ("s3",), ("s4",)]
    assert folds[1].train == ("s1", "s2", "s4")


def test_of_many_patients_a_fifth_is_tested_and_each_once(rng) -> None:
    patients = {f"s{i}": f"p{i // 2}" for i in range(20)}
    folds = patient_folds(patients, rng=rng)
    assert len(folds) == 5
    assert sorted(s for f in folds for s in f.test) == sorted(patients)
    for fold in folds:
        assert len({patients[s] for s in fold.test}) == 2
        assert not {patients[s] for s in fold.test} & {patients[s] for s in fold.train}


def test_patients_named_are_tested_together(rng) -> None:
    (fold,) = patient_folds({"s1": "a", "s2": "b", "s3": "c"}, test_patients=["c", "b"], rng=rng)
    assert (fold.train, fold.test) == (("s1",), ("s2", "s3"))


@pytest.mark.parametrize(
    ("patients", "test", "text"),
    [
        ({"s": "a", "t": "a"}, (), "two patients or more"),
        ({"s": "a", "t": "b"}, ("a", "b"), "one needs another to train on"),
        ({"s": "Br1", "t": "Br2"}, ("br1",), "Br1"),
    ],
)
def test_splits_that_cannot_be_made(patients, test, text, rng) -> None:
    with pytest.raises(ConfigError, match=text):
        patient_folds(patients, test_patients=test, rng=rng)


def test_scores_against_literal_sums(rng) -> None:
    true, guess = rng.normal(2, 1, (50, 3)), rng.normal(2.5, 0.5, (50, 3))
    scores = gene_scores(true, guess)
    for j in range(3):
        t, g = true[:, j], guess[:, j]
        mse = sum((a - b) ** 2 for a, b in zip(t, g, strict=True)) / 50
        assert scores["mse"][j] == pytest.approx(mse)
        assert scores["mae"][j] == pytest.approx(np.abs(t - g).sum() / 50)
        assert scores["r2"][j] == pytest.approx(1 - mse / t.var())
        assert scores["pcc"][j] == pytest.approx(np.corrcoef(t, g)[0, 1])
        parts = scores["centred_mse_over_variance"][j] * t.var() + scores["offset_mse"][j]
        assert parts == pytest.approx(mse)
        assert scores["offset_mse"][j] == pytest.approx((t.mean() - g.mean()) ** 2)


def test_a_constant_has_no_correlation_and_the_whole_variance_as_error(rng) -> None:
    true = rng.normal(0, 1, (40, 1))
    scores = gene_scores(true, np.full((40, 1), 0.1))
    assert np.isnan(scores["pcc"][0])
    assert scores["centred_mse_over_variance"][0] == pytest.approx(1)
    assert np.isnan(gene_scores(np.ones((9, 1)), true[:9])["r2"][0])
    assert np.isnan(correlation(np.full((7, 1), 0.1) * 3, rng.normal(size=(7, 1)))[0])


def reliability_slide(rng, depth: float, n: int = 3000):
    """A slide whose genes vary in truth or not at all; and log1p CP10k of the truth."""
    base = toy_prepared(rng, rows=2, n_genes=4)
    rates = np.exp(rng.normal(0, (0.8, 0.3, 0.0, 0.5), (n, 4)))
    counts = rng.poisson(depth * rates)
    total = np.full(n, depth * 400.0)
    spots = base.spots.iloc[np.zeros(n, int)].assign(total_umi=total).reset_index(drop=True)
    slide = dataclasses.replace(base, spots=spots, counts=sparse.csr_array(counts.astype(np.int32)))
    return slide, np.log1p(rates * depth / total[:, None] * 1e4)


@pytest.mark.parametrize("depth", [1.0, 5.0])
def test_reliability_is_the_squared_correlation_with_the_truth(rng, depth) -> None:
    slide, truth = reliability_slide(rng, depth)
    panel = Panel(genes=tuple(slide.genes.symbols), ensembl=("",) * 4)
    found = reliability(slide, panel, rng)
    reached = correlation(targets(slide, panel).values, truth)
    for j in (0, 1, 3):
        assert np.sqrt(found[j]) == pytest.approx(reached[j], abs=0.06)
    assert found[2] < 0.05


def test_reliability_of_what_was_not_measured_is_not_known(rng) -> None:
    slide = toy_prepared(rng)
    panel = Panel(genes=("GENE0", "ELSEWHERE"), ensembl=("", ""))
    found = reliability(slide, panel, rng)
    assert found[0] > 0.3
    assert np.isnan(found[1])
    assert np.isnan(reliability(without_counts(slide), panel, rng)).all()


def test_usable_slides_have_both_and_the_others_are_named(rng) -> None:
    good, bare = toy_prepared(rng, id="g"), toy_prepared(rng, id="n", image=False)
    assert usable([bare, good])[1] == ["n"]
    with pytest.raises(SlideError, match="both an image and counts"):
        usable([bare])


def test_an_unknown_gene_names_the_nearest(slides) -> None:
    with pytest.raises(ConfigError, match="GENE3"):
        gene_panel(["GENE33"], slides)


def test_the_mean_predictor_is_the_training_mean(slides) -> None:
    task = Task(train=slides[:2], test=slides[2:], panel=gene_panel(GENES, slides))
    found = MeanPredictor().predict(task, "")
    values = [targets(s, task.panel).values for s in slides[:2]]
    np.testing.assert_allclose(found["b1"][5], np.concatenate(values).mean(axis=0))


@pytest.mark.parametrize("track", [PER_SLIDE, BY_TRAINING])
def test_ridge_on_colours_beats_the_mean_where_colours_tell(slides, track) -> None:
    task = Task(train=slides[:2], test=slides[2:], panel=gene_panel(GENES, slides))
    found = RidgePredictor("colours", colours, "c").predict(task, track)["b1"]
    true = targets(slides[2], task.panel).values
    mean = MeanPredictor().predict(task, "")["b1"]
    assert gene_scores(true, found)["mse"].mean() < 0.8 * gene_scores(true, mean)["mse"].mean()


def test_what_is_next_to_constant_in_training_is_not_blown_up() -> None:
    block = np.c_[np.arange(10.0), np.arange(10.0) ** 2, np.full(10, 5) + 1e-5 * np.arange(10)]
    scaling = Scaling.of([block.astype(np.float32)])
    assert scaling.factor[2] == 0
    assert scaling.apply(block.astype(np.float32)).var(axis=0).sum() == pytest.approx(1)


def test_intervals_are_paired_and_know_the_direction(rng) -> None:
    noise = [rng.normal(5, 3, 400) for _ in range(4)]
    found = compare([n + 0.2 for n in noise], noise, rng)
    assert found.difference.value == pytest.approx(0.2)
    assert found.difference.low == pytest.approx(0.2)
    assert found.ratio.low > 1
    shifted = compare([rng.normal(0, 1, 300)], [rng.normal(0, 1, 300)], rng).difference
    assert shifted.low < 0 < shifted.high
    assert np.isnan(compare([np.ones(5)], [np.zeros(5)], rng).ratio.value)


def test_intervals_do_not_hold_the_draws_of_all_slides(rng) -> None:
    slides = [rng.normal(size=500) for _ in range(30)]
    tracemalloc.start()
    compare(slides, slides, rng)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * 2000 * 500 * 8, "the draws of a few slides"


def results(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_whole_bench(corpus, run_without_b, tmp_path) -> None:
    request = GenesRequest(
        genes=GENES[:2], test_patients=["b"], models=[f"ours={run_without_b}"], seed=1
    )
    result, failed = bench_genes(corpus.path, tmp_path / "out", request)
    assert failed == []
    rows = results(tmp_path / "out")
    methods = {row["method"] for row in rows}
    assert {"mean predictor", "colour statistics", "ours, r", "ours, e", "ours, r+e"} <= methods
    assert {"ours, genes predict", "toy-colour, spot", "toy-colour, niche", "uni"} <= methods
    assert [row["note"] for row in rows if row["method"] == "uni"] == ["no weights"]
    assert {row["protocol"] for row in rows if row["method"] == "ours, r"} == {"donor-held-out"}
    assert not any("failed" in row["note"] for row in rows)
    kept = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert kept["folds"] == [{"name": "test b", "train": ["a1", "a2"], "test": ["b1", "b2"]}]
    assert kept["audit"] == ["ours on b1: donor-held-out", "ours on b2: donor-held-out"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| uni |" in text
    assert "PCC pooled" in text
    assert (tmp_path / "out" / "genes.png").read_bytes().startswith(b"\x89PNG")
    own = [r for r in result["rows"] if r["method"] == "mean predictor" and not r.get("item")]
    ratio = [r["mean"] for r in own if r["metric"] == "mse_over_mean_predictor"]
    assert ratio == [1.0, 1.0]
    assert result["headline"]["least_mse"] in result["headline"]["methods"]


def test_a_finished_cell_is_not_made_again(corpus, tmp_path, monkeypatch) -> None:
    request = GenesRequest(genes=GENES[:1], test_patients=["b"])
    first = bench_genes(corpus.path, tmp_path / "out", request)
    monkeypatch.setattr(MeanPredictor, "predict", lambda *_: pytest.fail("made twice"))
    assert bench_genes(corpus.path, tmp_path / "out", request) == first


def test_a_method_that_fails_costs_its_row_alone(corpus, tmp_path, monkeypatch) -> None:
    def fail(*_):
        raise SlideError("no colour today")

    monkeypatch.setattr("st_align.benchmarks.genes.colours", fail)
    request = GenesRequest(genes=GENES[:1], test_patients=["b"])
    _, named = bench_genes(corpus.path, tmp_path / "out", request)
    assert len(named) == 2
    rows = results(tmp_path / "out")
    failed = {row["note"] for row in rows if row["method"] == "colour statistics"}
    assert failed == {"failed: no colour today"}
    assert any(row["method"] == "toy-colour, spot" and row["value"] for row in rows)


def test_the_command_ends_with_1_where_a_method_failed(corpus, tmp_path, monkeypatch) -> None:
    from typer.testing import CliRunner

    def fail(*_):
        raise SlideError("no colour today")

    words = ["bench", "genes", str(corpus.path), "--genes", "GENE0", "--test-patients", "b"]
    words += ["--out", str(tmp_path / "o"), "--json", str(tmp_path / "o.json")]
    with monkeypatch.context() as patch:
        patch.setattr("st_align.benchmarks.genes.colours", fail)
        broken = CliRunner().invoke(app, words)
    assert broken.exit_code == 1
    assert "2 cells failed" in broken.output
    mended = CliRunner().invoke(app, words)
    assert mended.exit_code == 0
    assert "# Expression from the image alone" in mended.output
    assert json.loads((tmp_path / "o.json").read_text())["headline"]["least_mse"]


def test_counts_of_the_target_do_not_reach_any_prediction(
    corpus, run_without_b, tmp_path, monkeypatch
) -> None:
    """The counts of all test slides are shuffled over spots and genes: nothing may change."""
    taken: list[dict[str, np.ndarray]] = []

    def keep(of, slides, predicted, panel, means):
        taken[-1] |= {f"{of.method} {of.track} {s}": v for s, v in predicted.items()}
        return genes.Cell(rows=())

    from st_align.benchmarks import genes

    monkeypatch.setattr(genes, "score_slides", keep)
    rng = np.random.default_rng(0)
    plain = type(corpus).slide

    def shuffled(self, slide_id):
        slide = plain(self, slide_id)
        if slide.patient == "a":
            return slide
        dense = slide.counts.toarray()
        dense = rng.permutation(rng.permutation(dense, axis=0), axis=1)
        return dataclasses.replace(slide, counts=sparse.csr_array(dense))

    request = GenesRequest(top=3, test_patients=["b"], models=[f"m={run_without_b}"],
                           min_reliability=0.0)  # fmt: skip
    for read in (plain, shuffled):
        taken.append({})
        monkeypatch.setattr(type(corpus), "slide", read)
        bench_genes(corpus.path, tmp_path / f"out{len(taken)}", request)
    assert len(taken[0]) >= 2 * 8
    assert taken[0].keys() == taken[1].keys()
    for name, values in taken[0].items():
        np.testing.assert_array_equal(values, taken[1][name], err_msg=name)


def test_a_model_that_saw_the_slide_is_refused(corpus, run_without_b, tmp_path) -> None:
    request = GenesRequest(genes=GENES[:1], test_patients=["a"], models=[str(run_without_b)])
    with pytest.raises(ModelError, match="was trained on a1"):
        bench_genes(corpus.path, tmp_path / "out", request)
    allowed = dataclasses.replace(request, allow_leak=True)
    bench_genes(corpus.path, tmp_path / "out", allowed)
    marked = {r["protocol"] for r in results(tmp_path / "out") if r["method"].startswith("run, ")}
    assert marked == {"LEAK: trained on the slide"}


def test_unreliable_genes_are_left_out_by_the_training_slides(corpus, tmp_path) -> None:
    every = GenesRequest(genes=GENES[:2], test_patients=["b"], min_reliability=0.999)
    with pytest.raises(ConfigError, match="no gene is as reliable"):
        bench_genes(corpus.path, tmp_path / "out", every)


def test_encoders_without_weights_say_so(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("ST_ALIGN_WEIGHTS", raising=False)
    found = dict(image_encoders({}))
    assert found["uni"] == "no weights"
    assert not isinstance(found["toy-colour"], str)


def test_weights_that_are_given_are_used_or_refused(tmp_path) -> None:
    with pytest.raises(ModelError, match="weights of 'uni' are missing"):
        parse_image_weights([f"uni={tmp_path / 'w.bin'}"])
    for given in ("scgpt=w.bin", "unj=w.bin", "uni", "resnet50-gn=w.bin"):
        with pytest.raises(ConfigError):
            parse_image_weights([given])
    (tmp_path / "w.bin").write_bytes(b"no weights of anything")
    given = {"uni": str(tmp_path / "w.bin")}
    assert parse_image_weights([f"uni={given['uni']}"]) == given
    with pytest.raises(ModelError, match="holds no weights"):
        dict(image_encoders(given))


def test_an_encoder_runs_on_the_weights_that_are_given(corpus, tmp_path, monkeypatch) -> None:
    toy, taken = registered()["toy-colour"], []
    info = toy.info._replace(files=("w.bin",))

    def load(path):
        taken.append(path)
        return toy.load(path)

    entry = dataclasses.replace(toy, name="weighty", info=info, load=load)
    monkeypatch.setattr("st_align.benchmarks.image_rows.registered", lambda: {"weighty": entry})
    monkeypatch.setattr("st_align.benchmarks.genes.image_encoders", image_encoders)
    plain = GenesRequest(genes=GENES[:1], test_patients=["b"])
    bench_genes(corpus.path, tmp_path / "out", plain)
    assert [r["note"] for r in results(tmp_path / "out") if "weighty" in r["method"]] == [
        "no weights"
    ]
    given = dataclasses.replace(plain, weights={"weighty": str(tmp_path / "w.bin")})
    bench_genes(corpus.path, tmp_path / "out", given)
    assert taken == [tmp_path / "w.bin"]
    rows = [r for r in results(tmp_path / "out") if r["method"] == "weighty, spot"]
    assert rows
    assert all(r["value"] for r in rows if r["metric"] == "mse")


def test_wrong_input_from_the_command(corpus, tmp_path) -> None:
    from typer.testing import CliRunner

    both = CliRunner().invoke(
        app, ["bench", "genes", str(corpus.path), "--out", str(tmp_path / "o"), "--genes", "A",
              "--top-hvg", "3"]
    )  # fmt: skip
    assert isinstance(both.exception, ConfigError)
    with pytest.raises(ConfigError, match="no slide is of patient 'x'"):
        bench_genes(corpus.path, tmp_path / "out", GenesRequest(patients=["x"]))
    with pytest.raises(ConfigError, match="not every slide was prepared with the niche 'k3'"):
        bench_genes(corpus.path, tmp_path / "out", GenesRequest(genes=["GENE0"], niche="k3"))
