"""Settings of a training run: frozen dataclasses, read from and written to TOML-shaped dicts."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from st_align.errors import ConfigError, nearest, require_file

Fusion = Literal["tokens", "vector", "concat"]
Use = Literal["image", "gene", "spot", "niche", "spot+niche"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and encoders. Any registered encoder can fill any role of its modality."""

    dim: int = 128
    heads: int = 4
    tokens: int = 16
    gene_layers: int = 2
    dropout: float = 0.1
    fusion: Fusion = "tokens"
    spot_image: str = "resnet-small-gn"
    niche_image: str = "efficientnet-lite0"
    spot_gene: str = "gene-transformer"
    niche_gene: str = "ae-gene"


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the three terms and what counts as a negative (eq. 10, 11)."""

    spot: float = 0.4
    niche: float = 0.3
    cross: float = 0.3
    temperature: float = 0.07
    mask_neighbors: bool = True
    symmetric_cross: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedules. `epochs` None: as many as `spot_budget` spots allow (2 to 60)."""

    batch: int = 256
    epochs: int | None = None
    spot_budget: int = 150_000
    lr: float = 5e-4
    warmup: float = 0.05
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What of a slide the model reads. `block`: spots that follow each other on disk and stay
    together in the shuffle (see `sampling`).
    """

    niche: str = "lattice"
    niche_without_centre: bool = False
    panel: int = 1000
    augment: bool = True
    block: int = 1


@dataclass(frozen=True, kw_only=True)
class ReadoutConfig:
    """Which embedding is `X_stalign`, and on how many principal axes of the training slides."""

    use: Use = "spot+niche"
    dims: int = 16


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """`[encoders.NAME]`: where a pretrained encoder's weights lie; and, for an image encoder, the
    side in um of the squares it is given in place of the corpus's patches.
    """

    weights: str | None = None
    patch_um: float | None = None


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run, apart from the data."""

    preset: str = "tiny"
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    readout: ReadoutConfig = field(default_factory=ReadoutConfig)
    encoders: dict[str, EncoderConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _validate(self)


def preset(name: str) -> Config:
    """The settings called `name`; an unknown name is a ConfigError."""
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}", fix=nearest(name, PRESETS))
    return PRESETS[name]


def read_toml(path: Path, base: Config) -> Config:
    """`base` with the keys of a TOML file put over it; the preset is not one of them, because
    `base` was made from one already.
    """
    text = require_file(path, "the config", ConfigError).read_bytes()
    try:
        values = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML", found=str(error)) from error
    if "preset" in values:
        raise ConfigError(
            f"{path}: a preset is chosen on the command line",
            found=f"preset = {values['preset']!r}",
            fix=f"take the key out and use --preset {values['preset']}",
        )
    return override(base, values, str(path))


def override(base: Config, values: dict[str, Any], where: str = "config") -> Config:
    """`base` with nested `values` put over it; unknown keys name the nearest known one."""
    merged: Config = _merge(base, values, where)
    return merged


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, the inverse of `from_dict`."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], where: str = "config.json") -> Config:
    """A Config from a nested dict such as a run's `config.json` holds."""
    return override(Config(), values, where)


def _merge(base: Any, values: dict[str, Any], where: str) -> Any:
    fields = {f.name for f in dataclasses.fields(base)}
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}", fix=nearest(key, fields))
        current, place = getattr(base, key), f"{where}: {key}"
        if dataclasses.is_dataclass(current):
            changes[key] = _merge(current, _table(value, place), place)
        elif key == "encoders":
            changes[key] = current | {
                name: _merge(EncoderConfig(), _table(v, place), f"{place}.{name}")
                for name, v in _table(value, place).items()
            }
        else:
            changes[key] = _typed(value, hints[key], place)
    return dataclasses.replace(base, **changes)


def _table(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{place} is a table", expected="[section] with keys", found=repr(value))
    return value


def _typed(value: Any, hint: Any, place: str) -> Any:
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            expected = ", ".join(map(str, typing.get_args(hint)))
            raise ConfigError(f"{place} has a wrong value", expected=expected, found=repr(value))
        return value
    union = isinstance(hint, types.UnionType)
    allowed = typing.get_args(hint) if union else (hint,)
    if type(value) is int and float in allowed:
        return float(value)
    if type(value) not in allowed:
        names = " or ".join(t.__name__ for t in allowed)
        raise ConfigError(f"{place} has a wrong type", expected=names, found=repr(value))
    return value


def _validate(config: Config) -> None:
    model, loss, optim = config.model, config.loss, config.optim
    rules = [
        (model.dim >= 8 and model.dim % model.heads == 0, "model.dim is a multiple of model.heads"),
        (model.heads >= 1 and model.tokens >= 1 and model.gene_layers >= 1, "model sizes >= 1"),
        (0 <= model.dropout < 1, "model.dropout in [0, 1)"),
        (min(loss.spot, loss.niche, loss.cross) >= 0, "loss weights >= 0"),
        (loss.spot + loss.niche + loss.cross > 0, "one loss weight above 0"),
        (0.01 <= loss.temperature <= 1, "loss.temperature in [0.01, 1]"),
        (optim.batch >= 2 and optim.seed >= 0, "optim.batch >= 2, optim.seed >= 0"),
        (optim.epochs is None or optim.epochs >= 1, "optim.epochs >= 1"),
        (optim.spot_budget >= 1 and optim.lr > 0, "optim.spot_budget >= 1, optim.lr > 0"),
        (0 <= optim.warmup < 1 and optim.clip > 0, "optim.warmup in [0, 1), optim.clip > 0"),
        (min(optim.weight_decay, optim.weight_decay_end) >= 0, "weight decay >= 0"),
        (config.data.panel >= 1, "data.panel >= 1"),
        (1 <= config.data.block <= optim.batch // 2, "data.block from 1 to half of optim.batch"),
        (1 <= config.readout.dims <= 32, "readout.dims in 1 to 32"),
    ]
    broken = [text for holds, text in rules if not holds]
    if broken:
        raise ConfigError("the config is out of range", expected="; ".join(broken))


_BIG = ModelConfig(dim=512, heads=8, gene_layers=6, spot_image="resnet50-gn")
PRESETS: dict[str, Config] = {
    "tiny": Config(),
    "open": Config(
        preset="open",
        model=_BIG,
        optim=OptimConfig(batch=1024, epochs=50),
        data=DataConfig(panel=2000),
    ),
    "paper": Config(
        preset="paper",
        model=dataclasses.replace(_BIG, niche_image="uni", spot_gene="scgpt"),
        optim=OptimConfig(batch=1024, epochs=100),
        data=DataConfig(niche="k3", panel=4000),
    ),
}
