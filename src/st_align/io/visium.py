"""Space Ranger output, versions 1 to 4: `outs`, its parent, or spatial/ beside a matrix.

Of Visium HD the bins of 16 um are read, those of 8 um where they are asked for by name (`PATH::ID`)
or by their own folder.
"""

from __future__ import annotations

import functools
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from st_align import hdf5
from st_align.errors import SlideError, require_file
from st_align.expression import unify_genes
from st_align.image import ImageSource, open_image
from st_align.inflation import (
    require_plausible_arrays,
    require_plausible_parquet,
    require_plausible_text,
)
from st_align.io.check import image_scale, match_barcodes, raw_counts
from st_align.io.refs import Found, ReadOptions, SlideRef
from st_align.slide import Slide, Technology

LOOKS_FOR = "Space Ranger: a folder (or its outs/) with spatial/ and filtered_feature_bc_matrix"
POSITIONS = ("tissue_positions.csv", "tissue_positions_list.csv", "tissue_positions.parquet")
_COLUMNS = [
    "barcode",
    "in_tissue",
    "array_row",
    "array_col",
    "pxl_row_in_fullres",
    "pxl_col_in_fullres",
]
_BINS: dict[str, Technology] = {
    "square_016um": "VisiumHD-16um",
    "square_008um": "VisiumHD-8um",
}
"""In this order: larger bins hold more molecules each."""
_FACTORS = "scalefactors_json.json"
_MATRIX = "filtered_feature_bc_matrix"
_SIZES = ("hires", "lowres")
_IMAGE = "tissue_{}_image.png"
_SPECIES = {"GRCh": "human", "hg": "human", "GRCm": "mouse", "mm": "mouse"}


def recognise(path: Path) -> str | None:
    """Why `path` is Space Ranger output; None when it isn't."""
    folder = _outs(path)
    if _binned(folder) is not None:
        return "binned_outputs/ of Visium HD"
    spatial = folder / "spatial"
    if any((spatial / name).is_file() for name in POSITIONS) or (
        spatial.is_dir() and _matrix(folder) is not None
    ):
        return f"spatial/ in {folder.name}/"
    return None


def find(path: Path, options: ReadOptions) -> Found:
    """The one slide of a Space Ranger folder; its id is the name of the sample's folder, and the
    size of the bins of Visium HD.
    """
    folder = _outs(path)
    binned = _binned(folder)
    if binned is None:
        return Found((_ref(folder, path, options),))
    for name in _BINS:
        if (binned / name).is_dir():
            return Found((_ref(binned / name, path, options),))
    raise SlideError(
        f"{path} holds no bins of Visium HD that can be read",
        expected=" or ".join(_BINS),
        found=", ".join(sorted(child.name for child in binned.iterdir())) or "nothing",
        fix="run Space Ranger with --custom-bin-size=16, or use its bins of 8 um",
    )


def find_library(path: Path, library: str, options: ReadOptions) -> SlideRef | None:
    """Bins of one size of a Visium HD folder, by their id; None where there are none."""
    binned = _binned(_outs(path))
    for name in _BINS if binned is not None else ():
        folder = binned / name if binned is not None else path
        if folder.is_dir() and _id(folder) == library:
            return _ref(folder, path, options)
    return None


def _ref(folder: Path, path: Path, options: ReadOptions) -> SlideRef:
    id = _id(folder)
    return SlideRef(
        id,
        "visium",
        path.parent if path.name == "outs" else path,
        functools.partial(_read, folder, id, options),
        why=recognise(path) or "",
        files=_files(folder),
    )


def _id(folder: Path) -> str:
    """The name of the sample's folder, with the size of the bins of Visium HD."""
    named = folder.resolve()
    bins = f"_{named.name.removeprefix('square_')}" if named.name in _BINS else ""
    if bins:
        named = named.parent.parent if named.parent.name == "binned_outputs" else named.parent
    return (named.parent.name if named.name == "outs" else named.name) + bins


def _files(folder: Path) -> tuple[Path, ...]:
    matrix = _matrix(folder)
    counts = sorted(matrix.iterdir()) if matrix and matrix.is_dir() else [matrix] if matrix else []
    names = (*POSITIONS, _FACTORS, *map(_IMAGE.format, _SIZES))
    return (*counts, *(p for name in names if (p := folder / "spatial" / name).is_file()))


def _outs(path: Path) -> Path:
    outs = path / "outs"
    return outs if outs.is_dir() and not (path / "spatial").is_dir() else path


def _binned(folder: Path) -> Path | None:
    """The folder that holds those of the bins of Visium HD; None for other folders."""
    binned = folder / "binned_outputs"
    if binned.is_dir():
        return binned
    return folder if any(folder.glob("square_*um")) else None


def _matrix(folder: Path) -> Path | None:
    """The count matrix: an h5 file or an mtx folder, or one h5 with a prefix (as downloaded)."""
    for name in (f"{_MATRIX}.h5", _MATRIX):
        if (folder / name).exists():
            return folder / name
    prefixed = sorted(folder.glob(f"*_{_MATRIX}.h5"))
    return prefixed[0] if len(prefixed) == 1 else None


