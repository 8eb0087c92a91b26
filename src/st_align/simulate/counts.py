"""Counts of a simulated cohort: negative binomial around domain, programme and batch.

Shape letters: N spots, G genes, C domains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from st_align.simulate import genes
from st_align.simulate.constants import Constants
from st_align.simulate.section import Section

Floats = NDArray[np.float64]
_HOUSEKEEPING_LOG_FOLD = 1.0


@dataclass(frozen=True, kw_only=True)
class Biology:
    """What all slides of a cohort share."""

    symbols: NDArray[np.str_]
    """[G]"""
    base: Floats
    """[G] log expression."""
    domain_effect: Floats
    """[C, G] added in each domain."""
    slope: Floats
    """[G] added per sd of the programme."""
    markers: tuple[tuple[str, ...], ...]
    """Of each domain."""

    @property
    def n_domains(self) -> int:
        """Number of domains C."""
        return len(self.markers)


def draw_biology(rng: np.random.Generator, constants: Constants, silent: int = 0) -> Biology:
    """Draw domains, markers and the programme of a cohort; `silent` more genes know of neither."""
    symbols = np.array([*genes.symbols(), *genes.silent(silent)])
    n_domains = int(rng.integers(constants.domains[0], constants.domains[1] + 1))
    base = rng.normal(0, constants.base_log_sd, len(symbols))
    base += _HOUSEKEEPING_LOG_FOLD * np.array([s.startswith(genes.HOUSEKEEPING) for s in symbols])
    known = rng.permutation(len(genes.KNOWN))
    n_markers = n_domains * constants.markers_per_domain
    of_domain = known[:n_markers].reshape(n_domains, -1)
    of_programme = known[n_markers:][: constants.programme_genes]

    effect = rng.normal(0, constants.domain_log_sd, (n_domains, len(symbols)))
    for domain, markers in enumerate(of_domain):
        fold = rng.gamma(4, constants.marker_log_fold / 4, len(markers))
        effect[domain, markers] += fold
        for beside in {domain - 1, domain + 1} & set(range(n_domains)):
            effect[beside, markers] += constants.marker_spill * fold
    slope = np.zeros(len(symbols))
    sign = np.where(rng.random(len(of_programme)) < 0.7, 1.0, -1.0)
    slope[of_programme] = sign * rng.gamma(4, constants.programme_log_slope / 4, len(of_programme))
    return Biology(
        symbols=symbols,
        base=base,
        domain_effect=effect,
        slope=slope,
        markers=tuple(tuple(map(str, symbols[markers])) for markers in of_domain),
    )


def draw_batch(rng: np.random.Generator, n_genes: int, log_sd: float) -> Floats:
    """[G] log effect of a patient or of a slide on each gene."""
    return rng.normal(0, log_sd, n_genes)


def draw_counts(
    rng: np.random.Generator,
    constants: Constants,
    biology: Biology,
    section: Section,
    batch: Floats,
) -> sparse.csr_array:
    """CSR int32 [N, G]: n ~ Poisson(Gamma(1/a, a mu)), of mean mu and variance mu + a mu^2.

    mu is the spot's library size times the softmax over genes of
    base + domain effect + slope x programme + batch.
    """
    log_share = biology.base + batch + biology.domain_effect[section.domain]
    log_share = log_share + section.programme[:, None] * biology.slope
    share = np.exp(log_share - log_share.max(axis=1, keepdims=True))
    mean = _libraries(rng, constants, len(share))[:, None] * share / share.sum(1, keepdims=True)
    a = constants.dispersion
    return sparse.csr_array(rng.poisson(mean * rng.gamma(1 / a, a, mean.shape)).astype(np.int32))


def _libraries(rng: np.random.Generator, constants: Constants, n: int) -> Floats:
    """[N] expected molecules, evenly spread over a log scale; 0 for empty spots."""
    exponent = rng.permutation(np.linspace(0, 1, n))
    sizes = constants.smallest_library * constants.library_fold**exponent
    sizes[rng.choice(n, max(1, round(constants.empty_share * n)), replace=False)] = 0
    return np.asarray(sizes)
