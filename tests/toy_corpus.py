"""A corpus in memory and the settings of a run of seconds, for tests and their subprocesses."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from st_align import runlog
from st_align.config import Config, DataConfig, ModelConfig, OptimConfig
from st_align.expression import Panel, PanelExpression, panel_expression
from st_align.slide import PreparedSlide
from toys import toy_prepared

CONFIG = Config(
    model=ModelConfig(
        dim=16,
        heads=2,
        tokens=4,
        gene_layers=1,
        niche_image="resnet-small-gn",
    ),
    optim=OptimConfig(batch=24, epochs=3, lr=2e-3),
    data=DataConfig(panel=12),
)


def configured(base: Config = CONFIG, **sections: dict) -> Config:
    """`base` with some keys of some sections changed."""
    changed = {n: dataclasses.replace(getattr(base, n), **v) for n, v in sections.items()}
    return dataclasses.replace(base, **changed)


class ToyCorpus:
    """What training asks of a `Corpus`."""

    path = Path("toy-corpus")

    def __init__(self, slides: list[PreparedSlide]) -> None:
        self._slides = {slide.id: slide for slide in slides}
        self.ids = sorted(self._slides)

    def entry(self, slide_id: str) -> dict:
        slide = self._slides[slide_id]
        total = float(np.nansum(slide.total_umi))
        return {"patient": slide.patient, "sha256": {"spots.parquet": f"{total}"}}

    def slides(self, ids=None) -> list[PreparedSlide]:
        return [self._slides[i] for i in ids or self.ids]

    def slide(self, slide_id: str) -> PreparedSlide:
        return self._slides[slide_id]

    def expression(self, slide_id: str, panel: Panel) -> PanelExpression:
        return panel_expression(self._slides[slide_id], panel)


def toy_corpus(seed: int = 0, **changes) -> ToyCorpus:
    """Two slides of one patient, one of another; `changes` to the last of them."""
    rng = np.random.default_rng(seed)
    return ToyCorpus(
        [
            toy_prepared(rng, id="a1", patient="A"),
            toy_prepared(rng, id="a2", patient="A", rows=5),
            toy_prepared(rng, id="b1", patient="B", **changes),
        ]
    )


def stop_after(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Send a signal to this process once the line of `step` is written."""
    append = runlog.append

    def append_and_stop(path, values):
        append(path, values)
        if values["step"] == step:
            os.kill(os.getpid(), number)

    patch.setattr(runlog, "append", append_and_stop)
