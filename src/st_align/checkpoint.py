"""A run folder: what a trained model is on disk, written whole or not at all.

model.safetensors  config.json  genes.txt  preprocess.json  provenance.json  splits.json
readout.safetensors   once training has ended
MODEL_CARD.md         what a person wants to know first, licences above all
metrics.jsonl         one line per logged step
trainer/step-N/       optimizer and position: to resume only, the last two kept
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from st_align.batch import Role
from st_align.config import Config, Use, from_dict, to_dict
from st_align.errors import ConfigError, ModelError, nearest
from st_align.expression import TARGET_SUM, Panel
from st_align.files import (
    read_json,
    read_tensors,
    replace_file,
    sync_folder,
    unwritable,
    write_json,
    write_tensors,
)
from st_align.keys import LINEAR_USES
from st_align.linear import LinearAxes, LinearUse
from st_align.model import FrozenShape, STAlign
from st_align.provenance import model_card
from st_align.readout import Readouts

SHIPPED = Path(__file__).parent / "models"
MODEL, CONFIG, GENES = "model.safetensors", "config.json", "genes.txt"
PREPROCESS, PROVENANCE, SPLITS = "preprocess.json", "provenance.json", "splits.json"
CARD = "MODEL_CARD.md"
READOUT, METRICS, TRAINER = "readout.safetensors", "metrics.jsonl", "trainer"
MOMENTS = "optimizer.safetensors"
_STATE = "step-"
_KEPT_STATES = 2
_TELLING = (MODEL, CONFIG, PREPROCESS, PROVENANCE, SPLITS, READOUT)
"""Files that lie in a run folder and hardly anywhere else."""


@dataclass(frozen=True, kw_only=True)
class FrozenUse:
    """The frozen encoder that fills a role, and the shape T, D of what it returns."""

    name: str
    fingerprint: str
    n_tokens: int
    dim: int


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a slide is prepared for the model: sides of the patches in pixels (None: no training
    slide had an image), niche spec, library size, and the frozen encoders by role.
    """

    spot_px: int | None
    niche_px: int | None
    niche: str
    target_sum: float = TARGET_SUM
    frozen: Mapping[Role, FrozenUse] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[Role, FrozenShape]:
        """What the model was built with."""
        return {role: FrozenShape(f.n_tokens, f.dim) for role, f in self.frozen.items()}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model and all that is needed to use it. The model is in evaluation mode."""

    path: Path
    model: STAlign
    config: Config
    panel: Panel
    preprocess: Preprocess
    provenance: Mapping[str, Any]
    readouts: Readouts

    @property
    def finished(self) -> bool:
        """False where training stopped early: it can be resumed, and has no readouts yet."""
        return bool(self.provenance.get("finished"))


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Where a training stands: `step` steps are done. Nothing else is needed: the order of the
    spots, augmentation and dropout are functions of the seed and the step.
    """

    step: int
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]


def build_model(config: Config, n_genes: int, frozen: Mapping[Role, FrozenShape]) -> STAlign:
    """The model of a config with random weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.optim.seed)
        return STAlign(
            config.model, n_genes=n_genes, frozen=frozen, temperature=config.loss.temperature
        )


def save_run(
    folder: Path, config: Config, panel: Panel, preprocess: Preprocess, splits: Mapping[str, Any]
) -> None:
    """Write what does not change during training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    write_json(folder / CONFIG, to_dict(config))
    write_json(folder / PREPROCESS, dataclasses.asdict(preprocess))
    write_json(folder / SPLITS, splits)
    part = folder / f".{GENES}.part"
    try:
        panel.save(part)
        part.replace(folder / GENES)
    except OSError as error:
        raise unwritable(folder / GENES, error) from error


def save_model(folder: Path, model: STAlign, provenance: Mapping[str, Any]) -> None:
    """Write weights and provenance; the old ones stay until the new ones are whole."""
    write_tensors(folder / MODEL, model.state_dict())
    write_json(folder / PROVENANCE, provenance)
    replace_file(folder / CARD, model_card(provenance).encode())


def save_readouts(folder: Path, readouts: Readouts) -> None:
    """Write the axes of every use, learned and linear."""
    values: dict[str, NDArray[Any]] = {str(use): axes for use, axes in readouts.axes.items()}
    for use, linear in readouts.linear.items():
        values |= {f"{use}.axes": linear.axes, f"{use}.variances": linear.variances}
        values[f"{use}.facts"] = np.array([linear.noise, linear.explained])
        values[f"{use}.spots"] = linear.spots.astype(np.float16)
    write_tensors(folder / READOUT, {k: torch.from_numpy(v.copy()) for k, v in values.items()})


