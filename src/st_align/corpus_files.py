"""Files of a corpus: columns written and synced under a temporary name, then renamed whole."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from st_align.corpus import (
    COUNTS,
    GENES,
    MANIFEST,
    RECORD,
    SCHEMA_VERSION,
    SPOT_PATCHES,
    SPOTS,
    sha256,
)
from st_align.errors import OutputError
from st_align.files import replace_file, sync_folder
from st_align.slide import Niche, PreparedSlide

Columns = dict[str, NDArray[Any] | pa.Table]
PART = ".part"


def slide_columns(slide: PreparedSlide) -> Columns:
    """The files of a slide by their path within its folder."""
    columns: Columns = {SPOTS: pa.Table.from_pandas(slide.spots, preserve_index=False)}
    if slide.genes is not None and slide.counts is not None:
        names = {"symbol": slide.genes.symbols, "ensembl": slide.genes.ensembl}
        columns[GENES] = pa.table({k: pa.array(v.tolist(), pa.string()) for k, v in names.items()})
        counts = slide.counts.sorted_indices()
        index = np.int32 if counts.nnz <= np.iinfo(np.int32).max else np.int64
        arrays = (counts.data, counts.indices.astype(index), counts.indptr.astype(index))
        columns |= dict(zip(COUNTS, arrays, strict=True))
    if slide.spot_patches is not None:
        columns[SPOT_PATCHES] = slide.spot_patches
    for spec, niche in slide.niches.items():
        columns |= {f"niches/{spec}/{name}": c for name, c in niche_columns(niche).items()}
    return columns


def slide_entry(slide: PreparedSlide, *, format: str, source: str) -> dict[str, Any]:
    """What the manifest says of a slide, but for the checksums of its columns."""
    names = ("technology", "patient", "patient_origin", "tissue", "species", "licence", "um_per_px")
    return {name: getattr(slide, name) for name in names} | {
        "format": format,
        "source": source,
        "n_spots": slide.n_spots,
        "n_genes": 0 if slide.genes is None else len(slide.genes),
        "niches": sorted(slide.niches),
        "warnings": list(slide.warnings),
    }


def niche_columns(niche: Niche) -> Columns:
    """The files of a niche by their path within its folder."""
    arrays = {"neighbors": niche.neighbors, "boxes": niche.boxes, "patches": niche.patches}
    return {f"{name}.npy": values for name, values in arrays.items() if values is not None}


@contextmanager
def new_folder(folder: Path, need: int) -> Iterator[Path]:
    """A temporary folder that becomes `folder`, synced and whole; on any failure it is removed.

    A write that fails is an OutputError that names the `need` in bytes.
    """
    part = folder.with_name(f".{folder.name}{PART}")
    with writing(folder, need):
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            yield part
            for inside in (part, *(p for p in part.rglob("*") if p.is_dir())):
                sync_folder(inside)
            remove(folder)
            part.rename(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def write_columns(folder: Path, columns: Columns) -> dict[str, str]:
    """Write and sync the files: path -> sha256."""
    sums = {}
    for name, column in columns.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            if isinstance(column, pa.Table):
                pq.write_table(column, file)
            else:
                np.save(file, np.ascontiguousarray(column), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        sums[name] = sha256(path)
    return sums


def write_record(
    folder: Path, request: str, entry: dict[str, Any], sums: Mapping[str, str]
) -> dict[str, Any]:
    """Write `slide.json`; gives the slide's entry with the checksums `sums` of its columns."""
    slide = entry | {"sha256": dict(sums)}
    header = {"schema_version": SCHEMA_VERSION, "request": request}
    write_json(folder / RECORD, header | {"slide": slide})
    return slide


def write_manifest(out: Path, slides: Mapping[str, Any], *, spot_px: int, niche_px: int) -> None:
    """The manifest of a corpus, with the entries of its slides."""
    sizes = {"spot_px": spot_px, "niche_px": niche_px}
    write_json(out / MANIFEST, {"schema_version": SCHEMA_VERSION, **sizes, "slides": dict(slides)})


@contextmanager
def writing(path: Path, need: int = 0) -> Iterator[None]:
    """Turn what the operating system says of a write into an OutputError with the space needed."""
    try:
        yield
    except OSError as error:
        folder = next(p for p in (path, *path.absolute().parents) if p.exists())
        free = shutil.disk_usage(folder).free
        raise OutputError(
            f"cannot write {path}",
            expected=f"about {need / 1e6:,.1f} MB free" if need else "a folder to write to",
            found=f"{error.strerror or error}; {free / 1e6:,.1f} MB free",
            fix="make room or choose another --out, then run again: finished work is kept",
        ) from error


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a folder against other processes; the lock ends with its process. A file system
    without locks is taken on trust. Without `wait`, a held lock is an OutputError.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        os.close(handle)
        raise OutputError(
            f"another process is writing to {folder}", fix="wait until it has ended"
        ) from error
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def locked_by(file: Path) -> Iterator[None]:
    """Wait for a lock of the file, which is made, and goes when the block ends well. Over NFS such
    a lock holds between machines; that of a folder holds on one machine alone.
    """
    with file.open("ab") as handle:
        with suppress(OSError):  # no locks here
            fcntl.lockf(handle, fcntl.LOCK_EX)
        yield
        file.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """JSON with sorted keys, written whole or not at all."""
    text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False)
    replace_file(path, f"{text}\n".encode())


def remove(path: Path) -> None:
    """Remove a file or folder; a folder leaves its name at once, then its content goes."""
    if path.is_dir():
        away = path.with_name(f".{path.name.removeprefix('.')}.old{PART}")
        path.rename(away)
        shutil.rmtree(away)
    else:
        path.unlink(missing_ok=True)
