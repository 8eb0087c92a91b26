"""What different methods see in a slide's images: features of one width per spot, images alone.

Shape letters: N spots, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from st_align.batch import Role
from st_align.benchmarks.rows import parse_weights
from st_align.colour import colour_statistics
from st_align.encoders.base import FrozenEncoder, FrozenEntry, View, find, registered
from st_align.encoders.lookup import find_weights, load_frozen
from st_align.errors import ConfigError, ModelError, SlideError, StAlignError
from st_align.features import Features, cached_features
from st_align.job import is_first
from st_align.slide import PreparedSlide

if TYPE_CHECKING:
    from st_align.checkpoint import Run
    from st_align.corpus import Corpus
    from st_align.infer import SlideEmbeddings

Read = Callable[[PreparedSlide], NDArray[np.float32]]
"""A slide's features [N, D]."""
VIEWS: tuple[View, ...] = ("spot", "niche")
PARTS = ("r", "e", "r+e")
"""Image embeddings of a run: of the spot, of the niche, both."""


def parse_image_weights(given: Iterable[str]) -> dict[str, str]:
    """`NAME=PATH` of `--weights`; a name that is no frozen image encoder is a ConfigError, a path
    where nothing lies a ModelError: both before any work is done.
    """
    weights = parse_weights(given)
    for name, path in weights.items():
        if not isinstance(find(name, "image"), FrozenEntry):
            raise ConfigError(f"encoder {name!r} has no weights: it is trained with a model")
        if not path.startswith("hf:") and not Path(path).expanduser().exists():
            raise ModelError(
                f"the weights of {name!r} are missing: {path}",
                expected="a file or a folder, or hf:OWNER/NAME",
                found="nothing there",
            )
    return weights


def image_encoders(weights: Mapping[str, str]) -> Iterator[tuple[str, FrozenEncoder | str]]:
    """Every registered frozen image encoder, or in words why it cannot run here; one is loaded at
    a time. `weights` are paths by name; a file that is not the encoder's is a ModelError.
    """
    for name, entry in registered().items():
        if not isinstance(entry, FrozenEntry) or entry.modality != "image":
            continue
        if name in weights:
            yield name, load_frozen(entry, weights[name])
            continue
        try:
            absent = find_weights(entry, None) is None and bool(entry.info.files)
            found = "no weights" if absent else load_frozen(entry, None)
        except StAlignError as error:
            found = error.one_line()
        yield name, found


def colours(slide: PreparedSlide) -> NDArray[np.float32]:
    """[N, 21] statistics of the spot patches: stain and tissue before any network."""
    if slide.spot_patches is None:
        raise SlideError(f"slide {slide.id!r} has no image")
    return colour_statistics(slide.spot_patches)


def frozen(corpus: Corpus, encoder: FrozenEncoder, view: View, niche: str) -> Read:
    """The encoder's pooled vectors of spots or niches, from the corpus's cache, which is filled."""

    def read(slide: PreparedSlide) -> NDArray[np.float32]:
        found = cached_features(
            corpus, slide.id, encoder, view, niche_spec=niche, progress=is_first()
        )
        if found is None:
            raise SlideError(f"slide {slide.id!r} has no image")
        return np.asarray(found.pooled, np.float32)

    return read


def run_parts(run: Run, corpus: Corpus) -> Mapping[str, Read]:
    """r, e and r+e of a run by name; a slide is embedded once for all of them, without its counts
    (r and e read images alone; nothing else is there to be read).
    """
    from st_align.infer import Embedder, without_counts

    seen: dict[str, SlideEmbeddings] = {}
    reader: list[Embedder] = []

    def embedded(slide: PreparedSlide) -> SlideEmbeddings:
        if not reader:
            reader.append(Embedder(run, corpus=corpus, progress=is_first()))
        if slide.id not in seen:
            images = without_counts(slide)
            features: dict[Role, Features | None] = reader[0].image_features(images)
            seen[slide.id] = reader[0].embed(images, features=features)
        return seen[slide.id]

    return {
        "r": lambda slide: embedded(slide).r,
        "e": lambda slide: embedded(slide).e,
        "r+e": lambda slide: np.concatenate([embedded(slide).r, embedded(slide).e], axis=1),
    }
