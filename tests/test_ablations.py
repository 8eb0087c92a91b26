"""The configs of Table 3 name encoders and settings that exist, and train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from st_align.config import override, preset, read_toml
from st_align.corpus_build import build_corpus
from st_align.train import train
from toy_slides import toy_ref

ABLATIONS = sorted((Path(__file__).parents[1] / "examples" / "ablations").glob("*.toml"))
SMALL = {
    "model": {"dim": 16, "heads": 2, "tokens": 4, "gene_layers": 1},
    "optim": {"batch": 16, "epochs": 1},
    "data": {"panel": 10},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory):
    refs = [toy_ref("a1"), toy_ref("b1")]
    return build_corpus(refs, tmp_path_factory.mktemp("ablations") / "corpus", progress=False)


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_trains(path: Path, corpus, tmp_path: Path) -> None:
    config = override(read_toml(path, preset("tiny")), SMALL)
    run = train(corpus, config, tmp_path / "run", log=lambda line: None)
    assert run.finished
    assert run.config.model.fusion == config.model.fusion
    assert all(np.isfinite(axes).all() for axes in run.readouts.axes.values())


def test_every_row_of_table_3_that_we_train_has_a_config() -> None:
    assert {"concat", "no-adaptive-encoders", "no-cross-scale-loss"} <= {p.stem for p in ABLATIONS}
