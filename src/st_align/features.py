"""Features of frozen encoders: computed once per slide, cached in the corpus, resumable.

Shape letters: N spots of a slide, B spots of a batch, T tokens, D the encoder's width.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from st_align.corpus import Corpus, map_array, read_json
from st_align.corpus_files import PART, locked, locked_by, write_json, writing
from st_align.encoders.base import Encoded, FrozenEncoder, View
from st_align.encoders.field import FieldEncoder
from st_align.errors import CorpusError, ModelError, SlideError
from st_align.files import replace_file, sync_folder
from st_align.geometry import incidence
from st_align.provenance import frozen_facts, licences
from st_align.recut import Cut, field_cut, field_px, field_warning, source_image
from st_align.slide import Niche, PreparedSlide
from st_align.spill import Spill

_BATCH = {"cpu": 16, "cuda": 64}
"""Spots at once. On a CPU more make activations so large that the C library takes them from the
system anew each time: half of the time then goes into page faults.
"""
_SYNC_EVERY, _SYNC_SECONDS = 64, 30.0
"""Batches, and seconds, between two syncs of a cache that is being filled: a slow network must not
lose what it took many minutes to see.
"""

_LIMIT = float(np.finfo(np.float16).max)
_FILES = ("tokens.npy", "pooled.npy")
RECORD = "encoder.json"
"""Beside them: the encoder, and the licences of its weights and of the slide."""

Arrays = tuple[NDArray[np.float16], NDArray[np.float16]]
Read = Callable[[int, int], tuple[Encoded, NDArray[np.bool_]]]


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a frozen encoder makes of a slide, in memory or memory-mapped."""

    tokens: NDArray[np.float16]
    """[N, T, D]"""
    pooled: NDArray[np.float16]
    """[N, D]"""


def slide_features(
    slide: PreparedSlide,
    encoder: FrozenEncoder,
    view: View,
    *,
    niche_spec: str,
    batch: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Features | None:
    """Encode the spots of a slide, or their niches of `niche_spec`; None where the slide lacks
    what the encoder reads.

    A gene encoder reads the raw counts of all genes, summed over the members for the niche view;
    spots without a library get zeros. Chance, if an encoder uses any, is seeded by `seed`. What is
    too large for memory lies in a temporary file.
    """
    work = _Work(slide, encoder, view, niche_spec, batch or batch_size(), seed, progress)
    if not work.possible:
        return None
    tokens, pooled = (Spill(shape, np.float16) for shape in work.shapes)
    for stop, arrays in work.encoded(first=0):
        rows = slice(stop - len(arrays[0]), stop)
        tokens.values[rows], pooled.values[rows] = arrays
        for spill in (tokens, pooled):
            if stop % spill.rows < work.batch:
                spill.written()
    found = (np.asarray(spill.values, np.float16) for spill in (tokens, pooled))
    return Features(**dict(zip(("tokens", "pooled"), found, strict=True)))


def cached_features(
    corpus: Corpus,
    slide_id: str,
    encoder: FrozenEncoder,
    view: View,
    *,
    niche_spec: str,
    batch: int | None = None,
    progress: bool = False,
) -> Features | None:
    """`slide_features` of a corpus slide, memory-mapped from its cache, which is filled if need be.

    A slide that was left half-done goes on where it stopped; two processes do not fill one cache
    at once. A corpus that cannot be written to, or has no room, is an OutputError.
    """
    slide = corpus.slide(slide_id)
    size = batch or batch_size()
    work = _Work(slide, encoder, view, niche_spec, size, 0, progress, corpus)
    if not work.possible:
        return None
    folder = feature_folder(corpus, slide_id, encoder, view, niche_spec)
    if not folder.is_dir():
        with writing(folder, sum(2 * math.prod(shape) for shape in work.shapes)):
            _fill(folder, work)
    try:
        tokens, pooled = (map_array(folder / name) for name in _FILES)
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"the features of slide {slide_id!r} are damaged: {folder}",
            found=str(error),
            fix="delete this folder: it is filled again when it is needed",
        ) from error
    return Features(tokens=tokens, pooled=pooled)