def _load_readouts(folder: Path) -> Readouts:
    stored = {name: values.numpy() for name, values in read_tensors(folder / READOUT).items()}
    try:
        linear: dict[LinearUse, LinearAxes] = {
            use: LinearAxes(
                axes=stored[f"{use}.axes"],
                variances=stored[f"{use}.variances"],
                noise=float(stored[f"{use}.facts"][0]),
                explained=float(stored[f"{use}.facts"][1]),
                spots=stored[f"{use}.spots"].astype(np.float32),
            )
            for use in LINEAR_USES
            if f"{use}.axes" in stored
        }
    except LookupError as error:
        raise ModelError(
            f"{folder / READOUT} is not whole",
            found=f"no {error}",
            fix=f"write it again: st-align train CORPUS --out {folder} --resume",
        ) from error
    return Readouts({use: stored[use] for use in get_args(Use) if use in stored}, linear)


def is_run(path: Path) -> bool:
    """Whether a folder holds a run, sound or not."""
    return any((path / name).is_file() for name in _TELLING)


def shipped() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(p.name for p in SHIPPED.glob("*") if (p / MODEL).is_file())


def load_run(name: str | Path) -> Run:
    """The run in a folder, or the shipped checkpoint of that name.

    A missing, damaged or foreign file is a ModelError that names it.
    """
    folder = resolve_model(name)
    config = _config(folder / CONFIG)
    panel = Panel.load(folder / GENES)
    preprocess = _preprocess(read_json(folder / PREPROCESS), folder / PREPROCESS)
    provenance = read_json(folder / PROVENANCE)
    model = build_model(config, len(panel), preprocess.shapes)
    load_weights(model, read_tensors(folder / MODEL), folder / MODEL)
    run = Run(
        path=folder,
        model=model.eval(),
        config=config,
        panel=panel,
        preprocess=preprocess,
        provenance=provenance,
        readouts=Readouts({}),
    )
    if not run.finished:
        return run
    return dataclasses.replace(run, readouts=_load_readouts(folder))


def resolve_model(name: str | Path) -> Path:
    """The folder of a run: a path, or the name of a checkpoint that ships with the package."""
    if Path(name).is_dir():
        return Path(name)
    names = shipped()
    if str(name) in names:
        return SHIPPED / str(name)
    raise ModelError(
        f"there is no model {str(name)!r}",
        expected="the folder of a run, or the name of a shipped checkpoint",
        fix=nearest(str(name), names) if names else "no checkpoint ships with this version",
    )


def load_weights(model: STAlign, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Put `tensors` into the model; a name or shape that does not fit is a ModelError."""
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ModelError(
            f"{source} does not fit the model its config describes",
            found=" ".join(lines[1:2]) or lines[0],
        ) from error


def save_state(folder: Path, state: TrainerState) -> None:
    """Write a resume point under `trainer/` and forget all but the last two."""
    place = folder / TRAINER / f"{_STATE}{state.step:08d}"
    part = place.with_name(f".{place.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_tensors(part / MODEL, state.weights)
        write_tensors(part / MOMENTS, state.moments)
        if place.exists():
            shutil.rmtree(place)
        part.rename(place)
        sync_folder(place.parent)
    except OSError as error:
        raise unwritable(place, error) from error
    for old in _states(folder)[_KEPT_STATES:]:
        shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path) -> tuple[TrainerState | None, list[str]]:
    """The newest whole resume point, None where there is none yet, and what was wrong with newer
    ones. When all are damaged: ModelError.
    """
    damaged: list[str] = []
    for place in _states(folder):
        try:
            weights, moments = (read_tensors(place / name) for name in (MODEL, MOMENTS))
        except ModelError as error:
            damaged.append(error.one_line())
            continue
        step = int(place.name.removeprefix(_STATE))
        return TrainerState(step=step, weights=weights, moments=moments), damaged
    if damaged:
        raise ModelError(
            f"no resume point of {folder} can be read",
            found="; ".join(damaged),
            fix="train again into a new folder; --init takes the weights of another run",
        )
    return None, damaged


def _config(path: Path) -> Config:
    try:
        return from_dict(read_json(path), str(path))
    except ConfigError as error:
        raise ModelError(f"{path} is damaged", found=error.one_line()) from error


def _preprocess(values: dict[str, Any], path: Path) -> Preprocess:
    try:
        frozen = {role: FrozenUse(**use) for role, use in values["frozen"].items()}
        return Preprocess(**{**values, "frozen": frozen})
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged", found=str(error)) from error


def _states(folder: Path) -> list[Path]:
    """Resume points, the newest first."""
    return sorted((folder / TRAINER).glob(f"{_STATE}*"), reverse=True)
