"""Expression from the image alone: a ridge head on what a run sees in a slide's picture.

    features   r, e, the frozen niche-image vector and the colours of a spot, each standardised
               within the slide by the slide's own images and weighing the same; averaged over
               `rings` lattice rings
    target     log1p CP10k less the mean of the gene on its training slide
    answer     training mean + features @ weights

Nothing that predicts can reach counts: `image_features` strips them before anything is read.

Shape letters: N spots, D features, g genes, A penalties.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align.batch import Role
from st_align.checkpoint import Run
from st_align.colour import colour_statistics
from st_align.errors import ConfigError, ModelError, SlideError, nearest, require_file
from st_align.expression import Panel, choose_panel, log_normalise, panel_columns
from st_align.features import Features
from st_align.geometry import ring_mean
from st_align.infer import Embedder, run_hash, without_counts
from st_align.provenance import licences
from st_align.ridge import Moments, choose_alpha, moments, solve, total
from st_align.slide import PreparedSlide

if TYPE_CHECKING:
    from st_align.corpus import Corpus

RINGS = (0, 1, 2)
"""How far features are averaged over the lattice; the inner cross-validation chooses."""
_BLOCKS = 5
_MAX_FOLDS = 5
_META = "st-align-head"
_SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class Head:
    """A fitted map from image features to expression; it belongs to one run."""

    panel: Panel
    """The g genes, found on a slide as those of a model are: by symbol, else by Ensembl id."""
    weights: NDArray[np.float32]
    """[D, g]"""
    means: NDArray[np.float32]
    """[g] mean of each gene over the training spots, log1p CP10k: the mean predictor."""
    rings: int
    alpha: float
    cv_error: float
    """Squared error over variance in the inner cross-validation, mean over genes; 1 is the
    predictor of the mean.
    """
    folds: str
    """What was left out in turn: 'patients', 'slides' or 'blocks'."""
    model_hash: str
    slides: Mapping[str, str]
    """Patient of every slide it was fitted on."""
    n_spots: int
    licences: Mapping[str, Any] = field(default_factory=dict)
    """Behind the run it belongs to, whose training slides it was fitted on."""

    def save(self, path: Path) -> None:
        """One safetensors file, written whole or not at all."""
        from safetensors.numpy import save

        from st_align.files import replace_file

        facts = {k: v for k, v in vars(self).items() if k not in ("panel", "weights", "means")}
        facts |= {"schema_version": _SCHEMA, **vars(self.panel)}
        meta = json.dumps(facts, sort_keys=True)
        tensors = {"means": self.means, "weights": self.weights}
        replace_file(path, save(tensors, metadata={_META: meta}))

    def require_run(self, run: Run) -> None:
        """ModelError unless the head was fitted on this run."""
        if self.model_hash != (found := run_hash(run)):
            raise ModelError(
                "the head was fitted on another model",
                expected=f"model {self.model_hash}",
                found=f"{run.path.name}, which is {found}",
                fix="give the model it was fitted on, or fit again: st-align genes fit",
            )

    @classmethod
    def load(cls, path: Path) -> Head:
        """Read `save`'s file; missing, damaged, foreign or of another version: ModelError."""
        from safetensors import SafetensorError, safe_open

        require_file(path, "the gene head", ModelError)
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {})[_META])
                _require_schema(path, facts.pop("schema_version"))
                names = {key: tuple(facts.pop(key)) for key in ("genes", "ensembl")}
                tensors = {key: file.get_tensor(key) for key in ("means", "weights")}
                head = cls(panel=Panel(**names), **tensors, **facts)
                if not head.weights.shape[1] == len(head.means) == len(head.panel):
                    raise ValueError(f"{head.weights.shape[1]} columns, {len(head.panel)} genes")
        except (SafetensorError, OSError, LookupError, ValueError, TypeError) as error:
            raise ModelError(
                f"{path} is no gene head",
                expected="a file written by: st-align genes fit",
                found=str(error) or type(error).__name__,
            ) from error
        return head


