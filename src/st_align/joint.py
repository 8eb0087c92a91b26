"""One set of domains over the slides of a cohort, with a probability per spot.

    views      the model's embedding and both linear ones, or, from counts alone, expression of the
               niche on principal axes that the slides have in common, as it is and scaled by gene;
               centred on each slide and of unit variance there, or a slide that varies more than
               the others would have the domains for itself
    domains    a consensus of mixtures on the views, or one mixture on the model's embedding (of
               counts, on scaled expression), over as many spots of every slide: each weighs the
               same whatever its size
    answer     the posterior of every spot under normal distributions with one covariance, those of
               the domains on all views; shares of the domains by slide and by patient

Shape letters: S slides, N spots of a slide, D axes, C domains, P genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align.agreement import View
from st_align.domains import assign_domains
from st_align.errors import SlideError
from st_align.expression import Panel, panel_expression
from st_align.geometry import own_weight, ring_mean
from st_align.linear import LinearUse, centred
from st_align.shared import levelled, principal_axes, rings_of, shared_panel
from st_align.slide import PITCH_UM, PreparedSlide

Floats = NDArray[np.float64]


class Seen(NamedTuple):
    """One slide: `x` [N, D] is what one mixture clusters, and what the number of domains is read
    off; `views` [N, D] each are what a consensus is found in.
    """

    x: NDArray[np.floating[Any]]
    views: Sequence[NDArray[np.floating[Any]]]


_AXES, _COUNTING_AXES, _FIT_SPOTS = 30, 12, 3_000


@dataclass(frozen=True, kw_only=True)
class JointDomains:
    """Domains of several slides, numbered from the largest over the cohort."""

    labels: tuple[NDArray[np.int64], ...]
    """[N] of each slide."""
    probabilities: tuple[NDArray[np.float32], ...]
    """[N, C] of each slide; rows sum to 1."""
    n_domains: int

    def shares(self, slides: Sequence[str], patients: Sequence[str]) -> pd.DataFrame:
        """The part of its spots that each slide has in each domain: columns slide, patient,
        domain, share, spots; S x C rows.
        """
        rows = [
            {
                "slide": slide,
                "patient": patient,
                "domain": str(domain),
                "share": float(np.mean(labels == domain)),
                "spots": int(np.sum(labels == domain)),
            }
            for slide, patient, labels in zip(slides, patients, self.labels, strict=True)
            for domain in range(self.n_domains)
        ]
        return pd.DataFrame(rows)


def joint_domains(
    slides: Sequence[Seen],
    n_domains: int | str,
    *,
    method: str = "consensus",
    runs: int = 5,
    seed: int = 0,
) -> JointDomains:
    """One set of domains over `slides`, all on the same axes.

    Domains are found on as many spots of every slide, drawn by `seed`, and extended to all.

    `n_domains` is a number or `auto`; `method` is consensus or gmm.

    Raises:
        SlideError: no slide, axes that differ, NaN, or nothing that varies.
        ConfigError: `n_domains` out of range.

    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    widths = {tuple(values.shape[1] for values in (one.x, *one.views)) for one in slides}
    if len(widths) != 1:
        raise SlideError(
            "the slides were not embedded alike",
            expected="embeddings of one model with the same number of axes",
            found="; ".join(", ".join(map(str, w)) for w in sorted(widths)) or "no slide",
            fix="embed all of them with one model and the same modalities",
        )
    levels = [[levelled(v) for v in (one.x, *one.views)] for one in slides]
    rng = np.random.default_rng((seed, len(slides)))
    most = min(_FIT_SPOTS, min(len(one.x) for one in slides) if len(slides) > 1 else _FIT_SPOTS)
    rows = [np.sort(rng.permutation(len(one.x))[:most]) for one in slides]
    drawn = [[v[at] for v in values] for values, at in zip(levels, rows, strict=True)]
    x, *views = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    found = assign_domains(
        x, n_domains, method=method, runs=runs, seed=seed, views=[View(v) for v in views]
    )
    many = method == "consensus" and bool(views)
    sample = np.hstack(views) if many else x
    everyone = [np.hstack(values[1:]) if many else values[0] for values in levels]
    normal = LinearDiscriminantAnalysis(solver="lsqr").fit(sample, found.labels)
    chances = [normal.predict_proba(values) for values in everyone]
    order = np.argsort(-np.concatenate(chances).sum(axis=0), kind="stable")
    chances = [part[:, order] for part in chances]
    return JointDomains(
        labels=tuple(part.argmax(axis=1) for part in chances),
        probabilities=tuple(part.astype(np.float32) for part in chances),
        n_domains=len(order),
    )


def counts_views(slides: Sequence[PreparedSlide]) -> list[Seen]:
    """Two views of each slide from its counts alone: log-expression of the niche, centred on the
    slide, as it is and scaled by gene, on the principal axes of all slides, which weigh the same.

    Genes are those that all slides measured, the 4,000 that vary most over tissue at most.
    No gene in common, and slides without counts, are SlideErrors.
    """
    lacking = [slide.id for slide in slides if slide.genes is None]
    if lacking or not slides:
        raise SlideError(
            "domains from counts need counts",
            found=f"none in {', '.join(lacking) or 'no slide'}",
        )
    panel = shared_panel(slides, ranked_on=slides)
    if panel is None:
        raise SlideError(
            "the slides have no genes in common",
            found=", ".join(slide.id for slide in slides),
            fix="give slides of one species with gene names of one kind",
        )
    uses: tuple[LinearUse, ...] = ("linear", "linear-scaled")
    views: list[list[Floats]] = [[] for _ in slides]
    for use in uses:
        total = np.zeros((len(panel), len(panel)), np.float32)
        for slide in slides:
            values = _niche_expression(slide, panel, use)
            total += values.T @ values / len(values)
        axes = principal_axes(total, _AXES)
        for slide, found in zip(slides, views, strict=True):
            found.append(np.asarray(_niche_expression(slide, panel, use) @ axes, np.float64))
    return [Seen(found[-1][:, :_COUNTING_AXES], found) for found in views]


def _niche_expression(slide: PreparedSlide, panel: Panel, use: LinearUse) -> NDArray[np.float32]:
    """[N, P] niche means centred on the slide, scaled where `use` says so."""
    found = panel_expression(slide, panel)
    own = own_weight(PITCH_UM[slide.technology])
    values = ring_mean(found.values.astype(np.float32), rings_of(slide), found.valid, own=own)
    return np.asarray(centred(values, use), np.float32)
