"""A picture of a slide put together from its niche patches.

A corpus keeps patches, not images: what the model saw is what there is to show.

Shape letters: N spots, q pixels of a niche patch, h and w pixels of the picture.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from st_align.slide import Niche

MAX_SIDE = 1500
_BACKGROUND = 255


def mosaic(niche: Niche, *, max_side: int = MAX_SIDE) -> tuple[NDArray[np.uint8], float]:
    """RGB [h, w, 3] from the origin of the coordinates to the last niche, and its px per
    full-resolution px. White where no niche lies, and never finer than the patches are.

    The niche needs patches [N, q, q, 3]; a ValueError where it has none.
    """
    from PIL import Image

    if niche.patches is None:
        raise ValueError("niches without patches show nothing")
    width, height = niche.boxes[:, 2:].max(axis=0)
    finest = niche.patches.shape[1] / float(np.median(niche.boxes[:, 2] - niche.boxes[:, 0]))
    scale = min(max_side / max(width, height), finest)
    size = int(np.ceil(width * scale)), int(np.ceil(height * scale))
    picture = Image.new("RGB", size, (_BACKGROUND,) * 3)
    for box, patch in zip(np.round(niche.boxes * scale).astype(int), niche.patches, strict=True):
        x0, y0, x1, y1 = box.tolist()
        side = max(x1 - x0, 1), max(y1 - y0, 1)
        tile = Image.fromarray(np.asarray(patch)).resize(side, Image.Resampling.BOX)
        picture.paste(tile, (x0, y0))
    return np.asarray(picture), scale
