"""STimage-1K4M: {Visium,ST}/{coord,gene_exp,image}, and its index of slides."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from st_align.errors import SlideError
from st_align.expression import unify_genes
from st_align.image import open_image
from st_align.io.check import check_id, match_barcodes, raw_counts, spacing
from st_align.io.count_csv import read_count_csv
from st_align.io.refs import TECHNOLOGIES, Found, ReadOptions, SlideRef
from st_align.io.tables import read_table
from st_align.io.technology import from_barcodes, st_places
from st_align.slide import Slide, Technology

LOOKS_FOR = "STimage-1K4M: a folder with coord/, gene_exp/, image/, or a root with Visium/ or ST/"
_COORD, _COUNT = "_coord.csv", "_count.csv"
_IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".btf")
_META = ("slide", "species", "tissue", "tech", "spot_num")
_LICENCE = "MIT, as part of STimage-1K4M"
"""Of the slides that its index names."""


@dataclass(frozen=True)
class _Source:
    """A slide that is wanted; no folder where its technology has none."""

    id: str
    technology: Technology | None
    folder: Path | None
    tissue: str = ""
    species: str = ""
    licence: str = ""


def recognise(path: Path) -> str | None:
    """Why `path` is an STimage root or one of its folders; None when it isn't."""
    if _is_folder(path):
        return "coord/ and gene_exp/"
    named = [name for name in (*TECHNOLOGIES, "VisiumHD") if _is_folder(path / name)]
    return f"{', '.join(named)} with coord/ and gene_exp/" if named else None


def find(path: Path, options: ReadOptions) -> Found:
    """Slides of a root or of one technology's folder, narrowed by the index where given."""
    folders = _folders(path, options)
    if options.meta is None:
        wanted = [
            _Source(id, technology, folder)
            for technology, folder in folders.items()
            for id in _ids(folder)
        ]
    else:
        rows = select_meta(
            options.meta,
            species=options.species,
            technology=options.tech,
            min_spots=options.min_spots,
        )
        wanted = [
            _Source(id, tech, folders.get(tech, folders.get(None)), tissue, species, _LICENCE)
            for id, species, tissue, tech in rows[list(_META[:4])].itertuples(index=False)
        ]
    refs, absent = [], {}
    for source in wanted:
        check_id(source.id, path)
        missing = _missing(source, options)
        if missing:
            absent[source.id] = ", ".join(missing)
        else:
            refs.append(_ref(source, options))
    return Found(tuple(refs), absent)


def select_meta(
    path: Path, *, species: str | None, technology: Technology | None, min_spots: int = 0
) -> pd.DataFrame:
    """Rows of the index that pass the curation; Visium HD is never among them."""
    meta = read_table(path, _META, "index of slides")
    spots = pd.to_numeric(meta["spot_num"], errors="coerce")
    kept = meta["tech"].isin(TECHNOLOGIES if technology is None else [technology])
    kept &= spots >= min_spots
    if species is not None:
        kept &= meta["species"].str.lower() == species.lower()
    if not kept.any():
        raise SlideError(
            f"no slide of {path} passes the curation",
            expected=f"species {species or 'any'}, technology {technology or 'Visium or ST'}, at "
            f"least {min_spots} spots",
            found=f"species {', '.join(sorted(set(meta['species'])))}; technologies "
            f"{', '.join(sorted(set(meta['tech'])))}; up to {spots.max():.0f} spots",
        )
    return meta[kept].assign(spot_num=spots[kept].astype(int))


def _is_folder(path: Path) -> bool:
    return (path / "coord").is_dir() and (path / "gene_exp").is_dir()


def _folders(path: Path, options: ReadOptions) -> dict[Technology | None, Path]:
    """Technology -> its folder; None where a folder doesn't name one."""
    if _is_folder(path):
        name = path.resolve().name
        return {next((t for t in TECHNOLOGIES if t == name), options.tech): path}
    folders: dict[Technology | None, Path] = {
        technology: path / technology
        for technology in TECHNOLOGIES
        if _is_folder(path / technology) and options.technology in (None, technology)
    }
    if not folders:
        raise SlideError(
            f"{path} has no slides of the technology asked for",
            expected=f"{options.technology or 'Visium or ST'}/ with coord/ and gene_exp/",
            found=", ".join(sorted(child.name for child in path.iterdir())),
            fix="VisiumHD is not supported",
        )
    return folders


