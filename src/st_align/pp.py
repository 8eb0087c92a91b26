"""Preprocessing for AnnData and SpatialData: niches, normalised expression, patches.

Every function takes one AnnData, a dict of them by slide, or a SpatialData; writes into it and
returns None, or returns a copy with `copy=True`. `Where` names the options that all of them take.

Shape letters: N spots of the table, G genes, p pixels of a patch side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

import numpy as np
from scipy import sparse

from st_align import keys
from st_align.adapt import Where, note, opened, options, scatter, tell
from st_align.errors import SlideError

__all__ = ["niches", "normalise", "patches"]


def niches(
    data: Any,
    *,
    niche: str = "lattice",
    technology: str | None = None,
    key_added: str = keys.NICHE,
    copy: bool = False,
    **where: Unpack[Where],
) -> Any:
    """Who is in whose niche, as a graph in `obsp[f"{key_added}_connectivities"]`.

    CSR [N, N], row i holds 1 at the members of the niche of spot i but itself; squidpy reads it
    with `connectivity_key=key_added`. `niche` is `lattice`, `rings2`, `k3`, ... (`geometry`).

    Raises:
        ConfigError: no niche is called so. SlideError: no coordinates, or no scale.

    """
    from st_align.geometry import incidence, neighbors
    from st_align.slide import LATTICE

    data, parts = opened(data, copy, where)
    graphs: dict[int, Any] = {}
    for part in parts:
        slide = part.slide(options(no_image=True, technology=technology))
        members = neighbors(
            niche,
            xy=slide.xy,
            places=slide.places,
            lattice=LATTICE[slide.technology],
            barcodes=slide.barcodes,
        )[:, 1:]
        rows, n = part.rows_of(slide.barcodes), part.table.n_obs
        graph = incidence(members, slide.n_spots).tocoo()
        placed = sparse.csr_matrix((graph.data, (rows[graph.row], rows[graph.col])), shape=(n, n))
        graphs[id(part.table)] = graphs.get(id(part.table), 0) + placed
        note(part, parts, niche=niche, technology=slide.technology)
        tell(part, slide.warnings)
    for part in parts:
        part.table.obsp[keys.connectivities(key_added)] = graphs[id(part.table)]
    return data if copy else None


def normalise(
    data: Any, *, key_added: str = keys.NORMALISED, copy: bool = False, **where: Unpack[Where]
) -> Any:
    """log1p of counts per ten thousand in `layers[key_added]`, CSR float32 [N, G].

    Raw counts are taken from X, `layers["counts"]`, whichever holds them; the library size from
    `obs["total_umi"]` and its like where a subset of the genes was kept (`DESIGN`: full library).

    Raises:
        SlideError: nothing holds raw counts.

    """
    from st_align.expression import log_normalise
    from st_align.io.anndata_table import InMemory, library_sizes, raw_matrix

    data, parts = opened(data, copy, where)
    for table in {id(part.table): part.table for part in parts}.values():
        name, matrix, var = raw_matrix(InMemory(table), "the AnnData")
        if matrix is None or matrix.shape[1] != table.n_vars:
            raise SlideError(
                "there are no raw counts of these genes to normalise",
                expected="whole numbers in X or layers['counts']",
                found="no matrix" if matrix is None else f"{name} with {matrix.shape[1]} genes",
            )
        sums = np.asarray(matrix.sum(axis=1), np.float64)
        total = library_sizes(table.obs, sums, len(var), [])
        table.layers[key_added] = sparse.csr_matrix(log_normalise(matrix, total)[0])
    return data if copy else None


def patches(
    data: Any,
    *,
    image: str | Path | None = None,
    side: int = 56,
    technology: str | None = None,
    key_added: str = keys.PATCHES,
    copy: bool = False,
    **where: Unpack[Where],
) -> Any:
    """The image of each spot's bounding square in `obsm[key_added]`, uint8 [N, p, p, 3].

    `image` is the full-resolution image of the one slide given; `side` is p. Spots off the tissue
    hold 0. Raises SlideError where there is no image.
    """
    from st_align.prepare import prepare_slide

    data, parts = opened(data, copy, where)
    for part in parts:
        slide = part.slide(options(image=image, technology=technology))
        prepared = prepare_slide(slide, (), spot_px=side)
        if prepared.spot_patches is None:
            raise SlideError(f"slide {part.id!r} has no image", fix="pass image=")
        scatter(part, key_added, part.rows_of(slide.barcodes), prepared.spot_patches)
        tell(part, prepared.warnings)
    return data if copy else None
