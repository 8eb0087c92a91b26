"""HEST-1k and HEST-bench folders: counts in st/ (or adata/), patches around spots, metadata.

    st/ID.h5ad or adata/ID.h5ad   AnnData, obsm['spatial'] in full-resolution px
    patches/ID.h5                 img [M, p, p, 3], barcode [M, 1], coords [M, 2] (a patch's top
                                  left in full-resolution px); some spots have no patch
    metadata/ID.json              st_technology, pixel_size_um_estimated, patient, organ, ...

Shape letters: M patches, p px of their side.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align.errors import SlideError
from st_align.geometry import fit_scale
from st_align.image import ImageSource, open_image
from st_align.io.anndata_table import read_obs, read_spots
from st_align.io.refs import Found, ReadOptions, SlideRef
from st_align.raster import Pixels, RegionImage
from st_align.slide import LATTICE, PITCH_UM, Slide, Technology

LOOKS_FOR = "HEST: a folder with st/ID.h5ad (or adata/ID.h5ad) and patches/ID.h5"
PATCH_UM_PER_PX = 0.5
"""Of HEST's patches, where their file does not say another."""
_COUNTS = ("st", "adata")
_TECHNOLOGIES: dict[str, Technology] = {"Visium": "Visium", "Spatial Transcriptomics": "ST"}
_DATASETS = ("img", "barcode", "coords")


def recognise(path: Path) -> str | None:
    """Why `path` is a HEST folder; None when it isn't."""
    counts = next((name for name in _COUNTS if (path / name).is_dir()), None)
    if counts is None or not (path / "patches").is_dir():
        return None
    return f"{counts}/ and patches/"


def find(path: Path, options: ReadOptions) -> Found:
    """Samples with counts; those without patches, or of another technology, are absent."""
    refs, absent = [], {}
    folder = next(path / name for name in _COUNTS if (path / name).is_dir())
    for counts in sorted(folder.glob("*.h5ad")):
        id = counts.stem
        meta = _metadata(path, id)
        technology = str(meta.get("st_technology", "Visium"))
        patches = path / "patches" / f"{id}.h5"
        if technology not in _TECHNOLOGIES:
            absent[id] = f"{technology} is not a technology of spots"
        elif not patches.is_file() and options.image is None and not options.no_image:
            absent[id] = f"no patches/{id}.h5 (--no-image reads counts only)"
        else:
            read = functools.partial(_read, path, counts, options)
            files = tuple(f for f in (counts, patches) if f.is_file())
            refs.append(SlideRef(id, "hest", path, read, "counts and patches", files=files))
    return Found(tuple(refs), absent)


def barcodes_of(path: Path) -> NDArray[np.str_]:
    """[M] the spots that a file of patches holds, in its order; damaged: SlideError."""
    with _opened(path) as file:
        values = np.asarray(file["barcode"][:]).ravel()
    return np.array([v.decode() if isinstance(v, bytes) else str(v) for v in values], np.str_)


def patches_of(path: Path, start: int, stop: int) -> Pixels:
    """[M, p, p, 3] RGB of patches `start` to `stop` of a file."""
    with _opened(path) as file:
        return np.asarray(file["img"][start:stop], np.uint8)


class PatchMosaic(RegionImage):
    """The tissue as far as patches around spots show it; white where none does.

    Where patches overlap, the one whose middle is nearest to the middle of the region is on top:
    a crop around a spot is its own patch.
    """

    def __init__(self, path: Path, centres: NDArray[np.float64], um_per_px: float) -> None:
        """`centres` [M, 2] x, y of the patches in full-resolution px, which measure `um_per_px`; a
        patch with a NaN is left out.
        """
        with _opened(path) as file:
            self._side = int(file["img"].shape[1])
            stored_um = _patch_um_per_px(file)
        scale = um_per_px / stored_um
        self._path = path
        self._rows = np.flatnonzero(np.isfinite(centres).all(axis=1))
        self._middle = centres[self._rows] * scale
        width, height = np.ceil(self._middle.max(axis=0) + self._side / 2).astype(int)
        super().__init__((int(height), int(width)), scale)

    def region(self, top: int, bottom: int, left: int, right: int) -> Pixels:
        """RGB of rows top:bottom and columns left:right, put together from the patches there."""
        canvas = np.full((bottom - top, right - left, 3), 255, np.uint8)
        corner = np.rint(self._middle - self._side / 2).astype(int)
        low, high = np.array([left, top]), np.array([right, bottom])
        touching = ((corner < high) & (corner + self._side > low)).all(axis=1)
        away = ((self._middle - (low + high) / 2) ** 2).sum(axis=1)
        rows = np.flatnonzero(touching)
        with _opened(self._path) as file:
            for row in rows[np.argsort(-away[rows], kind="stable")]:
                first, last = (
                    np.maximum(corner[row], low),
                    np.minimum(corner[row] + self._side, high),
                )
                (x0, y0), (x1, y1) = first - corner[row], last - corner[row]
                (u0, v0), (u1, v1) = first - low, last - low
                canvas[v0:v1, u0:u1] = file["img"][self._rows[row], y0:y1, x0:x1]
        return canvas