def _ids(folder: Path) -> list[str]:
    """Ids that any of the three folders names."""
    ids = {p.name.removesuffix(_COORD) for p in (folder / "coord").glob(f"*{_COORD}")}
    ids |= {p.name.removesuffix(_COUNT) for p in (folder / "gene_exp").glob(f"*{_COUNT}")}
    return sorted(ids)


def _tables(folder: Path, id: str) -> tuple[Path, Path]:
    """Coordinates and counts of a slide."""
    return folder / "coord" / f"{id}{_COORD}", folder / "gene_exp" / f"{id}{_COUNT}"


def _image_path(folder: Path, id: str) -> Path | None:
    paths = (folder / "image" / f"{id}{end}" for end in _IMAGES)
    return next((path for path in paths if path.is_file()), None)


def _missing(source: _Source, options: ReadOptions) -> list[str]:
    """The files that a slide lacks."""
    folder, id = source.folder, source.id
    if folder is None:
        return [f"no folder {source.technology}/"]
    tables = _tables(folder, id)
    missing = [f"no {path.relative_to(folder)}" for path in tables if not path.is_file()]
    if not options.no_image and options.image is None and _image_path(folder, id) is None:
        missing.append(f"no image/{id}.png (--no-image reads counts only)")
    return missing


def _ref(source: _Source, options: ReadOptions) -> SlideRef:
    folder, id = source.folder or Path(), source.id
    image = _image_path(folder, id)
    return SlideRef(
        id,
        "stimage",
        folder,
        functools.partial(_read, source, folder, options),
        "coord/ and gene_exp/",
        files=(*_tables(folder, id), *((image,) if image else ())),
    )


def _read(source: _Source, folder: Path, options: ReadOptions) -> Slide:
    id, technology = source.id, source.technology
    coord, gene_exp = _tables(folder, id)
    coordinates = _read_coordinates(coord)
    spots = coordinates.index.to_numpy(str)
    barcodes, counts, symbols = read_count_csv(gene_exp)
    rows = match_barcodes(barcodes, spots, f"slide {id!r}")
    warnings = []
    if len(barcodes) < len(spots):
        warnings.append(f"{len(spots) - len(barcodes)} spots have no counts: left out")
    xy = coordinates[["xaxis", "yaxis"]].to_numpy(np.float64)[rows]
    pitch = spacing(xy)
    fill = 2 * float(coordinates["r"].median()) / pitch if pitch > 0 else float("nan")
    if not 0.25 <= fill <= 1:  # half a pitch for ST, about two thirds for Visium
        warnings.append(f"the stated radius makes spots {fill:.2f} pitches wide: not used")
    if technology is None:
        told = from_barcodes(barcodes)
        technology, reason = told or ("Visium", "nothing tells it, so the usual one")
        warnings.append(f"technology taken to be {technology}: {reason}")
    counts, genes, notes = unify_genes(raw_counts(counts, f"slide {id!r}"), symbols)
    path = options.image or _image_path(folder, id)
    return Slide(
        id=id,
        technology=technology,
        source=str(folder),
        barcodes=barcodes,
        xy=xy,
        places=st_places(barcodes, xy) if technology == "ST" else None,
        counts=counts,
        genes=genes,
        total_umi=None,
        image=None if options.no_image or path is None else open_image(path),
        obs=pd.DataFrame(index=pd.Index(barcodes)),
        patient=id,
        patient_origin="slide",
        tissue=source.tissue,
        species=source.species,
        licence=source.licence,
        warnings=(*warnings, *notes),
    )


def _read_coordinates(path: Path) -> pd.DataFrame:
    """Spot name -> yaxis, xaxis (image px) and r, the radius of a spot."""
    try:
        table = pd.read_csv(path, index_col=0, dtype={0: str}, encoding="utf-8-sig")
        table = table[["yaxis", "xaxis", "r"]].astype(float)
    except (ValueError, KeyError, IndexError) as error:
        raise SlideError(
            f"{path} is not a table of coordinates",
            expected="spot name, yaxis, xaxis, r",
            found=str(error),
        ) from error
    return table.set_axis(table.index.astype(str), axis=0)
