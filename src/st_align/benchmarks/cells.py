"""A bench's folder: one file per cell, so that a killed run goes on and a crash costs one cell.

cells/NAME-HASH.json (+ .npz)   rows and arrays of one cell; HASH is of all that decides them
results.csv  results.md  provenance.json  *.png   written at the end, from the cells

Ranks of a job (torchrun, srun) share the cells: each makes its own, then the first reads them all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import platform
import re
import resource
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from st_align.benchmarks.table import Row
from st_align.errors import OutputError, StAlignError
from st_align.files import replace_file, require_writable, write_json
from st_align.job import gather, launch
from st_align.provenance import json_hash, software
from st_align.slide import PreparedSlide

PROVENANCE = "provenance.json"
T = TypeVar("T")
Found = tuple[dict[str, Any], list[str]]
"""What a bench gives: its `--json` result, and the cells that failed."""


class Cost(NamedTuple):
    """Seconds on the clock, and those of the processor, which other programs do not lengthen."""

    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> Cost:
        """To be handed to `since`."""
        return cls(time.perf_counter(), time.process_time())

    @classmethod
    def since(cls, started: Cost, times: int = 1) -> Cost:
        """What one of `times` equal steps cost."""
        wall, cpu = ((b - a) / times for a, b in zip(started, cls.now(), strict=True))
        return cls(round(wall, 2), round(cpu, 2))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one method gave on one slide: rows, and arrays that a figure or an interval needs."""

    rows: tuple[Row, ...]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    """Of steps within, by a name of their own."""


class SkippedError(Exception):
    """The cell cannot be made here (no weights, not installed); the message is its row's note."""


class _Unmade(NamedTuple):
    """Why a cell has no file: what its row says, and what `failed` does ("": nothing)."""

    note: str
    failed: str


class Bench:
    """Cells of a bench in the folder `out`; what was made with the same key is not made again.

    All of a bench's cells are made within one `collect`.
    """

    def __init__(self, out: Path) -> None:
        require_writable(out / PROVENANCE)
        self.out = out
        self.failed: list[str] = []
        self.costs: dict[str, Cost] = {}
        self._fabric = launch()
        self._gathered = False
        self._owners: dict[tuple[str, ...], int] = {}
        self._unmade: dict[str, _Unmade] = {}
        self._peak_memory = 0.0

    def collect(self, make_all: Callable[[], T]) -> T | None:
        """What `make_all` gives, which asks for every `cell`, in an order that no cell decides.

        Of several ranks each makes its share and gets bare rows in place of the other cells. Then
        the first one asks again and finds all cells made; the others have None and are done.
        """
        ranks = self._fabric.world_size
        found = make_all()
        if ranks > 1 and self._fabric.is_global_zero:
            print(f"rank 0 of {ranks} has made its cells: waiting for the others", file=sys.stderr)
        told = gather(self._fabric, (self._unmade, _peak_memory()))
        self._peak_memory = max(peak for _, peak in told)
        if ranks == 1:
            return found
        if not self._fabric.is_global_zero:
            return None
        self._unmade = {file: unmade for part, _ in told for file, unmade in part.items()}
        self._gathered, self.failed, self.costs = True, [], {}
        return make_all()

    @property
    def progress(self) -> bool:
        """Whether to show a bar: cells are being made, and this is the rank that speaks."""
        return self._fabric.is_global_zero and not self._gathered

    def cell(self, name: str, key: Mapping[str, Any], of: Row, make: Callable[[], Cell]) -> Cell:
        """The cell `name`, read where it was made with `key`, else made and kept.

        `key` holds all that decides the numbers (data hashes, model hash, options, seeds) and is
        JSON-able. When `make` fails the cell is the row `of` with the reason as its note; it is
        tried again next time, and `failed` names it. Cells of one slide and method are made by
        one rank: they read each other, or what is read once for all of them.
        """
        key = {**key, "software": software()}
        digest = json_hash(key)
        path = self.out / "cells" / f"{_file_name(name)}-{digest}.json"
        if not (self._gathered or self._is_mine((of.slide, of.method) if of.slide else (digest,))):
            return Cell(rows=(of,))
        found = _read(path)
        if found is None and not self._gathered:
            started = Cost.now()
            try:
                made = make()
            except SkippedError as reason:
                self._unmade[path.name] = _Unmade(str(reason), "")
            except Exception as error:  # one method's failure is a row, not the end of the table
                self._unmade[path.name] = self._failure(name, error)
            else:
                found = dataclasses.replace(made, cost=Cost.since(started))
                _write(path, key, found)
        if found is None:
            return self._row_alone(name, path.name, of)
        self.costs[name] = found.cost
        return found

    def _is_mine(self, work: tuple[str, ...]) -> bool:
        """Work is dealt out as it is first heard of: the same on every rank."""
        owner = self._owners.setdefault(work, len(self._owners) % self._fabric.world_size)
        return owner == self._fabric.global_rank

    def _row_alone(self, name: str, file: str, of: Row) -> Cell:
        if file not in self._unmade:
            raise OutputError(
                f"the first rank does not find what another one made: {name}",
                expected=f"{self.out / 'cells' / file}",
                fix="give an --out that all machines share, and the same versions of software on "
                "all of them; then run the same command again",
            )
        note, failed = self._unmade[file]
        if failed:
            self.failed.append(failed)
        return Cell(rows=(dataclasses.replace(of, note=note),))

    def _failure(self, name: str, error: Exception) -> _Unmade:
        known = isinstance(error, StAlignError)
        reason = error.one_line() if isinstance(error, StAlignError) else repr(error)
        print(f"failed: {name}: {reason}", file=sys.stderr)
        if not known:
            with contextlib.suppress(OSError):
                log = "".join(traceback.format_exception(error))
                replace_file(self.out / "failures" / f"{_file_name(name)}.txt", log.encode())
        return _Unmade(f"failed: {reason}", f"{name}: {reason}")

    def write_provenance(self, **facts: Any) -> None:
        """`provenance.json`: `facts` (data hashes, seeds, splits, models), versions, machine, wall
        time of each cell and peak memory of the largest process.
        """
        write_json(
            self.out / PROVENANCE,
            {
                "command": sys.argv[1:],
                "software": software(),
                "machine": {"system": platform.platform(), "python": platform.python_version()},
                "seconds": {
                    "cells": {name: cost._asdict() for name, cost in self.costs.items()},
                    "total": {
                        field: round(sum(getattr(cost, field) for cost in self.costs.values()), 2)
                        for field in Cost._fields
                    },
                },
                "peak_memory_gib": round(max(self._peak_memory, _peak_memory()), 3),
                "failed": self.failed,
                **facts,
            },
        )


