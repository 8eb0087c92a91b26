"""Whose slide it is: the unit of every split.

A table, else one constant obs column, else the study in an STimage-1K4M name, else the slide.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from st_align.errors import SlideError, nearest
from st_align.io.tables import read_table
from st_align.keys import PATIENT_COLUMNS, UNLABELLED
from st_align.slide import Slide


def read_patients(path: Path) -> dict[str, str]:
    """Read the table slide,patient. A slide with two patients or without one is an error."""
    table = read_table(path, ("slide", "patient"), "patient table")
    patients: dict[str, str] = {}
    for slide, patient in zip(
        table["slide"].str.strip(), table["patient"].str.strip(), strict=True
    ):
        if not slide or patient.lower() in UNLABELLED:
            raise SlideError(
                f"patient table {path} has an incomplete row",
                expected="a slide and its patient",
                found=f"slide {slide!r}, patient {patient!r}",
            )
        if patients.setdefault(slide, patient) != patient:
            raise SlideError(
                f"patient table {path} gives slide {slide!r} two patients",
                found=f"{patients[slide]!r} and {patient!r}",
            )
    return patients


def check_patients(
    table: Mapping[str, str], path: Path, *, needed: Collection[str], known: Collection[str]
) -> None:
    """Refuse a table that lacks a slide of `needed` or names one outside `known`."""
    missing = sorted(set(needed) - set(table))
    unknown = sorted(set(table) - set(known))
    if missing:
        raise SlideError(
            f"patient table {path} lacks {len(missing)} of {len(needed)} slides",
            expected="one row per slide",
            found=f"no row for {_some(missing)}",
            fix="add them; a slide of an unknown patient gets a patient of its own",
        )
    if unknown:
        raise SlideError(
            f"patient table {path} names {len(unknown)} unknown slides",
            expected=f"slides that were found: {_some(sorted(known))}",
            found=_some(unknown),
            fix=f"for {unknown[0]!r}: {nearest(unknown[0], known)}",
        )


def with_patient(slide: Slide, table: Mapping[str, str] | None, *, study: bool) -> Slide:
    """Set the slide's patient; `study` where the id begins with the name of its study."""
    if table is not None:
        return replace(slide, patient=table[slide.id], patient_origin="table")
    for column in PATIENT_COLUMNS:
        values = slide.obs[column].dropna().astype(str) if column in slide.obs else ()
        names = {value for value in values if value.lower() not in UNLABELLED}
        if len(names) == 1:
            return replace(slide, patient=names.pop(), patient_origin="obs")
    prefix = slide.id.rpartition("_")[0] if study else ""
    if prefix:
        warning = f"no patient given: the whole study {prefix!r} counts as one patient"
        return replace(
            slide, patient=prefix, patient_origin="study", warnings=(*slide.warnings, warning)
        )
    warning = "no patient given: the slide counts as a patient of its own"
    return replace(
        slide, patient=slide.id, patient_origin="slide", warnings=(*slide.warnings, warning)
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
