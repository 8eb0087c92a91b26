"""Labels carried over from annotated slides to a new one.

    features   expression of the spot and its rings on the principal axes of the annotated slides'
               niches, the run's embedding, or both; each block centred on its slide and of unit
               variance
    classifier linear discriminant analysis with shrunken covariance (Ledoit and Wolf, 2004): the
               generative twin of a logistic regression, which scored less on brain layers
    answer     its probabilities, averaged over the lattice and calibrated by one temperature

Features, averaging and temperature are those that predict annotated slides left out in turn best.
With one annotated slide squares of it are left out, and genes are read where there are counts: how
well an embedding carries over to another slide cannot be seen within one. A spot farther from
all labels than 99 in 100 annotated spots when left out is `unknown`, and so is one whose genes hold
a quarter more that the axes do not. No label of the new slide
is ever read.

Shape letters: N spots of a slide, D features, C labels, P genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from st_align import keys
from st_align.errors import SlideError
from st_align.expression import Panel, panel_expression
from st_align.geometry import ring_mean
from st_align.shared import levelled, principal_axes, rings_of, shared_panel
from st_align.slide import PreparedSlide

Floats = NDArray[np.float64]

FEATURES: tuple[tuple[str, ...], ...] = (("genes",), ("genes", "embedding"), ("embedding",))
RINGS = (0, 1, 2, 4)
"""How often probabilities are averaged over the lattice."""
_GENE_RINGS, _AXES = 4, 30
_SPOTS_PER_FEATURE = 10
_SQUARES, _MAX_FOLDS = 8, 5
_TEMPERATURES = np.geomspace(0.25, 8, 31)
_FAR, _BESIDE = 0.99, 1.25
_MIN_SPOTS = 5
"""A label with fewer spots than this cannot be learned."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A slide and what a model sees in it: `embedding` [N, D] or None."""

    slide: PreparedSlide
    embedding: NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True)
class Labelled(Seen):
    """An annotated slide: `labels` [N], `''` where a spot has none."""

    labels: NDArray[np.str_]


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """Labels of a new slide's spots, and how they came about."""

    labels: NDArray[np.str_]
    """[N]; `unknown` where a spot is far from all labels."""
    nearest: NDArray[np.str_]
    """[N] the same without `unknown`."""
    classes: tuple[str, ...]
    probabilities: NDArray[np.float32]
    """[N, C] calibrated on the annotated slides; rows sum to 1."""
    distance: NDArray[np.float32]
    """[N] from the nearest label's mean, over that of the farthest annotated spots; above 1 is
    unknown.
    """
    features: tuple[str, ...]
    rings: int
    temperature: float
    cv_accuracy: float
    """Of annotated spots that were left out, by slide or by square."""
    folds: str
    left_out: Mapping[str, int]
    """Labels with too few spots to be learned, and how many they have."""


class _Model(NamedTuple):
    lda: Any
    means: Floats
    whitening: Floats
    """[D, D] W with W W^T the inverse of the covariance within labels."""

    def distance(self, x: Floats) -> Floats:
        """[N] to the nearest label's mean."""
        z, centres = x @ self.whitening, self.means @ self.whitening
        square = (z**2).sum(axis=1)[:, None] - 2 * z @ centres.T + (centres**2).sum(axis=1)
        return np.asarray(np.sqrt(np.maximum(square.min(axis=1), 0)))


class _Choice(NamedTuple):
    accuracy: float
    features: tuple[str, ...]
    rings: int
    probabilities: Floats
    """Of annotated spots when left out, averaged over the lattice."""
    distance: Floats


