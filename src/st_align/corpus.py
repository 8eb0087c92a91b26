"""Corpus: prepared slides on disk, opened memory-mapped. `corpus_build` writes it.

    manifest.json      schema version, patch sizes, and an entry for each slide
    quarantine.json    slide -> why it could not be prepared
    sources.json       slide -> where it was read from, relative to the corpus
    slides/ID/         slide.json (the slide's entry, and what it was made from), spots.parquet,
                       genes.parquet, counts/{data,indices,indptr}.npy, spot_patches.npy,
                       niches/SPEC/{neighbors,boxes,patches}.npy, features/ (filled by `features`)
    expression/PANEL/  cache of expression on a panel, one file a slide

Paths inside are relative. Shape letters: N spots, G measured genes, P panel genes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from weakref import WeakValueDictionary

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import sparse

from st_align import keys
from st_align.errors import CorpusError, nearest
from st_align.expression import Genes, Panel, PanelExpression, panel_columns, panel_expression
from st_align.io.check import check_id
from st_align.slide import Niche, PreparedSlide

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.json"
SOURCES = "sources.json"
RECORD = "slide.json"
SPOTS = "spots.parquet"
GENES = "genes.parquet"
COUNTS = ("counts/data.npy", "counts/indices.npy", "counts/indptr.npy")
SPOT_PATCHES = "spot_patches.npy"
_MANIFEST = {"spot_px": int, "niche_px": int, "slides": dict}
_RECORD = {"request": str, "slide": dict}
_ENTRY = {
    **dict.fromkeys(
        ("technology", "source", "patient", "patient_origin", "tissue", "species"), str
    ),
    **{"um_per_px": float | int | None, "n_spots": int, "n_genes": int},
    **{"niches": list, "warnings": list, "sha256": dict},
}
"""Keys of a manifest, of a slide's record, and of the slide's entry in both."""
_ANEW = "prepare the slides again into a new folder"


class Source(NamedTuple):
    """Where a slide was read from: what `prepare` was given, the format, and the image where one
    was given for it.
    """

    path: Path
    format: str
    image: Path | None


class Corpus:
    """An opened corpus; nothing of a slide is read before it is asked for."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._genes: dict[str, Genes] = {}
        self._opened: WeakValueDictionary[str, PreparedSlide] = WeakValueDictionary()

    @classmethod
    def open(cls, path: Path | str) -> Corpus:
        """The corpus in a folder; no corpus, another schema version or no slide: CorpusError."""
        path = Path(path)
        manifest = read_manifest(path)
        if not manifest["slides"]:
            raise CorpusError(
                f"the corpus {path} holds no slides yet",
                found=f"an interrupted preparation, or every slide in {QUARANTINE}",
                fix="mend the sources, then run the same st-align prepare again",
            )
        return cls(path, manifest)

    @property
    def ids(self) -> list[str]:
        """Slide ids, sorted."""
        return sorted(self.manifest["slides"])

    @property
    def quarantined(self) -> dict[str, str]:
        """Slides that could not be prepared, with the reason."""
        path = self.path / QUARANTINE
        reasons: dict[str, str] = read_json(path) if path.is_file() else {}
        return reasons

    @property
    def n_spots(self) -> int:
        """Number of spots of all slides."""
        return sum(int(entry["n_spots"]) for entry in self.manifest["slides"].values())

    def entry(self, slide_id: str) -> dict[str, Any]:
        """What the manifest says of a slide; an unknown id is a CorpusError."""
        slides: dict[str, dict[str, Any]] = self.manifest["slides"]
        if slide_id not in slides:
            reason = self.quarantined.get(slide_id)
            raise CorpusError(
                f"the corpus {self.path} has no slide {slide_id!r}",
                found=f"quarantined: {reason}" if reason else None,
                fix=None if reason else nearest(slide_id, slides),
            )
        return slides[slide_id]

    def folder(self, slide_id: str) -> Path:
        """Where the columns of a slide lie."""
        return self.path / "slides" / slide_id

    def source(self, slide_id: str) -> Source | None:
        """Where a slide was read from; None where the corpus does not say."""
        path = self.path / SOURCES
        found = read_json(path).get(slide_id) if path.is_file() else None
        if not isinstance(found, dict) or not {"path", "format", "image"} <= set(found):
            return None
        place, image = self.path / found["path"], found["image"]
        image = None if image is None else Path(os.path.normpath(self.path / image))
        return Source(Path(os.path.normpath(place)), found["format"], image)

    def slides(self, ids: Iterable[str] | None = None) -> list[PreparedSlide]:
        """The slides asked for, or all, in that order."""
        return [self.slide(i) for i in (self.ids if ids is None else ids)]

    def slide(self, slide_id: str) -> PreparedSlide:
        """One slide, its arrays memory-mapped and read-only; a damaged column is a CorpusError.

        As long as somebody holds it, it is not read again: to plan a run asks four times.
        """
        slide = self._opened.get(slide_id)
        if slide is None:
            slide = self._opened[slide_id] = self._read(slide_id)
        return slide

    def _read(self, slide_id: str) -> PreparedSlide:
        entry = self.entry(slide_id)
        columns, n, n_genes = entry["sha256"], entry["n_spots"], entry["n_genes"]
        has_counts, has_image = GENES in columns, SPOT_PATCHES in columns
        side = self.manifest["spot_px"]
        return PreparedSlide(
            id=slide_id,
            technology=entry["technology"],
            source=entry["source"],
            patient=entry["patient"],
            patient_origin=entry["patient_origin"],
            tissue=entry["tissue"],
            species=entry["species"],
            um_per_px=entry["um_per_px"],
            spots=self._table(slide_id, SPOTS, n, ("barcode", "x", "y", keys.TOTAL_UMI)),
            genes=self._slide_genes(slide_id, columns[GENES], n_genes) if has_counts else None,
            counts=self._counts(slide_id, n, n_genes) if has_counts else None,
            spot_patches=self._array(slide_id, SPOT_PATCHES, "u", (n, side, side, 3))
            if has_image
            else None,
            niches={spec: self._niche(slide_id, spec, n, has_image) for spec in entry["niches"]},
            licence=entry.get("licence", ""),
            warnings=tuple(entry["warnings"]),
        )

    def expression(self, slide_id: str, panel: Panel) -> PanelExpression:
        """The slide's `panel_expression`, its values float16 and memory-mapped from a cache.

        The first call fills `expression/PANEL/ID.npy`; a corpus that cannot be written to
        serves them from memory.
        """
        path = self.path / "expression" / panel.hash / f"{slide_id}.npy"
        slide = self.slide(slide_id)
        if slide.genes is None:
            return panel_expression(slide, panel)
        try:
            values = map_array(path)
        except (OSError, ValueError):
            values = None
        if values is None or values.shape != (slide.n_spots, len(panel)):
            fresh = panel_expression(slide, panel)
            values = fresh.values.astype(np.float16)
            _keep(path, values)
        return PanelExpression(
            values=values,
            measured=panel_columns(slide.genes, panel) >= 0,
            valid=slide.total_umi > 0,
        )

    def verify(self) -> dict[str, list[str]]:
        """Every column against its checksum: slide -> problems, {} when all is sound."""
        problems = {i: list(self._problems(i)) for i in self.ids}
        return {slide_id: found for slide_id, found in problems.items() if found}

    def _problems(self, slide_id: str) -> Iterable[str]:
        for name, expected in self.entry(slide_id)["sha256"].items():
            path = self.folder(slide_id) / name
            if not path.is_file():
                yield f"slides/{slide_id}/{name} is missing"
            elif sha256(path) != expected:
                yield f"slides/{slide_id}/{name} is damaged: its checksum differs"

    def _niche(self, slide_id: str, spec: str, n: int, has_image: bool) -> Niche:
        where, side = f"niches/{spec}", self.manifest["niche_px"]
        name, patches = f"{where}/neighbors.npy", None
        neighbors = self._array(slide_id, name, "i", (n, None))
        if not ((neighbors >= -1) & (neighbors < n)).all():
            self._damaged(slide_id, name, f"rows outside -1 to {n - 1}")
        if has_image:
            patches = self._array(slide_id, f"{where}/patches.npy", "u", (n, side, side, 3))
        return Niche(
            neighbors=neighbors,
            boxes=self._array(slide_id, f"{where}/boxes.npy", "f", (n, 4)),
            patches=patches,
        )

    def _counts(self, slide_id: str, n: int, n_genes: int) -> sparse.csr_array:
        data_name, indices_name, indptr_name = COUNTS
        data = self._array(slide_id, data_name, "i", (None,))
        indices = self._array(slide_id, indices_name, "i", (len(data),))
        indptr = self._array(slide_id, indptr_name, "i", (n + 1,))
        if indptr[0] != 0 or indptr[-1] != len(data) or (np.diff(indptr) < 0).any():
            self._damaged(slide_id, indptr_name, f"no row ends of {len(data)} entries")
        matrix = sparse.csr_array((data, indices, indptr), shape=(n, n_genes), copy=False)
        # Written in canonical form; saying so spares a look at every entry.
        matrix.has_canonical_format = matrix.has_sorted_indices = True
        return matrix

    def _slide_genes(self, slide_id: str, checksum: str, n_genes: int) -> Genes:
        """Slides of one annotation share one `Genes`: 36,000 names are 3 MB."""
        if checksum not in self._genes:
            table = self._table(slide_id, GENES, n_genes, ("symbol", "ensembl"))
            self._genes[checksum] = Genes(
                symbols=table["symbol"].to_numpy(np.str_),
                ensembl=table["ensembl"].to_numpy(np.str_),
            )
        return self._genes[checksum]

    def _array(
        self, slide_id: str, name: str, kind: str, shape: tuple[int | None, ...]
    ) -> NDArray[Any]:
        """A column of this NumPy kind and shape; None stands for any length."""
        try:
            values = map_array(self.folder(slide_id) / name)
        except (OSError, ValueError) as error:
            self._damaged(slide_id, name, error)
        fits = values.ndim == len(shape) and all(
            wanted in (None, length) for wanted, length in zip(shape, values.shape, strict=True)
        )
        if values.dtype.kind != kind or not fits:
            self._damaged(slide_id, name, f"{values.dtype} {values.shape}, not {kind} {shape}")
        return values

    def _table(self, slide_id: str, name: str, rows: int, columns: Sequence[str]) -> pd.DataFrame:
        try:
            table = pq.read_table(self.folder(slide_id) / name).to_pandas()
        except (OSError, pa.ArrowException) as error:
            self._damaged(slide_id, name, error)
        if len(table) != rows or not set(columns) <= set(table):
            found = f"{len(table)} rows of {', '.join(map(str, table))}"
            self._damaged(slide_id, name, f"{found}, not {rows} of {', '.join(columns)}")
        return table

    def _damaged(self, slide_id: str, name: str, why: Exception | str) -> NoReturn:
        raise CorpusError(
            f"slide {slide_id!r} has a damaged column: {self.folder(slide_id) / name}",
            found=str(why),
            fix=f"delete the folder slides/{slide_id} and run st-align prepare again",
        ) from (why if isinstance(why, Exception) else None)


