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
    first, registers = (
        t.expand(len(patches), -1, -1) for t in (vit.cls_token, vit.register_tokens)
    )
    tokens = torch.cat([first, patches], dim=1) + vit.pos_embed
    tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
    tokens = vit.norm(vit.blocks(tokens))
    return as_map(tokens[:, 1 + _REGISTERS :]), tokens[:, 0]


for _size, _kind, _width, _hidden in (("b", "base", 768, 4096), ("l", "large", 1024, 5472)):
    ImageFamily(
        name=f"hibou-{_size}",
        info=EncoderInfo(
            title=f"Hibou-{_size.upper()}, ViT-{_size.upper()}/14 on histology",
            licence="Apache-2.0",
            gated=False,
            source=f"huggingface.co/histai/hibou-{_size}, or hibou-{_size}.pth by "
            "github.com/HistAI/hibou",
            files=(f"hibou-{_size}.pth", "model.safetensors", "pytorch_model.bin"),
            requires=LIBRARIES,
            hub=f"histai/hibou-{_size}",
        ),
        pixels=Pixels(side=224, stretch=True, interpolation="bicubic", colours=_COLOURS),
        dim=_width,
        build=partial(_build, _kind, _width, _hidden),
        read=_read,
        layouts=(_ORIGINAL, _TRANSFORMERS),
    ).register()