def _read(root: Path, counts: Path, options: ReadOptions) -> Slide:
    import h5py

    id, meta = counts.stem, _metadata(root, counts.stem)
    patches = root / "patches" / f"{id}.h5"
    mosaic = options.image is None and not options.no_image
    with h5py.File(counts, "r") as file:
        obs = read_obs(file, str(counts))
        kept = np.ones(len(obs), np.bool_)
        if mosaic:
            kept = obs.index.isin(barcodes_of(patches))
            if not kept.any():
                raise SlideError(
                    f"no patch of {patches} belongs to a spot of {counts}",
                    expected="the same barcodes in both",
                    found=f"{', '.join(obs.index[:2])} and {', '.join(barcodes_of(patches)[:2])}",
                )
        spots = read_spots(file, str(counts), obs, kept)
    given = _TECHNOLOGIES.get(str(meta.get("st_technology")))
    technology, reasons = spots.technology(options.tech or given)
    notes = [*spots.warnings, *reasons]
    if not kept.all():
        notes.append(f"{int((~kept).sum())} spots have no patch: left out")
    image: ImageSource | None = open_image(options.image) if options.image else None
    if mosaic:
        lattice, pitch = LATTICE[technology], PITCH_UM[technology]
        um_per_px = meta.get("pixel_size_um_estimated")
        um_per_px = um_per_px or fit_scale(spots.xy, spots.places, lattice, pitch).um_per_px
        centre = dict(zip(spots.barcodes.tolist(), spots.xy, strict=True))
        order = [centre.get(b, np.full(2, np.nan)) for b in barcodes_of(patches).tolist()]
        image = PatchMosaic(patches, np.array(order), float(um_per_px))
    slide = spots.slide(id=id, source=str(counts), given=technology, image=image)
    return replace(
        slide,
        obs=_with_patient(slide.obs, meta),
        tissue=str(meta.get("organ") or ""),
        species=str(meta.get("species") or ""),
        warnings=tuple(notes),
    )


def _with_patient(obs: pd.DataFrame, meta: dict[str, Any]) -> pd.DataFrame:
    """The patient that the metadata names, told apart by study: numbers repeat between them."""
    patient, study = meta.get("patient"), meta.get("dataset_title")
    if not patient or "patient" in obs:
        return obs
    return obs.assign(patient=f"{study}: {patient}" if study else str(patient))


def _metadata(root: Path, id: str) -> dict[str, Any]:
    """Of a sample; {} without the file."""
    path = root / "metadata" / f"{id}.json"
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise SlideError(f"{path} is damaged", expected="JSON", found=str(error)) from error
    if not isinstance(values, dict):
        raise SlideError(f"{path} is damaged", expected="a JSON object")
    return {k: v for k, v in values.items() if v == v}  # NaN, as pandas writes what is missing


def _opened(path: Path) -> Any:
    """The open HDF5 file of patches, with what is needed in it."""
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise SlideError(
            f"{path} is truncated or no file of patches",
            expected="HDF5 as HEST writes it",
            found=str(error),
            fix="download it again",
        ) from error
    missing = [name for name in _DATASETS if name not in file]
    if missing or file["img"].ndim != 4 or len(file["img"]) != len(file["barcode"]):
        found = ", ".join(sorted(file))
        file.close()
        raise SlideError(
            f"{path} is no file of patches",
            expected="img [M, p, p, 3], barcode [M, 1] and coords [M, 2]",
            found=found or "nothing",
        )
    return file


def _patch_um_per_px(file: Any) -> float:
    """What a pixel of the patches measures."""
    attrs = file["coords"].attrs
    if {"pixel_size", "downsample"} <= set(attrs):
        return float(np.ravel(attrs["pixel_size"])[0] * np.ravel(attrs["downsample"])[0])
    return PATCH_UM_PER_PX
