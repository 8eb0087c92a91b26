"""CLIP ViT-B/32 (OpenAI) and PLIP, the same network trained on pathology captions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from st_align.encoders._images import LIBRARIES, OPENAI, ImageFamily, Maps, Pixels, as_map
from st_align.encoders._layout import Layout
from st_align.encoders._torchvision import import_timm
from st_align.encoders.base import EncoderInfo

_WIDTH, _DIM = 768, 512

_TRANSFORMERS = Layout(
    renames={
        r"^(?!visual_projection)": "vision_model.",
        r"\.cls_token": ".embeddings.class_embedding",
        r"\.pos_embed": ".embeddings.position_embedding.weight",
        r"\.patch_embed\.proj": ".embeddings.patch_embedding",
        r"\.norm_pre\.": ".pre_layrnorm.",
        r"\.norm\.": ".post_layernorm.",
        r"\.blocks": ".encoder.layers",
        r"\.attn\.qkv": ".self_attn.*_proj",
        r"\.attn\.proj": ".self_attn.out_proj",
        r"\.norm(\d)": r".layer_norm\1",
    },
    parts=("q", "k", "v"),
    unneeded=(r"text_", r"logit_scale", r"vision_model\.embeddings\.position_ids"),
)


def _build() -> Any:
    vit = import_timm().create_model("vit_base_patch32_clip_quickgelu_224", num_classes=0)
    vit.visual_projection = nn.Linear(_WIDTH, _DIM, bias=False)
    return vit


def _read(vit: Any, pixels: Tensor) -> Maps:
    """Patch tokens pass the projection that is made for the class token: one space for both."""
    tokens = vit.visual_projection(vit.forward_features(pixels))
    return as_map(tokens[:, 1:]), tokens[:, 0]


def _family(name: str, hub: str, title: str, licence: str) -> ImageFamily:
    return ImageFamily(
        name=name,
        info=EncoderInfo(
            title=title,
            licence=licence,
            gated=False,
            source=f"huggingface.co/{hub}",
            files=("model.safetensors", "pytorch_model.bin"),
            requires=LIBRARIES,
            hub=hub,
        ),
        pixels=Pixels(side=224, interpolation="bicubic", colours=OPENAI),
        dim=_DIM,
        build=_build,
        read=_read,
        layouts=(_TRANSFORMERS,),
    )


CLIP = _family(
    "clip-vit-b-32",
    "openai/clip-vit-base-patch32",
    "CLIP ViT-B/32 on pictures and captions of the web",
    "MIT",
)
PLIP = _family(
    "plip",
    "vinid/plip",
    "PLIP, CLIP ViT-B/32 on pathology pictures and captions",
    "none stated: see its model card",
)

for _one in (CLIP, PLIP):
    _one.register()
