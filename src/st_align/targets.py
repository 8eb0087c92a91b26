"""What a predictor of expression is taught: genes, their values, and what is left out in turn.

Shape letters: N spots, g genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from st_align.errors import ConfigError, SlideError, nearest
from st_align.expression import Panel, log_normalise, panel_columns
from st_align.slide import PreparedSlide

MAX_FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Expression to predict: log1p CP10k `values` [N, g] (0 where not measured), genes `measured`
    [g], spots `valid` [N] with a library.
    """

    values: NDArray[np.float64]
    measured: NDArray[np.bool_]
    valid: NDArray[np.bool_]


def targets(slide: PreparedSlide, panel: Panel) -> Targets:
    """What a predictor is to say of a slide with counts."""
    if slide.genes is None or slide.counts is None:
        raise SlideError(f"slide {slide.id!r} has no counts to learn from or to score against")
    columns = panel_columns(slide.genes, panel)
    measured = columns >= 0
    values = np.zeros((slide.n_spots, len(panel)))
    matrix, valid = log_normalise(slide.counts[:, columns[measured]], slide.total_umi)
    values[:, measured] = matrix.toarray()
    return Targets(values=values, measured=measured, valid=valid)


def gene_panel(names: Sequence[str], slides: Sequence[PreparedSlide]) -> Panel:
    """The genes `names`, each once, with the Ensembl ids that slides know them by.

    No gene, or one that none of the slides measured (the nearest is named), is a ConfigError.
    """
    ids: dict[str, str] = {}
    for slide in slides:
        if slide.genes is not None:
            known = zip(slide.genes.symbols.tolist(), slide.genes.ensembl.tolist(), strict=True)
            ids |= {symbol: ids.get(symbol) or ensembl for symbol, ensembl in known}
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in ids]
    if not wanted or unknown:
        found = f"{len(unknown)} of {len(wanted)} genes unknown: {', '.join(unknown[:9])}"
        what = f"gene {unknown[0]!r} was measured on no training slide" if unknown else None
        raise ConfigError(
            what or "no gene was given",
            found=found if unknown else None,
            fix=f"{nearest(unknown[0], ids)}; name genes with --genes, or use --top-hvg N"
            if unknown
            else "name genes, or use --top-hvg",
        )
    return Panel(genes=tuple(wanted), ensembl=tuple(ids[name] for name in wanted))


class Folds(NamedTuple):
    """Inner fold [N] of every spot by slide id, and `what` is left out: 'patients', 'slides' or
    'blocks'.
    """

    of: dict[str, NDArray[np.intp]]
    what: str


def inner_folds(slides: Sequence[PreparedSlide]) -> Folds:
    """At most five folds of whole patients; of whole slides where there is one patient; strips
    along the longer side of a single slide.
    """
    if len(slides) == 1:
        xy = slides[0].spots[["x", "y"]].to_numpy(np.float64)
        along = xy[:, int(np.ptp(xy, axis=0).argmax())]
        rank = np.argsort(np.argsort(along, kind="stable"), kind="stable")
        return Folds({slides[0].id: rank * min(MAX_FOLDS, len(xy)) // len(xy)}, "blocks")
    by_patient = len({s.patient for s in slides}) > 1
    group = {s.id: s.patient if by_patient else s.id for s in slides}
    number = {name: i % MAX_FOLDS for i, name in enumerate(sorted(set(group.values())))}
    of = {s.id: np.full(s.n_spots, number[group[s.id]], np.intp) for s in slides}
    return Folds(of, "patients" if by_patient else "slides")
