"""Labels carried over from annotated slides to a new one.

    features   expression of the spot and its rings on the principal axes of the annotated slides'
               niches, the run's embedding, or both; each block centred on its slide and of unit
               variance
    classifier linear discriminant analysis with shrunken covariance (Ledoit and Wolf, 2004): the
               generative twin of a logistic regression, which scored less on brain layers
    placing    the new slide's mean and spread are moved to where its own mixture of labels, as the
               classifier sees it, would put them: a slide with much white matter is centred
               elsewhere than one with little
    answer     its probabilities, averaged over the lattice and calibrated by one temperature

Features, axes and averaging are those that predict best what is left out: annotated slides in turn,
or quarters of the only one, each taken for a slide of its own. Temperature and distances come from
the same slides, or from squares all over the only one, which look like the whole. With one slide
genes are read where there are counts: how well an embedding carries over to another slide cannot be
seen within one. A spot farther from all labels than 99 in 100 annotated spots when left out is
`unknown`, and so is one whose genes hold a quarter more that the axes do not. No label of the new
slide is ever read.

Shape letters: N spots of a slide, D features, C labels, P genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from st_align import keys
from st_align.discriminant import Blocks, Floats, fitted, side_by_side
from st_align.errors import SlideError
from st_align.expression import Panel, panel_expression
from st_align.geometry import ring_mean
from st_align.shared import principal_axes, rings_of, shared_panel
from st_align.slide import PreparedSlide

FEATURES: tuple[tuple[str, ...], ...] = (("genes",), ("genes", "embedding"), ("embedding",))
AXES = (16, 30)
"""Of expression, for each ring; 60 scored less on brain."""
RINGS = (0, 1, 2, 4)
"""How often probabilities are averaged over the lattice."""
_GENE_RINGS = 4
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
    axes: int
    """Of expression; 0 where genes are not read."""
    rings: int
    temperature: float
    cv_accuracy: float
    """Of annotated spots that were left out, by slide or by square."""
    folds: str
    left_out: Mapping[str, int]
    """Labels with too few spots to be learned, and how many they have."""


class _Table(NamedTuple):
    """One choice of features: blocks of every slide, the new one last."""

    features: tuple[str, ...]
    axes: int
    blocks: Sequence[Blocks]


class _LeftOut(NamedTuple):
    """What models say of annotated spots that they did not see."""

    probabilities: Floats
    distance: Floats


def reads_embeddings(annotated: Sequence[PreparedSlide], new: PreparedSlide) -> bool:
    """Whether `annotate` looks at embeddings of these slides."""
    return len(annotated) > 1 or any(slide.genes is None for slide in (*annotated, new))


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
            values["embedding"] = [np.asarray(one.embedding, np.float64)]
    known = [_number(one.labels, names) for one in annotated]
    tables = _tables(blocks, only_genes=len(annotated) == 1)
    if not tables:
        raise SlideError(
            f"slide {new.slide.id!r} has nothing in common with the annotated slides",
            expected="counts of the same genes, or the same modalities for the model",
        )
    members = [rings_of(one) for one in slides]
    folds, alike, kind = _folds(slides[:-1], known)
    best, rings = _chosen(tables, known, folds, members)
    rows, y = np.concatenate(known) >= 0, np.concatenate(known)
    seen = _left_out(best, known, alike)
    chances = _averaged_each(seen.probabilities, known, members, rings)
    accuracy = float((chances.argmax(axis=1) == y)[rows].mean())
    temperature = _temperature(chances[rows], y[rows])
    model = fitted(np.vstack([side_by_side(one) for one in best.blocks[:-1]])[rows], y[rows])
    placed = model.placed(best.blocks[-1])
    raw = _averaged(model.lda.predict_proba(placed), members[-1], rings)
    chances = _calibrated(raw, temperature)
    far = _over(model.distance(placed), seen.distance[rows])
    if "genes" in best.features:
        beside = [one["beside"][0] for one in blocks]
        far = np.maximum(far, _over(beside[-1], _BESIDE * np.concatenate(beside[:-1])[rows]))
    nearest = np.array(names)[chances.argmax(axis=1)]
    return Annotation(
        labels=np.where(far > 1, keys.UNKNOWN, nearest),
        nearest=nearest,
        classes=tuple(names),
        probabilities=chances.astype(np.float32),
        distance=far.astype(np.float32),
        features=best.features,
        axes=best.axes,
        rings=rings,
        temperature=temperature,
        cv_accuracy=accuracy,
        folds=kind,
        left_out=left_out,
    )


def _over(values: NDArray[np.floating], usual: NDArray[np.floating]) -> Floats:
    """`values` over what 99 in 100 of the `usual` ones stay below."""
    return np.asarray(values / max(float(np.quantile(usual, _FAR)), 1e-12))


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


def _gene_blocks(slides: Sequence[PreparedSlide]) -> list[dict[str, Blocks]]:
    """`genes` of each slide, [N, axes] for the spot and each of its rings, the most variable axis
    first; nothing where one of them has no counts or no gene is shared. `beside` [N] is the part
    of the niche's expression that no axis holds, over the slide's median.

    Axes are fitted on all but the last slide; a spot's own expression and that of its rings are
    put on the same ones.
    """
    counted = all(slide.genes is not None for slide in slides)
    panel = shared_panel(slides, ranked_on=slides[:-1]) if counted else None
    if panel is None:
        return [{} for _ in slides]
    found: list[dict[str, Blocks]] = []
    total = np.zeros((len(panel), len(panel)), np.float32)
    for slide in slides[:-1]:
        values, members, valid = _expression(slide, panel)
        niche = ring_mean(values, members, valid)
        niche -= niche.mean(axis=0)
        total += niche.T @ niche
    n_spots = sum(slide.n_spots for slide in slides[:-1])
    most = max(1, n_spots // (_SPOTS_PER_FEATURE * _GENE_RINGS))
    axes = principal_axes(total, min(max(AXES), most))
    for slide in slides:
        values, members, valid = _expression(slide, panel)
        seen = [np.asarray(values @ axes, np.float64)]
        for _ in range(_GENE_RINGS - 1):
            seen.append(ring_mean(seen[-1], members, valid if len(seen) == 1 else None))
        niche = ring_mean(values, members, valid)
        niche -= niche.mean(axis=0)
        beside = np.sqrt(np.maximum((niche**2).sum(axis=1) - ((niche @ axes) ** 2).sum(axis=1), 0))
        usual = max(float(np.median(beside)), 1e-12)
        found.append({"genes": seen, "beside": [beside / usual]})
    return found


def _tables(found: Sequence[dict[str, Blocks]], *, only_genes: bool) -> list[_Table]:
    """Every choice of features that all slides have; with `only_genes`, genes where they can."""
    shared = set.intersection(*(set(values) for values in found))
    usable = [features for features in FEATURES if shared.issuperset(features)]
    tables = []
    for features in usable[:1] if only_genes else usable:
        most = found[0]["genes"][0].shape[1] if "genes" in features else 0
        for axes in dict.fromkeys(min(n, most) for n in AXES):
            blocks = [
                [b[:, :axes] if name == "genes" else b for name in features for b in values[name]]
                for values in found
            ]
            tables.append(_Table(features, axes, blocks))
    return tables


def _expression(
    slide: PreparedSlide, panel: Panel
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.bool_]]:
    found = panel_expression(slide, panel)
    return found.values.astype(np.float32), rings_of(slide), found.valid


def _folds(
    slides: Sequence[PreparedSlide], known: Sequence[NDArray[np.int64]]
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], str]:
    """Folds [N] of every slide's spots that differ as slides do, folds that look alike, and what
    the latter are. Whole slides are both; of the only one, quarters, which hold other shares of
    the labels each, and squares, dealt out so that each fold reaches all over the tissue.
    """
    if len(slides) > 1:
        of = [np.full(s.n_spots, i % _MAX_FOLDS) for i, s in enumerate(slides)]
        return of, of, "slides"
    xy = slides[0].spots[["x", "y"]].to_numpy(np.float64)
    left = xy[:, 0] < np.median(xy[:, 0])
    middle = np.where(left, *(float(np.median(xy[half, 1])) for half in (left, ~left)))
    quarter = 2 * left + (xy[:, 1] < middle)
    side = max(float(np.ptp(xy, axis=0).max()), 1e-12) / _SQUARES
    column, row = np.minimum((xy - xy.min(axis=0)) // side, _SQUARES - 1).astype(np.int64).T
    squares, y = (column + 2 * row) % _MAX_FOLDS, known[0]
    rest = [np.unique(y[(quarter != i) & (y >= 0)]) for i in range(4)]
    if min(map(len, rest)) < 2:  # A quarter holds all there is of a label.
        return [squares], [squares], "squares"
    return [quarter.astype(np.int64)], [squares], "squares"


def _chosen(
    tables: Sequence[_Table],
    known: Sequence[NDArray[np.int64]],
    folds: Sequence[NDArray[np.int64]],
    members: Sequence[NDArray[np.int32]],
) -> tuple[_Table, int]:
    """The features, and how often to average, that predict left-out spots best; of equal ones the
    first.
    """
    y = np.concatenate(known)
    tried: list[tuple[float, _Table, int]] = []
    for table in tables:
        chances = _left_out(table, known, folds).probabilities
        for rings in RINGS:
            smooth = _averaged_each(chances, known, members, rings)
            tried.append((float((smooth.argmax(axis=1) == y)[y >= 0].mean()), table, rings))
    return max(tried, key=lambda choice: choice[0])[1:]


def _left_out(
    table: _Table, known: Sequence[NDArray[np.int64]], folds: Sequence[NDArray[np.int64]]
) -> _LeftOut:
    """Of all spots, by models that did not see their fold. What a slide has in a fold is taken for
    a slide of its own.
    """
    blocks, y = table.blocks[: len(known)], np.concatenate(known)
    parts = [np.zeros((len(k), int(y.max()) + 1)) for k in known]
    distances = [np.zeros(len(k)) for k in known]
    for fold in np.unique(np.concatenate(folds)):
        kept = [of != fold for of in folds]
        x = [side_by_side(_rows(one, rows)) for one, rows in zip(blocks, kept, strict=True)]
        of = np.concatenate([k[rows] for k, rows in zip(known, kept, strict=True)])
        model = fitted(np.vstack(x)[of >= 0], of[of >= 0])
        for i, rows in enumerate(kept):
            if rows.all():
                continue
            placed = model.placed(_rows(blocks[i], ~rows))
            parts[i][np.ix_(~rows, model.lda.classes_)] = model.lda.predict_proba(placed)
            distances[i][~rows] = model.distance(placed)
    return _LeftOut(np.concatenate(parts), np.concatenate(distances))


def _rows(blocks: Blocks, rows: NDArray[np.bool_]) -> Blocks:
    return [block[rows] for block in blocks]


def _averaged_each(
    chances: Floats,
    known: Sequence[NDArray[np.int64]],
    members: Sequence[NDArray[np.int32]],
    rings: int,
) -> Floats:
    """Averages within each annotated slide; rows are those of all."""
    parts = np.split(chances, np.cumsum([len(k) for k in known])[:-1])
    return np.vstack([_averaged(p, of, rings) for p, of in zip(parts, members, strict=False)])


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
