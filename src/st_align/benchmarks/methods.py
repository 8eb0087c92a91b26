"""What a row of `bench domains` is: a method that turns a target slide into an embedding."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from st_align.agreement import View
from st_align.corpus import Corpus
from st_align.domains import Clustering
from st_align.slide import PreparedSlide

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]


ORACLE, BLIND, REFINED = "oracle K", "blind K", ", refined"
"""Tracks: the number of labels known or not; the last is appended where labels were smoothed."""
TRUTH = "truth"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A labelled slide, and the slides on which axes may be fitted for it."""

    slide: PreparedSlide
    labels: NDArray[Any]
    """[N] as text; '' where there is none."""
    fit: Sequence[PreparedSlide]
    protocol: str
    """How far the `fit` slides are from the target."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """`slide_hash` by id, of every slide at hand."""
    corpus: Corpus | None = None
    """Whose slides these are, where they come from one: frozen features are kept in it."""

    @property
    def neighbors(self) -> NDArray[np.int32]:
        """[N, K+1] the lattice ring."""
        return self.slide.niches["lattice"].neighbors

    @property
    def n_labels(self) -> int:
        """How many domains the labels name."""
        return len(set(self.labels.tolist()) - {""})


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """What a method makes of a slide: all that clusterers read, so that it can be kept."""

    x: Floats
    """[N, D] what the one clusterer of every row reads."""
    views: tuple[View, ...] = ()
    """What the method's own clusterer reads where that is not `x`."""
    counted: Floats | None = None
    """[N, D] what the method's authors read the number of domains off where that is not `x`."""
    note: str = ""


class Clusterer(NamedTuple):
    """A clusterer by its name: '' is the one of every row."""

    name: str
    find: Callable[[Embedded, int, int, int], Sequence[Clustering]]
    """(embedding, number of domains, runs, seed) -> labels [N] of each run, and how well they
    fit.
    """


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row: its name, how far it is from a target, what decides its numbers, and the embedding.

    `missing` says why the row cannot be made for a target ('' when it can) without doing the
    work; `key` is JSON-able.
    """

    name: str
    protocol: Callable[[Target], str]
    embed: Callable[[Target, int], Embedded]
    """(target, seed)"""
    own: Clusterer | None = None
    """The clusterer of the method's authors, where it is another one and runs here."""
    missing: Callable[[Target], str] = lambda target: ""
    key: Callable[[Target], Mapping[str, Any]] = lambda target: {}

    @property
    def read_by(self) -> tuple[str, ...]:
        """Names of the clusterers that make a row each: '' is the one of every row."""
        return ("",) if self.own is None else ("", self.own.name)


def always(protocol: str) -> Callable[[Target], str]:
    """The same protocol for every target."""
    return lambda target: protocol


def needs_counts(target: Target) -> str:
    """The reason why a slide without counts has no row."""
    return "" if target.slide.counts is not None else "the slide has no counts"


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global random state, which foreign libraries draw from, seeded inside and restored after."""
    import torch

    state, own = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002
            random.setstate(own)


def with_genes(slide: PreparedSlide, symbols: Sequence[str]) -> PreparedSlide:
    """The slide with these of its genes, in this order; library sizes stay those of all genes."""
    import pandas as pd

    genes = slide.genes
    if genes is None or slide.counts is None:
        raise ValueError(f"slide {slide.id!r} has no counts")
    columns = pd.Index(genes.symbols).get_indexer(list(symbols))
    kept = dataclasses.replace(
        genes, symbols=genes.symbols[columns], ensembl=genes.ensembl[columns]
    )
    return dataclasses.replace(slide, genes=kept, counts=slide.counts[:, columns])
