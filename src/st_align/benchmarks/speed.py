"""Figures of speed and memory: each measured beside what it is compared with.

The machine may be busy with other work. A ratio is therefore taken in rounds: every round runs
both sides once, the ratio is that of the round, and the median over rounds is reported. Wall
times are given with their best and their median; CPU times beside them where they tell more.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from st_align.errors import ConfigError
from st_align.files import replace_file

ROUNDS = 5
_SAMPLE_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number. `met` says whether the `target` holds; None where it is shown for comparison."""

    figure: str
    case: str
    value: float
    unit: str
    runs: tuple[float, ...] = ()
    target: str = ""
    met: bool | None = None
    note: str = ""


def at_least(bound: float, value: float) -> dict[str, Any]:
    """Target and verdict of a figure that should be large."""
    return {"value": value, "target": f">= {bound:,g}", "met": value >= bound}


def at_most(bound: float, value: float) -> dict[str, Any]:
    """Target and verdict of a figure that should be small."""
    return {"value": value, "target": f"<= {bound:,g}", "met": value <= bound}


@dataclass(frozen=True)
class Times:
    """Seconds of each round, of one side."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def best(self) -> float:
        """Least wall time."""
        return min(self.wall)

    @property
    def median(self) -> float:
        """Median wall time."""
        return statistics.median(self.wall)


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    rounds: int = ROUNDS,
    *,
    before: Callable[[], object] = lambda: None,
) -> dict[str, Times]:
    """Run every side once a round, in turn; results are dropped before the next one runs, and
    what `before` does, ahead of each, is not counted.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            before()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: Times(tuple(w for w, _ in both), tuple(c for _, c in both))
        for name, both in taken.items()
    }


def ratios(above: Sequence[float], below: Sequence[float]) -> tuple[float, ...]:
    """Of each round."""
    return tuple(a / b for a, b in zip(above, below, strict=True))


@dataclass(frozen=True)
class Child:
    """What a process of its own took; `peak` is bytes of anonymous memory, page cache left out."""

    wall: float
    cpu: float
    peak: int


def in_child(command: Sequence[str]) -> Child:
    """Run a command to its end and watch its memory: the largest `RssAnon` of it and its children
    together, looked at every 10 ms (Linux). A command that fails is a ConfigError.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = _started(command)
    peak, over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(_SAMPLE_S):
            peak = max(peak, sum(map(anonymous, family(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        _finish(process, command)
    finally:
        over.set()
        watcher.join()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Child(wall, cpu, peak)


def unwatched(command: Sequence[str]) -> None:
    """Run a command that may want all cores: watching its memory would take a share of one."""
    _finish(_started(command), command)


def _started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _finish(process: subprocess.Popen[bytes], command: Sequence[str]) -> None:
    said = process.communicate()[1]
    if process.returncode:
        found = said.decode(errors="replace").strip().splitlines()[-1:]
        raise ConfigError(f"{' '.join(command)} failed", found=" ".join(found))


def python(code: str, *arguments: str) -> list[str]:
    """A command that runs `code` in a fresh interpreter."""
    return [sys.executable, "-c", code, *arguments]


def st_align(*arguments: object) -> list[str]:
    """The command line of a verb."""
    return [sys.executable, "-m", "st_align.cli", *map(str, arguments)]


def family(pid: int) -> list[int]:
    """A process and its children, theirs too."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *(p for child in children for p in family(int(child)))]


def anonymous(pid: int | str = "self") -> int:
    """Bytes of memory that a process holds and no file backs; 0 where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next(
        (1024 * int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line), 0
    )


def to_csv(figures: Iterable[Figure]) -> str:
    """Tidy table, a line a figure; `runs` with blanks between."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in dataclasses.fields(Figure)]
    writer.writerow(names)
    for figure in figures:
        values = dataclasses.asdict(figure) | {"runs": " ".join(f"{v:.6g}" for v in figure.runs)}
        writer.writerow(["" if values[name] is None else values[name] for name in names])
    return text.getvalue()


def to_markdown(figures: Iterable[Figure]) -> str:
    """The same as a table to read."""
    lines = ["| figure | case | measured | target | met |", "|---|---|---|---|---|"]
    for f in figures:
        ends = f"{_short(min(f.runs))} to {_short(max(f.runs))}" if len(f.runs) > 1 else ""
        spread = f" ({ends})" if ends else ""
        met = {True: "yes", False: "**no**", None: ""}[f.met]
        note = f"; {f.note}" if f.note else ""
        measured = f"{_short(f.value)} {f.unit}{spread}{note}"
        cells = (f.figure, f.case, measured, f.target, met)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _short(value: float) -> str:
    """Three digits, or all of a large whole number's."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write(out: Path, what: str, figures: Sequence[Figure]) -> None:
    """`speed-WHAT.csv` and `speed-WHAT.md` in the folder `out`."""
    replace_file(out / f"speed-{what}.csv", to_csv(figures).encode())
    replace_file(out / f"speed-{what}.md", to_markdown(figures).encode())
