"""One set of domains over the slides of a cohort, with a probability per spot.

    embedding  the model's, or, from counts alone, expression of the niche on principal axes that
               the slides have in common; centred on each slide and of unit variance there, or a
               slide that varies more than the others would have the domains for itself
    domains    a Gaussian mixture with one covariance over all slides, each slide weighing the same
               whatever its number of spots
    answer     the posterior of every spot; shares of the domains by slide and by patient

Shape letters: S slides, N spots of a slide, D axes, C domains, P genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align.domains import assign_domains, choose_n_domains
from st_align.errors import SlideError
from st_align.expression import Panel, panel_expression
from st_align.geometry import ring_mean
from st_align.shared import levelled, principal_axes, rings_of, shared_panel
from st_align.slide import PreparedSlide

Floats = NDArray[np.float64]

_AXES, _FIT_SPOTS = 16, 3_000


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
    embeddings: Sequence[NDArray[np.floating]],
    n_domains: int | str,
    *,
    runs: int = 5,
    seed: int = 0,
) -> JointDomains:
    """One set of domains over the `embeddings` [N, D] of several slides on the same axes.

    The mixture is fitted on as many spots of every slide, drawn by `seed`, and applied to all.

    `n_domains` is a number or `auto`.

    Raises:
        SlideError: no slide, axes that differ, NaN, or nothing that varies.
        ConfigError: `n_domains` out of range.

    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    widths = {x.shape[1] for x in embeddings}
    if len(widths) != 1:
        raise SlideError(
            "the slides were not embedded alike",
            expected="embeddings of one model with the same number of axes",
            found=", ".join(map(str, sorted(widths))) or "no slide",
            fix="embed all of them with one model and the same modalities",
        )
    centred = [levelled(x) for x in embeddings]
    rng = np.random.default_rng((seed, len(centred)))
    most = min(_FIT_SPOTS, min(len(x) for x in centred)) if len(centred) > 1 else _FIT_SPOTS
    drawn = [x[np.sort(rng.permutation(len(x))[:most])] for x in centred]
    sample = np.concatenate(drawn)
    count = choose_n_domains(sample, seed=seed) if n_domains == "auto" else n_domains
    found = assign_domains(sample, count, runs=runs, seed=seed)
    mixture = LinearDiscriminantAnalysis(solver="lsqr").fit(sample, found.labels)
    chances = [mixture.predict_proba(x) for x in centred]
    order = np.argsort(-np.concatenate(chances).sum(axis=0), kind="stable")
    chances = [part[:, order] for part in chances]
    return JointDomains(
        labels=tuple(part.argmax(axis=1) for part in chances),
        probabilities=tuple(part.astype(np.float32) for part in chances),
        n_domains=len(order),
    )


def counts_embeddings(slides: Sequence[PreparedSlide]) -> list[Floats]:
    """[N, D] of each slide from its counts alone: log-expression of the niche, centred on the
    slide, on the principal axes of all slides, which weigh the same.

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
    total = np.zeros((len(panel), len(panel)), np.float32)
    for slide in slides:
        values = _niche_expression(slide, panel)
        total += values.T @ values / len(values)
    axes = principal_axes(total, _AXES)
    return [np.asarray(_niche_expression(slide, panel) @ axes, np.float64) for slide in slides]


def _niche_expression(slide: PreparedSlide, panel: Panel) -> NDArray[np.float32]:
    """[N, P] niche means centred on the slide."""
    found = panel_expression(slide, panel)
    values = ring_mean(found.values.astype(np.float32), rings_of(slide), found.valid)
    return np.asarray(values - values.mean(axis=0), np.float32)