def _peak_memory() -> float:
    """Of this process, GiB."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage / (2**30 if sys.platform == "darwin" else 2**20)


def slide_hash(slide: PreparedSlide) -> str:
    """12 hex digits of all that a slide holds: spots and their labels, counts, patches."""
    digest = hashlib.sha256(slide.spots.to_csv(index=False).encode())
    arrays: list[Any] = [slide.spot_patches]
    if slide.genes is not None and slide.counts is not None:
        arrays += [slide.genes.symbols, slide.counts.data, slide.counts.indices]
        arrays += [slide.counts.indptr]
    for _, niche in sorted(slide.niches.items()):
        arrays += [niche.neighbors, niche.patches]
    for values in arrays:
        if values is not None:
            digest.update(f"{values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:12]


def _write(path: Path, key: Mapping[str, Any], cell: Cell) -> None:
    """Arrays first: a cell counts once its JSON is there."""
    if cell.arrays:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **cell.arrays)  # type: ignore[arg-type]
        replace_file(path.with_suffix(".npz"), buffer.getvalue())
    values = {
        "key": key,
        "rows": [dataclasses.asdict(row) for row in cell.rows],
        "arrays": sorted(cell.arrays),
        "cost": cell.cost,
        "costs": cell.costs,
    }
    replace_file(path, f"{json.dumps(values, indent=1)}\n".encode())


def _read(path: Path) -> Cell | None:
    """A whole cell, or None: one that is absent or damaged is made anew."""
    try:
        values = json.loads(path.read_bytes())
        arrays: dict[str, NDArray[Any]] = {}
        if values["arrays"]:
            with path.with_suffix(".npz").open("rb") as file:
                stored = np.load(file, allow_pickle=False)
                arrays = {name: stored[name] for name in values["arrays"]}
        rows = tuple(Row(**row) for row in values["rows"])
        costs = {name: Cost(*cost) for name, cost in values["costs"].items()}
        return Cell(rows=rows, arrays=arrays, cost=Cost(*values["cost"]), costs=costs)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", name)[:120]


def join(cells: Sequence[Cell]) -> list[Row]:
    """The rows of all cells, in order."""
    return [row for cell in cells for row in cell.rows]
