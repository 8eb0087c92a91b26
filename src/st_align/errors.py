"""Errors a person can act on: what was expected, what was found, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class StAlignError(Exception):
    """Base of all errors raised on purpose; the command prints it and exits with 2."""

    def __init__(
        self,
        problem: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.expected, self.found, self.fix = problem, expected, found, fix
        rows = [("expected", expected), ("found", found), ("to do", fix)]
        lines = [problem, *(f"  {name + ':':<9} {text}" for name, text in rows if text)]
        super().__init__("\n".join(lines))

    def one_line(self) -> str:
        """The message on one line, for logs and `quarantine.json`."""
        return "; ".join(" ".join(part.split()) for part in str(self).splitlines())


class SlideError(StAlignError):
    """A slide's files are missing, damaged or contradict each other."""


class CorpusError(StAlignError):
    """A corpus is damaged, of another schema version or lacks what is asked of it."""


class ConfigError(StAlignError):
    """An option or a config key is unknown or out of range."""


class ModelError(StAlignError):
    """A run folder, checkpoint or weights file cannot be used, or does not fit the data."""


class OutputError(StAlignError):
    """The output cannot be written, or would overwrite something."""


class TrainingError(StAlignError):
    """Training cannot go on (a loss that is not finite, for instance)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean ...?` for a misspelt name, or the list of known ones."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    between = "; " if any("," in name for name in known) else ", "
    return f"did you mean {close[0]!r}?" if close else f"known: {between.join(known)}"


def require_file(path: Path, what: str, error: type[StAlignError] = SlideError) -> Path:
    """Return `path` when it is a readable file, else raise `error`."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise error(f"{what} is missing: {path}", expected="a file", found=found)
    return path


def require_new_or_empty(folder: Path, what: str, fix: str) -> Path:
    """Return `folder` when nothing is in it yet; existing work is never overwritten."""
    if folder.is_file():
        raise OutputError(f"{what} {folder} is a file", expected="a folder", fix=fix)
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(
            f"{what} {folder} is not empty", expected="a new or empty folder", fix=fix
        )
    return folder
