"""What a slide's image says of its spots, as one matrix for a linear head; counts play no part.

    spot     frozen vector of the spot's crop          as it is, and its mean over the niche
    colour   21 colour statistics of the spot's crop   as they are, and their mean over the niche
    niche    frozen vector of the niche's crop         as it is

Each block is standardised within the slide by the slide's own images and weighs the same. A run
without a frozen image encoder puts its own r and e in place of the frozen vectors.

Shape letters: N spots, D features of all blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from st_align.batch import Role
from st_align.colour import colour_statistics
from st_align.encoders.base import View
from st_align.errors import SlideError
from st_align.features import Features, cached_features, slide_features
from st_align.geometry import ring_mean
from st_align.infer import Embedder, fitting_slide, without_counts
from st_align.slide import PreparedSlide

_VARIES = 1e-3
"""Of the median spread: columns that hardly vary would be blown up by standardising."""

Array = NDArray[np.float16] | NDArray[np.float32]


class ImageBlocks(NamedTuple):
    """What is read of a slide's image once: small, or memory-mapped from a corpus."""

    ringed: tuple[Array, ...]
    """[N, ...] blocks of the spots, which also enter as means over the niche."""
    plain: tuple[Array, ...]
    """[N, ...] blocks that enter as they are."""
    members: NDArray[np.int32]
    """[N, K+1] of the niches, -1 fills."""

    def features(self) -> NDArray[np.float32]:
        """[N, D]"""
        means = [ring_mean(np.asarray(b, np.float32), self.members) for b in self.ringed]
        blocks = [*self.ringed, *means, *self.plain]
        return np.concatenate([_standardised(block) for block in blocks], axis=1)


def image_blocks(
    reader: Embedder,
    slide: PreparedSlide,
    features: Mapping[Role, Features | None] | None = None,
) -> ImageBlocks:
    """The blocks of a slide; its counts are dropped before anything is read.

    `features` are the reader's `image_features` of the slide, where they are at hand.

    Raises:
        SlideError: the slide has no image, or fewer than 2 spots.
        ModelError, CorpusError: it does not fit the run.

    """
    patches = slide.spot_patches
    if patches is None:
        raise SlideError(
            f"slide {slide.id!r} has no image to predict from",
            expected="a slide with its histology",
            fix="give the image: --image FILE",
        )
    if slide.n_spots < 2:
        raise SlideError(
            f"slide {slide.id!r} has too few spots", expected="2 or more", found=str(slide.n_spots)
        )
    slide, _ = fitting_slide(reader.run, without_counts(slide))
    spot, niche = (_frozen(reader, slide, view, features or {}) for view in ("spot", "niche"))
    if spot is None or niche is None:
        seen = reader.embed(slide, features=features)
        spot, niche = seen.r, seen.e
    members = np.asarray(slide.niches[reader.run.config.data.niche].neighbors)
    return ImageBlocks((spot, colour_statistics(patches)), (niche,), members)


def _frozen(
    reader: Embedder, slide: PreparedSlide, view: View, at_hand: Mapping[Role, Features | None]
) -> Array | None:
    """[N, width] what the frozen image encoder of a view sees; that of the other view where the
    run has none of its own, None where it has neither.
    """
    own: Role = "spot_image" if view == "spot" else "niche_image"
    other: Role = "niche_image" if view == "spot" else "spot_image"
    if (found := at_hand.get(own)) is not None:
        return found.pooled
    encoder = reader.encoders.get(own) or reader.encoders.get(other)
    if encoder is None:
        return None
    spec = reader.run.config.data.niche
    if reader.corpus is not None:
        found = cached_features(reader.corpus, slide.id, encoder, view, niche_spec=spec)
    else:
        found = slide_features(slide, encoder, view, niche_spec=spec, progress=reader.progress)
    return None if found is None else found.pooled


def _standardised(block: Array) -> NDArray[np.float32]:
    """[N, D] with mean 0, equal spread of all columns that vary, and a total variance of 1: a
    wide block weighs as much as a narrow one.
    """
    values = np.asarray(block, np.float32)
    spread = values.std(axis=0)
    varies = spread > max(1e-6, _VARIES * float(np.median(spread)))
    values = (values - values.mean(axis=0)) / np.where(varies, spread, 1)
    return np.where(varies, values / np.sqrt(max(varies.sum(), 1)), 0).astype(np.float32)
