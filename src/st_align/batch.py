"""Batch: the one type that joins the loader to the model.

Shape letters: B spots of a batch, K neighbours, G panel genes, p and q pixels of a patch side.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from st_align.encoders.base import Encoded

Role = Literal["spot_image", "niche_image", "spot_gene", "niche_gene"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Spots of one step. A role holds what its encoder reads: uint8 patches [B, p, p, 3] or
    expression [B, G] for a trained encoder, `Encoded` features for a frozen one. Rows whose
    modality is absent hold zeros, and `has_image` / `has_counts` say so.
    """

    ids: Tensor
    """[B] int64, the spots' numbers within the data set."""
    neighbors: Tensor
    """[B, K+1] int64 ids of the niche members, self first, -1 fills."""
    has_image: Tensor
    """[B] bool"""
    has_counts: Tensor
    """[B] bool: the slide has counts and this spot's library is not empty."""
    spot_image: Tensor | Encoded
    niche_image: Tensor | Encoded
    spot_gene: Tensor | Encoded
    niche_gene: Tensor | Encoded

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""

        def move(value: Any) -> Any:
            if isinstance(value, Encoded):
                return Encoded(*(t.to(device, non_blocking=True) for t in value))
            return value.to(device, non_blocking=True)

        names = [f.name for f in dataclasses.fields(self)]
        return dataclasses.replace(self, **{name: move(getattr(self, name)) for name in names})
