"""Slide to PreparedSlide: the physical scale is fitted, niches are found, patches are cut.

Shape letters: N spots, K neighbours, p and q pixels of a patch side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align import keys
from st_align.geometry import (
    Scale,
    fit_scale,
    neighbors,
    niche_boxes,
    parse_niche_spec,
    spot_boxes,
)
from st_align.slide import LATTICE, PITCH_UM, SPOT_UM, Niche, PreparedSlide, Slide
from st_align.spill import Spill

if TYPE_CHECKING:
    from st_align.image import ImageSource

SPOT_PX = 56
NICHE_PX = 112
_ADVISED_PX_PER_SPOT = 20
_COLUMNS = ("barcode", keys.ARRAY_ROW, keys.ARRAY_COL, "x", "y", keys.TOTAL_UMI)


def prepare_slide(
    slide: Slide,
    niche_specs: Sequence[str],
    *,
    spot_px: int = SPOT_PX,
    niche_px: int = NICHE_PX,
) -> PreparedSlide:
    """Cut a slide into what a model reads, with a niche for each spec.

    The patch of a spot is its bounding square, that of a niche the bounding box of its members'
    squares, both resampled to uint8 [N, p, p, 3] and [N, q, q, 3]; at the border the image's
    edge is repeated. Without an image there are no patches and `um_per_px` is None: the
    coordinates may be in any unit.

    A SlideError says when the scale cannot be fitted, a ConfigError when a spec is unknown.
    """
    scale = _scale(slide)
    image = slide.image
    patches = _crops(image, _spot_boxes(slide, scale), spot_px) if image is not None else None
    niches = {spec: cut_niche(slide, spec, niche_px=niche_px) for spec in niche_specs}
    return PreparedSlide(
        id=slide.id,
        technology=slide.technology,
        source=slide.source,
        patient=slide.patient,
        patient_origin=slide.patient_origin,
        tissue=slide.tissue,
        species=slide.species,
        um_per_px=scale.um_per_px if image is not None else None,
        spots=_spots(slide),
        genes=slide.genes,
        counts=slide.counts,
        spot_patches=patches,
        niches=niches,
        licence=slide.licence,
        warnings=slide_warnings(slide, niche_specs),
        image=image,
    )


def cut_niche(slide: Slide, spec: str, *, niche_px: int = NICHE_PX) -> Niche:
    """The niches of one spec, with patches where the slide has an image."""
    members = neighbors(
        spec,
        xy=slide.xy,
        places=slide.places,
        lattice=LATTICE[slide.technology],
        barcodes=slide.barcodes,
    )
    boxes = niche_boxes(members, _spot_boxes(slide, _scale(slide)))
    patches = _crops(slide.image, boxes, niche_px) if slide.image is not None else None
    return Niche(neighbors=members, boxes=boxes, patches=patches)


def um_per_px(slide: Slide) -> float | None:
    """Micrometres of a full-resolution pixel; None without an image: the coordinates may be in any
    unit. A SlideError when it cannot be fitted.
    """
    return None if slide.image is None else _scale(slide).um_per_px


def slide_warnings(slide: Slide, niche_specs: Iterable[str]) -> tuple[str, ...]:
    """What the reader said, then: few pixels per spot, fewer spots than a niche."""
    return tuple(_warnings(slide, niche_specs))


def _crops(image: ImageSource, boxes: NDArray[np.float64], side: int) -> NDArray[np.uint8]:
    """uint8 [N, side, side, 3]; those of Visium HD, which memory does not hold, lie in a file."""
    patches = Spill((len(boxes), side, side, 3), np.uint8)
    for start in range(0, len(boxes), patches.rows):
        rows = slice(start, start + patches.rows)
        patches.values[rows] = image.crops(boxes[rows], side)
        patches.written()
    return np.asarray(patches.values, np.uint8)


def _scale(slide: Slide) -> Scale:
    technology = slide.technology
    return fit_scale(slide.xy, slide.places, LATTICE[technology], PITCH_UM[technology])


def _spot_boxes(slide: Slide, scale: Scale) -> np.ndarray:
    return spot_boxes(slide.xy, SPOT_UM[slide.technology] / scale.um_per_px)


def _spots(slide: Slide) -> pd.DataFrame:
    """Our columns, then the source's that do not have the name of one of ours."""
    places = slide.places if slide.places is not None else np.full((slide.n_spots, 2), -1)
    umi = slide.total_umi if slide.total_umi is not None else np.full(slide.n_spots, np.nan)
    own = (slide.barcodes.astype(object), *places.T.astype(np.int32), *slide.xy.T, umi)
    spots = pd.DataFrame(dict(zip(_COLUMNS, own, strict=True)))
    obs = slide.obs.reset_index(drop=True)
    return pd.concat([spots, obs[[name for name in obs if name not in _COLUMNS]]], axis=1)


def _warnings(slide: Slide, niche_specs: Iterable[str]) -> Iterator[str]:
    yield from slide.warnings
    if slide.image is not None:
        pixels = SPOT_UM[slide.technology] / _scale(slide).um_per_px * slide.image.scale
        if pixels < _ADVISED_PX_PER_SPOT:
            yield (
                f"the image has {pixels:.1f} px per spot ({_ADVISED_PX_PER_SPOT} or more are "
                "advised): give the full-resolution image for texture within spots"
            )
    for spec in sorted(niche_specs):
        k = parse_niche_spec(spec)
        if k is not None and slide.n_spots <= k:
            yield f"{slide.n_spots} spots are fewer than the {k + 1} of a niche {spec}"