def batch_size() -> int:
    """How many spots an encoder sees at once on this machine; it changes no feature."""
    return _BATCH["cuda" if torch.cuda.is_available() else "cpu"]


def feature_folder(
    corpus: Corpus, slide_id: str, encoder: FrozenEncoder, view: View, niche_spec: str
) -> Path:
    """Where the features of a corpus slide lie; the folder exists once they are whole."""
    place = view if view == "spot" else f"{view}-{niche_spec}"
    return corpus.folder(slide_id) / "features" / f"{encoder.name}-{encoder.fingerprint}-{place}"


def feature_record(folder: Path) -> dict[str, Any]:
    """What a folder of features says of itself; {} for one of an earlier version."""
    path = folder / RECORD
    return read_json(path) if path.is_file() else {}


@dataclass(frozen=True)
class _Work:
    """One slide to encode."""

    slide: PreparedSlide
    encoder: FrozenEncoder
    view: View
    niche_spec: str
    batch: int
    seed: int
    progress: bool
    corpus: Corpus | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def possible(self) -> bool:
        """Whether the slide has what the encoder reads."""
        slide = self.slide
        return slide.has_image if self.encoder.modality == "image" else slide.counts is not None

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of tokens and pooled."""
        n_spots, encoder = self.slide.n_spots, self.encoder
        return (n_spots, encoder.n_tokens, encoder.dim), (n_spots, encoder.dim)

    @property
    def record(self) -> dict[str, Any]:
        """Where the features come from, and the licences behind them."""
        facts = frozen_facts(self.encoder)
        behind = licences({"encoders": {self.view: facts}}, self.slide.licence)
        field = {"patch_um": getattr(self.encoder, "patch_um", None), "warnings": self.warnings}
        return {**facts, "view": self.view, **field, "licences": behind}

    def encoded(self, first: int) -> Iterator[tuple[int, Arrays]]:
        """From spot `first` on: the row after a batch, and its tokens and pooled vectors."""
        n_spots = self.slide.n_spots
        read = self._images() if self.encoder.modality == "image" else self._genes()
        starts = range(first, n_spots, self.batch)
        title = f"{self.encoder.name} {self.slide.id}"
        for start in tqdm(starts, title, unit="batch", leave=False, disable=not self.progress):
            stop = min(start + self.batch, n_spots)
            encoded, given = read(start, stop)
            yield stop, self._checked(encoded, given)

    def _niche(self) -> Niche | None:
        if self.view == "spot":
            return None
        if self.niche_spec not in self.slide.niches:
            raise CorpusError(
                f"slide {self.slide.id!r} was not prepared with the niche {self.niche_spec!r}",
                found=", ".join(self.slide.niches),
                fix=f"run: st-align prepare SRC --out CORPUS --niche {self.niche_spec}",
            )
        return self.slide.niches[self.niche_spec]

    def _images(self) -> Read:
        niche = self._niche()
        patches = self.slide.spot_patches if niche is None else niche.patches
        if isinstance(self.encoder, FieldEncoder):
            cut = self._field(self.encoder)
        else:

            def cut(start: int, stop: int) -> NDArray[np.uint8]:
                # A copy: PyTorch warns of arrays that it may not write to.
                return np.array(patches[start:stop])  # type: ignore[index]

        def read(start: int, stop: int) -> tuple[Encoded, NDArray[np.bool_]]:
            return self.encoder.encode_images(cut(start, stop)), np.ones(stop - start, np.bool_)

        return read

    def _field(self, encoder: FieldEncoder) -> Cut:
        """Squares cut from the slide's image, which is opened again where it is not at hand."""
        slide = self.slide
        image = slide.image
        if image is None and self.corpus is not None:
            image = source_image(self.corpus, slide)
        if image is None:
            raise SlideError(
                f"the image of slide {slide.id!r} is not at hand",
                expected=f"an image to cut squares of {encoder.patch_um:g} um from",
            )
        px = field_px(slide, encoder, self.view)
        if warning := field_warning(image, slide, encoder, px):
            self.warnings.append(warning)
            if self.progress:
                tqdm.write(f"warning: {warning}", file=sys.stderr)
        return field_cut(image, slide, encoder, self.view, self.niche_spec)

    def _genes(self) -> Read:
        slide, niche = self.slide, self._niche()
        members = np.arange(slide.n_spots)[:, None] if niche is None else niche.neighbors

        def read(start: int, stop: int) -> tuple[Encoded, NDArray[np.bool_]]:
            sums = incidence(members[start:stop], slide.n_spots, dtype=np.int32)
            umi = np.asarray(sums @ slide.total_umi)
            given = umi > 0
            counts = (sums @ slide.counts)[given]
            rng = np.random.default_rng(self.seed)  # the batch must not matter
            return self.encoder.encode_genes(counts, slide.genes, umi[given], rng), given  # type: ignore[arg-type]

        return read

    def _checked(self, encoded: Encoded, given: NDArray[np.bool_]) -> Arrays:
        """float16 tokens and pooled of a batch, zeros where nothing was `given` [B]."""
        out, n = [], int(given.sum())
        for tensor, shape in zip(encoded, self.shapes, strict=True):
            expected, found = (n, *shape[1:]), f"shape {tuple(tensor.shape)}"
            fits = tensor.shape == expected
            # The extremes of a batch tell in one pass what a look at every value tells in ten.
            if fits and n and not torch.stack(tensor.aminmax()).isfinite().all():
                fits, found = False, "NaN or infinity"
            if not fits:
                raise ModelError(
                    f"encoder {self.encoder.name!r} gave unusable features on {self.slide.id!r}",
                    expected=f"finite values of shape {expected}",
                    found=found,
                )
            values = tensor.detach().clamp(-_LIMIT, _LIMIT).half().cpu().numpy()
            if n < len(given):
                filled = np.zeros((len(given), *shape[1:]), np.float16)
                filled[given] = values
                values = filled
            out.append(values)
        return out[0], out[1]


