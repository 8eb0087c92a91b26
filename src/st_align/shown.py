"""What pages show of an .h5ad file of ours or of others: the slide, groups of spots, genes.

Shape letters: N spots, g genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align import figures, keys, store
from st_align.errors import SlideError
from st_align.expression import log_normalise
from st_align.image import rgb_array

if TYPE_CHECKING:
    from anndata import AnnData

_SPOT_PER_PITCH = 0.55
"""Where the file does not give the spots' size: that of Visium. Bins of Visium HD touch."""


def slide_view(adata: AnnData) -> figures.SlideView:
    """Coordinates, spot size and image of an AnnData in the convention of scanpy and squidpy; what
    lies in `uns['spatial']` in another form is no image.
    """
    xy = store.coordinates(adata)
    library = mapping(next(iter(mapping(adata.uns.get(keys.SPATIAL)).values()), None))
    factors, images = mapping(library.get("scalefactors")), mapping(library.get("images"))
    square = str(store.notes(adata).get("technology")).startswith("VisiumHD")
    share = 1.0 if square else _SPOT_PER_PITCH
    diameter = positive(factors.get("spot_diameter_fullres")) or share * _pitch(xy)
    view = figures.SlideView(xy=xy, diameter=diameter, is_square=square)
    for name in ("hires", "lowres"):
        image, scale = np.asarray(images.get(name)), positive(factors.get(f"tissue_{name}_scalef"))
        if image.ndim == 3 and scale:
            return replace(view, image=rgb_array(image), scale=scale)
    return view


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` where it is a mapping: files of other tools and edited ones hold anything."""
    return value if isinstance(value, Mapping) else {}


def groups(obs: pd.DataFrame, key: str) -> list[str]:
    """[N] names; '' where unlabelled. A column that is not there is a SlideError."""
    if key not in obs:
        raise SlideError(
            f"no column {key!r} in obs",
            expected="a column with labels",
            found=f"columns: {', '.join(map(str, obs.columns)) or 'none'}",
            fix="find them first: st-align domains, or sta.tl.domains"
            if key == keys.DOMAIN
            else None,
        )
    names = obs[key].astype(object).where(obs[key].notna(), "").astype(str)
    return ["" if name.strip().lower() in keys.UNLABELLED else name for name in names]


def measured(adata: AnnData, genes: Sequence[str]) -> pd.DataFrame:
    """log1p CP10k [N, those of `genes` that were measured]; NaN where a spot has no counts. Empty
    without library sizes.
    """
    shared = [gene for gene in genes if gene in adata.var_names]
    if not shared or keys.TOTAL_UMI not in adata.obs:
        return pd.DataFrame(index=adata.obs_names)
    total = pd.to_numeric(adata.obs[keys.TOTAL_UMI], errors="coerce").to_numpy(np.float64)
    matrix, valid = log_normalise(adata[:, shared].X, total)
    values = matrix.toarray().astype(np.float64)
    values[~valid] = np.nan
    return pd.DataFrame(values, index=adata.obs_names, columns=shared)


def predicted(adata: AnnData) -> pd.DataFrame:
    """[N, g] predicted log1p CP10k; no columns where nothing was predicted."""
    if keys.PREDICTED not in adata.obsm:
        return pd.DataFrame(index=adata.obs_names)
    return pd.DataFrame(adata.obsm[keys.PREDICTED])


def positive(value: Any) -> float | None:
    """`value` as a number above 0; None for what is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < float("inf") else None


def _pitch(xy: NDArray[np.float64]) -> float:
    """Median distance to the nearest other spot; 1 for one spot and for spots that all coincide."""
    from scipy.spatial import cKDTree

    if len(xy) < 2:
        return 1.0
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])) or 1.0
