"""What slides have in common: genes that all of them measured, and axes that they share.

Shape letters: N spots, P genes, D axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from st_align.expression import Panel, choose_panel
from st_align.slide import PreparedSlide

MOST_GENES = 4_000


def shared_symbols(slides: Sequence[PreparedSlide]) -> list[str]:
    """Symbols measured by all slides that have counts, sorted."""
    symbols = [s.genes.symbols for s in slides if s.genes is not None]
    return [str(name) for name in reduce(np.intersect1d, symbols)] if symbols else []


def shared_panel(
    slides: Sequence[PreparedSlide], *, ranked_on: Sequence[PreparedSlide]
) -> Panel | None:
    """The genes that all `slides` measured, the 4,000 at most that vary most over the tissue of
    the slides `ranked_on`, in that order. None where fewer than two are shared.
    """
    shared = set(shared_symbols(slides))
    if len(shared) < 2:
        return None
    widest = max(len(s.genes) for s in slides if s.genes is not None)
    ranked = choose_panel(ranked_on, widest).genes
    kept = tuple(gene for gene in ranked if gene in shared)[:MOST_GENES]
    return Panel(genes=kept, ensembl=("",) * len(kept)) if len(kept) > 1 else None


def principal_axes(covariance: NDArray[np.float32], n_axes: int) -> NDArray[np.float32]:
    """[P, D] eigenvectors of the largest eigenvalues; the same for the same covariance."""
    from scipy.sparse.linalg import eigsh

    p = len(covariance)
    if p <= 2 * n_axes:
        return np.asarray(np.linalg.eigh(covariance)[1][:, ::-1][:, :n_axes])
    return np.asarray(eigsh(covariance, k=n_axes, v0=np.ones(p, np.float32))[1][:, ::-1])


def levelled(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """[N, D] centred and of total variance 1, so that no slide or block outweighs another."""
    wide = np.asarray(values, np.float64)
    if not len(wide):
        return wide
    wide = wide - wide.mean(axis=0)
    return np.asarray(wide / max(np.sqrt((wide**2).sum(axis=1).mean()), 1e-12))


def rings_of(slide: PreparedSlide) -> NDArray[np.int32]:
    """[N, K+1] the rings of the lattice where the slide has them, else its first niches."""
    niche = slide.niches.get("lattice") or next(iter(slide.niches.values()))
    return np.asarray(niche.neighbors)
