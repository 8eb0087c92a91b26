"""Learning rate, weight decay and the number of epochs, as functions of the step."""

from __future__ import annotations

import math

from st_align.config import OptimConfig

_REFERENCE_BATCH = 256
_EPOCHS = (2, 60)


def n_epochs(optim: OptimConfig, n: int) -> int:
    """Epochs over `n` spots: as configured, else as many as `spot_budget` allows, 2 to 60."""
    if optim.epochs is not None:
        return optim.epochs
    return min(max(round(optim.spot_budget / n), _EPOCHS[0]), _EPOCHS[1])


def learning_rate(optim: OptimConfig, step: int, total: int, batch: int) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine to 0.

    The peak is `lr * batch / 256`, with `batch` the spots of a global batch.
    """
    peak = optim.lr * batch / _REFERENCE_BATCH
    warmup = round(optim.warmup * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * _half_cosine((step - warmup) / max(total - warmup, 1))


def weight_decay(optim: OptimConfig, step: int, total: int) -> float:
    """Half a cosine from `weight_decay` at step 0 to `weight_decay_end` at the last step."""
    start, end = optim.weight_decay, optim.weight_decay_end
    return end + (start - end) * _half_cosine(step / max(total - 1, 1))


def _half_cosine(progress: float) -> float:
    """1 at 0, 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))
