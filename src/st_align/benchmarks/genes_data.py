"""What `bench genes` predicts, and from which patients: genes, targets, folds.

Shape letters: N spots, g genes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from st_align.errors import ConfigError, SlideError, nearest
from st_align.expression import Panel
from st_align.slide import PreparedSlide

CATEGORIES = {
    "layer": ("FABP7", "CCK", "PVALB"),
    "laminar": ("PCP4", "MOBP", "SNAP25"),
    "non-laminar": ("IGKC", "HBB", "NPY"),
}
"""Table 2 of the paper."""
NINE = tuple(gene for genes in CATEGORIES.values() for gene in genes)
FEW_PATIENTS = 5
"""Up to so many, each patient is a fold; of more, a fold is a fifth of them (80/20)."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Slides by their part in one fold; no patient has slides in both."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def patient_folds(
    patients: Mapping[str, str],
    *,
    test_patients: Collection[str] = (),
    rng: np.random.Generator,
) -> list[Fold]:
    """Folds of whole patients over the slides that `patients` maps to theirs.

    With `test_patients` one fold tests them and trains on the others. Else every patient is tested
    once: alone where there are five or fewer, in a fifth of them (drawn by `rng`) where there are
    more.

    An unknown patient, or nobody left to train on, is a ConfigError.
    """
    known = sorted(set(patients.values()))
    for name in test_patients:
        if name not in known:
            raise ConfigError(f"no slide is of patient {name!r}", fix=nearest(name, known))
    if len(known) - len(set(test_patients)) < 1 or len(known) < 2:
        raise ConfigError(
            "splits are by patient, and one needs another to train on",
            expected="slides of two patients or more, one of them at least not tested",
            found=f"patients {', '.join(known) or 'none'}",
            fix="prepare slides of more patients, or name the patients of yours with --patients",
        )
    if test_patients:
        groups = [sorted(set(test_patients))]
    elif len(known) <= FEW_PATIENTS:
        groups = [[name] for name in known]
    else:
        shuffled = [known[i] for i in rng.permutation(len(known))]
        groups = [sorted(shuffled[i::FEW_PATIENTS]) for i in range(FEW_PATIENTS)]
    return [
        Fold(
            name=f"test {', '.join(group)}",
            train=tuple(s for s in sorted(patients) if patients[s] not in group),
            test=tuple(s for s in sorted(patients) if patients[s] in group),
        )
        for group in groups
    ]


def usable(slides: Sequence[PreparedSlide]) -> tuple[list[PreparedSlide], list[str]]:
    """Slides with an image, counts and two spots that have any; and the ids of the others."""
    good = [
        s
        for s in slides
        if s.has_image and s.counts is not None and int((s.total_umi > 0).sum()) >= 2
    ]
    if not good:
        raise SlideError(
            "no slide has both an image and counts",
            expected="slides to learn expression from images",
            found=f"{len(slides)} slides without one of them",
        )
    kept = {s.id for s in good}
    return good, [s.id for s in slides if s.id not in kept]


def narrowed(panel: Panel, kept: NDArray[np.bool_]) -> Panel:
    """The panel's genes where `kept` [g]."""
    at = np.flatnonzero(kept)
    return Panel(
        genes=tuple(panel.genes[i] for i in at), ensembl=tuple(panel.ensembl[i] for i in at)
    )
