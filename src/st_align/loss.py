"""The three contrastive objectives (eq. 10, 11) over the spots of all ranks.

Shape letters: B rows of this rank, A rows of all ranks, C rows done at a time, K neighbours, D an
embedding's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

from st_align.batch import Batch
from st_align.config import LossConfig
from st_align.model import Embeddings

MAX_LOGIT_SCALE = math.log(100)
LOGITS_AT_ONCE = 2**22
"""A batch of 2,048 is done in one go; 16 MB of float32 an array."""


def clamp_logit_scale(logit_scale: Tensor) -> None:
    """Keep s = ln(1/tau) within [0, ln 100], in place; to be called after every step."""
    with torch.no_grad():
        logit_scale.clamp_(0, MAX_LOGIT_SCALE)


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """The loss of one step as this rank sees it.

    The mean over ranks of `total`, of each term, and of their parameter gradients is what one
    process holding all rows gets, however unevenly the rows that count are spread.
    """

    total: Tensor
    """Scalar, with gradient."""
    terms: dict[str, Tensor]
    """Unweighted and detached: 'spot', 'niche', 'cross'."""
    rows: dict[str, Tensor]
    """By term, the number n of rows of all ranks that take part: chance level is ln n."""


class StAlignLoss(nn.Module):
    """L = spot L_CL^s + niche L_CL^n + cross L_NS, weighted by `LossConfig`.

    Logits are made for some rows at a time, `logits_at_once` of them, and made again in the
    backward pass: memory grows with A and not with B x A. Fewer logits than that are kept.
    `alone`: negatives are of this process, whatever other ranks there are.
    """

    def __init__(
        self, config: LossConfig, *, logits_at_once: int = LOGITS_AT_ONCE, alone: bool = False
    ) -> None:
        super().__init__()
        self.config, self.logits_at_once, self.alone = config, logits_at_once, alone

    def forward(self, embeddings: Embeddings, batch: Batch, logit_scale: Tensor) -> LossTerms:
        """`embeddings` belong to the spots of `batch`, `logit_scale` is s = ln(1/tau).

        Collective where torch.distributed is initialised, unless `alone`: every rank calls it,
        with equally many rows. Rows that lack a modality leave the terms that need it, as rows
        and as negatives. No spot is in a global batch twice. Logits are float32 or wider,
        whatever the autocast.
        """
        config = self.config
        gather = _gather if _distributed() and not self.alone else _keep
        with torch.autocast(batch.ids.device.type, enabled=False):
            scale = _wide(logit_scale).exp()
            mine = Embeddings(*(F.normalize(_wide(x), dim=-1) for x in embeddings))
            widths = [x.shape[-1] for x in mine]
            every = Embeddings(*torch.split(gather(torch.cat(mine, dim=-1)), widths, dim=-1))
            rows = _Rows.of(batch, config.mask_neighbors, gather)
            both, any_ = rows.has_image & rows.has_counts, rows.has_image | rows.has_counts
            cross = [(mine.h_spot, every.h_niche), (mine.h_niche, every.h_spot)]
            directions = {
                "spot": ([(mine.r, every.u), (mine.u, every.r)], both),
                "niche": ([(mine.e, every.t), (mine.t, every.e)], both),
                "cross": (cross if config.symmetric_cross else cross[:1], any_),
            }
            at_once = max(self.logits_at_once // len(rows.has_image), 1)
            terms = {
                name: rows.mean_loss(pairs, scale, takes_part, at_once)
                for name, (pairs, takes_part) in directions.items()
            }
        total = torch.stack([getattr(config, name) * term for name, term in terms.items()]).sum()
        return LossTerms(
            total=total,
            terms={name: term.detach() for name, term in terms.items()},
            rows={name: takes_part.sum() for name, (_, takes_part) in directions.items()},
        )


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Which rows of all ranks are which.

    Two rows are no negatives of each other when one lies in the niche of the other, whichever:
    for each row of this rank `members` says where its niche is among the A rows, and for each of
    the A rows `member_of` says where its niche is among this rank's; A and B stand for nowhere.
    """

    own: Tensor
    """[B] this rank's among the A."""
    has_image: Tensor
    has_counts: Tensor
    """[A]"""
    members: Tensor
    """[B, K+1], or [B, 0] where neighbours are not masked."""
    member_of: Tensor
    """[A, K+1] or [A, 0]"""

    @classmethod
    def of(cls, batch: Batch, mask_neighbors: bool, gather: Callable[[Tensor], Tensor]) -> _Rows:
        facts = [batch.ids[:, None], batch.has_image[:, None], batch.has_counts[:, None]]
        every = gather(torch.cat([*facts, batch.neighbors], dim=1))
        ids, width = every[:, 0], batch.neighbors.shape[1] if mask_neighbors else 0
        first = len(batch) * (dist.get_rank() if len(every) > len(batch) else 0)
        return cls(
            own=torch.arange(first, first + len(batch), device=ids.device),
            has_image=every[:, 1].bool(),
            has_counts=every[:, 2].bool(),
            members=_positions(batch.neighbors[:, :width], ids),
            member_of=_positions(every[:, 3 : 3 + width], batch.ids),
        )

    def mean_loss(
        self,
        pairs: list[tuple[Tensor, Tensor]],
        scale: Tensor,
        takes_part: Tensor,
        at_once: int,
    ) -> Tensor:
        """Mean InfoNCE over the directions in `pairs` (own a [B, D], everyone's b [A, D]) and
        over the rows of all ranks that take part, times the number of ranks; `at_once` rows of
        this rank at a time.

        DDP averages over ranks; a mean over this rank's rows would weigh the rows of a rank
        with few of them more.
        """

        def chunk(first: int, scale: Tensor, *tensors: Tensor) -> Tensor:
            own, every = tensors[: len(pairs)], tensors[len(pairs) :]
            rows = slice(first, first + len(own[0]))
            candidates = self._candidates(rows, takes_part)
            sums = [
                info_nce(a, b, scale, candidates, self.own[rows]).sum()
                for a, b in zip(own, every, strict=True)
            ]
            return torch.stack(sums).mean()

        run: Callable[..., Tensor] = chunk
        if at_once < len(self.own):
            run = partial(checkpoint, chunk, use_reentrant=False, preserve_rng_state=False)
        every = [b for _, b in pairs]
        chunks = zip(*(torch.split(a, at_once) for a, _ in pairs), strict=True)
        losses = [run(n * at_once, scale, *own, *every) for n, own in enumerate(chunks)]
        ranks = len(takes_part) / len(self.own)
        return torch.stack(losses).sum() * ranks / takes_part.sum().clamp(min=1)

    def _candidates(self, rows: slice, takes_part: Tensor) -> Tensor:
        """[C, A] the positive and the negatives of some of this rank's rows."""
        own, n = self.own[rows], len(takes_part)
        kept = torch.ones(len(own), n + 1, dtype=torch.bool, device=own.device)
        kept.scatter_(1, self.members[rows], False)
        kept_too = torch.ones(len(own) + 1, n, dtype=torch.bool, device=own.device)
        here = self.member_of - rows.start
        here = torch.where((here >= 0) & (here < len(own)), here, len(own))
        kept_too.scatter_(0, here.T, False)
        kept = kept[:, :n] & kept_too[:-1]
        kept &= takes_part & takes_part[own, None]
        # A pair always keeps itself, so a row that takes no part has loss and gradient 0.
        kept[torch.arange(len(own), device=own.device), own] = True
        return kept


