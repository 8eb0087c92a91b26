"""Rows of `bench hest`: what is read of a sample's images, and how expression is fitted to it.

Shape letters: M spots with a patch, D features, g genes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align.benchmarks.audit import Contender
from st_align.benchmarks.cells import SkippedError
from st_align.benchmarks.genes_models import MEAN, Scaling, ridge_weights
from st_align.benchmarks.genes_models import Sample as Fitted
from st_align.benchmarks.hest_files import Sample
from st_align.benchmarks.image_rows import PARTS, image_encoders
from st_align.checkpoint import Run
from st_align.colour import colour_statistics
from st_align.infer import run_hash
from st_align.io.hest import barcodes_of, patches_of
from st_align.job import is_first
from st_align.slide import Slide
from st_align.trained import STAlign

Floats = NDArray[np.float64]
Fit = Callable[[Sequence[Floats], Sequence[Floats], Floats], Floats]
"""Features [M, D] and targets [M, g] of each training sample, features [M', D] -> [M', g]."""
Read = Callable[[Sample], NDArray[np.floating]]
"""Features [M, D] of a sample's spots, in the order of its patches."""
Sections = Mapping[str, Slide]
"""Slides without counts by sample id."""
OFFICIAL = "official split"
_SEED, _BATCH = 1, 64


def hest_readme(train: Sequence[Floats], targets: Sequence[Floats], test: Floats) -> Floats:
    """StandardScaler, PCA to 256, ridge: the README's table (`dimreduce: PCA`)."""
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = np.concatenate(train)
    pca = PCA(n_components=min(256, *x.shape), random_state=_SEED)
    reduce = make_pipeline(StandardScaler(), pca).fit(x)
    return _upstream_ridge(reduce.transform(x), np.concatenate(targets), reduce.transform(test))


def hest_a13(train: Sequence[Floats], targets: Sequence[Floats], test: Floats) -> Floats:
    """The same ridge on the features as they are (`dimreduce` not set)."""
    return _upstream_ridge(np.concatenate(train), np.concatenate(targets), test)


def cv_alpha(train: Sequence[Floats], targets: Sequence[Floats], test: Floats) -> Floats:
    """Ridge with an intercept on scaled features, its penalty chosen by leaving out training
    samples in turn (fifths of the spots where there is one).
    """
    scaling = Scaling.of([x.astype(np.float32) for x in train])
    mean = np.concatenate(targets).mean(axis=0)
    samples = []
    for i, (x, y) in enumerate(zip(train, targets, strict=True)):
        alone = np.arange(len(x)) * 5 // len(x)
        folds = alone if len(train) == 1 else np.full(len(x), i % 5)
        every = np.ones(y.shape[1], np.bool_)
        samples.append(Fitted(scaling.apply(x.astype(np.float32)), y - mean, every, folds))
    return np.asarray(scaling.apply(test.astype(np.float32)) @ ridge_weights(samples) + mean)


PROTOCOLS: Mapping[str, Fit] = {
    "hest-readme": hest_readme,
    "hest-a13": hest_a13,
    "cv-alpha": cv_alpha,
}


