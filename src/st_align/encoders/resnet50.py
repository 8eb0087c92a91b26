"""ResNet-50 on ImageNet, in the layout of timm and torchvision."""

from __future__ import annotations

from typing import Any

from st_align.encoders._images import IMAGENET, LIBRARIES, ImageFamily, Pixels, mean_of_map
from st_align.encoders._layout import Layout
from st_align.encoders._torchvision import import_timm
from st_align.encoders.base import EncoderInfo


def _build() -> Any:
    return import_timm().create_model("resnet50", num_classes=0)


RESNET50 = ImageFamily(
    name="resnet50",
    info=EncoderInfo(
        title="ResNet-50, ImageNet",
        licence="Apache-2.0 (timm's weights), BSD-3-Clause (torchvision's)",
        gated=False,
        source="huggingface.co/timm/resnet50.a1_in1k, or resnet50-*.pth of torchvision",
        files=(
            "model.safetensors",
            "pytorch_model.bin",
            "resnet50-11ad3fa6.pth",
            "resnet50-0676ba61.pth",
        ),
        requires=LIBRARIES,
        hub="timm/resnet50.a1_in1k",
    ),
    pixels=Pixels(side=224, colours=IMAGENET),
    dim=2048,
    build=_build,
    read=mean_of_map,
    layouts=(Layout(unneeded=(r"fc\.",)),),
)
RESNET50.register()
