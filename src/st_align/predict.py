"""Expression from the image alone: a ridge head on what frozen encoders and colour say of a slide.

    features   blocks of the spot's and the niche's image, standardised within the slide
               (`image_blocks`)
    target     log1p CP10k averaged over the niche, less the gene's mean on its training slide
    answer     training mean + (features @ weights) averaged over the niche; of the latter 70 % on
               another patient than the only one of training

Nothing that predicts can reach counts: `image_blocks` strips them before anything is read.

Shape letters: N spots, D features, g genes, A axes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align.batch import Role
from st_align.checkpoint import Run
from st_align.errors import ModelError, SlideError, require_file
from st_align.expression import Panel, choose_panel
from st_align.features import Features
from st_align.geometry import ring_mean
from st_align.image_blocks import ImageBlocks, image_blocks
from st_align.infer import Embedder, run_hash
from st_align.provenance import licences
from st_align.ridge import Moments, choose_alpha, leading_axes, moments, solve, total
from st_align.slide import PreparedSlide
from st_align.targets import Targets, gene_panel, inner_folds, targets

if TYPE_CHECKING:
    from st_align.corpus import Corpus

N_AXES = 512
"""Principal axes of the training features that a head is fitted on: with all of them, its figures
on her2st are the same within .001."""
_AXES_SPOTS = 1536
"""Training spots, spread over slides, that the axes are taken from."""
NEW_PATIENT = 0.7
"""What is left of a deviation on a patient that is new to a head of one patient: how it carries
over could not be seen, and it carries over in part only. Of heads of several patients, who were
left out in turn, the penalty knows.
"""
_META = "st-align-head"
_SCHEMA = 3


@dataclass(frozen=True, kw_only=True)
class Head:
    """A fitted map from image features to expression; it belongs to one run."""

    panel: Panel
    """The g genes, found on a slide as those of a model are: by symbol, else by Ensembl id."""
    weights: NDArray[np.float32]
    """[D, g]"""
    means: NDArray[np.float32]
    """[g] mean of each gene over the training spots, log1p CP10k: the mean predictor."""
    alpha: float
    cv_error: float
    """Squared error over variance of the averaged targets in the inner cross-validation, mean
    over genes; 1 is the predictor of the mean.
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

    def trust(self, patient: str) -> float:
        """What is left of deviations on a slide of this patient: 1, or `NEW_PATIENT`."""
        known = set(self.slides.values())
        return NEW_PATIENT if len(known) == 1 and patient not in known else 1.0

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

    The penalty is the one with the least error when patients are left out in turn; slides where
    there is one patient; strips of the slide where there is one slide. A gene that some slides
    did not measure is fitted on the others.

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
    _require_spots(usable, len(slides))
    panel, folds = gene_panel(genes, usable), inner_folds(usable)
    reader = Embedder(run, corpus=corpus)
    bar = tqdm(usable, desc="image features", disable=not progress)
    seen = {slide.id: image_blocks(reader, slide) for slide in bar}
    axes = _axes(usable, seen)
    parts: dict[int, Moments] = {}
    sums, counted = np.zeros((2, len(panel)))
    for slide in tqdm(usable, desc="fit", disable=not progress):
        found = targets(slide, panel)
        use = found.valid
        sums += np.where(found.measured, found.values[use].sum(axis=0), 0)
        counted += np.where(found.measured, use.sum(), 0)
        taught = _taught(found, seen[slide.id].members)
        _add(parts, seen[slide.id].features() @ axes, taught, found, folds.of[slide.id])
    alpha, error = choose_alpha(list(parts.values()))
    return Head(
        panel=panel,
        weights=(axes @ solve(total(list(parts.values())), alpha)).astype(np.float32),
        means=(sums / counted).astype(np.float32),
        alpha=alpha,
        cv_error=error,
        folds=folds.what,
        model_hash=run_hash(run),
        slides={s.id: s.patient for s in sorted(usable, key=lambda s: s.id)},
        n_spots=int(sum((s.total_umi > 0).sum() for s in usable)),
        licences=licences(run.provenance),
    )


def _add(
    parts: dict[int, Moments],
    coordinates: NDArray[np.floating],
    taught: NDArray[np.floating],
    found: Targets,
    folds: NDArray[np.intp],
) -> None:
    """Add a slide's spots with a library, `folds` [N], to the sums of their folds."""
    for fold in np.unique(folds[found.valid]).tolist():
        rows = found.valid & (folds == fold)
        part = moments(coordinates[rows], taught[rows], found.measured)
        parts[fold] = parts[fold] + part if fold in parts else part


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
    blocks = image_blocks(reader, slide, features)
    deviations = ring_mean(blocks.features() @ head.weights, blocks.members)
    values = head.trust(slide.patient) * deviations + head.means
    # Expression is not negative, so that cutting at 0 can only bring an answer nearer.
    values = np.maximum(values, 0)
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
    found = targets(slide, head.panel)
    target, measured, use = found.values, found.measured, found.valid
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


def _require_schema(path: Path, version: int) -> None:
    """ModelError unless a head is of this version: others may hold anything."""
    if version != _SCHEMA:
        raise ModelError(
            f"the gene head {path} was not written for this version of ST-Align",
            expected=f"schema version {_SCHEMA}",
            found=str(version),
            fix="use the version that wrote it, or fit again: st-align genes fit",
        )


def _require_spots(usable: Sequence[PreparedSlide], n_given: int) -> None:
    """SlideError where there is nothing to fit on."""
    if sum(int((s.total_umi > 0).sum()) for s in usable) < 2:
        raise SlideError(
            "there is no slide to fit genes on",
            expected="a slide with an image and counts, and 2 spots or more",
            found=f"{n_given} slides, {len(usable)} of them with both",
        )


def _axes(slides: Sequence[PreparedSlide], seen: Mapping[str, ImageBlocks]) -> NDArray[np.float32]:
    """[D, A] principal axes of the training slides' features, each slide counting the same."""
    each = max(_AXES_SPOTS // len(slides), 2)
    return leading_axes([seen[s.id].features()[s.spread(each)] for s in slides], N_AXES)


def _taught(found: Targets, members: NDArray[np.int32]) -> NDArray[np.float64]:
    """[N, g] targets averaged over the niche and centred on the slide; a single spot's counts are
    mostly noise.
    """
    smooth = ring_mean(found.values, members, found.valid)
    return np.asarray(smooth - smooth[found.valid].mean(axis=0))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
