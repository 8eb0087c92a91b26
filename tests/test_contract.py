"""The command's contract, which other people's scripts rest on: exit codes, what is written when,
and `--json` results that fit the schemas in the package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import typer

import hest_files
import sources
from st_align import cli
from st_align.errors import ConfigError
from st_align.schemas import names, schema

SLOW = ("demo",)


def command(*words: object) -> int:
    """The exit code of the command, run in this process."""
    before, sys.argv = sys.argv, ["st-align", *map(str, words)]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return 0


def verbs() -> dict[str, typer.core.TyperCommand]:
    """Every verb that takes `--json`, groups spelt out."""
    found = {}
    for name, one in typer.main.get_command(cli.app).commands.items():
        parts = {f"{name} {sub}": c for sub, c in getattr(one, "commands", {}).items()} or {
            name: one
        }
        found |= parts
    return {name: one for name, one in found.items() if any("--json" in p.opts for p in one.params)}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """What the verbs read: two slides with labels, a corpus, a run, an embedded slide, a head, a
    task of HEST-bench.
    """
    root = tmp_path_factory.mktemp("contract")
    (root / "small.toml").write_text(sources.SMALL)
    rows = ["barcode,slide,label"]
    for part in (sources.section("S1", seed=1), sources.section("S2", seed=2)):
        sources.write_spaceranger(root / "slides" / part.id, part)
        side = np.where(part.xy[:, 0] < np.median(part.xy[:, 0]), "left", "right")
        rows += [f"{b},{part.id},{s}" for b, s in zip(part.barcodes, side, strict=True)]
    (root / "obs.csv").write_text("\n".join(rows) + "\n")
    hest_files.write_task(root / "task", ["H1", "H2"], ["GENE1", "GENE2"])
    for words in (
        ["prepare", root / "slides", "--out", root / "corpus", "--obs", root / "obs.csv"],
        ["train", root / "corpus", "--out", root / "run", "--config", root / "small.toml",
         "--hold-out-slide", "S2"],
        ["embed", f"{root / 'corpus'}::S2", "--model", root / "run", "--out", root / "S2.h5ad"],
        ["genes", "fit", root / "corpus", "--model", root / "run", "--top-hvg", 3,
         "--out", root / "head.safetensors"],
    ):  # fmt: skip
        assert command(*words) == 0
    return root


def call(verb: str, root: Path, out: Path) -> list[object]:
    """Words that make the verb succeed, writing below `out`."""
    corpus, run, slide = root / "corpus", root / "run", root / "S2.h5ad"
    spot = sources.section("S2", seed=2).barcodes[0]
    return {
        "demo": ["--out", out / "demo"],
        "doctor": [],
        "simulate": ["--out", out / "cohort", "--slides", 2, "--spots", 60],
        "prepare": [root / "slides", "--out", out / "corpus"],
        "inspect": [corpus],
        "features": [corpus, "--encoder", "efficientnet-lite0"],
        "train": [corpus, "--out", out / "run", "--config", root / "small.toml"],
        "embed": [f"{corpus}::S2", "--model", run, "--out", out / "S2.h5ad"],
        "domains": [slide, "--n-domains", 2, "--label-key", "label", "--out", out / "d.h5ad"],
        "genes fit": [
            corpus, "--model", run, "--genes", "GENE1,GENE2", "--out", out / "h.safetensors",
        ],
        "genes predict": [
            f"{corpus}::S2", "--model", run, "--head", root / "head.safetensors",
            "--out", out / "p.h5ad",
        ],
        "annotate": [
            f"{corpus}::S2", "--from", f"{corpus}::S1", "--label-key", "label", "--model", run,
            "--out", out / "a.h5ad",
        ],
        "retrieve": [f"{slide}::{spot}", "--in", slide, "--out", out / "r.csv"],
        "report": [run, "--out", out / "report.html"],
        "view": [slide, "--out", out / "view.html"],
        "bench domains": [
            corpus, "--label-key", "label", "--runs", 2, "--rows", "Scanpy-style PCA",
            "--out", out / "bench",
        ],
        "bench genes": [
            corpus, "--genes", "GENE1,GENE2", "--test-patients", "S2", "--out", out / "bench",
        ],
        "bench retrieval": [corpus, "--model", run, "--out", out / "bench"],
        "bench ablation": [
            corpus, "--label-key", "label", "--hold-out-slide", "S2", "--genes", "GENE1",
            "--config", root / "small.toml", "--seeds", 1, "--out", out / "bench",
        ],
        "bench hest": [root / "task", "--out", out / "bench"],
        "bench speed": ["epoch", "--corpus", corpus, "--out", out / "bench"],
    }[verb]  # fmt: skip


def result_of(verb: str, root: Path, out: Path, words: list[object] | None = None) -> dict:
    given = call(verb, root, out) if words is None else words
    assert command(*verb.split(), *given, "--json", out / "result.json") == 0
    text = (out / "result.json").read_text()
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_every_verb_has_a_schema_and_every_schema_a_verb():
    assert sorted(name.replace(" ", "-") for name in verbs()) == names()
    for name in names():
        jsonschema.Draft202012Validator.check_schema(schema(name))
        assert schema(name)["title"] == f"st-align {name.replace('-', ' ', 1)} --json"
    with pytest.raises(ConfigError, match=r"(?s)'domain'.*did you mean 'domains'"):
        schema("domain")


@pytest.mark.parametrize(
    "verb",
    [pytest.param(v, marks=pytest.mark.slow) if v in SLOW else v for v in sorted(verbs())],
)
def test_results_fit_their_schema(verb, root, tmp_path):
    found = result_of(verb, root, tmp_path)
    jsonschema.validate(found, schema(verb))


@pytest.mark.parametrize("what", ["run", "corpus::S1"])
def test_inspect_of_other_things(what, root, tmp_path):
    found = result_of("inspect", root, tmp_path, [root / what])
    jsonschema.validate(found, schema("inspect"))
    assert found["kind"] == {"run": "run", "corpus::S1": "slide"}[what]


def test_a_schema_says_no(root, tmp_path):
    found = result_of("inspect", root, tmp_path)
    del found["n_spots"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, schema("inspect"))


@pytest.mark.parametrize("verb", sorted(set(verbs()) - {"demo", "doctor", "simulate"}))
def test_bad_input_is_exit_2_and_nothing_is_written(verb, root, tmp_path, capsys):
    """Whatever a verb reads is not there."""
    given = [
        tmp_path / "nowhere" / Path(str(word)).name if str(word).startswith(str(root)) else word
        for word in call(verb, root, tmp_path / "out")
    ]
    assert command(*verb.split(), *given, "--json", tmp_path / "out" / "r.json") == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err + said.out
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_an_unknown_option_is_exit_2(verb, root, tmp_path, capsys):
    assert command(*verb.split(), *call(verb, root, tmp_path), "--no-such-option") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_a_result_that_cannot_be_written_is_exit_2_before_the_work(verb, root, tmp_path, capsys):
    assert command(*verb.split(), *call(verb, root, tmp_path / "out"), "--json", root) == 2
    assert "cannot write" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_was_not_foreseen_is_exit_1(root, tmp_path, capsys, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("st_align.commands.view.build_view", fail)
    assert command("view", root / "S2.h5ad", "--out", tmp_path / "view.html") == 1
    said = capsys.readouterr().err
    assert said.startswith("failed: ZeroDivisionError: oops")
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "verb",
    ["simulate", "train", "domains", "bench domains", "bench genes", "bench retrieval",
     "bench speed"],
)  # fmt: skip
def test_chance_takes_a_seed(verb):
    assert any("--seed" in option.opts for option in verbs()[verb].params)
