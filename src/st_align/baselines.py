"""What a learned model has to beat: PCA + k-means, and the linear niche baseline.

Shape letters: N spots, P shared genes, D axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from st_align.errors import SlideError
from st_align.expression import Panel, choose_panel, panel_expression
from st_align.geometry import ring_mean
from st_align.shared import shared_symbols
from st_align.slide import PreparedSlide

Floats = NDArray[np.float64]


def spot_pca(slide: PreparedSlide, *, n_genes: int = 1000, dims: int = 30) -> Floats:
    """[N, D] principal components of the slide's own most variable genes, spot by spot: what
    k-means is usually run on. Fitted on the slide itself.
    """
    values = panel_expression(slide, choose_panel([slide], n_genes)).values.astype(np.float64)
    return np.asarray(values @ _axes(values.T @ values, dims))


def linear_niche(train: Sequence[PreparedSlide], slide: PreparedSlide, *, dims: int = 16) -> Floats:
    """[N, D] of `slide`: mean log-expression over the spot and its lattice ring, centred on the
    slide, on principal axes of the `train` slides. Nothing is fitted on `slide` but its mean.

    Genes are those measured by all of these slides. No gene in common, no counts, and no niche
    'lattice' are SlideErrors.
    """
    counted = [s for s in (slide, *train) if s.genes is not None]
    if slide.genes is None or len(counted) < 2:
        raise SlideError("the linear niche baseline needs counts", found=f"slide {slide.id!r}")
    shared = tuple(shared_symbols(counted))
    if not shared:
        raise SlideError(
            "the slides have no gene in common", found=", ".join(s.id for s in counted)
        )
    panel = Panel(genes=shared, ensembl=("",) * len(shared))
    covariance = np.zeros((len(shared), len(shared)))
    for other in counted[1:]:
        values = _niche_expression(other, panel)
        covariance += values.T @ values
    return np.asarray(_niche_expression(slide, panel) @ _axes(covariance, dims))


def _niche_expression(slide: PreparedSlide, panel: Panel) -> Floats:
    """[N, P] niche means centred on the slide."""
    if "lattice" not in slide.niches:
        raise SlideError(
            f"the linear niche baseline needs the lattice ring of slide {slide.id!r}",
            found=f"niches {', '.join(slide.niches) or 'none'}",
            fix="prepare the slides with --niche lattice as well",
        )
    found = panel_expression(slide, panel)
    niche = ring_mean(found.values, slide.niches["lattice"].neighbors, found.valid)
    return np.asarray(niche - niche.mean(axis=0), np.float64)


def _axes(covariance: Floats, dims: int) -> Floats:
    """[P, D] eigenvectors of the largest eigenvalues."""
    from scipy.linalg import eigh

    p = len(covariance)
    _, vectors = eigh(covariance, subset_by_index=(max(0, p - dims), p - 1))
    return np.asarray(vectors[:, ::-1])