def _fill(folder: Path, work: _Work) -> None:
    """Append batch after batch to the files of a hidden folder, then rename it whole.

    `rows`, beside the files, says how many rows are safely on disk.
    """
    part = folder.with_name(f".{folder.name}{PART}")
    folder.parent.mkdir(exist_ok=True)
    with locked(folder.parent), locked_by(part.with_suffix(".lock")), ExitStack() as stack:
        if folder.is_dir():  # another process filled it while this one waited
            return
        part.mkdir(exist_ok=True)
        shapes = zip(_FILES, work.shapes, strict=True)
        columns = [stack.enter_context(_Column(part / name, shape)) for name, shape in shapes]
        marker = part / "rows"
        safe = int(marker.read_text()) if marker.is_file() else 0
        first = min(safe, *(column.rows for column in columns)) // work.batch * work.batch
        for column in columns:
            column.cut(first)
        synced = time.monotonic()
        for number, (stop, arrays) in enumerate(work.encoded(first), start=1):
            for column, values in zip(columns, arrays, strict=True):
                column.append(values)
            due = number % _SYNC_EVERY == 0 or time.monotonic() - synced > _SYNC_SECONDS
            if due or stop == work.slide.n_spots:
                synced = time.monotonic()
                for column in columns:
                    column.sync()
                replace_file(marker, str(stop).encode())
        write_json(part / RECORD, work.record)
        marker.unlink()
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(part)  # a machine that the locks do not reach was faster
        sync_folder(folder.parent)


class _Column:
    """A float16 `.npy` file that grows by rows; what an interrupted run left in it is kept."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        head = io.BytesIO()
        facts = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(head, facts)
        self._start, self._row = head.tell(), 2 * math.prod(shape[1:])
        self._file = path.open("a+b")
        self._file.seek(0)
        if self._file.read(self._start) != head.getvalue():
            self._file.truncate(0)
            self._file.write(head.getvalue())
        self.rows = (self._file.seek(0, os.SEEK_END) - self._start) // self._row

    def __enter__(self) -> _Column:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def cut(self, rows: int) -> None:
        """Keep the first `rows`."""
        self._file.truncate(self._start + rows * self._row)

    def append(self, values: NDArray[np.float16]) -> None:
        """Write rows at the end."""
        self._file.write(values.tobytes())

    def sync(self) -> None:
        """Make what was appended last."""
        self._file.flush()
        os.fsync(self._file.fileno())
