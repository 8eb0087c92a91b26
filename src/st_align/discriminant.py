"""Linear discriminant analysis of labelled spots, and a new slide placed by its own labels' shares.

Shape letters: N spots of a slide, D features, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from st_align.errors import SlideError
from st_align.shared import levelled

Floats = NDArray[np.float64]
Blocks = Sequence[NDArray[np.floating[Any]]]
"""Features of one slide, [N, D] each."""

_PLACINGS = 10


class Discriminant(NamedTuple):
    """The classifier, and what places a slide."""

    lda: Any
    within: Floats
    """[D] variance within labels."""
    whitening: Floats
    """[D, D] W with W W^T the inverse of the covariance within labels."""

    def placed(self, blocks: Blocks) -> Floats:
        """[N, D] a slide where its shares of labels would put it: blocks have the mean and the
        total variance of a mixture of the labels' normal distributions with these shares, which
        are those of its own probabilities (after Saerens, Latinne and Decaestecker, 2002, who
        move the classifier's prior where here the slide moves).
        """
        x, starts = side_by_side(blocks), np.cumsum([0, *(b.shape[1] for b in blocks)])[:-1]
        widths = [block.shape[1] for block in blocks]
        means, shares = self.lda.means_, self.lda.priors_
        for _ in range(_PLACINGS):
            centre = shares @ means
            variance = self.within + shares @ (means - centre) ** 2
            scale = np.repeat(np.sqrt(np.add.reduceat(variance, starts)), widths)
            placed = np.asarray(x * scale + centre)
            shares = self.lda.predict_proba(placed).mean(axis=0)
        return placed

    def distance(self, x: Floats) -> Floats:
        """[N] to the nearest label's mean."""
        z, centres = x @ self.whitening, self.lda.means_ @ self.whitening
        square = (z**2).sum(axis=1)[:, None] - 2 * z @ centres.T + (centres**2).sum(axis=1)
        return np.asarray(np.sqrt(np.maximum(square.min(axis=1), 0)))


def fitted(x: Floats, y: NDArray[np.int64]) -> Discriminant:
    """Fitted to spots `x` [M, D] with labels `y` [M]. Fewer than two labels are a SlideError."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    present = np.unique(y)
    if len(present) < 2:
        raise SlideError(
            "a label lies in one part of the annotated slides alone: there is nothing to test on",
            expected="2 labels or more when a slide, or squares of the only one, is left out",
            fix="give another annotated slide",
        )
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x, y)
    covariance = lda.covariance_ + 1e-12 * np.eye(x.shape[1])
    whitening = np.linalg.inv(np.linalg.cholesky(covariance)).T
    return Discriminant(lda, np.diag(lda.covariance_), whitening)


def side_by_side(blocks: Blocks) -> Floats:
    """[N, D] blocks centred and of total variance 1 each."""
    return np.hstack([levelled(block) for block in blocks])
