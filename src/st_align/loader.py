"""Slides to batches: one class for training and for inference.

Features and patches stay memory-mapped; a batch gathers its own rows and nothing else. Rows whose
modality is absent hold zeros.

Shape letters: N spots of a slide, M rows read at once, B spots of a batch, K neighbours, P genes
of the panel, T tokens, D an encoder's own width, p pixels of a patch side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from st_align.augment import augment
from st_align.batch import ROLES, Batch, Role
from st_align.config import Config, EncoderConfig
from st_align.encoders.base import Encoded, FrozenEncoder, View
from st_align.encoders.field import with_field
from st_align.encoders.lookup import load_frozen
from st_align.errors import CorpusError
from st_align.geometry import own_weight, ring_mean
from st_align.model import MODALITY, FrozenShape, frozen_roles
from st_align.slide import PITCH_UM, PreparedSlide

if TYPE_CHECKING:
    from st_align.expression import PanelExpression
    from st_align.features import Features

Key = TypeVar("Key")
Groups = list[tuple["SlideInputs", int, NDArray[np.intp], NDArray[np.intp]]]

VIEW: Mapping[Role, View] = {
    "spot_image": "spot",
    "niche_image": "niche",
    "spot_gene": "spot",
    "niche_gene": "niche",
}
_STATISTICS_ROWS, _STATISTICS_BLOCK = 1024, 64
_NO_PATCH_PX = 32
_AT_ONCE = 1 << 20
"""Bytes: what rows pass through on their way into a batch stays in the processor's cache."""


class RowSource(Protocol):
    """What one role reads of one slide."""

    def read(self, rows: NDArray[np.intp]) -> tuple[NDArray[Any], ...]:
        """Arrays of the given spots: one, or tokens and pooled."""
        ...


@dataclass(frozen=True)
class Patches:
    """uint8 [N, p, p, 3] as cut from the slide."""

    values: NDArray[np.uint8]

    def read(self, rows: NDArray[np.intp]) -> tuple[NDArray[Any], ...]:
        """uint8 [M, p, p, 3]."""
        return (self.values[rows],)


@dataclass(frozen=True)
class SpotGenes:
    """Panel expression [N, P]."""

    values: NDArray[Any]

    def read(self, rows: NDArray[np.intp]) -> tuple[NDArray[Any], ...]:
        """float32 [M, P]."""
        return (self.values[rows].astype(np.float32),)


@dataclass(frozen=True)
class NicheGenes:
    """Mean panel expression over the niche members whose library is not empty (eq. 2)."""

    values: NDArray[Any]
    valid: NDArray[np.bool_]
    members: NDArray[np.int32]
    """[N, K+1] row numbers, -1 fills."""
    own: float = 1.0
    """How much more the spot itself counts than a neighbour; 1 in eq. 2."""

    def read(self, rows: NDArray[np.intp]) -> tuple[NDArray[Any], ...]:
        """float32 [M, P]; 0, the slide's mean, where no member is valid."""
        needed, where = np.unique(self.members[rows], return_inverse=True)
        absent = int(np.searchsorted(needed, 0))
        members = np.where(where >= absent, where - absent, -1).reshape(len(rows), -1)
        needed = needed[absent:]
        return (ring_mean(self.values[needed], members, self.valid[needed], own=self.own),)


class FrozenRows:
    """Cached features of a frozen encoder: tokens [N, T, D] and pooled [N, D].

    Image features are standardised within the slide, channel by channel, with the mean and the
    standard deviation of the slide's own tokens and of its own pooled vectors: a new donor's
    stain shifts them all, and the slide's own image is enough to undo it. No counts are read.
    """

    def __init__(self, features: Features, *, scored: NDArray[np.intp] | None) -> None:
        """`scored` are the rows that mean and standard deviation are taken of, once; None leaves
        features as they are.
        """
        self.arrays = [features.tokens, features.pooled]
        self.scaling = None if scored is None else [_mean_and_sd(a, scored) for a in self.arrays]

    def read(self, rows: NDArray[np.intp]) -> tuple[NDArray[Any], ...]:
        """float32 [M, T, D] and [M, D]."""
        # PyTorch turns float16 into float32 several times faster than NumPy.
        read = tuple(torch.from_numpy(np.asarray(a[rows])).float().numpy() for a in self.arrays)
        if self.scaling is not None:
            for values, (mean, sd) in zip(read, self.scaling, strict=True):
                values -= mean
                values /= sd
        return read


