"""Trained spot-image encoders (eq. 3): ResNets with group normalisation.

Batch norm would couple the samples of a contrastive batch and the ranks of a job.

Shape letters: B patches of side p, T = t x t tokens, d width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from st_align.encoders._torchvision import import_timm
from st_align.encoders.base import Encoded, TrainedEntry, TrainedShape, register


class ImageEncoder(nn.Module):
    """uint8 patches [B, p, p, 3] -> a network's last feature map [B, C, h, w] -> `Encoded`."""

    def __init__(
        self, network: nn.Module, channels: int, shape: TrainedShape, side: int | None
    ) -> None:
        """`side`: pixels to which patches are resampled first; None reads them as they are."""
        super().__init__()
        self.network, self.side = network, side
        self.grid = math.isqrt(shape.tokens)
        self.to_tokens = nn.Linear(channels, shape.dim)
        self.to_pooled = nn.Linear(channels, shape.dim)

    def forward(self, patches: Tensor) -> Encoded:
        """Tokens [B, T, d] of a square grid with T <= `shape.tokens`, pooled [B, d]."""
        pixels = patches.permute(0, 3, 1, 2).to(self.to_pooled.weight.dtype) / 127.5 - 1
        if self.side is not None:
            pixels = F.interpolate(pixels, size=(self.side, self.side), mode="bilinear")
        last = self.network(pixels)
        cells = F.adaptive_avg_pool2d(last, self.grid).flatten(2).transpose(1, 2)
        return Encoded(self.to_tokens(cells), self.to_pooled(last.mean(dim=(2, 3))))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // 8, channels)


class _Block(nn.Module):
    """Pre-activation residual block that halves the side and sets the width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(inputs), _norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        shortcut: Tensor = self.shortcut(F.avg_pool2d(x, 2, ceil_mode=True))
        return y + shortcut


def _small(shape: TrainedShape) -> nn.Module:
    """About 0.3 M parameters and 14 million multiply-adds at 56 px. The residual path is not
    normalised before its end, so the brightness of a patch is not lost.
    """
    widths = (16, 32, 64, 128)
    network = nn.Sequential(
        nn.Conv2d(3, widths[0], 3, stride=2, padding=1),
        *(_Block(inputs, outputs) for inputs, outputs in pairwise(widths)),
        _norm(widths[-1]),
        nn.ReLU(),
    )
    return ImageEncoder(network, widths[-1], shape, side=None)


def _resnet50(shape: TrainedShape) -> nn.Module:
    network = import_timm().create_model("resnet50_gn", num_classes=0, global_pool="")
    return ImageEncoder(network, 2048, shape, side=224)


register(TrainedEntry(name="resnet-small-gn", modality="image", build=_small))
register(TrainedEntry(name="resnet50-gn", modality="image", build=_resnet50))
