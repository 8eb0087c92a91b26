"""From paths to slides: picks the reader of each source and says why."""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pandas as pd

from st_align.errors import ConfigError, SlideError, nearest
from st_align.io import h5ad, hest, spatialdata, stimage, visium
from st_align.io.check import check_id, check_slide
from st_align.io.patients import check_patients, read_patients, with_patient
from st_align.io.refs import Found, ReadOptions, SlideRef
from st_align.io.species import read_gene_map, rename_genes, require_human
from st_align.io.tables import join_obs, read_table
from st_align.slide import Slide

_READERS: Mapping[str, ModuleType] = {
    "spatialdata": spatialdata,
    "stimage": stimage,
    "hest": hest,
    "visium": visium,
    "h5ad": h5ad,
}
"""In this order: the first that recognises a path reads it."""
_FAILURES = (
    OSError, KeyError, ValueError, TypeError, IndexError, RuntimeError, EOFError, AttributeError,
    ArithmeticError, MemoryError, zlib.error, struct.error,
)  # fmt: skip


def find_slides(sources: Sequence[str | Path], options: ReadOptions | None = None) -> Found:
    """Find the slides of all sources, without reading them.

    A source is one slide (a Space Ranger folder, an .h5ad, a SpatialData .zarr), a folder of
    such slides, an STimage-1K4M root or one of its folders, or `PATH::ID` for one slide of any
    of these. Raises SlideError when nothing is found, for two slides with one id, and for a
    patient table that doesn't fit.
    """
    options = options or ReadOptions()
    refs: list[SlideRef] = []
    absent: dict[str, str] = {}
    known: set[str] = set()
    for source in sources:
        path, pick = split_spec(source)
        try:
            found = _look(path, pick, options)
        except OSError as error:
            raise SlideError(f"{path} cannot be searched", found=str(error)) from error
        known |= {ref.id for ref in found.refs} | set(found.absent)
        if pick is not None:
            found = Found((_picked(found, pick, path),))
        refs.extend(found.refs)
        absent.update(found.absent)
    refs.sort(key=lambda ref: ref.id)
    _check_found(refs, absent, sources, options)
    patients = None
    if options.patients is not None:
        patients = read_patients(options.patients)
        check_patients(patients, options.patients, needed=[r.id for r in refs], known=known)
    obs = _read_obs_table(refs, options)
    return Found(
        tuple(
            replace(
                ref,
                read=functools.partial(_read_validated, ref, options, patients, obs),
                image=options.image,
            )
            for ref in refs
        ),
        {id: reason for id, reason in sorted(absent.items()) if id not in {r.id for r in refs}},
    )


def read_one(spec: str | Path, options: ReadOptions | None = None) -> Slide:
    """Read the slide of a path that holds exactly one, or of `PATH::ID`."""
    refs = find_slides([spec], options).refs
    only_id(spec, [ref.id for ref in refs])
    return refs[0].read()


def split_spec(spec: str | Path) -> tuple[Path, str | None]:
    """`PATH::ID` -> (PATH, ID), `PATH` -> (PATH, None); a path that exists is never split."""
    path, separator, id = str(spec).rpartition("::")
    if separator and not Path(spec).exists():
        return Path(path), check_id(id, spec)
    return Path(spec), None


def only_id(spec: str | Path, ids: Sequence[str]) -> str:
    """The id of the one slide that `spec` holds; several are a SlideError that lists them."""
    if len(ids) > 1:
        raise SlideError(
            f"{spec} holds {len(ids)} slides",
            expected="one slide",
            found=", ".join(ids[:20]) + (", ..." if len(ids) > 20 else ""),
            fix=f"pick one: {spec}::{ids[0]}",
        )
    return ids[0]


def _look(path: Path, pick: str | None, options: ReadOptions) -> Found:
    """The slides of one source; only `pick` of a file of several libraries."""
    if not path.exists():
        raise SlideError(f"{path} does not exist", expected="a slide or a folder of slides")
    reader = _reader(path, options)
    if reader is not None:
        if pick is not None and reader in (h5ad, spatialdata, visium):
            ref = reader.find_library(path, pick, options)
            return Found((ref,)) if ref is not None else reader.find(path, options)
        found: Found = reader.find(path, options)
        return found
    if not path.is_dir():
        raise _nothing(path, options)
    refs: list[SlideRef] = []
    absent: dict[str, str] = {}
    for child in sorted(path.iterdir()):
        reader = None if child.name.startswith(".") else _reader(child, options)
        if reader is None:
            continue
        try:
            found = reader.find(child, options)
        except SlideError as error:
            absent[child.name] = error.one_line()
        else:
            refs.extend(found.refs)
            absent.update(found.absent)
    if not refs and not absent:
        raise _nothing(path, options)
    return Found(tuple(refs), absent)


