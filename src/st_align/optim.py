"""AdamW over a model, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import AdamW


def build_optimizer(model: nn.Module, *, fused: bool) -> AdamW:
    """AdamW with two groups: matrices, which decay, and the rest (biases, norms, the logit
    scale), which never does. `set_rates` sets the rates before every step.
    """
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim >= 2]},
        {"params": [p for p in params if p.ndim < 2]},
    ]
    return AdamW(groups, lr=0.0, weight_decay=0.0, fused=fused)


def set_rates(optimizer: AdamW, *, lr: float, weight_decay: float) -> None:
    """Learning rate of both groups; weight decay of the matrices only."""
    matrices, rest = optimizer.param_groups
    matrices["lr"] = rest["lr"] = lr
    matrices["weight_decay"] = weight_decay


def moments(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """What AdamW remembers, as `exp_avg:NAME`, `exp_avg_sq:NAME` and `step:NAME`."""
    return {
        f"{key}:{name}": value
        for name, param in model.named_parameters()
        for key, value in optimizer.state.get(param, {}).items()
    }


def restore_moments(model: nn.Module, optimizer: AdamW, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `moments`, for the same model."""
    names = {param: name for name, param in model.named_parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    numbers = {names[param]: number for number, param in enumerate(params)}
    state: dict[int, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        key, name = full.split(":", 1)
        state.setdefault(numbers[name], {})[key] = tensor.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