def fit_head(
    run: Run,
    slides: Sequence[PreparedSlide],
    genes: Sequence[str],
    *,
    corpus: Corpus | None = None,
    progress: bool = False,
) -> Head:
    """Fit `genes` on slides that have an image and counts.

    The penalty and the number of rings are those with the least error when patients are left
    out in turn; slides where there is one patient; strips of the slide where there is one slide.
    A gene that some slides did not measure is fitted on the others.

    Args:
        run: a finished run.
        slides: what to fit on; those without image or without any count are passed over.
        genes: symbols; each must be measured on one of the slides at least.
        corpus: where the slides come from, if they do: its caches are used.
        progress: show a bar.

    Raises:
        ConfigError: no gene, or one that no slide measured (the nearest is named).
        SlideError: no slide has both image and counts, or they have too few spots.
        ModelError, CorpusError: the slides do not fit the run.

    """
    from tqdm import tqdm

    usable = [s for s in slides if s.has_image and s.counts is not None and s.total_umi.any()]
    panel = _known_genes(genes, usable, len(slides))
    folds, kind = _folds(usable)
    reader = Embedder(run, corpus=corpus)
    parts: dict[int, dict[int, Moments]] = {rings: {} for rings in RINGS}
    mean_sum, mean_n = np.zeros((2, len(panel)))
    for slide in tqdm(usable, desc="image features", disable=not progress):
        target, measured, use = _expression(slide, panel)
        mean_sum[measured] += target[use][:, measured].sum(axis=0)
        mean_n[measured] += use.sum()
        target[:, measured] -= target[use][:, measured].mean(axis=0)
        for rings, features in _ringed(reader, slide):
            for fold in np.unique(folds[slide.id][use]):
                rows = use & (folds[slide.id] == fold)
                _add(parts[rings], fold, moments(features[rows], target[rows], measured))
    choices = {rings: choose_alpha(list(part.values())) for rings, part in parts.items()}
    rings = min(choices, key=lambda r: choices[r].error)
    alpha, error = choices[rings]
    return Head(
        panel=panel,
        weights=solve(total(list(parts[rings].values())), alpha).astype(np.float32),
        means=(mean_sum / mean_n).astype(np.float32),
        rings=rings,
        alpha=alpha,
        cv_error=error,
        folds=kind,
        model_hash=run_hash(run),
        slides={s.id: s.patient for s in sorted(usable, key=lambda s: s.id)},
        n_spots=int(sum((s.total_umi > 0).sum() for s in usable)),
        licences=licences(run.provenance),
    )


def predict(
    head: Head,
    reader: Embedder,
    slide: PreparedSlide,
    *,
    features: Mapping[Role, Features | None] | None = None,
) -> pd.DataFrame:
    """Predicted log1p CP10k [N, g] by barcode, from the slide's image alone.

    `features` are the reader's `image_features` of the slide, where they are at hand.

    Raises:
        ModelError: the head was fitted on another run, or the slide does not fit the run.
        SlideError: the slide has no image, or fewer than 2 spots.

    """
    head.require_run(reader.run)
    seen = dict(_ringed(reader, slide, (head.rings,), features))[head.rings]
    # Expression is not negative, so that cutting at 0 can only bring an answer nearer.
    values = np.maximum(seen @ head.weights + head.means, 0)
    barcodes = slide.spots["barcode"].astype(str)
    return pd.DataFrame(values, index=barcodes, columns=list(head.panel.genes))


def score(predicted: pd.DataFrame, slide: PreparedSlide, head: Head) -> dict[str, Any]:
    """How well `predicted` [N, g] fits the counts of the slide.

    Per gene and as the mean over genes: `mse` in log1p CP10k, `mse_mean_predictor` of answering
    the training mean everywhere, `pcc` within the slide (None where either does not vary).
    Spots without counts are left out, genes that the slide did not measure are listed in
    `absent`; the means are None when all of them are. A slide without counts is a SlideError.
    """
    if slide.counts is None:
        raise SlideError(f"slide {slide.id!r} has no counts to score against")
    target, measured, use = _expression(slide, head.panel)
    if not use.any():
        raise SlideError(f"no spot of slide {slide.id!r} has counts to score against")
    guesses = predicted.to_numpy(np.float64)
    genes: dict[str, dict[str, float | None]] = {}
    for j in np.flatnonzero(measured):
        true, guess = target[use, j], guesses[use, j]
        varies = len(true) > 1 and min(true.std(), guess.std()) > 0
        genes[head.panel.genes[j]] = {
            "mse": float(np.mean((true - guess) ** 2)),
            "mse_mean_predictor": float(np.mean((true - head.means[j]) ** 2)),
            "pcc": float(np.corrcoef(true, guess)[0, 1]) if varies else None,
        }
    overall = {
        name: _mean([gene[name] for gene in genes.values()])
        for name in ("mse", "mse_mean_predictor", "pcc")
    }
    absent = [head.panel.genes[j] for j in np.flatnonzero(~measured)]
    return {"genes": genes, **overall, "absent": absent, "n_spots": int(use.sum())}


def top_hvg(slides: Sequence[PreparedSlide], n: int) -> list[str]:
    """The `n` most variable genes of training slides, chosen as a panel is."""
    return list(choose_panel(slides, n).genes)


