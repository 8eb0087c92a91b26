"""A model over spots, in evaluation mode: batches in, NumPy vectors out.

Shape letters: N spots of a slide, d the model's width, D an embedding's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from st_align.config import Use
from st_align.loader import SpotData, prefetch
from st_align.model import STAlign

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class SlideVectors:
    """Embeddings of spots of one slide: r, u, e, t [N, d] and h_spot, h_niche [N, 2d], float32;
    `has_image`, `has_counts` [N] say which rows hold something.
    """

    r: NDArray[np.float32]
    u: NDArray[np.float32]
    e: NDArray[np.float32]
    t: NDArray[np.float32]
    h_spot: NDArray[np.float32]
    h_niche: NDArray[np.float32]
    has_image: NDArray[np.bool_]
    has_counts: NDArray[np.bool_]

    def of(self, use: Use) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The vectors [N, D] of one use, and the rows [N] that hold something.

        image is [r; e], gene is t (of the niche), spot is h_spot, niche is h_niche, spot+niche
        is both.
        """
        image, either = self.has_image, self.has_image | self.has_counts
        vectors, present = {
            "image": ((self.r, self.e), image),
            "gene": ((self.t,), self.has_counts),
            "spot": ((self.h_spot,), either),
            "niche": ((self.h_niche,), either),
            "spot+niche": ((self.h_spot, self.h_niche), either),
        }[use]
        return np.concatenate(vectors, axis=1), present


def embed_spots(
    model: STAlign, data: SpotData, ids: NDArray[np.int64], *, progress: bool = False
) -> SlideVectors:
    """Vectors of the spots `ids` of `data`, in that order; float32, no augmentation, no dropout.

    The model runs where its parameters are. Spots of one slide in, one slide's vectors out.
    """
    from tqdm import tqdm

    device = model.logit_scale.device
    training = model.training
    model.eval()
    blocks = [ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH)]
    # One array for all batches: small ones kept from each would pin the heap that batches leave.
    found: list[NDArray[np.float32]] = []
    has_image, has_counts = np.empty((2, len(ids)), np.bool_)
    with torch.inference_mode():
        batches = prefetch(data.batch, blocks)
        for i, batch in enumerate(tqdm(batches, "embed", len(blocks), disable=not progress)):
            vectors = model(batch.to(device))
            found = found or [np.empty((len(ids), v.shape[1]), np.float32) for v in vectors]
            rows = slice(i * _BATCH, (i + 1) * _BATCH)
            for values, vector in zip(found, vectors, strict=True):
                values[rows] = vector.float().cpu().numpy()
            has_image[rows], has_counts[rows] = batch.has_image.numpy(), batch.has_counts.numpy()
    model.train(training)
    r, u, e, t, h_spot, h_niche = found
    return SlideVectors(
        r=r,
        u=u,
        e=e,
        t=t,
        h_spot=h_spot,
        h_niche=h_niche,
        has_image=has_image,
        has_counts=has_counts,
    )