def _positions(wanted: Tensor, ids: Tensor) -> Tensor:
    """Where each of `wanted` lies in `ids` [N], which are distinct; N where it does not."""
    ids_sorted, order = ids.sort()
    at = torch.searchsorted(ids_sorted, wanted.contiguous()).clamp(max=len(ids) - 1)
    return torch.where(ids_sorted[at] == wanted, order[at], len(ids))


def info_nce(a: Tensor, b: Tensor, scale: Tensor, candidates: Tensor, positives: Tensor) -> Tensor:
    """One direction of eq. 10 by rows: -log( exp(s a_i . b_p(i)) / sum_j exp(s a_i . b_j) ).

    a [B, D], b [A, D] of unit length; `scale` s = 1/tau; j runs over `candidates` [B, A] bool,
    which hold p = `positives` [B]. Returns [B].
    """
    logits = (scale * a @ b.T).masked_fill(~candidates, -torch.inf)
    return F.cross_entropy(logits, positives, reduction="none")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(x: Tensor) -> Tensor:
    """Rows of all ranks in their order: [B, ...] -> [A, ...]. The gradient sums the backward
    passes of all ranks, so that averaging parameter gradients over ranks leaves none out.
    """
    gathered: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return gathered


def _keep(x: Tensor) -> Tensor:
    """Of one process."""
    return x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        first = dist.get_rank() * ctx.rows
        return summed[first : first + ctx.rows]
