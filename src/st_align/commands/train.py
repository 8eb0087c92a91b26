"""`st-align features` and `st-align train`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from torch import distributed
from tqdm import tqdm

from st_align.config import Config, override, preset, read_toml
from st_align.corpus import Corpus
from st_align.encoders.base import FrozenEntry, View, find, registered
from st_align.encoders.lookup import load_frozen
from st_align.errors import ConfigError, nearest
from st_align.features import cached_features, feature_folder
from st_align.infer import training_slides
from st_align.job import launch, share, total
from st_align.train import train


def fill_features(
    corpus_path: Path, name: str, weights: Path | None, view: str, niche_spec: str
) -> dict[str, Any] | None:
    """`st-align features`: a frozen encoder over every slide of a corpus that has its modality.
    Ranks share the slides; the first one has the result.
    """
    corpus = Corpus.open(corpus_path)
    entry = find(name)
    if not isinstance(entry, FrozenEntry):
        raise ConfigError(
            f"{name} is trained with the model: it has no features to keep",
            fix=nearest("", [n for n, e in registered().items() if isinstance(e, FrozenEntry)]),
        )
    if view not in get_args(View):
        raise ConfigError(f"--view {view} is unknown", fix=nearest(view, get_args(View)))
    fabric = launch()
    first = fabric.is_global_zero
    encoder = load_frozen(entry, weights)
    seen, computed, cached = cast(View, view), 0, 0
    mine = share(fabric, {id: corpus.entry(id)["n_spots"] for id in corpus.ids})
    for id in tqdm(mine, desc=name, unit="slide", disable=not first):
        there = feature_folder(corpus, id, encoder, seen, niche_spec).is_dir()
        found = cached_features(corpus, id, encoder, seen, niche_spec=niche_spec, progress=first)
        cached += there
        computed += found is not None and not there
    computed, cached = total(fabric, computed, cached)
    if not first:
        return None
    without = len(corpus.ids) - computed - cached
    print(f"{name}, {view} view: {computed} slides computed, {cached} there already", end="")
    print(f", {without} without {entry.modality}s" if without else "")
    return {
        "encoder": name,
        "view": view,
        "fingerprint": encoder.fingerprint,
        "computed": computed,
        "cached": cached,
        "without": without,
    }


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
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
        return None
    if run.finished:
        print(f"trained: {out}")
    else:
        print(f"stopped and saved; go on with the same command and --resume: {out}")
    return {"out": str(out), "finished": run.finished, "slides": sorted(training_slides(run))}
