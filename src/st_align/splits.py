"""Which slides train and which are held out; patients are the unit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from st_align.errors import ConfigError, nearest
from st_align.provenance import json_hash


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Slides by their part in a run, each sorted; `patients` gives the patient of every slide."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    patients: Mapping[str, str]

    @property
    def same_patient(self) -> tuple[str, ...]:
        """Held-out slides whose patient has other slides in training."""
        trained = {self.patients[slide] for slide in self.train}
        return tuple(slide for slide in self.held_out if self.patients[slide] in trained)

    def to_dict(self) -> dict[str, Any]:
        """What `splits.json` holds."""

        def part(slides: tuple[str, ...]) -> dict[str, list[str]]:
            patients = sorted({self.patients[slide] for slide in slides})
            return {"slides": list(slides), "patients": patients}

        return {
            "train": part(self.train),
            "held_out": part(self.held_out),
            "same_patient": list(self.same_patient),
            "patient_of": dict(sorted(self.patients.items())),
        }

    @property
    def hash(self) -> str:
        """12 hex digits that change with any slide's part or patient."""
        return json_hash(self.to_dict())


def split_slides(
    patients: Mapping[str, str],
    *,
    hold_out_slides: Collection[str] = (),
    hold_out_patients: Collection[str] = (),
) -> Splits:
    """Hold out the slides named and all slides of the patients named; the others train.

    `patients` maps every slide to its patient. An unknown name, or nothing left to train on, is
    a ConfigError.
    """
    for name in hold_out_slides:
        if name not in patients:
            raise ConfigError(
                f"no slide to hold out is called {name!r}", fix=nearest(name, patients)
            )
    for name in hold_out_patients:
        if name not in patients.values():
            known = set(patients.values())
            raise ConfigError(
                f"no patient to hold out is called {name!r}", fix=nearest(name, known)
            )
    held = {s for s, p in patients.items() if s in hold_out_slides or p in hold_out_patients}
    train = sorted(set(patients) - held)
    if not train:
        raise ConfigError(
            "every slide is held out",
            expected="at least one slide to train on",
            found=f"{len(held)} held out of {len(patients)}",
        )
    return Splits(train=tuple(train), held_out=tuple(sorted(held)), patients=dict(patients))
