"""Is a run sound? Collapse, leaks of slide identity, attention that does not look, on a corpus.

Everything is measured on embeddings centred on their slide, as readouts are, but for the slide
probe, which asks how much of the slide's identity the raw vectors carry.

Shape letters: N spots, D an embedding's width, T image tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from st_align.attention import Scale, refusal, watched
from st_align.errors import CorpusError
from st_align.infer import Embedder, SlideEmbeddings

if TYPE_CHECKING:
    from st_align.checkpoint import Run
    from st_align.corpus import Corpus

_VECTORS = ("r", "u", "e", "t", "h_spot", "h_niche")
_PAIRS: dict[Scale, tuple[str, str]] = {"spot": ("r", "u"), "niche": ("e", "t")}
_SPOTS, _PAIRS_DRAWN = 1_000, 10_000
"""Of each slide; of all slides, for uniformity."""
_FOLDS = 5


def diagnose(run: Run, corpus: Corpus, *, seed: int = 0) -> dict[str, Any]:
    """What `st-align inspect RUN --diagnose CORPUS` says.

    - `effective_rank` by embedding: exponential of the entropy of its normalised spectrum (Roy
      and Vetterli 2007); 1 is collapse.
    - `alignment` by scale: mean squared distance of an image and its genes, 0 to 4, less is
      better; `uniformity`: log mean Gaussian potential, 0 is collapse (Wang and Isola 2020).
    - `slide_probe`: cross-validated accuracy of guessing the slide from raw vectors, and `chance`.
    - `attention` by scale: spread of a spot's attention over image tokens relative to even
      attention; 0 means that it does not look.

    Terms that no slide can give are absent. A corpus without slides is a CorpusError.
    """
    from tqdm import tqdm

    rng = np.random.default_rng(seed)
    reader = Embedder(run, corpus=corpus)
    found: list[_Drawn] = []
    spread: dict[Scale, list[float]] = {scale: [] for scale in _PAIRS}
    for id in tqdm(corpus.ids, desc="diagnose", unit="slide"):
        slide = corpus.slide(id)
        n = slide.n_spots
        rows = np.sort(rng.choice(n, min(n, _SPOTS), replace=False))
        with watched(run, [s for s in _PAIRS if refusal(run, slide, s) is None]) as shares:
            found.append(_drawn(reader.embed(slide), rows))
        for scale, blocks in shares.items():
            share = np.concatenate(blocks)
            spread[scale].append(float(share.std(axis=1).mean() * share.shape[1]))
    if not found:
        raise CorpusError(f"{corpus.path} holds no slide")
    result: dict[str, Any] = {"n_slides": len(found), "effective_rank": {}, "slide_probe": {}}
    for name in _VECTORS:
        parts = [drawn.present(name) for drawn in found]
        if not sum(len(p) for p in parts):
            continue
        result["effective_rank"][name] = _effective_rank(parts)
        if sum(len(p) >= _FOLDS for p in parts) > 1:
            result["slide_probe"][name] = _slide_probe(parts, seed)
    result |= _geometry(found, rng)
    result["attention"] = {scale: float(np.mean(v)) for scale, v in spread.items() if v}
    return result


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """Some spots of one slide: vectors [n, D] by name, and which hold an image and counts [n]."""

    vectors: Mapping[str, NDArray[np.float32]]
    has_image: NDArray[np.bool_]
    has_counts: NDArray[np.bool_]

    def present(self, name: str) -> NDArray[Any]:
        """[m, D] of the spots that hold something."""
        image, counts = self.has_image, self.has_counts
        kept = {"r": image, "e": image, "u": counts, "t": counts}.get(name, image | counts)
        return self.vectors[name][kept].astype(np.float64)


def _drawn(embeddings: SlideEmbeddings, rows: NDArray[np.intp]) -> _Drawn:
    """Copies, so that a slide's embeddings go when the next slide comes."""
    return _Drawn(
        vectors={name: getattr(embeddings, name)[rows] for name in _VECTORS},
        has_image=embeddings.has_image[rows],
        has_counts=embeddings.has_counts[rows],
    )


def _effective_rank(parts: Sequence[NDArray[Any]]) -> float:
    centred = np.concatenate([p - p.mean(axis=0) for p in parts if len(p)])
    variance = np.linalg.eigvalsh(centred.T @ centred).clip(min=0)
    share = variance / max(variance.sum(), 1e-30)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def _slide_probe(parts: Sequence[NDArray[Any]], seed: int) -> dict[str, float]:
    """Linear discriminant with shrinkage, five folds, slides weighing the same."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    parts = [p for p in parts if len(p) >= _FOLDS]
    slide = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    model = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage="auto", priors=np.full(len(parts), 1 / len(parts))
    )
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    guess = cross_val_predict(model, np.concatenate(parts), slide, cv=folds)
    hits = [float((guess[slide == k] == k).mean()) for k in range(len(parts))]
    return {"accuracy": float(np.mean(hits)), "chance": 1 / len(parts)}


def _geometry(found: Sequence[_Drawn], rng: np.random.Generator) -> dict[str, dict[str, float]]:
    """Alignment and uniformity of the normalised pairs that training pulls together."""
    alignment: dict[str, float] = {}
    uniformity: dict[str, float] = {}
    for scale, (image, gene) in _PAIRS.items():
        pairs = []
        for drawn in found:
            both = drawn.has_image & drawn.has_counts
            pairs.append([_unit(drawn.vectors[name][both]) for name in (image, gene)])
        seen, genes = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        if len(seen) < 2:
            continue
        alignment[scale] = float(((seen - genes) ** 2).sum(axis=1).mean())
        one, other = rng.integers(0, len(seen), (2, _PAIRS_DRAWN))
        apart = ((seen[one] - seen[other]) ** 2).sum(axis=1)[one != other]
        uniformity[scale] = float(np.log(np.exp(-2 * apart).mean()))
    return {"alignment": alignment, "uniformity": uniformity}


def _unit(values: NDArray[Any]) -> NDArray[np.float64]:
    values = values.astype(np.float64)
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))
