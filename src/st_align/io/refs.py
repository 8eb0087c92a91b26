"""What a search for slides is asked and what it gives back."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from st_align.errors import ConfigError, nearest
from st_align.slide import Slide, Technology

FORMATS = ("auto", "visium", "stimage", "hest", "h5ad", "spatialdata")
TECHNOLOGIES: tuple[Technology, ...] = get_args(Technology)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How sources are read; the same for every slide of a call."""

    format: str = "auto"
    """One of `FORMATS`."""
    image: Path | None = None
    """The full-resolution image of the one slide that is read, instead of the source's own."""
    no_image: bool = False
    """Read counts only; otherwise a slide without an image is an error."""
    patients: Path | None = None
    """CSV with the columns slide, patient."""
    obs: Path | None = None
    """CSV with the columns barcode, optionally slide, and any further ones: joined to obs."""
    meta: Path | None = None
    """Index of STimage-1K4M; its rows select slides by species, technology and spots."""
    species: str | None = None
    technology: str | None = None
    """One of `TECHNOLOGIES`; also narrows an STimage root to one of its folders."""
    min_spots: int = 0
    gene_map: Path | None = None
    """CSV with the columns from, to: genes are renamed, those not in it left out."""
    any_species: bool = True
    """Otherwise a slide whose genes are not human ones is an error."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(
                f"unknown format {self.format!r}",
                expected=" | ".join(FORMATS),
                fix=nearest(self.format, FORMATS),
            )
        if self.technology is not None and self.technology not in TECHNOLOGIES:
            raise ConfigError(
                f"unknown technology {self.technology!r}",
                expected=" | ".join(TECHNOLOGIES),
                fix=nearest(self.technology, TECHNOLOGIES),
            )
        if self.image is not None and self.no_image:
            raise ConfigError("an image and 'no image' were both asked for", fix="give one of them")
        if self.min_spots < 0:
            raise ConfigError("min_spots is negative", found=str(self.min_spots))

    @property
    def tech(self) -> Technology | None:
        """The technology asked for, typed."""
        return next((t for t in TECHNOLOGIES if t == self.technology), None)


@dataclass(frozen=True)
class SlideRef:
    """A slide that was found; nothing large is read before `read()`. Can be pickled."""

    id: str
    format: str
    source: Path
    read: Callable[[], Slide]
    files: tuple[Path, ...] = field(default=(), kw_only=True)
    """What `read` reads: a change of one of them is a change of the slide."""
    why: str = ""
    """What told the format."""
    image: Path | None = field(default=None, kw_only=True)
    """The image that was given for it."""


@dataclass(frozen=True)
class Found:
    """Slides sorted by id, and those that are named somewhere but cannot be read, with reasons."""

    refs: tuple[SlideRef, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)


def fingerprint(ref: SlideRef) -> str:
    """12 hex digits of what a slide is read from and how: files by name, size and time of change,
    tables by their rows for this slide. A folder counts by the files in it that are read.
    """
    text = json.dumps(_plain(ref, ref.id), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value: Any, slide_id: str) -> Any:
    """`value` as JSON can hold it, without the parts that belong to other slides."""

    def plain(items: Iterable[Any]) -> list[Any]:
        return [_plain(item, slide_id) for item in items]

    if isinstance(value, SlideRef):
        return plain((value.format, value.files, value.read))
    if isinstance(value, Path):
        status = value.stat() if value.is_file() else None
        return [value.name, status.st_size, status.st_mtime_ns] if status else []
    if isinstance(value, functools.partial):
        return plain((value.func, value.args, value.keywords))
    if isinstance(value, ReadOptions):
        value = replace(value, patients=None, obs=None, meta=None)  # their rows come beside them
    if is_dataclass(value):
        return plain(getattr(value, field.name) for field in fields(value))
    if isinstance(value, Mapping):
        return plain([value[slide_id]] if slide_id in value else value.items())
    if isinstance(value, list | tuple):
        return plain(value)
    if isinstance(value, pd.DataFrame):
        return (value[value["slide"] == slide_id] if "slide" in value else value).to_csv()
    return value.__qualname__ if callable(value) else str(value)
