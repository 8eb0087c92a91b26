"""95 % intervals of paired differences of means: slides are drawn, then spots within each.

Shape letters: Q spots (or queries) of a slide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DRAWS = 2000


class Interval(NamedTuple):
    """A value and the 2.5th and 97.5th percentile of its bootstrap draws."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Comparison(NamedTuple):
    """`mine` less `other`, and `mine` over `other` (NaN where a draw of `other` is 0)."""

    difference: Interval
    ratio: Interval


def compare(
    mine: Sequence[Floats],
    other: Sequence[Floats],
    rng: np.random.Generator,
    *,
    draws: int = DRAWS,
) -> Comparison:
    """Compare the means of two methods on the same spots: `mine` and `other` hold one array [Q] a
    slide, a spot's value in both at the same place.

    The mean is that over a slide's spots, then over slides. Each draw takes slides with
    replacement, then spots within each, the same for both. Of a single slide, spots alone vary:
    what another slide would give is then not in the interval.
    """

    def resampled(a: Floats, b: Floats) -> list[Floats]:
        """[draws] means of both; the weights [draws, Q] of one slide are all that is held."""
        weights = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), size=draws)
        return [weights @ a / len(a), weights @ b / len(b)]

    drawn = np.stack([resampled(a, b) for a, b in zip(mine, other, strict=True)], axis=1)
    n = drawn.shape[1]  # of [2, slides, draws]
    picked = rng.multinomial(n, np.full(n, 1 / n), size=draws).T / n
    a, b = (drawn * picked).sum(axis=1)
    whole_a, whole_b = (float(np.mean([v.mean() for v in values])) for values in (mine, other))
    ratio = np.divide(a, b, out=np.full(draws, np.nan), where=b > 0)
    return Comparison(
        percentiles(whole_a - whole_b, a - b),
        percentiles(whole_a / whole_b if whole_b > 0 else float("nan"), ratio),
    )


def percentiles(value: float, draws: Floats) -> Interval:
    """`value` with the 95 % interval of its `draws`; NaN where one of them is."""
    if np.isnan(draws).any():
        return Interval(value, float("nan"), float("nan"))
    low, high = np.percentile(draws, (2.5, 97.5))
    return Interval(value, float(low), float(high))
