"""What an encoder is: the two protocols, and the registry that joins a name to its builder.

Shape letters: B spots of a batch, T tokens, D an encoder's own width, d the model's width,
G genes of the panel, p pixels of a patch side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from st_align.errors import ConfigError, nearest

if TYPE_CHECKING:
    from st_align.expression import Genes

Modality = Literal["image", "gene"]
View = Literal["spot", "niche"]


class Encoded(NamedTuple):
    """What every encoder returns: tokens for attention and one pooled vector.

    `tokens` is [B, T, width], `pooled` is [B, width].
    """

    tokens: Tensor
    pooled: Tensor


class EncoderInfo(NamedTuple):
    """What a person wants to know before using an encoder."""

    title: str
    licence: str
    gated: bool
    source: str
    """Where users get the weights, in words."""
    files: tuple[str, ...] = ()
    """Published names of the weights file, searched in a weights folder; empty: none needed."""
    requires: tuple[str, ...] = ()
    """Importable modules that must be installed."""
    hub: str | None = None
    """OWNER/NAME of the published repository on the Hugging Face hub."""
    beside: tuple[str, ...] = ()
    """Files that must lie in the same folder as the weights."""

    @property
    def expected(self) -> str:
        """The files to bring, in words."""
        words = " or ".join(filter(None, (", ".join(self.files[:-1]), *self.files[-1:])))
        return f"{words}, with {' and '.join(self.beside)} in its folder" if self.beside else words


@dataclass(frozen=True, kw_only=True)
class TrainedShape:
    """Sizes a trained encoder is built with."""

    dim: int
    heads: int
    tokens: int
    layers: int
    dropout: float
    n_genes: int


class FrozenEncoder(Protocol):
    """A pretrained encoder that is run once per corpus and never trained.

    `fingerprint` is 12 hex digits of weights hash + preprocessing: equal fingerprints, equal
    features. `n_tokens` and `dim` are the T and D of what it returns.
    """

    name: str
    modality: Modality
    n_tokens: int
    dim: int
    fingerprint: str

    def encode_images(self, patches: NDArray[np.uint8]) -> Encoded:
        """RGB patches [B, p, p, 3] -> float32 tokens [B, T, D] and pooled [B, D]."""
        ...

    def encode_genes(
        self, counts: Any, genes: Genes, total_umi: NDArray[np.float64], rng: np.random.Generator
    ) -> Encoded:
        """Raw counts (CSR [B, all genes]) -> float32 tokens [B, T, D] and pooled [B, D].

        `rng` comes in the same state for every batch of a slide: what a spot gives must not depend
        on the batch it is in.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TrainedEntry:
    """A registered encoder that is trained with the model: `build(shape)` gives a module
    that maps uint8 patches [B, p, p, 3] or expression [B, G] to `Encoded` of width d.
    """

    name: str
    modality: Modality
    build: Callable[[TrainedShape], nn.Module]


@dataclass(frozen=True, kw_only=True)
class FrozenEntry:
    """A registered pretrained encoder: `load(weights)` gives a `FrozenEncoder`; `weights` is a
    local file or folder, or None where they ship with a package.
    """

    name: str
    modality: Modality
    info: EncoderInfo
    load: Callable[[Path | None], FrozenEncoder]
    recognises: Callable[[Mapping[str, Tensor]], bool] = lambda tensors: False
    """Whether the tensors of some file are this encoder's: names a file given to another one."""


_REGISTRY: dict[str, TrainedEntry | FrozenEntry] = {}


def register(entry: TrainedEntry | FrozenEntry) -> None:
    """Make an encoder known by its name; a name is given once."""
    if entry.name in _REGISTRY:
        raise ValueError(f"encoder {entry.name!r} is registered twice")
    _REGISTRY[entry.name] = entry


def registered() -> dict[str, TrainedEntry | FrozenEntry]:
    """All encoders by name, sorted."""
    import st_align.encoders  # noqa: F401  (importing the package registers its families)

    return dict(sorted(_REGISTRY.items()))


def find(name: str, modality: Modality | None = None) -> TrainedEntry | FrozenEntry:
    """The encoder called `name`; a misspelt name or the wrong modality is a ConfigError."""
    entries = registered()
    if name not in entries:
        raise ConfigError(f"no encoder is called {name!r}", fix=nearest(name, entries))
    entry = entries[name]
    if modality is not None and entry.modality != modality:
        raise ConfigError(
            f"encoder {name!r} reads {entry.modality}s",
            expected=f"an encoder for {modality}s",
            fix=nearest("", [n for n, e in entries.items() if e.modality == modality]),
        )
    return entry
