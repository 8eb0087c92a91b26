"""Where a spot's genes look in its image: the attention of the fusion (eq. 7).

Shape letters: N spots, T image tokens, n heads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from st_align.checkpoint import Run
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
    refused = refusal(reader.run, slide, scale)
    if refused is not None:
        raise refused
    with watched(reader.run, (scale,)) as shares:
        reader.embed(slide)
    return np.concatenate(shares[scale])


def refusal(run: Run, slide: PreparedSlide, scale: Scale) -> ModelError | None:
    """Why a slide has no attention to look at; None where it has."""
    if not isinstance(_fusion(run, scale), TokenFusion):
        return ModelError(
            "the model has no attention over tokens",
            expected="a model with fusion 'tokens'",
            found=f"fusion {run.config.model.fusion!r}",
        )
    if not slide.has_image or slide.counts is None:
        return ModelError(
            f"slide {slide.id!r} has nothing to attend to", expected="an image and counts"
        )
    return None


@contextmanager
def watched(
    run: Run, scales: Iterable[Scale]
) -> Iterator[Mapping[Scale, list[NDArray[np.float32]]]]:
    """Embeddings made inside leave blocks [n, T] of attention behind, as `image_attention` has it,
    in the order of their spots.
    """
    shares: dict[Scale, list[NDArray[np.float32]]] = {scale: [] for scale in scales}
    with ExitStack() as hooks:
        for scale, blocks in shares.items():
            fusion = _fusion(run, scale)
            hook = functools.partial(_note, fusion, blocks)
            hooks.callback(fusion.register_forward_pre_hook(hook).remove)
        yield shares


def _note(fusion: Any, blocks: list[NDArray[np.float32]], _: Any, inputs: tuple[Any, ...]) -> None:
    with torch.inference_mode():
        image, gene = fusion.present(*inputs)
        blocks.append(fusion.attention(gene, image).mean(dim=(1, 2)).float().cpu().numpy())


def _fusion(run: Run, scale: Scale) -> torch.nn.Module:
    return run.model.fuse_spot if scale == "spot" else run.model.fuse_niche
