"""CONCH (Mahmood lab): the image side of a vision-language model of histology.

Shape letters: B pictures, n tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from st_align.encoders._images import LIBRARIES, OPENAI, ImageFamily, Maps, Pixels, as_map
from st_align.encoders._layout import Layout
from st_align.encoders._torchvision import import_timm
from st_align.encoders.base import EncoderInfo

_TRUNK, _DIM, _HEADS, _CELLS = 768, 512, 8, 4


class _AttentionPool(nn.Module):
    """One learned query over all tokens [B, n, 768] -> [B, 512]."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, _DIM))
        self.attn = nn.MultiheadAttention(_DIM, _HEADS, kdim=_TRUNK, vdim=_TRUNK, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(_DIM), nn.LayerNorm(_TRUNK)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.ln_k(tokens)
        query = self.ln_q(self.query).expand(len(tokens), 1, -1)
        pooled: Tensor = self.attn(query, tokens, tokens, need_weights=False)[0][:, 0]
        return pooled


def _build() -> nn.Module:
    trunk = import_timm().create_model("vit_base_patch16_224", img_size=448, num_classes=0)
    return nn.ModuleDict(
        {
            "trunk": trunk,
            "attn_pool_contrast": _AttentionPool(),
            "ln_contrast": nn.LayerNorm(_DIM),
        }
    )


def _read(network: Any, pixels: Tensor) -> Maps:
    """`encode_image(..., proj_contrast=False, normalize=False)`, of the whole picture, and of each
    of 4 x 4 cells: the query attends to the 7 x 7 tokens of a cell alone.
    """
    tokens = network["trunk"].forward_features(pixels)

    def embed(some: Tensor) -> Tensor:
        out: Tensor = network["ln_contrast"](network["attn_pool_contrast"](some))
        return out

    side = round((tokens.shape[1] - 1) ** 0.5) // _CELLS
    cells = tokens[:, 1:].reshape(-1, _CELLS, side, _CELLS, side, _TRUNK).transpose(2, 3)
    cells = embed(cells.reshape(-1, side * side, _TRUNK))
    return as_map(cells.reshape(len(tokens), -1, _DIM)), embed(tokens)


CONCH = ImageFamily(
    name="conch",
    info=EncoderInfo(
        title="CONCH, ViT-B/16 on histology and captions",
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        source="huggingface.co/MahmoodLab/CONCH, once access is granted",
        files=("pytorch_model.bin", "model.safetensors"),
        requires=LIBRARIES,
        hub="MahmoodLab/CONCH",
    ),
    pixels=Pixels(side=448, interpolation="bicubic", colours=OPENAI),
    dim=_DIM,
    build=_build,
    read=_read,
    layouts=(
        Layout(
            renames={r"^": "visual."},
            unneeded=(
                r"text",
                r"logit_scale",
                r"visual\.(proj_contrast|attn_pool_caption|ln_caption)",
            ),
        ),
    ),
)
CONCH.register()
