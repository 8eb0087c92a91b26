"""`st-align train`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from st_align.config import Config, override, preset, read_toml
from st_align.corpus import Corpus
from st_align.infer import training_slides
from st_align.job import is_first
from st_align.train import train


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Options of `st-align train`; None leaves a setting to preset and config."""

    preset: str = "tiny"
    config: Path | None = None
    panel: str | None = None
    epochs: int | None = None
    batch: int | None = None
    seed: int | None = None
    hold_out_slides: Sequence[str] = ()
    hold_out_patients: Sequence[str] = ()
    init: str | None = None
    resume: bool = False

    def settings(self) -> tuple[Config, Path | None]:
        """The config, and the file of the panel where one was given."""
        config = preset(self.preset)
        if self.config is not None:
            config = read_toml(self.config, config)
        given = {"epochs": self.epochs, "batch": self.batch, "seed": self.seed}
        optim = {name: value for name, value in given.items() if value is not None}
        config = override(config, {"optim": optim}, "options")
        if self.panel is not None and self.panel.isdecimal():
            return override(config, {"data": {"panel": int(self.panel)}}, "--panel"), None
        return config, None if self.panel is None else Path(self.panel)


def train_model(corpus_path: Path, out: Path, request: TrainRequest) -> dict[str, Any] | None:
    """`st-align train`: a run folder in `out`. Of several ranks the first has the result and says
    it; the others have None.
    """
    config, panel = request.settings()
    run = train(
        Corpus.open(corpus_path),
        config,
        out,
        hold_out_slides=request.hold_out_slides,
        hold_out_patients=request.hold_out_patients,
        panel=panel,
        init=request.init,
        resume=request.resume,
        command=shlex.join(["st-align", *sys.argv[1:]]),
    )
    if not is_first():
        return None
    if run.finished:
        print(f"trained: {out}")
    else:
        print(f"stopped and saved; go on with the same command and --resume: {out}")
    return {"out": str(out), "finished": run.finished, "slides": sorted(training_slides(run))}
