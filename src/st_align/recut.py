"""A corpus slide's own image, opened again: squares of any physical size are cut from it.

Shape letters: N spots, p pixels of a patch side.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from st_align.corpus import Corpus
from st_align.encoders.base import View
from st_align.encoders.field import FieldEncoder
from st_align.errors import CorpusError, SlideError
from st_align.geometry import spot_boxes
from st_align.image import ImageSource
from st_align.io import ReadOptions
from st_align.io.detect import read_one
from st_align.slide import SPOT_UM, PreparedSlide

_COMPARED = 16
"""Spots whose patches tell whether the image is still the one the corpus was made from."""
_SAME = 2.0
"""Grey levels by which they may differ in the mean: another version of a decoder."""
_COARSER = 1.05

Cut = Callable[[int, int], NDArray[np.uint8]]


def source_image(corpus: Corpus, slide: PreparedSlide) -> ImageSource:
    """The image that a corpus slide was cut from. A source that is gone, has no image or is no
    longer what the corpus was made from is a CorpusError.
    """
    where = corpus.source(slide.id)
    fix = "run st-align prepare with the source where it lies now: finished slides are kept"
    if where is None:
        raise CorpusError(
            f"the corpus does not say where slide {slide.id!r} came from",
            expected="the place of its source, to read the image again",
            found=f"a slide prepared by an earlier version, from {slide.source}",
            fix=fix,
        )
    try:
        options = ReadOptions(format=where.format, image=where.image, technology=slide.technology)
        image = read_one(f"{where.path}::{slide.id}", options).image
    except SlideError as error:
        raise CorpusError(
            f"the image of slide {slide.id!r} cannot be read again",
            expected=f"its source: {where.path}",
            found=error.one_line(),
            fix=fix,
        ) from error
    if image is None:
        raise CorpusError(f"the source of slide {slide.id!r} has no image", found=str(where.path))
    _require_same(image, slide)
    return image


def field_cut(
    image: ImageSource, slide: PreparedSlide, encoder: FieldEncoder, view: View, niche_spec: str
) -> Cut:
    """Cuts the squares of some rows, first to last, around the middle of what the view's patches
    show: the spot, or the niche's box.
    """
    niche = slide.niches[niche_spec] if view == "niche" else None
    centres = slide.spots[["x", "y"]].to_numpy(np.float64)
    if niche is not None:
        centres = (niche.boxes[:, :2] + niche.boxes[:, 2:]) / 2
    boxes, side = spot_boxes(centres, encoder.patch_um / _um(slide)), field_px(slide, encoder, view)
    return lambda start, stop: image.crops(boxes[start:stop], side)


def field_px(slide: PreparedSlide, encoder: FieldEncoder, view: View) -> int:
    """Pixels of a square's side: what the network reads, else the corpus's own."""
    if encoder.side is not None:
        return encoder.side
    patches = slide.spot_patches
    if view == "niche":
        patches = next((n.patches for n in slide.niches.values()), None)
    return 0 if patches is None else int(patches.shape[1])


def field_warning(
    image: ImageSource, slide: PreparedSlide, encoder: FieldEncoder, px: int
) -> str | None:
    """Where the image is coarser than what the encoder is given: how coarse it is."""
    there, asked = _um(slide) / image.scale, encoder.patch_um / px
    if there <= _COARSER * asked:
        return None
    return (
        f"the image of slide {slide.id!r} has {there:.3g} um/px, coarser than the {asked:.3g} "
        f"um/px asked for: squares are enlarged {there / asked:.2g} times"
    )


def _um(slide: PreparedSlide) -> float:
    """Micrometres per full-resolution pixel."""
    if slide.um_per_px is None:
        raise CorpusError(f"slide {slide.id!r} has no image: a field in um cannot be cut")
    return slide.um_per_px


def _require_same(image: ImageSource, slide: PreparedSlide) -> None:
    """The image gives the corpus's own spot patches again."""
    stored = slide.spot_patches
    if stored is None:
        raise CorpusError(f"slide {slide.id!r} was prepared without its image")
    rows = slide.spread(_COMPARED)
    xy = slide.spots[["x", "y"]].to_numpy(np.float64)[rows]
    cut = image.crops(spot_boxes(xy, SPOT_UM[slide.technology] / _um(slide)), stored.shape[1])
    apart = float(np.abs(cut.astype(np.float32) - stored[rows]).mean())
    if apart > _SAME:
        raise CorpusError(
            f"the source of slide {slide.id!r} has changed since the corpus was made",
            expected="an image that gives the corpus's spot patches again",
            found=f"patches that differ by {apart:.0f} grey levels of 255",
            fix="run st-align prepare again, into a new folder or over this corpus",
        )