def map_array(path: Path) -> NDArray[Any]:
    """A `.npy` file memory-mapped and read-only, without an open file left behind (a NumPy
    memmap keeps one for each array: 500 slides would pass the usual limit of 1,024).

    A missing file raises OSError, one that is truncated or no `.npy` ValueError.
    """
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"unknown .npy version {version}")
        shape, fortran, dtype = read_header(file)
        start = file.tell()
    size = math.prod(shape) * dtype.itemsize
    if fortran or dtype.hasobject or path.stat().st_size != start + size:
        raise ValueError(f"{start + size:,} bytes expected, {path.stat().st_size:,} found")
    with pa.memory_map(str(path)) as mapped:
        content = mapped.read_buffer()
    return np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape)


def is_corpus(path: Path) -> bool:
    """Whether a folder holds a corpus, sound or not."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> dict[str, Any]:
    """The sound manifest of a corpus of this schema version, else CorpusError."""
    if not is_corpus(path):
        found = "a file" if path.is_file() else "a folder without it"
        raise CorpusError(
            f"{path} is not a corpus",
            expected=f"a folder with {MANIFEST}",
            found=found if path.exists() else "nothing there",
            fix=f"run: st-align prepare SRC --out {path}",
        )
    manifest = _of_schema(path / MANIFEST, _MANIFEST)
    for slide_id, entry in manifest["slides"].items():
        check_id(slide_id, path)  # the name of a folder: a corpus may come from somebody else
        _require_keys(path / MANIFEST, f"slide {slide_id!r}: ", entry, _ENTRY)
    return manifest


def read_record(path: Path) -> dict[str, Any]:
    """A slide's `slide.json` of this schema version, else CorpusError."""
    record = _of_schema(path, _RECORD)
    _require_keys(path, "slide: ", record["slide"], _ENTRY)
    return record


