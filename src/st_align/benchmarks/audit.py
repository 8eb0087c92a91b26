"""Leakage audit: what a model has seen of the slides it is scored on.

Of a method on a slide: `donor-held-out` (no slide of the patient was seen), `section-held-out`
(other slides of the patient were), `patient unknown` (held out, but nobody said whose slides
these are), `LEAK` (the slide itself was seen).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from st_align.checkpoint import Run
from st_align.errors import ConfigError, ModelError, nearest
from st_align.infer import training_slides
from st_align.slide import PreparedSlide, Slide

DONOR, SECTION = "donor-held-out", "section-held-out"
UNKNOWN = "held out, patient unknown"
LEAK = "LEAK: trained on the slide"
ON_SLIDE = "fitted on the slide"
ZERO_SHOT = "zero-shot"
_RANK = (DONOR, UNKNOWN, SECTION, LEAK)


@dataclass(frozen=True)
class Seen:
    """How far a run is from a slide, and the slides that say so."""

    protocol: str
    by: tuple[str, ...] = ()


def seen(slides: Mapping[str, str], target: PreparedSlide | Slide) -> Seen:
    """How far a method that saw `slides` (id -> patient) is from `target`.

    A slide is taken for the target under another name where one id is the end of the other after
    an underscore: STimage-1K4M's `..._Visium_151674` is `151674`.
    """
    same = tuple(sorted(id for id in slides if same_section(id, target.id)))
    if same:
        return Seen(LEAK, same)
    kin = tuple(sorted(id for id, patient in slides.items() if patient == target.patient))
    if kin:
        return Seen(SECTION, kin)
    return Seen(UNKNOWN if target.patient_origin == "slide" else DONOR)


def same_section(one: str, other: str) -> bool:
    """Whether two slide ids name one section."""
    short, long = sorted((one, other), key=len)
    return long == short or long.endswith(f"_{short}")


@dataclass(frozen=True)
class Contender:
    """Runs that are one method: each fold's model scores the slides it has not seen."""

    name: str
    runs: tuple[Run, ...]

    def for_slide(self, target: PreparedSlide | Slide) -> tuple[Run, Seen]:
        """The run that is farthest from the slide."""
        found = [(run, seen(training_slides(run), target)) for run in self.runs]
        return min(found, key=lambda pair: _RANK.index(pair[1].protocol))


def contenders(runs: Iterable[tuple[str, Run]], taken: Iterable[str] = ()) -> list[Contender]:
    """Runs by the name they were given; a name of another row is a ConfigError."""
    named: dict[str, list[Run]] = {}
    for name, run in runs:
        if name in taken:
            raise ConfigError(f"a model cannot be called {name!r}", expected="no name of a row")
        named.setdefault(name, []).append(run)
    return [Contender(name, tuple(found)) for name, found in named.items()]


def parse_model(given: str) -> tuple[str, str]:
    """`NAME=RUN` -> (NAME, RUN); `RUN` alone is called like its folder."""
    name, equals, path = given.partition("=")
    if equals and (not name or not path):
        raise ConfigError("--model is RUN or NAME=RUN", expected="ours=runs/fold-1", found=given)
    return (name, path) if equals else (given.rstrip("/").rsplit("/", 1)[-1], given)


def require_no_leak(
    models: Sequence[Contender], targets: Sequence[PreparedSlide | Slide], *, allow: bool
) -> list[str]:
    """The audit as lines, one a model and slide; a leak is a ModelError unless allowed."""
    lines = []
    for model in models:
        for target in targets:
            run, found = model.for_slide(target)
            if found.protocol == LEAK and not allow:
                raise ModelError(
                    f"{model.name} was trained on {target.id}, the slide it would be scored on",
                    expected="a model that has not seen the slide",
                    found=f"{', '.join(found.by)} among the training slides of {run.path.name}",
                    fix="train with --hold-out-slide or --hold-out-patient (several folds are one "
                    "method: --model NAME=RUN, repeated); --allow-leak scores and brands it",
                )
            lines.append(_line(model, run, target, found))
    return lines


def _line(model: Contender, run: Run, target: PreparedSlide | Slide, found: Seen) -> str:
    where = f"{model.name} ({run.path.name})" if len(model.runs) > 1 else model.name
    if found.protocol == SECTION:
        return f"{where} on {target.id}: {SECTION}; saw {', '.join(found.by)} of {target.patient}"
    if found.protocol == LEAK:
        return f"{where} on {target.id}: {LEAK} ({', '.join(found.by)})"
    return f"{where} on {target.id}: {found.protocol}"


def fitting_slides(
    target: PreparedSlide, slides: Sequence[PreparedSlide], protocol: str
) -> list[PreparedSlide]:
    """The slides on which a baseline may be fitted for `target`: of other patients (`donor`), or
    all others (`section`).
    """
    if protocol not in ("donor", "section"):
        raise ConfigError(
            f"--protocol {protocol} is unknown", fix=nearest(protocol, ("donor", "section"))
        )
    others = [s for s in slides if not same_section(s.id, target.id)]
    return others if protocol == "section" else [s for s in others if s.patient != target.patient]
