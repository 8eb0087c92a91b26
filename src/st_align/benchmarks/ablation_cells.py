"""What `bench ablation` trains: Table 3 of the paper, and the settings its discussion leaves open.

Each configuration is a few keys put over one base config, so that all share budget and sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from st_align.config import Config, override

TABLE_3, SENSITIVITY = "Table 3", "sensitivity"
FULL = "ST-Align (full)"
PAPER = {
    "image only": (0.109, 0.201),
    "gene only": (0.262, None),
    "simple concatenation": (0.111, 0.198),
    "ABFN + L_NS (w/o AEs)": (0.259, 0.180),
    "AE + ABFN (w/o L_NS)": (0.162, 0.171),
    FULL: (0.340, 0.168),
}
"""ARI and MSE of Table 3; its unimodal rows are UNI and scGPT."""
SIMPLEX = (
    (1.0, 0.0, 0.0),
    (0.0, 1.0, 0.0),
    (0.0, 0.0, 1.0),
    (0.5, 0.5, 0.0),
    (0.5, 0.0, 0.5),
    (0.0, 0.5, 0.5),
    (1 / 3, 1 / 3, 1 / 3),
)
"""Weights of the spot, niche and cross term beside the base's."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """One trained configuration."""

    name: str
    track: str
    changes: Mapping[str, Any]

    def config(self, base: Config, seed: int) -> Config:
        """`base` with the changes and the seed; changes that cannot be are a ConfigError."""
        changed = override(base, dict(self.changes), self.name)
        return override(changed, {"optim": {"seed": seed}}, self.name)


def table_3(base: Config) -> list[Ablation]:
    """The four rows that are trained. Without adaptive encoders the spot's image is read by the
    encoder of niches, and the niche's genes by the encoder of spots.
    """
    plain = {"spot_image": base.model.niche_image, "niche_gene": base.model.spot_gene}
    rows: dict[str, dict[str, Any]] = {
        "simple concatenation": {"model": plain | {"fusion": "concat"}, "loss": {"cross": 0.0}},
        "ABFN + L_NS (w/o AEs)": {"model": plain},
        "AE + ABFN (w/o L_NS)": {"loss": {"cross": 0.0}},
        FULL: {},
    }
    return [Ablation(name=name, track=TABLE_3, changes=keys) for name, keys in rows.items()]


def sensitivity(base: Config) -> list[Ablation]:
    """One setting changed at a time; values that the base has already are left out."""
    rows: dict[str, dict[str, Any]] = {
        f"niche {spec}": {"data": {"niche": spec}} for spec in ("lattice", "k3", "k6", "k18")
    }
    for weights in SIMPLEX:
        name = "lambda " + " / ".join(f"{w:.2g}" for w in weights)
        rows[name] = {"loss": dict(zip(("spot", "niche", "cross"), weights, strict=True))}
    rows |= {f"fusion {kind}": {"model": {"fusion": kind}} for kind in ("tokens", "vector")}
    rows |= {
        "neighbours masked": {"loss": {"mask_neighbors": True}},
        "neighbours not masked": {"loss": {"mask_neighbors": False}},
        "niche with its centre": {"data": {"niche_without_centre": False}},
        "niche without its centre": {"data": {"niche_without_centre": True}},
    }
    every = [Ablation(name=n, track=SENSITIVITY, changes=keys) for n, keys in rows.items()]
    return [one for one in every if override(base, dict(one.changes), one.name) != base]