@dataclass(frozen=True, kw_only=True)
class SlideInputs:
    """What a model reads of one slide; `sources` lacks the roles whose modality is absent."""

    id: str
    neighbors: NDArray[np.int32]
    """[N, K+1] row numbers, self first, -1 fills."""
    has_image: bool
    has_counts: NDArray[np.bool_]
    """[N]"""
    sources: Mapping[Role, RowSource]
    pitch_um: float

    @property
    def n_spots(self) -> int:
        """Number of spots N."""
        return len(self.neighbors)

    @property
    def near_expression(self) -> NicheGenes | None:
        """Niche expression in which near spots count more: what linear views read; None where no
        network of ours reads the niche's counts.
        """
        niches = self.sources.get("niche_gene")
        if not isinstance(niches, NicheGenes):
            return None
        return replace(niches, own=own_weight(self.pitch_um))


def slide_inputs(
    slide: PreparedSlide,
    config: Config,
    *,
    expression: PanelExpression | None,
    features: Mapping[Role, Features | None],
) -> SlideInputs:
    """The inputs of one slide. `expression` is None for a slide without counts; `features` holds
    those roles that a frozen encoder fills. A niche spec that was not prepared is a CorpusError.
    """
    niche = slide.niches.get(config.data.niche)
    if niche is None:
        raise CorpusError(
            f"slide {slide.id!r} has no niches {config.data.niche!r}",
            expected=f"one of {', '.join(sorted(slide.niches)) or 'none prepared'}",
            fix=f"run: st-align prepare SRC --out CORPUS --niche {config.data.niche}",
        )
    neighbors = niche.neighbors
    raw: dict[Role, RowSource | None] = {
        "spot_image": _patches(slide.spot_patches),
        "niche_image": _patches(niche.patches),
        "spot_gene": SpotGenes(expression.values) if expression else None,
        "niche_gene": _niche_genes(expression, neighbors, config) if expression else None,
    }
    scored = slide.spread(_STATISTICS_ROWS)
    frozen: dict[Role, RowSource | None] = {
        role: FrozenRows(found, scored=scored if MODALITY[role] == "image" else None)
        if found
        else None
        for role, found in features.items()
    }
    n = slide.n_spots
    return SlideInputs(
        id=slide.id,
        neighbors=neighbors,
        has_image=slide.has_image,
        has_counts=expression.valid if expression else np.zeros(n, bool),
        sources={role: source for role, source in (raw | frozen).items() if source is not None},
        pitch_um=PITCH_UM[slide.technology],
    )


def frozen_encoders(config: Config) -> dict[Role, FrozenEncoder]:
    """The roles that frozen encoders fill, with the encoders loaded (each of them once)."""
    loaded: dict[str, FrozenEncoder] = {}
    roles: dict[Role, FrozenEncoder] = {}
    for role, entry in frozen_roles(config.model).items():
        if entry.name not in loaded:
            own = config.encoders.get(entry.name, EncoderConfig())
            loaded[entry.name] = with_field(load_frozen(entry, own.weights), own.patch_um)
        roles[role] = loaded[entry.name]
    return roles


