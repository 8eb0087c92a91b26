"""CTransPath (Wang et al.): a Swin transformer with a convolutional stem."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from st_align.encoders._images import IMAGENET, LIBRARIES, ImageFamily, Maps, Pixels
from st_align.encoders._layout import Layout
from st_align.encoders._torchvision import import_timm
from st_align.encoders.base import EncoderInfo

_STEM = (3, 12, 24, 96)


class _ConvStem(nn.Module):
    """Pixels [B, 3, 224, 224] -> [B, 56, 56, 96]; names are the published ones."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(_STEM[:3]):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.proj = nn.Sequential(*layers, nn.Conv2d(*_STEM[2:], 1))
        self.norm = nn.LayerNorm(_STEM[-1])

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.norm(self.proj(pixels).permute(0, 2, 3, 1))
        return out


def _build() -> Any:
    # Swin computes index tables when it is built, so it is built in memory; the start values that
    # come along must not move the caller's random numbers.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        swin = import_timm().create_model("swin_tiny_patch4_window7_224", num_classes=0)
        swin.patch_embed = _ConvStem()
    return swin


def _read(swin: Any, pixels: Tensor) -> Maps:
    last = swin.forward_features(pixels).permute(0, 3, 1, 2)
    return last, last.mean(dim=(2, 3))


def _to_published() -> dict[str, str]:
    """Upstream merges patches at the end of a stage, timm at the start of the next one."""
    return {rf"^layers\.{n}\.downsample": f"layers.{n - 1}.downsample" for n in (1, 2, 3)}


CTRANSPATH = ImageFamily(
    name="ctranspath",
    info=EncoderInfo(
        title="CTransPath, Swin-T with a convolutional stem on histology",
        licence="GPL-3.0",
        gated=False,
        source="ctranspath.pth by github.com/Xiyue-Wang/TransPath",
        files=("ctranspath.pth",),
        requires=LIBRARIES,
    ),
    pixels=Pixels(side=224, colours=IMAGENET),
    dim=768,
    build=_build,
    read=_read,
    layouts=(
        Layout(
            renames=_to_published(),
            unneeded=(r".*\.relative_position_index$", r".*\.attn_mask$", r"head\."),
        ),
    ),
)
CTRANSPATH.register()