def _reader(path: Path, options: ReadOptions) -> ModuleType | None:
    for name, reader in _READERS.items():
        if options.format in ("auto", name) and reader.recognise(path):
            return reader
    return None


def _nothing(path: Path, options: ReadOptions) -> SlideError:
    looked_for = [
        reader.LOOKS_FOR for name, reader in _READERS.items() if options.format in ("auto", name)
    ]
    if path.is_dir():
        names = sorted(child.name + "/" * child.is_dir() for child in path.iterdir())
        found = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")
    else:
        found = f"a file of {path.stat().st_size} bytes"
    return SlideError(
        f"no slide in {path}",
        expected="\n            or ".join(looked_for),
        found=found or "an empty folder",
    )


def _picked(found: Found, id: str, path: Path) -> SlideRef:
    for ref in found.refs:
        if ref.id == id:
            return ref
    if id in found.absent:
        raise SlideError(f"{path}::{id} cannot be read", found=found.absent[id])
    raise SlideError(
        f"{path} holds no slide {id!r}", fix=nearest(id, [ref.id for ref in found.refs])
    )


def _check_found(
    refs: Sequence[SlideRef],
    absent: Mapping[str, str],
    sources: Sequence[str | Path],
    options: ReadOptions,
) -> None:
    """Refuse nothing at all, two slides with one id, and options that fit one slide only."""
    if not refs:
        reasons = [f"{id}: {reason}" for id, reason in sorted(absent.items())]
        raise SlideError(
            f"no slide to read in {', '.join(map(str, sources)) or 'no source'}",
            expected="at least one slide with its files",
            found="; ".join(reasons[:3]) + (f"; {len(reasons) - 3} more" if reasons[3:] else ""),
        )
    seen: dict[str, SlideRef] = {}
    for ref in refs:
        check_id(ref.id, ref.source)
        if ref.id in seen:
            raise SlideError(
                f"two slides have the id {ref.id!r}",
                expected="unique ids",
                found=f"{seen[ref.id].source} and {ref.source}",
                fix="rename one of the folders or files, or give only one of them",
            )
        seen[ref.id] = ref
    if options.image is not None and len(refs) > 1:
        raise ConfigError(
            "one image was given for several slides", expected="one slide", found=f"{len(refs)}"
        )
    if options.meta is not None and not any(ref.format == "stimage" for ref in refs):
        raise ConfigError(
            "an index of slides was given for sources that are not STimage-1K4M",
            expected=stimage.LOOKS_FOR,
            found=", ".join(sorted({ref.format for ref in refs})),
        )


def _read_obs_table(refs: Sequence[SlideRef], options: ReadOptions) -> pd.DataFrame | None:
    if options.obs is None:
        return None
    table = read_table(options.obs, ("barcode",), "table of spots")
    table = table.rename(columns={c: "slide" for c in table if str(c).lower() == "slide"})
    if "slide" in table:
        table["slide"] = table["slide"].astype(str)
    elif len(refs) > 1:
        raise SlideError(
            f"table of spots {options.obs} does not name slides",
            expected=f"a column 'slide', for {len(refs)} slides whose barcodes may repeat",
            found=", ".join(map(str, table)),
        )
    return table


def _read_validated(
    ref: SlideRef,
    options: ReadOptions,
    patients: Mapping[str, str] | None,
    obs: pd.DataFrame | None,
) -> Slide:
    """Read a slide, add what the options give, and validate the outcome."""
    try:
        slide = ref.read()
    except _FAILURES as error:  # damaged files fail inside the libraries in many ways
        raise SlideError(
            f"slide {ref.id!r} cannot be read from {ref.source}",
            expected=f"{ref.format} files ({ref.why})",
            found=f"{type(error).__name__}: {error}",
        ) from error
    if obs is not None and options.obs is not None:
        slide = join_obs(slide, obs, options.obs)
    if options.gene_map is not None:
        slide = rename_genes(slide, read_gene_map(options.gene_map), options.gene_map)
    elif not options.any_species:
        require_human(slide)
    slide = with_patient(slide, patients, study=ref.format == "stimage")
    slide = check_slide(replace(slide, species=slide.species or options.species or ""))
    if slide.n_spots < options.min_spots:
        raise SlideError(
            f"slide {ref.id!r} has too few spots",
            expected=f"at least {options.min_spots}",
            found=str(slide.n_spots),
        )
    return slide
