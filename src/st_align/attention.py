"""Where a spot's genes look in its image: the attention of the fusion (eq. 7).

Shape letters: N spots, T image tokens, n heads.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from st_align.errors import ModelError
from st_align.fusion import TokenFusion
from st_align.infer import Embedder
from st_align.slide import PreparedSlide

Scale = Literal["spot", "niche"]


def image_attention(
    reader: Embedder, slide: PreparedSlide, *, scale: Scale = "spot"
) -> NDArray[np.float32]:
    """[N, T] share of the attention of a spot's gene tokens that falls on each of its image tokens,
    the mean over gene tokens and heads; rows sum to 1. Tokens of AE-Img are the cells of a grid,
    row by row; those of an encoder with one vector are trained and have no place.

    A model without attention over tokens is a ModelError; so is a slide that lacks a modality.
    """
    fusion = reader.run.model.fuse_spot if scale == "spot" else reader.run.model.fuse_niche
    if not isinstance(fusion, TokenFusion):
        raise ModelError(
            "the model has no attention over tokens",
            expected="a model with fusion 'tokens'",
            found=f"fusion {reader.run.config.model.fusion!r}",
        )
    if not slide.has_image or slide.counts is None:
        raise ModelError(
            f"slide {slide.id!r} has nothing to attend to", expected="an image and counts"
        )
    blocks: list[NDArray[np.float32]] = []

    def watch(_: Any, inputs: tuple[Any, ...]) -> None:
        with torch.inference_mode():
            image, gene = fusion.present(*inputs)
            blocks.append(fusion.attention(gene, image).mean(dim=(1, 2)).float().cpu().numpy())

    handle = fusion.register_forward_pre_hook(watch)
    try:
        reader.embed(slide)
    finally:
        handle.remove()
    return np.concatenate(blocks)