def _read(folder: Path, id: str, options: ReadOptions) -> Slide:
    positions = _read_positions(folder / "spatial")
    in_tissue = positions[positions["in_tissue"] == 1]
    warnings: list[str] = []
    matrix = _matrix(folder)
    if matrix is None:
        warnings.append(f"no {_MATRIX}: the slide is read as an image only")
        slide_spots, counts, genes, species = in_tissue, None, None, ""
    else:
        raw = read_matrix(matrix)
        rows = match_barcodes(raw.barcodes, positions["barcode"].to_numpy(str), str(folder))
        on = positions["in_tissue"].to_numpy()[rows] == 1
        if not on.all():
            warnings.append(f"{int((~on).sum())} spots of the matrix are off the tissue: left out")
        if len(in_tissue) > on.sum():
            warnings.append(f"{len(in_tissue) - on.sum()} spots in tissue have no counts: left out")
        slide_spots, species = positions.iloc[rows[on]], raw.species
        counts, genes, notes = unify_genes(
            raw_counts(raw.counts[np.flatnonzero(on)], str(matrix)), raw.symbols, raw.ensembl
        )
        warnings.extend(notes)
    barcodes = slide_spots["barcode"].to_numpy(str)
    return Slide(
        id=id,
        technology=_BINS.get(folder.resolve().name, "Visium"),
        source=str(folder),
        barcodes=barcodes,
        xy=slide_spots[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(np.float64),
        places=slide_spots[["array_row", "array_col"]].to_numpy(np.int32),
        counts=counts,
        genes=genes,
        total_umi=None,
        image=None if options.no_image else _open_image(folder / "spatial", options.image),
        obs=pd.DataFrame(index=pd.Index(barcodes)),
        patient=id,
        patient_origin="slide",
        species=species,
        warnings=tuple(warnings),
    )


def _open_image(spatial: Path, full_resolution: Path | None) -> ImageSource:
    """The given image, else hires, else lowres."""
    if full_resolution is not None:
        return open_image(full_resolution)
    for size in _SIZES:
        path = spatial / _IMAGE.format(size)
        if path.is_file():
            return open_image(path, _scale_factor(spatial, f"tissue_{size}_scalef"))
    raise SlideError(
        f"no image in {spatial}",
        expected="tissue_hires_image.png or tissue_lowres_image.png",
        fix="give the full-resolution image with --image, or read without one with --no-image",
    )


def _scale_factor(spatial: Path, key: str) -> float:
    path = require_file(spatial / _FACTORS, "scale factors")
    try:
        factors = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise SlideError(
            f"{path} does not give the image's scale", expected="JSON", found=str(error)
        ) from error
    found = factors.get(key) if isinstance(factors, dict) else None
    return image_scale(found, f"{path}: {key}")


def _read_positions(spatial: Path) -> pd.DataFrame:
    """Barcode, in_tissue, place and pixel of every spot of the capture area."""
    path = next((spatial / name for name in POSITIONS if (spatial / name).is_file()), None)
    if path is None:
        raise SlideError(f"no positions in {spatial}", expected=" or ".join(POSITIONS))
    try:
        if path.suffix == ".parquet":
            require_plausible_parquet(path)
            table = pd.read_parquet(path)
        else:
            with path.open(encoding="utf-8-sig") as file:
                first = file.readline()
            header = 0 if first.startswith("barcode") else None
            table = pd.read_csv(path, header=header, encoding="utf-8-sig", dtype={0: str})
        if "barcode" not in table:
            table.columns = pd.Index(_COLUMNS)
        table = table[_COLUMNS].astype({"barcode": str} | dict.fromkeys(_COLUMNS[1:], float))
    except (ValueError, KeyError, OSError) as error:
        raise SlideError(
            f"{path} is not a table of positions",
            expected=", ".join(_COLUMNS),
            found=str(error),
        ) from error
    places = table[_COLUMNS[1:4]].to_numpy()
    if not ((np.abs(places) < 1 << 31) & (places == np.floor(places))).all():
        raise SlideError(
            f"{path}: in_tissue, array_row and array_col are not whole numbers",
            fix="order of the columns: " + ", ".join(_COLUMNS),
        )
    return table


@dataclass(frozen=True)
class Matrix10x:
    """A 10x count matrix: `counts` CSR [N, G] of gene expression only."""

    barcodes: NDArray[np.str_]
    counts: sparse.csr_array
    symbols: NDArray[np.str_]
    ensembl: NDArray[np.str_]
    species: str


def read_matrix(path: Path) -> Matrix10x:
    """Read a 10x h5 file (layouts 2 and 3) or an mtx folder, features of gene expression only."""
    barcodes, counts, features = _read_mtx(path) if path.is_dir() else _read_h5(path)
    if counts.shape != (len(barcodes), len(features)):
        raise SlideError(
            f"{path} is inconsistent",
            expected=f"{len(barcodes)} barcodes x {len(features)} features",
            found=f"a matrix of {counts.shape[0]} x {counts.shape[1]}",
        )
    kept = np.flatnonzero(features["type"] == "Gene Expression")
    if not kept.size:
        raise SlideError(
            f"{path} holds no gene expression",
            expected="features of type 'Gene Expression'",
            found=", ".join(sorted(set(features["type"]))) or "no features",
        )
    features = features.iloc[kept]
    genomes = {
        species
        for g in set(features["genome"])
        for p, species in _SPECIES.items()
        if str(g).startswith(p)
    }
    return Matrix10x(
        barcodes=np.asarray(barcodes, str),
        counts=counts[:, kept],
        symbols=features["name"].to_numpy(str),
        ensembl=features["id"].to_numpy(str),
        species=genomes.pop() if len(genomes) == 1 else "",
    )


def _read_h5(path: Path) -> tuple[NDArray[np.str_], sparse.csr_array, pd.DataFrame]:
    try:
        with hdf5.open_file(path) as file:
            groups = [name for name in file if {"barcodes", "indptr"} <= set(_members(file[name]))]
            if len(groups) != 1:
                raise SlideError(
                    f"{path} is not a 10x matrix",
                    expected="one group (matrix, or a genome) with barcodes, data, indices, indptr",
                    found=", ".join(file) or "an empty file",
                )
            group = file[groups[0]]
            require_plausible_arrays(group, f"{path}: {groups[0]}")
            barcodes = group["barcodes"].asstr()[:]
            n_features = int(group["shape"][0])
            # Columns of the stored CSC matrix are spots: the same arrays are its transpose's CSR.
            counts = sparse.csr_array(
                (group["data"][:], group["indices"][:], group["indptr"][:]),
                shape=(len(group["indptr"]) - 1, n_features),
            )
            counts.check_format()
            return barcodes, counts, _h5_features(group, groups[0])
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise SlideError(
            f"{path} is truncated or not a 10x matrix",
            expected="filtered_feature_bc_matrix.h5 of Space Ranger",
            found=str(error),
            fix="copy or download it again",
        ) from error


def _members(item: Any) -> list[str]:
    return list(item) if hasattr(item, "keys") else []


def _h5_features(group: Any, name: str) -> pd.DataFrame:
    if "features" in group:
        features = group["features"]
        keys = {"id": "id", "name": "name", "type": "feature_type", "genome": "genome"}
        return pd.DataFrame({k: features[v].asstr()[:] for k, v in keys.items()})
    ids, names = group["genes"].asstr()[:], group["gene_names"].asstr()[:]
    return pd.DataFrame({"id": ids, "name": names, "type": "Gene Expression", "genome": name})


def _read_mtx(folder: Path) -> tuple[NDArray[np.str_], sparse.csr_array, pd.DataFrame]:
    from scipy.io import mmread

    def part(*names: str) -> Path:
        found = [folder / f"{n}{end}" for n in names for end in ("", ".gz")]
        return next((p for p in found if p.is_file()), found[0])

    matrix = require_file(part("matrix.mtx"), "count matrix")
    barcode_file = require_file(part("barcodes.tsv"), "barcodes of the matrix")
    feature_file = require_file(part("features.tsv", "genes.tsv"), "features of the matrix")
    options: dict[str, Any] = {"sep": "\t", "header": None, "dtype": str, "keep_default_na": False}
    try:
        sizes = [require_plausible_text(file) for file in (matrix, barcode_file, feature_file)]
        barcodes = pd.read_csv(barcode_file, **options)[0].to_numpy(str)
        table = pd.read_csv(feature_file, **options)
        _require_header(matrix, (len(table), len(barcodes)), sizes[0])
        counts = sparse.csr_array(mmread(matrix).T)
        features = pd.DataFrame({"id": table[0], "name": table[1], "genome": ""})
    except (OSError, ValueError, KeyError, EOFError, zlib.error) as error:
        raise SlideError(
            f"{folder} is damaged",
            expected="matrix.mtx, barcodes.tsv, features.tsv (.gz)",
            found=str(error),
        ) from error
    features["type"] = table.get(2, "Gene Expression")
    return barcodes, counts, features


def _require_header(path: Path, expected: tuple[int, int], size: int) -> None:
    """What a matrix.mtx says of its size, before it is allocated: rows, columns, entries. A line
    of an entry has 4 bytes at least.
    """
    from scipy.io import mminfo

    rows, columns, entries = mminfo(path)[:3]
    if (rows, columns) != expected:
        raise SlideError(
            f"{path.parent} is inconsistent",
            expected=f"{expected[1]} barcodes x {expected[0]} features",
            found=f"a matrix of {columns} x {rows}",
        )
    if 4 * entries > size:
        raise SlideError(f"{path} is truncated", found=f"{size:,} bytes for {entries:,} entries")