def image_features(
    reader: Embedder,
    slide: PreparedSlide,
    features: Mapping[Role, Features | None] | None = None,
) -> NDArray[np.float32]:
    """[N, D] features standardised on the slide; its counts are dropped before it is read."""
    if not slide.has_image:
        raise SlideError(
            f"slide {slide.id!r} has no image to predict from",
            expected="a slide with its histology",
            fix="give the image: --image FILE",
        )
    if slide.n_spots < 2:
        raise SlideError(
            f"slide {slide.id!r} has too few spots", expected="2 or more", found=str(slide.n_spots)
        )
    slide = without_counts(slide)
    features = reader.image_features(slide) if features is None else features
    seen = reader.embed(slide, features=features)
    blocks = [seen.r, seen.e]
    if slide.spot_patches is not None:
        blocks.append(colour_statistics(slide.spot_patches))
    frozen = features.get("niche_image")
    if frozen is not None:
        blocks.append(np.asarray(frozen.pooled, np.float32))
    return np.concatenate([_standardised(block) for block in blocks], axis=1)


def _require_schema(path: Path, version: int) -> None:
    """ModelError unless a head is of this version: others may hold anything."""
    if version != _SCHEMA:
        raise ModelError(
            f"the gene head {path} was not written for this version of ST-Align",
            expected=f"schema version {_SCHEMA}",
            found=str(version),
            fix="use the version that wrote it, or fit again: st-align genes fit",
        )


def _add(sums: dict[int, Moments], fold: int, part: Moments) -> None:
    sums[fold] = sums[fold] + part if fold in sums else part


def _standardised(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, D] with mean 0, equal spread of all columns that vary, and a total variance of 1: a
    wide block weighs as much as a narrow one.
    """
    spread = block.std(axis=0)
    varies = spread > 1e-6
    values = (block - block.mean(axis=0)) / np.where(varies, spread, 1)
    return np.where(varies, values / np.sqrt(max(varies.sum(), 1)), 0).astype(np.float32)


def _ringed(
    reader: Embedder,
    slide: PreparedSlide,
    wanted: Sequence[int] = RINGS,
    seen: Mapping[Role, Features | None] | None = None,
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Features averaged over 0, 1, 2, ... rings, for the numbers `wanted`."""
    features = image_features(reader, slide, seen)
    members = np.asarray(slide.niches[reader.run.config.data.niche].neighbors)
    for rings in range(max(wanted) + 1):
        if rings:
            features = ring_mean(features, members)
        if rings in wanted:
            yield rings, features


def _expression(
    slide: PreparedSlide, panel: Panel
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
    """log1p CP10k [N, g] (0 where not measured), genes measured [g], spots with counts [N]."""
    if slide.genes is None or slide.counts is None:
        raise ValueError(f"slide {slide.id} has no counts")
    columns = panel_columns(slide.genes, panel)
    measured = columns >= 0
    values = np.zeros((slide.n_spots, len(panel)))
    matrix, valid = log_normalise(slide.counts[:, columns[measured]], slide.total_umi)
    values[:, measured] = matrix.toarray()
    return values, measured, valid


def _known_genes(genes: Sequence[str], slides: Sequence[PreparedSlide], n_given: int) -> Panel:
    """The genes asked for, with their Ensembl ids where a slide knows them."""
    if not slides or sum(int((s.total_umi > 0).sum()) for s in slides) < 2:
        raise SlideError(
            "there is no slide to fit genes on",
            expected="a slide with an image and counts, and 2 spots or more",
            found=f"{n_given} slides, {len(slides)} of them with both",
        )
    wanted = list(dict.fromkeys(genes))
    ids: dict[str, str] = {}
    for slide in slides:
        if slide.genes is not None:
            names = zip(slide.genes.symbols.tolist(), slide.genes.ensembl.tolist(), strict=True)
            ids |= {symbol: ids.get(symbol) or ensembl for symbol, ensembl in names}
    unknown = [gene for gene in wanted if gene not in ids]
    if not wanted or unknown:
        raise ConfigError(
            f"gene {unknown[0]!r} was measured on no slide" if unknown else "no gene was given",
            found=f"{len(unknown)} of {len(wanted)} genes unknown" if unknown else None,
            fix=nearest(unknown[0], ids) if unknown else "name genes, or use --top-hvg",
        )
    return Panel(genes=tuple(wanted), ensembl=tuple(ids[gene] for gene in wanted))


def _folds(slides: Sequence[PreparedSlide]) -> tuple[dict[str, NDArray[np.intp]], str]:
    """Fold of every spot by slide: at most five folds of whole patients or whole slides, or
    strips along the longer side of a single slide.
    """
    if len(slides) == 1:
        xy = slides[0].spots[["x", "y"]].to_numpy(np.float64)
        along = xy[:, int(np.ptp(xy, axis=0).argmax())]
        rank = np.argsort(np.argsort(along, kind="stable"), kind="stable")
        return {slides[0].id: rank * min(_BLOCKS, len(xy)) // len(xy)}, "blocks"
    patients = {s.patient for s in slides}
    group = {s.id: s.patient if len(patients) > 1 else s.id for s in slides}
    number = {name: i % _MAX_FOLDS for i, name in enumerate(sorted(set(group.values())))}
    folds = {s.id: np.full(s.n_spots, number[group[s.id]], np.intp) for s in slides}
    return folds, "patients" if len(patients) > 1 else "slides"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
