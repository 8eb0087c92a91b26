"""Post-norm transformer layers over sets of tokens of unequal size, laid end to end.

Nothing is padded: linear layers read all tokens of a batch as one matrix and attention runs set
by set, so that no work is spent on fill, and what a set gives does not depend on the others.

Shape letters: L tokens of all sets, n tokens of one set, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

_TOKENS_AT_ONCE = {"cpu": 2_400, "cuda": 65_536}
"""Bounds the memory of the activations; on a CPU few tokens also stay in its caches."""


@dataclass(frozen=True)
class TokenSet:
    """The tokens of one spot: `ids` [n] int64 and `values` [n] float32."""

    ids: NDArray[np.int64]
    values: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)


class SetNetwork(Protocol):
    """A network that reads sets laid end to end: one vector per set."""

    def __call__(self, ids: Tensor, values: Tensor, sizes: list[int]) -> Tensor:
        """`ids` and `values` [L], `sizes` that sum to L -> [sets, width]."""
        ...


def encode_sets(
    network: SetNetwork, sets: Sequence[TokenSet | None], width: int, device: torch.device
) -> Tensor:
    """float32 [sets, width] on the CPU; a set that is None gives zeros. On a GPU the network runs
    in bfloat16.
    """
    out = torch.zeros(len(sets), width)
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    for rows in _chunks(sets, _TOKENS_AT_ONCE.get(device.type, _TOKENS_AT_ONCE["cpu"])):
        chunk = [s for row in rows if (s := sets[row]) is not None]
        ids = torch.from_numpy(np.concatenate([s.ids for s in chunk])).to(device)
        values = torch.from_numpy(np.concatenate([s.values for s in chunk])).to(device)
        with torch.no_grad(), half:
            out[rows] = network(ids, values, [len(s) for s in chunk]).float().cpu()
    return out


def _chunks(sets: Sequence[TokenSet | None], most: int) -> Iterator[list[int]]:
    """Numbers of sets in order, none of them None, of at most `most` tokens or one set."""
    rows: list[int] = []
    total = 0
    for row, tokens in enumerate(sets):
        if tokens is None:
            continue
        if rows and total + len(tokens) > most:
            yield rows
            rows, total = [], 0
        rows.append(row)
        total += len(tokens)
    if rows:
        yield rows


class PostNormLayer(nn.Module):
    """x = LN(x + attention(x)); x = LN(x + W2 relu(W1 x)), with the names of
    `torch.nn.TransformerEncoderLayer`.
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = _Attention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        """[L, D] -> [L, D]."""
        x = self.norm1(x + self.self_attn(x, sizes))
        out: Tensor = self.norm2(x + self.linear2(F.relu(self.linear1(x))))
        return out


class _Attention(nn.Module):
    """Multi-head self-attention within each set, scale 1 / sqrt(D / H)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        """[L, D] -> [L, D]."""
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = projected.view(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)
        parts = (t.split(sizes, dim=1) for t in (query, key, value))
        # A batch of one: without it some kernels of PyTorch are not chosen.
        attended = [
            F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
            for q, k, v in zip(*parts, strict=True)
        ]
        out: Tensor = self.out_proj(torch.cat(attended, dim=1).transpose(0, 1).flatten(1))
        return out
