"""Sources of every format, damaged in one way per case; a case is its number, to be had again.

Damage: flipped bits; truncation at borders of structures (chunks, lines, cells, braces, blocks);
bytes lost, doubled or zeroed; columns swapped or dropped; cells and JSON values replaced; files
emptied, lost or exchanged.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

import sources
from st_align.errors import StAlignError
from st_align.io import ReadOptions, find_slides

SECONDS = 10
BYTES = 2 << 30
JUNK = ("", "nan", "-1", "1e400", "inf", "x", "0", "99999999999999999999", '"', "\x00", "é" * 50)
JUNK_JSON = (None, [], {}, "x", -1, 0, 1e400, True, "9" * 400, [[[]]])
_HEADS = (
    b"\x89PNG\r\n\x1a\n", b"II*\0\x08\0\0\0", b"\x89HDF\r\n\x1a\n", b"\x1f\x8b\x08", b"{}",
    b"a,b\n1,2\n",
)  # fmt: skip
_BORDERS = (
    b"IHDR", b"IDAT", b"IEND", b"PLTE", b"\x89HDF", b"TREE", b"HEAP", b"SNOD", b"OHDR", b"FRHP",
    b"\xff\xd8", b"\xff\xda", b"\xff\xdb", b"\xff\xc0", b"\x1f\x8b", b"PAR1", b"\n", b",", b"\t",
    b"{", b"}", b"[", b"]", b":",
)  # fmt: skip


def make_sources(root: Path) -> dict[str, Path]:
    """One small sound source a format and variety."""
    s = sources.section()
    kinds = {}
    for matrix in ("h5", "h5v2", "mtx", "mtx.gz"):
        kinds[matrix] = sources.write_spaceranger(root / matrix, s, matrix=matrix)
    kinds["parquet"] = sources.write_spaceranger(root / "parquet", s, positions="parquet")
    kinds["h5ad"] = sources.write_h5ad(root / "h5ad" / "S1.h5ad", s)
    kinds["stimage"] = sources.write_stimage(root / "stimage", s, "Visium")
    kinds["tiff"] = sources.write_stimage(root / "tiff", s, "Visium", image="TIFF")
    kinds["st"] = sources.write_stimage(root / "st", sources.section(technology="ST"), "ST")
    kinds["zarr"] = sources.write_spatialdata(root / "S1.zarr", s)
    return kinds


class Hang(BaseException):
    """Not an Exception: nothing may swallow it."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """The block may take `SECONDS` and `BYTES` more than the process has."""

    def stop(*_: object) -> None:
        raise Hang

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + BYTES
    old = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    signal.alarm(SECONDS)
    # A library that goes round without coming back to Python: the process ends, with a traceback.
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, old)


def read_all(path: Path) -> str:
    """Find, read and cut as `prepare` would: 'read' or 'refused'. Anything else raises."""
    try:
        with bounded():
            for ref in find_slides([path], ReadOptions()).refs:
                slide = ref.read()
                if slide.image is not None:
                    boxes = np.concatenate([slide.xy[:4] - 8, slide.xy[:4] + 8], axis=1)
                    slide.image.crops(boxes, 8)
                    slide.image.thumbnail(64)
    except StAlignError:
        return "refused"
    return "read"


def damaged(case: int, kinds: dict[str, Path], at: Path) -> tuple[Path, str]:
    """A damaged copy of a source in `at`, and what was done to it."""
    rng = np.random.default_rng(case)
    name = sorted(kinds)[case % len(kinds)]
    shutil.rmtree(at, ignore_errors=True)
    at.mkdir(parents=True)
    source = kinds[name]
    copy = at / source.name
    if source.is_dir():
        shutil.copytree(source, copy)
        files = sorted(p for p in copy.rglob("*") if p.is_file())
    else:
        shutil.copy(source, copy)
        files = [copy]
    file = files[rng.integers(len(files))]
    how = _hows(file)[rng.integers(len(_hows(file)))]
    how(file, rng)
    return copy, f"case {case}: {name}, {how.__name__} of {file.relative_to(at)}"


def _hows(file: Path) -> list[Callable[[Path, np.random.Generator], None]]:
    if file.suffix in (".csv", ".tsv"):
        return [*_BYTES, *_TABLE, *_TABLE]
    return [*_BYTES, _value, _value, _value] if file.suffix == ".json" else _BYTES


# --- damage -------------------------------------------------------------------------------------


def _flip(file: Path, rng: np.random.Generator) -> None:
    data = np.frombuffer(file.read_bytes(), np.uint8).copy()
    if len(data):
        at = rng.integers(len(data), size=rng.integers(1, 9))
        data[at] ^= (1 << rng.integers(8, size=len(at))).astype(np.uint8)
    file.write_bytes(data.tobytes())


def _cut(file: Path, rng: np.random.Generator) -> None:
    """Truncate at, or one byte off, a border of a structure."""
    data = file.read_bytes()
    mark = _BORDERS[rng.integers(len(_BORDERS))]
    at = [i for i in range(len(data)) if data.startswith(mark, i)] if len(data) < 1 << 17 else []
    if not at:
        at = [int(rng.integers(len(data) + 1)), len(data) // 512 * 512, len(data) - 1]
    file.write_bytes(data[: max(0, at[rng.integers(len(at))] + int(rng.integers(-1, 5)))])


def _lose(file: Path, rng: np.random.Generator) -> None:
    data = file.read_bytes()
    start = int(rng.integers(len(data) + 1))
    file.write_bytes(data[:start] + data[start + int(rng.integers(1, 600)) :])


def _double(file: Path, rng: np.random.Generator) -> None:
    data = file.read_bytes()
    start, size = int(rng.integers(len(data) + 1)), int(rng.integers(1, 600))
    file.write_bytes(data[: start + size] + data[start:])


def _blank(file: Path, rng: np.random.Generator) -> None:
    """Bytes set to zeros or ones: sizes and offsets become nothing, or huge."""
    data = bytearray(file.read_bytes())
    start, size = int(rng.integers(len(data) + 1)), int(rng.integers(1, 65))
    size = min(size, len(data) - start)
    data[start : start + size] = (b"\0" if rng.random() < 0.5 else b"\xff") * size
    file.write_bytes(bytes(data))


def _empty(file: Path, rng: np.random.Generator) -> None:
    file.write_bytes(b"")


def _remove(file: Path, rng: np.random.Generator) -> None:
    file.unlink()


def _exchange(file: Path, rng: np.random.Generator) -> None:
    """Another kind of file under this name."""
    file.write_bytes(_HEADS[rng.integers(len(_HEADS))])


def _swap_columns(file: Path, rng: np.random.Generator) -> None:
    _cells(file, lambda table: table.iloc[:, rng.permutation(table.shape[1])])


def _drop_column(file: Path, rng: np.random.Generator) -> None:
    _cells(file, lambda table: table.drop(columns=table.columns[rng.integers(table.shape[1])]))


def _replace_cells(file: Path, rng: np.random.Generator) -> None:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        for _ in range(int(rng.integers(1, 4))):
            row, column = rng.integers(len(table)), rng.integers(table.shape[1])
            table.iloc[row, column] = JUNK[rng.integers(len(JUNK))]
        return table

    _cells(file, change)


def _repeat_rows(file: Path, rng: np.random.Generator) -> None:
    _cells(file, lambda table: table.iloc[rng.integers(len(table), size=len(table))])


def _cells(file: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    options = {"sep": "\t" if file.suffix == ".tsv" else ",", "header": None}
    table = pd.read_csv(file, dtype=str, keep_default_na=False, **options)
    change(table).to_csv(file, index=False, header=False, sep=str(options["sep"]))


def _value(file: Path, rng: np.random.Generator) -> None:
    """One value of a JSON file, at any depth, replaced or left out."""
    root = json.loads(file.read_text())
    places: list[tuple[dict | list, object]] = []

    def walk(node: object) -> None:
        items = (
            node.items()
            if isinstance(node, dict)
            else enumerate(node if isinstance(node, list) else ())
        )
        for key, value in items:
            places.append((node, key))  # type: ignore[arg-type]
            walk(value)

    walk(root)
    node, key = places[rng.integers(len(places))]
    if rng.random() < 0.25:
        del node[key]
    else:
        node[key] = JUNK_JSON[rng.integers(len(JUNK_JSON))]
    file.write_text(json.dumps(root))


_BYTES = [_flip, _flip, _cut, _cut, _lose, _double, _blank, _blank, _empty, _remove, _exchange]
_TABLE = [_swap_columns, _drop_column, _replace_cells, _repeat_rows]


def bomb(path: Path, side: int) -> Path:
    """A white PNG: 30,000 x 30,000 pixels are 1 MB on disk and 2.7 GB in memory."""
    Image.new("L", (side, side), 255).save(path, compress_level=9)
    return path