def annotate(annotated: Sequence[Labelled], new: Seen) -> Annotation:
    """Carry the labels of `annotated` slides over to a `new` one.

    Raises:
        SlideError: fewer than two labels with five spots or more, or slides without anything in
            common.

    """
    names, left_out = _classes(annotated)
    every: list[Seen] = [*annotated, new]
    slides = [one.slide for one in every]
    blocks = _gene_blocks(slides)
    if all(one.embedding is not None for one in every):
        for values, one in zip(blocks, every, strict=True):
            values["embedding"] = levelled(np.asarray(one.embedding, np.float64))
    known = [_number(one.labels, names) for one in annotated]
    folds, kind = _folds(slides[:-1])
    members = [rings_of(one) for one in slides]
    shared = set.intersection(*(set(values) for values in blocks))
    usable = [f for f in FEATURES if shared.issuperset(f)]
    if len(annotated) == 1:
        usable = usable[:1]
    if not usable:
        raise SlideError(
            f"slide {new.slide.id!r} has nothing in common with the annotated slides",
            expected="counts of the same genes, or the same modalities for the model",
        )
    tables = {f: [np.hstack([values[name] for name in f]) for values in blocks] for f in usable}
    best = _chosen(tables, known, folds, members)
    x = tables[best.features]
    rows, y = np.concatenate(known) >= 0, np.concatenate(known)
    model = _fit(np.vstack(x[:-1])[rows], y[rows])
    temperature = _temperature(best.probabilities[rows], y[rows])
    raw = _averaged(model.lda.predict_proba(x[-1]), members[-1], best.rings)
    chances = _calibrated(raw, temperature)
    limit = float(np.quantile(best.distance[rows], _FAR))
    far = model.distance(x[-1]) / max(limit, 1e-12)
    if "genes" in best.features:
        usual = np.quantile(np.concatenate([b["beside"] for b in blocks[:-1]])[rows], _FAR)
        far = np.maximum(far, blocks[-1]["beside"] / max(_BESIDE * float(usual), 1e-12))
    nearest = np.array(names)[chances.argmax(axis=1)]
    return Annotation(
        labels=np.where(far > 1, keys.UNKNOWN, nearest),
        nearest=nearest,
        classes=tuple(names),
        probabilities=chances.astype(np.float32),
        distance=far.astype(np.float32),
        features=best.features,
        rings=best.rings,
        temperature=temperature,
        cv_accuracy=best.accuracy,
        folds=kind,
        left_out=left_out,
    )


def _classes(annotated: Sequence[Labelled]) -> tuple[list[str], dict[str, int]]:
    """Labels that can be learned, sorted, and those with too few spots."""
    labels = np.concatenate([np.array([""]), *(one.labels for one in annotated)])
    found, counts = np.unique(labels[labels != ""], return_counts=True)
    sizes = dict(zip(found.tolist(), counts.tolist(), strict=True))
    names = [name for name, n in sizes.items() if n >= _MIN_SPOTS]
    if len(names) < 2:
        raise SlideError(
            "there are too few labels to carry over",
            expected=f"2 labels or more with {_MIN_SPOTS} spots each",
            found=", ".join(f"{name} ({n})" for name, n in sizes.items()) or "no label",
        )
    return names, {name: n for name, n in sizes.items() if n < _MIN_SPOTS}


def _number(labels: NDArray[np.str_], names: Sequence[str]) -> NDArray[np.int64]:
    """[N] position of each label among `names`, -1 where there is none."""
    position = {name: i for i, name in enumerate(names)}
    return np.array([position.get(label, -1) for label in labels.tolist()], np.int64)


def _gene_blocks(slides: Sequence[PreparedSlide]) -> list[dict[str, Floats]]:
    """`genes` [N, D] of each slide, nothing where one of them has no counts or no gene is shared;
    `beside` [N] is the part of the niche's expression that no axis holds, over the slide's median.

    Axes are fitted on all but the last slide; a spot's own expression and that of its rings are
    put on the same ones.
    """
    counted = all(slide.genes is not None for slide in slides)
    panel = shared_panel(slides, ranked_on=slides[:-1]) if counted else None
    if panel is None:
        return [{} for _ in slides]
    rings, total = [], np.zeros((len(panel), len(panel)), np.float32)
    for slide in slides[:-1]:
        values, members, valid = _expression(slide, panel)
        niche = ring_mean(values, members, valid)
        niche -= niche.mean(axis=0)
        total += niche.T @ niche
    n_spots = sum(slide.n_spots for slide in slides[:-1])
    most = max(1, n_spots // (_SPOTS_PER_FEATURE * _GENE_RINGS))
    axes = principal_axes(total, min(_AXES, most))
    for slide in slides:
        values, members, valid = _expression(slide, panel)
        seen = [np.asarray(values @ axes, np.float64)]
        for _ in range(_GENE_RINGS - 1):
            seen.append(ring_mean(seen[-1], members, valid if len(seen) == 1 else None))
        niche = ring_mean(values, members, valid)
        niche -= niche.mean(axis=0)
        beside = np.sqrt(np.maximum((niche**2).sum(axis=1) - ((niche @ axes) ** 2).sum(axis=1), 0))
        genes = np.hstack([levelled(block) for block in seen])
        rings.append({"genes": genes, "beside": beside / max(float(np.median(beside)), 1e-12)})
    return rings


def _expression(
    slide: PreparedSlide, panel: Panel
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.bool_]]:
    found = panel_expression(slide, panel)
    return found.values.astype(np.float32), rings_of(slide), found.valid


