"""What a search for slides is asked and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from st_align.errors import ConfigError, nearest
from st_align.slide import Slide, Technology

FORMATS = ("auto", "visium", "stimage", "h5ad", "spatialdata")
TECHNOLOGIES: tuple[Technology, ...] = ("Visium", "ST")


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
    why: str = ""
    """What told the format."""


@dataclass(frozen=True)
class Found:
    """Slides sorted by id, and those that are named somewhere but cannot be read, with reasons."""

    refs: tuple[SlideRef, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
