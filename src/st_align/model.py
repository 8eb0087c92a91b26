"""STAlign: four encoders, one per role, and a fusion per scale.

Shape letters: B spots, T tokens and D width of a frozen encoder, d the model's width, G genes
of the panel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from st_align.batch import ROLES, Batch, Role
from st_align.config import ModelConfig
from st_align.encoders.base import Encoded, FrozenEntry, Modality, TrainedEntry, TrainedShape, find
from st_align.errors import ModelError
from st_align.fusion import build_fusion

MODALITY: dict[Role, Modality] = {
    "spot_image": "image",
    "niche_image": "image",
    "spot_gene": "gene",
    "niche_gene": "gene",
}


class FrozenShape(NamedTuple):
    """What a frozen encoder returns: T tokens of width D."""

    n_tokens: int
    dim: int


class Embeddings(NamedTuple):
    """The paper's letters: r, u, e, t [B, d]; h_spot, h_niche [B, 2d].

    Rows that lack an embedding's modality (h: both) are zero.
    """

    r: Tensor
    u: Tensor
    e: Tensor
    t: Tensor
    h_spot: Tensor
    h_niche: Tensor


@runtime_checkable
class StartsFromData(Protocol):
    """A trained encoder that sets its weights from the training values before training."""

    def initialise(self, values: NDArray[np.float32]) -> None:
        """`values` [M, G]: rows of expression it will read."""
        ...


def role_encoders(config: ModelConfig) -> dict[Role, TrainedEntry | FrozenEntry]:
    """The registered encoder of every role; a name of the wrong modality is a ConfigError."""
    return {role: find(getattr(config, role), MODALITY[role]) for role in ROLES}


def frozen_roles(config: ModelConfig) -> dict[Role, FrozenEntry]:
    """The roles whose encoder is frozen: a batch holds its features instead of raw input."""
    entries = role_encoders(config)
    return {role: entry for role, entry in entries.items() if isinstance(entry, FrozenEntry)}


class FrozenInput(nn.Module):
    """Trained entry of a frozen encoder: features of width D -> `Encoded` of width d.

    An encoder of one vector per spot gets its tokens by a trained linear map to tokens x d:
    attention over a single key would be constant.
    """

    def __init__(self, shape: FrozenShape, *, dim: int, tokens: int) -> None:
        super().__init__()
        self.expand = tokens if shape.n_tokens == 1 else 1
        # No affine part: the linear maps behind it hold it, and no gradient has to pass the
        # widest tensors of a step.
        self.norm = nn.LayerNorm(shape.dim, elementwise_affine=False)
        self.to_tokens = nn.Linear(shape.dim, dim * self.expand)
        self.to_pooled = nn.Linear(shape.dim, dim)

    def forward(self, features: Encoded) -> Encoded:
        """Tokens [B, T, D] and pooled [B, D] of any float type -> tokens and pooled of width d."""
        tokens, pooled = (self.norm(x.to(self.to_pooled.weight.dtype)) for x in features)
        return Encoded(
            self.to_tokens(tokens).unflatten(-1, (self.expand, -1)).flatten(1, 2),
            self.to_pooled(pooled),
        )


class STAlign(nn.Module):
    """Batch -> Embeddings; `logit_scale` = ln(1/tau) is a parameter of the loss kept here.

    Every parameter gets a gradient in every step, whatever the batch lacks, so that
    DistributedDataParallel needs no search for unused ones.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        n_genes: int,
        frozen: Mapping[Role, FrozenShape],
        temperature: float = 0.07,
    ) -> None:
        """`n_genes` G; `frozen` gives the shape of every role of `frozen_roles(config)`."""
        super().__init__()
        self.encoders = nn.ModuleDict()
        for role, entry in role_encoders(config).items():
            self.encoders[role] = _build(entry, role, config, n_genes, frozen)
        self.fuse_spot = build_fusion(config.fusion, dim=config.dim, heads=config.heads)
        self.fuse_niche = build_fusion(config.fusion, dim=config.dim, heads=config.heads)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def initialise(
        self, spot_values: NDArray[np.float32], niche_values: NDArray[np.float32]
    ) -> None:
        """Start the gene encoders that can from training expression [M, G] of their scale."""
        for role, values in (("spot_gene", spot_values), ("niche_gene", niche_values)):
            encoder = self.encoders[role]
            if isinstance(encoder, StartsFromData):
                encoder.initialise(values)

    def forward(self, batch: Batch) -> Embeddings:
        """Embeddings of the spots of `batch`."""
        has_image, has_counts = batch.has_image, batch.has_counts
        r = self._encode("spot_image", batch.spot_image, has_image)
        u = self._encode("spot_gene", batch.spot_gene, has_counts)
        e = self._encode("niche_image", batch.niche_image, has_image)
        t = self._encode("niche_gene", batch.niche_gene, has_counts)
        return Embeddings(
            r=r.pooled,
            u=u.pooled,
            e=e.pooled,
            t=t.pooled,
            h_spot=self.fuse_spot(r, u, has_image, has_counts),
            h_niche=self.fuse_niche(e, t, has_image, has_counts),
        )

    def _encode(self, role: Role, inputs: Tensor | Encoded, present: Tensor) -> Encoded:
        """Run an encoder on the rows that have its modality; zeros in the others."""
        encoder = self.encoders[role]
        if present.all():
            full: Encoded = encoder(inputs)
            return full
        rows = present.nonzero().squeeze(1)
        if len(rows) == 0:
            # One blank row, masked below, keeps the encoder's parameters in the graph.
            rows = rows.new_zeros(1)
        if isinstance(inputs, Encoded):
            some: Encoded = encoder(Encoded(*(x[rows] for x in inputs)))
        else:
            some = encoder(inputs[rows])
        blank = (x.new_zeros(len(present), *x.shape[1:]) for x in some)
        tokens, pooled = (b.index_copy(0, rows, x) for b, x in zip(blank, some, strict=True))
        return Encoded(tokens, torch.where(present[:, None], pooled, 0.0))


def _build(
    entry: TrainedEntry | FrozenEntry,
    role: Role,
    config: ModelConfig,
    n_genes: int,
    frozen: Mapping[Role, FrozenShape],
) -> nn.Module:
    if isinstance(entry, FrozenEntry):
        if role not in frozen:
            raise ModelError(
                f"the model's {role} reads features of {entry.name!r}, whose shape is not known",
                fix=f"load the encoder first, or name a trained one in model.{role}",
            )
        return FrozenInput(frozen[role], dim=config.dim, tokens=config.tokens)
    return entry.build(
        TrainedShape(
            dim=config.dim,
            heads=config.heads,
            tokens=config.tokens,
            layers=config.gene_layers,
            dropout=config.dropout,
            n_genes=n_genes,
        )
    )