def _folds(slides: Sequence[PreparedSlide]) -> tuple[NDArray[np.int64], str]:
    """Fold of every spot of all slides: whole slides, or squares of the only one, dealt out so
    that each fold reaches all over the tissue.
    """
    if len(slides) > 1:
        of = [np.full(s.n_spots, i % _MAX_FOLDS) for i, s in enumerate(slides)]
        return np.concatenate(of), "slides"
    xy = slides[0].spots[["x", "y"]].to_numpy(np.float64)
    side = max(float(np.ptp(xy, axis=0).max()), 1e-12) / _SQUARES
    column, row = np.minimum((xy - xy.min(axis=0)) // side, _SQUARES - 1).astype(np.int64).T
    return (column + 2 * row) % _MAX_FOLDS, "squares"


def _chosen(
    tables: Mapping[tuple[str, ...], Sequence[Floats]],
    known: Sequence[NDArray[np.int64]],
    folds: NDArray[np.int64],
    members: Sequence[NDArray[np.int32]],
) -> _Choice:
    """The settings that predict left-out spots best; of equal ones the first."""
    y = np.concatenate(known)
    ends = np.cumsum([len(k) for k in known])[:-1]
    tried: list[_Choice] = []
    for features, values in tables.items():
        chances, distance = _left_out(np.vstack(values[:-1]), y, folds)
        for rings in RINGS:
            parts = zip(np.split(chances, ends), members[:-1], strict=True)
            smooth = np.vstack([_averaged(part, of, rings) for part, of in parts])
            accuracy = float((smooth.argmax(axis=1) == y)[y >= 0].mean())
            tried.append(_Choice(accuracy, features, rings, smooth, distance))
    return max(tried, key=lambda choice: choice.accuracy)


def _left_out(x: Floats, y: NDArray[np.int64], folds: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Probabilities [N, C] and distances [N] of spots by models that did not see their fold."""
    n_classes = int(y.max()) + 1
    chances, distance = np.zeros((len(x), n_classes)), np.zeros(len(x))
    for fold in np.unique(folds):
        train, test = (folds != fold) & (y >= 0), folds == fold
        model = _fit(x[train], y[train])
        chances[np.ix_(test, model.lda.classes_)] = model.lda.predict_proba(x[test])
        distance[test] = model.distance(x[test])
    return chances, distance


def _fit(x: Floats, y: NDArray[np.int64]) -> _Model:
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
    return _Model(lda, lda.means_, whitening)


def _averaged(chances: Floats, members: NDArray[np.int32], rings: int) -> Floats:
    for _ in range(rings):
        chances = ring_mean(chances, members)
    return chances


def _calibrated(chances: Floats, temperature: float) -> Floats:
    """p^(1/T), rows summing to 1."""
    scaled = np.maximum(chances, 1e-12) ** (1 / temperature)
    return np.asarray(scaled / scaled.sum(axis=1, keepdims=True))


def _temperature(chances: Floats, y: NDArray[np.int64]) -> float:
    """That under which labels of left-out spots are likeliest (Guo et al., 2017)."""
    rows = np.arange(len(y))
    losses = [-np.log(_calibrated(chances, t)[rows, y] + 1e-12).mean() for t in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(losses))])
