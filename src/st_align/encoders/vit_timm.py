"""Vision transformers that timm builds as their authors do: UNI, UNI2-h, Prov-GigaPath."""

from __future__ import annotations

from typing import Any

from torch import nn

from st_align.encoders._images import IMAGENET, LIBRARIES, ImageFamily, Pixels, class_token
from st_align.encoders._torchvision import import_timm
from st_align.encoders.base import EncoderInfo

_FILES = ("pytorch_model.bin", "model.safetensors")


def _uni() -> Any:
    return import_timm().create_model(
        "vit_large_patch16_224", img_size=224, patch_size=16, init_values=1e-5, num_classes=0
    )


def _uni2() -> Any:
    timm = import_timm()
    return timm.create_model(
        "vit_giant_patch14_224",
        img_size=224,
        patch_size=14,
        depth=24,
        num_heads=24,
        embed_dim=1536,
        init_values=1e-5,
        mlp_ratio=2.66667 * 2,
        mlp_layer=timm.layers.SwiGLUPacked,
        act_layer=nn.SiLU,
        reg_tokens=8,
        no_embed_class=True,
        num_classes=0,
    )


def _gigapath() -> Any:
    return import_timm().create_model(
        "vit_giant_patch14_dinov2",
        img_size=224,
        patch_size=16,
        depth=40,
        num_heads=24,
        embed_dim=1536,
        init_values=1e-5,
        mlp_ratio=5.33334,
        num_classes=0,
    )


def _mahmood(title: str, hub: str) -> EncoderInfo:
    return EncoderInfo(
        title=title,
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        source=f"huggingface.co/{hub}, once access is granted",
        files=_FILES,
        requires=LIBRARIES,
        hub=hub,
    )


UNI = ImageFamily(
    name="uni",
    info=_mahmood("UNI, ViT-L/16 on histology", "MahmoodLab/UNI"),
    pixels=Pixels(side=224, colours=IMAGENET),
    dim=1024,
    build=_uni,
    read=class_token,
)

UNI2 = ImageFamily(
    name="uni2",
    info=_mahmood("UNI2-h, ViT-H/14 on histology", "MahmoodLab/UNI2-h"),
    pixels=Pixels(side=224, colours=IMAGENET),
    dim=1536,
    build=_uni2,
    read=class_token,
)

GIGAPATH = ImageFamily(
    name="gigapath",
    info=EncoderInfo(
        title="Prov-GigaPath tile encoder, ViT-g/16 on histology",
        licence="Apache-2.0, by its access form for research only",
        gated=True,
        source="huggingface.co/prov-gigapath/prov-gigapath, once access is granted",
        files=_FILES,
        requires=LIBRARIES,
        hub="prov-gigapath/prov-gigapath",
    ),
    pixels=Pixels(side=224, shortest=256, interpolation="bicubic", colours=IMAGENET),
    dim=1536,
    build=_gigapath,
    read=class_token,
)

for _family in (UNI, UNI2, GIGAPATH):
    _family.register()
