"""`st-align bench speed`: which figures there are, and what each needs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from st_align.benchmarks import speed_files, speed_graph, speed_train
from st_align.benchmarks.speed import Figure, to_markdown, write
from st_align.corpus import Corpus
from st_align.errors import ConfigError, nearest
from st_align.simulate import simulate_cohort

_SMALL = (2, 2_000)
"""Slides and spots of the corpus that is simulated where none is given."""
_LITE = "efficientnet-lite0"


@dataclass(frozen=True)
class _Job:
    """What a figure is measured with; a corpus is simulated when it is asked for."""

    work: Path
    given: Path | None
    preset: str
    seed: int

    def corpus(self, slides: int = _SMALL[0], spots: int = _SMALL[1]) -> Corpus:
        return Corpus.open(self.given) if self.given is not None else self.small(slides, spots)

    def small(self, slides: int = _SMALL[0], spots: int = _SMALL[1]) -> Corpus:
        path = self.work / "small"
        simulate_cohort(path, slides=slides, spots=spots, seed=self.seed, layout="corpus")
        return Corpus.open(path)

    def large(self) -> Corpus:
        if self.given is None:
            raise ConfigError(
                "memory is compared between a small corpus and a large one",
                expected="--corpus LARGE",
                fix="st-align simulate --as corpus --sparse --slides 531 --spots 2450 --out LARGE",
            )
        return Corpus.open(self.given)


WHAT: dict[str, Callable[[_Job], Iterator[Figure]]] = {
    "training": lambda job: speed_train.training(job.corpus(2, 320), job.preset, job.work),
    "features": lambda job: speed_train.features(job.corpus(1, 3_600), _LITE),
    "patches": lambda job: speed_files.patches(job.corpus()),
    "stimage": lambda job: speed_files.stimage(job.work, job.seed),
    "visium": lambda job: speed_files.visium(job.work, job.seed),
    "prepare": lambda job: speed_files.prepare(job.work, job.seed),
    "neighbors": lambda job: speed_graph.neighbours(job.seed),
    "domains": lambda job: speed_graph.domains(job.seed),
    "epoch": lambda job: speed_train.epoch(job.corpus()),
    # The large one first: where it is not given, nothing is simulated in vain.
    "memory": lambda job: speed_train.memory(large=job.large(), small=job.small()),
    "start": lambda _: speed_graph.start(),
}


def run_speed(
    what: str, out: Path, *, corpus: Path | None, preset: str, seed: int
) -> dict[str, Any]:
    """Measure one family of figures, print it and write it to `out`."""
    if what not in WHAT:
        raise ConfigError(
            f"bench speed knows no {what!r}", expected=", ".join(WHAT), fix=nearest(what, WHAT)
        )
    if preset not in ("tiny", "open"):
        raise ConfigError("the preset is unknown here", expected="tiny or open", found=preset)
    figures = []
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".speed-", dir=out) as work:
        for figure in WHAT[what](_Job(Path(work), corpus, preset, seed)):
            figures.append(figure)
            print(to_markdown([figure]).splitlines()[-1], flush=True)
    write(out, what, figures)
    return {"rows": [dataclasses.asdict(f) for f in figures], "headline": _headline(figures)}


def _headline(figures: list[Figure]) -> dict[str, Any]:
    """How many of the targets were met."""
    judged = [figure for figure in figures if figure.met is not None]
    return {"targets": len(judged), "met": sum(bool(figure.met) for figure in judged)}
