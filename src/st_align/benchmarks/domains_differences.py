"""Differences of mean ARI between rows of `bench domains`, each with a 95 % interval.

Shape letters: R runs, N spots, B bootstrap replicates.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st_align.benchmarks.bootstrap import Interval
from st_align.benchmarks.domains_score import draw, interval, resampled_ari
from st_align.benchmarks.methods import Floats, Target
from st_align.files import replace_file

Found = Mapping[tuple[str, str, str], NDArray[Any]]
"""(slide, row, track) -> labels [R, N]."""


@dataclass(frozen=True)
class Difference:
    """Mean ARI of a row less that of the reference, over the slides that both have."""

    method: str
    reference: str
    track: str
    slides: tuple[str, ...]
    interval: Interval


def differences(
    targets: Sequence[Target], found: Found, references: Sequence[str], seed: int
) -> list[Difference]:
    """Every row against every reference within each track: paired bootstrap of spots, then
    slides. Pairs without a slide in common are left out.
    """
    resampled: dict[tuple[str, str, str], Floats] = {}
    for number, target in enumerate(targets):
        rng = np.random.default_rng((seed, number))
        drawn = draw(int((target.labels != "").sum()), rng)
        weights = np.concatenate([np.ones((1, drawn.shape[1])), drawn])
        for key, runs in found.items():
            if key[0] == target.slide.id:
                resampled[key] = resampled_ari(target.labels, list(runs), weights)
    slides = [target.slide.id for target in targets]
    made = []
    for reference in references:
        for row, track in dict.fromkeys((row, track) for _, row, track in found):
            both = [
                s for s in slides if {(s, row, track), (s, reference, track)} <= resampled.keys()
            ]
            if row == reference or not both:
                continue
            apart = [resampled[s, row, track] - resampled[s, reference, track] for s in both]
            rng = np.random.default_rng((seed, len(targets)))
            observed = float(np.mean([a[0] for a in apart]))
            between = interval([a[1:] for a in apart], observed, rng)
            made.append(Difference(row, reference, track, tuple(both), between))
    return made


def differences_table(found: Sequence[Difference], track: str) -> str:
    """Markdown: a line a row, a column a reference, the largest difference to the first on top."""
    shown = [one for one in found if one.track == track]
    references = list(dict.fromkeys(one.reference for one in shown))
    if not references:
        return "No row has a slide in common with a reference."
    by_row: dict[str, dict[str, Difference]] = {}
    for one in sorted(shown, key=lambda d: -d.interval.value):
        by_row.setdefault(one.method, {})[one.reference] = one
    first = [row for row in by_row if references[0] in by_row[row]]
    first.sort(key=lambda row: -by_row[row][references[0]].interval.value)
    lines = [["ARI less that of", *references, "slides"]]
    lines.append(["---"] * len(lines[0]))
    for row in dict.fromkeys([*first, *by_row]):
        n = {len(one.slides) for one in by_row[row].values()}
        cells = [_words(by_row[row].get(reference)) for reference in references]
        lines.append([row, *cells, " / ".join(map(str, sorted(n)))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_differences(path: Path, found: Sequence[Difference]) -> None:
    """Tidy CSV, one line a row, reference and track."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "reference", "metric", "track", "difference", "low", "high",
                     "slides"])  # fmt: skip
    for one in found:
        named = [one.method, one.reference, "ari", one.track]
        writer.writerow([*named, *one.interval, " ".join(one.slides)])
    replace_file(path, text.getvalue().encode())


def _words(one: Difference | None) -> str:
    if one is None:
        return ""
    value, low, high = one.interval
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"