class SpotData:
    """The spots of some slides, numbered through: slide by slide, in the order given.

    `n_genes` and `frozen` are what the model was built with; they size the zeros of a role that
    no slide here can fill. `pin` puts batches into page-locked memory.
    """

    def __init__(
        self,
        slides: Sequence[SlideInputs],
        *,
        n_genes: int,
        frozen: Mapping[Role, FrozenShape],
        pin: bool = False,
    ) -> None:
        self.slides = list(slides)
        self.starts = np.cumsum([0, *(s.n_spots for s in self.slides)])
        """[S+1] the number of each slide's first spot, then the number of all spots."""
        self._pin = pin
        # As wide for every batch: ranks exchange the niches of their rows.
        self._width = max((s.neighbors.shape[1] for s in self.slides), default=1)
        self._rows = {role: self._row(role, n_genes, frozen) for role in ROLES}

    @property
    def n_spots(self) -> int:
        """Number of spots of all slides."""
        return int(self.starts[-1])

    def batch(self, ids: NDArray[np.int64], *, augment_key: tuple[int, int] | None = None) -> Batch:
        """The spots `ids` [B], in that order; raw patches are augmented for a key (seed, epoch)."""
        groups = self._by_slide(ids)
        neighbors = np.full((len(ids), self._width), -1, np.int64)
        has_image, has_counts = np.zeros((2, len(ids)), bool)
        for slide, start, at, rows in groups:
            near = slide.neighbors[rows]
            neighbors[at, : near.shape[1]] = np.where(near >= 0, near + start, -1)
            has_image[at] = slide.has_image
            has_counts[at] = slide.has_counts[rows]
        inputs = {role: self._gather(role, len(ids), groups) for role in ROLES}
        if augment_key is not None:
            for value in inputs.values():
                if isinstance(value, Tensor) and value.dtype == torch.uint8 and has_image.any():
                    patches = value.numpy()
                    patches[has_image] = augment(patches[has_image], ids[has_image], augment_key)
        return Batch(
            ids=torch.from_numpy(np.array(ids, np.int64)),
            neighbors=torch.from_numpy(neighbors),
            has_image=torch.from_numpy(has_image),
            has_counts=torch.from_numpy(has_counts),
            **inputs,
        )

    def _by_slide(self, ids: NDArray[np.int64]) -> Groups:
        """For each slide among `ids`: it, its first spot's number, positions in the batch, rows."""
        groups: Groups = []
        which = np.searchsorted(self.starts, ids, side="right") - 1
        order = np.argsort(which, kind="stable")
        for at in np.split(order, np.flatnonzero(np.diff(which[order])) + 1):
            number = int(which[at[0]])
            start = int(self.starts[number])
            groups.append((self.slides[number], start, at, ids[at] - start))
        return groups

    def _gather(self, role: Role, n: int, groups: Groups) -> Tensor | Encoded:
        out = [
            torch.zeros((n, *shape), dtype=dtype, pin_memory=self._pin)
            for shape, dtype in self._rows[role]
        ]
        step = max(1, _AT_ONCE * n // max(1, out[0].nbytes))
        for slide, _, at, rows in groups:
            if role not in slide.sources:
                continue
            for some in (slice(i, i + step) for i in range(0, len(rows), step)):
                for tensor, values in zip(out, slide.sources[role].read(rows[some]), strict=True):
                    tensor.numpy()[at[some]] = values
        return Encoded(*out) if len(out) == 2 else out[0]

    def _row(
        self, role: Role, n_genes: int, frozen: Mapping[Role, FrozenShape]
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of one spot's row in each tensor of a role."""
        if role in frozen:
            shape = frozen[role]
            return [
                ((shape.n_tokens, shape.dim), torch.float32),
                ((shape.dim,), torch.float32),
            ]
        if MODALITY[role] == "gene":
            return [((n_genes,), torch.float32)]
        sources = [s.sources[role] for s in self.slides if role in s.sources]
        side = next((s.values.shape[1] for s in sources if isinstance(s, Patches)), _NO_PATCH_PX)
        return [((side, side, 3), torch.uint8)]


def prefetch(
    make: Callable[[Key], Batch], keys: Iterable[Key], *, ahead: int = 2
) -> Generator[Batch]:
    """`make(key)` for each key, in order, made up to `ahead` keys early by one background thread.

    An error of `make` is raised here, when its turn comes.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: deque[Any] = deque()
        try:
            for key in keys:
                waiting.append(pool.submit(make, key))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _patches(values: NDArray[np.uint8] | None) -> Patches | None:
    return None if values is None else Patches(values)


def _niche_genes(
    expression: PanelExpression, neighbors: NDArray[np.int32], config: Config
) -> NicheGenes:
    members = neighbors
    if config.data.niche_without_centre:
        alone = (neighbors[:, 1:] < 0).all(axis=1)
        members = neighbors.copy()
        members[~alone, 0] = -1
    return NicheGenes(expression.values, expression.valid, members)


def _mean_and_sd(
    values: NDArray[Any], rows: NDArray[np.intp]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[D] each, over all axes but the last; a channel that never varies gets sd 1."""
    width = values.shape[-1]
    centre = values[rows[0]].reshape(-1, width)[0].astype(np.float32)
    total, square, count = np.zeros(width), np.zeros(width), 0
    for block in np.array_split(rows, -(-len(rows) // _STATISTICS_BLOCK)):
        some = values[block].reshape(-1, width).astype(np.float32)
        some -= centre  # small numbers: float32 is enough within a block
        total += some.sum(axis=0)
        square += np.einsum("nd,nd->d", some, some)
        count += len(some)
    mean = total / count
    sd = np.sqrt(np.maximum(square / count - mean**2, 0))
    return (centre + mean).astype(np.float32), np.where(sd > 1e-6, sd, 1.0).astype(np.float32)