class Reader(NamedTuple):
    """How the samples of a split are read for one test sample of it."""

    read: Read
    identity: str
    """All that decides the features apart from the files."""
    protocol: str = OFFICIAL


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row: its reader by test sample (of a model with several folds they differ); the fit is the
    protocol's unless it has its own. Without a reader `note` says why there is none.
    """

    name: str
    reader: Callable[[str], Reader] | None = None
    fit: Fit | None = None
    note: str = ""


def methods(
    sections: Sections, models: Sequence[Contender], weights: Mapping[str, str]
) -> Iterator[Method]:
    """Every row of the table, one after another: a large encoder is let go before the next."""
    yield _everywhere(
        MEAN, "", lambda sample: np.ones((len(barcodes_of(sample.patches)), 1)), _mean
    )
    yield _everywhere("colour statistics", "colours-1", _by_patch(colour_statistics))
    for name, encoder in image_encoders(weights):
        if isinstance(encoder, str):
            yield Method(name=name, note=encoder)
            continue

        def pooled(patches: NDArray[np.uint8], encode: Any = encoder) -> NDArray[np.floating]:
            found: NDArray[np.floating] = encode.encode_images(patches).pooled.cpu().numpy()
            return found

        yield _everywhere(name, encoder.fingerprint, _by_patch(pooled))
    for model in models:
        yield from _of_model(model, sections)


def _everywhere(name: str, identity: str, read: Read, fit: Fit | None = None) -> Method:
    """The same for every sample."""
    reader = Reader(read, identity)
    return Method(name=name, reader=lambda _: reader, fit=fit)


def _mean(train: Sequence[Floats], targets: Sequence[Floats], test: Floats) -> Floats:
    """The training mean of every gene, everywhere."""
    mean = np.concatenate(targets).mean(axis=0)
    return np.broadcast_to(mean, (len(test), len(mean)))


def _by_patch(encode: Callable[[NDArray[np.uint8]], NDArray[np.floating]]) -> Read:
    """Features of each patch by itself, kept: splits share samples."""
    seen: dict[Path, NDArray[np.floating]] = {}

    def read(sample: Sample) -> NDArray[np.floating]:
        if sample.patches not in seen:
            starts = range(0, len(barcodes_of(sample.patches)), _BATCH)
            blocks = [encode(patches_of(sample.patches, i, i + _BATCH)) for i in starts]
            seen[sample.patches] = np.concatenate(blocks)
        return seen[sample.patches]

    return read


def _of_model(model: Contender, sections: Sections) -> Iterator[Method]:
    """r, e and r+e; each test sample by the run that is farthest from it."""
    hashes = {run.path: run_hash(run) for run in model.runs}
    images = {run.path: RunImages(run, sections) for run in model.runs}
    for part in PARTS:
        reads = {path: seen.reader(part) for path, seen in images.items()}

        def reader(sample: str, part: str = part, reads: Mapping[Path, Read] = reads) -> Reader:
            if sample not in sections:
                return Reader(_unreadable, "")
            run, found = model.for_slide(sections[sample])
            protocol = f"{OFFICIAL}, {found.protocol}"
            return Reader(reads[run.path], f"{hashes[run.path]} {part}", protocol)

        yield Method(name=f"{model.name}, {part}", reader=reader)


def _unreadable(sample: Sample) -> NDArray[np.floating]:
    raise SkippedError(f"{sample.id} is no slide of spots that a model can read")


class RunImages:
    """What a run sees in samples: their tissue is put together from the patches, then cut into the
    spot and niche patches that the run was trained on. r and e are kept, images let go.
    """

    def __init__(self, run: Run, sections: Sections) -> None:
        self.sections = sections
        self._model = STAlign(run, progress=is_first())
        self._seen: dict[str, dict[str, NDArray[np.float32]]] = {}

    def reader(self, part: str) -> Read:
        """Reads `r`, `e` or `r+e`."""
        return lambda sample: self._of(sample)[part]

    def _of(self, sample: Sample) -> dict[str, NDArray[np.float32]]:
        if sample.id not in self._seen:
            if sample.id not in self.sections:
                _unreadable(sample)
            slide = self.sections[sample.id]
            rows = pd.Index(slide.barcodes).get_indexer(pd.Index(barcodes_of(sample.patches)))
            if (rows < 0).any():
                raise SkippedError(f"patches of {sample.id} belong to no spot of its counts")
            found = self._model.embed(slide)
            r, e = found.r[rows], found.e[rows]
            self._seen[sample.id] = {"r": r, "e": e, "r+e": np.concatenate([r, e], axis=1)}
        return self._seen[sample.id]


def _upstream_ridge(x: Floats, y: Floats, test: Floats) -> Floats:
    """hest/bench/trainer.py: alpha = 100 / (D g), no intercept, LSQR."""
    from sklearn.linear_model import Ridge

    ridge = Ridge(solver="lsqr", alpha=100 / (x.shape[1] * y.shape[1]), fit_intercept=False,
                  max_iter=1000, random_state=_SEED)  # fmt: skip
    # Of one gene, scikit-learn gives a vector.
    return np.asarray(ridge.fit(x, y).predict(test)).reshape(len(test), y.shape[1])