def _of_schema(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a JSON file, with these keys, when it is of this schema version."""
    values = read_json(path)
    if values.get("schema_version") != SCHEMA_VERSION:
        raise CorpusError(
            f"{path} is of another schema version",
            expected=str(SCHEMA_VERSION),
            found=str(values.get("schema_version")),
            fix=_ANEW,
        )
    _require_keys(path, "", values, kinds)
    return values


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a corpus; damaged: CorpusError."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} is damaged", expected="JSON", found=str(error)) from error
    if not isinstance(values, dict):
        raise CorpusError(f"{path} is damaged", expected="a JSON object")
    return values


def _require_keys(path: Path, where: str, values: Any, kinds: Mapping[str, Any]) -> None:
    """Refuse the JSON file `path` unless `values` at `where` holds these keys of these types."""
    found = values if isinstance(values, dict) else {}
    wrong = [k for k, kind in kinds.items() if k not in found or not isinstance(found[k], kind)]
    if wrong:
        raise CorpusError(
            f"{path} is damaged",
            expected=f"{where}{', '.join(wrong)}",
            found="missing, or of another type",
            fix=_ANEW,
        )


def sha256(path: Path) -> str:
    """Checksum of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keep(path: Path, values: NDArray[np.float16]) -> None:
    """Write a cache file whole; several processes may do so at once, and it may not be possible."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                np.save(file, values, allow_pickle=False)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
