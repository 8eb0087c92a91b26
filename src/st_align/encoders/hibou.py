"""Hibou-B and Hibou-L (HistAI): DINOv2 vision transformers with registers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from st_align.encoders._images import LIBRARIES, ImageFamily, Maps, Pixels, as_map
from st_align.encoders._layout import Layout
from st_align.encoders._torchvision import import_timm
from st_align.encoders.base import EncoderInfo

_REGISTERS = 4
_COLOURS = ((0.7068, 0.5755, 0.7220), (0.1950, 0.2316, 0.1816))

_ORIGINAL = Layout(
    renames={r"mlp\.fc1": "mlp.w12", r"mlp\.fc2": "mlp.w3"}, unneeded=(r"mask_token",)
)
_TRANSFORMERS = Layout(
    renames={
        r"^(cls_token|register_tokens)": r"embeddings.\1",
        r"^pos_embed": "embeddings.position_embeddings",
        r"^patch_embed\.proj": "embeddings.patch_embeddings.projection",
        r"^norm\.": "layernorm.",
        r"^blocks": "encoder.layer",
        r"attn\.qkv": "attention.attention.*",
        r"attn\.proj": "attention.output.dense",
        r"mlp\.fc1": "mlp.weights_in",
        r"mlp\.fc2": "mlp.weights_out",
        r"ls(\d)\.gamma": r"layer_scale\1.lambda1",
    },
    parts=("query", "key", "value"),
    unneeded=(r"embeddings\.mask_token",),
)


def _build(kind: str, width: int, hidden: int) -> Any:
    """`hidden`: rows of the two halves of SwiGLU, which are one matrix here."""
    timm = import_timm()
    vit = timm.create_model(
        f"vit_{kind}_patch14_dinov2",
        img_size=224,
        init_values=1e-5,
        mlp_ratio=hidden / width,
        mlp_layer=timm.layers.SwiGLUPacked,
        act_layer=nn.SiLU,
        num_classes=0,
    )
    vit.register_tokens = nn.Parameter(torch.empty(1, _REGISTERS, width))
    return vit


def _read(vit: Any, pixels: Tensor) -> Maps:
    """DINOv2's order, which timm's is not: the class token has a position, registers have none."""
    patches = vit.patch_embed(pixels)
    first = vit.cls_token.expand(len(patches), -1, -1)
    registers = vit.register_tokens.expand(len(patches), -1, -1)
    tokens = torch.cat([first, patches], dim=1) + vit.pos_embed
    tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
    tokens = vit.norm(vit.blocks(tokens))
    return as_map(tokens[:, 1 + _REGISTERS :]), tokens[:, 0]


def _family(size: str, kind: str, width: int, hidden: int) -> ImageFamily:
    return ImageFamily(
        name=f"hibou-{size}",
        info=EncoderInfo(
            title=f"Hibou-{size.upper()}, ViT-{size.upper()}/14 on histology",
            licence="Apache-2.0",
            gated=False,
            source=f"huggingface.co/histai/hibou-{size}, or hibou-{size}.pth by "
            "github.com/HistAI/hibou",
            files=(f"hibou-{size}.pth", "model.safetensors", "pytorch_model.bin"),
            requires=LIBRARIES,
            hub=f"histai/hibou-{size}",
        ),
        pixels=Pixels(side=224, stretch=True, interpolation="bicubic", colours=_COLOURS),
        dim=width,
        build=partial(_build, kind, width, hidden),
        read=_read,
        layouts=(_ORIGINAL, _TRANSFORMERS),
    )


HIBOU_B = _family("b", "base", 768, 4096)
HIBOU_L = _family("l", "large", 1024, 5472)

for _one in (HIBOU_B, HIBOU_L):
    _one.register()
