"""A trained model on slides: embeddings of their spots.

Nothing is fitted on the slide that is embedded, apart from its own mean (`readout`).

Shape letters: N spots, d the model's width, R axes of a readout, P genes of the panel.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from st_align import keys
from st_align.batch import Role
from st_align.checkpoint import Run
from st_align.config import Use
from st_align.embedding import SlideVectors, embed_spots
from st_align.encoders.base import FrozenEncoder
from st_align.errors import ModelError, SlideError
from st_align.expression import PanelExpression, panel_expression
from st_align.features import Features, cached_features, slide_features
from st_align.linear import LinearUse, coordinates, niche_facts, share_explained
from st_align.loader import VIEW, SlideInputs, SpotData, frozen_encoders, slide_inputs
from st_align.model import MODALITY
from st_align.provenance import config_hash
from st_align.slide import PreparedSlide

if TYPE_CHECKING:
    from st_align.corpus import Corpus

_LOW_SHARE = 0.5
_NEAR = 0.5
"""Brain sections never seen keep .9 of the training slides' share, lung and breast .2 to .3."""


@dataclass(frozen=True, kw_only=True)
class SlideEmbeddings(SlideVectors):
    """The vectors of a slide's spots, and what they read out."""

    readouts: Mapping[Use, NDArray[np.float32]]
    """[N, R] by use: centred on the slide, on the axes of the training slides; rows without the
    modality hold 0. Uses that the slide or the model cannot fill are absent.
    """
    linear: Mapping[LinearUse, NDArray[np.float32]]
    """[N, R] of niche expression alone, no network (`linear`); empty without counts."""
    training: Mapping[LinearUse, NDArray[np.float32]]
    """[M, R] of spots of the training slides on the same axes."""
    shares: tuple[float, float] | None
    """Of the variance of niche expression, how much lies on the training axes: on this slide, on
    the training slides. None without counts.
    """
    panel_measured: float
    """Share of the model's panel that the slide measured; 0 without counts."""
    warnings: tuple[str, ...]


class Embedder:
    """A run made ready for several slides: its frozen encoders are loaded once, its model is
    moved to the GPU where there is one.

    With a `corpus`, slides are its slides: frozen features and expression come from its caches,
    which are filled. `progress` shows a bar for each long step. A run that has not ended, or
    other encoder weights than it was trained with, are a ModelError.
    """

    def __init__(self, run: Run, *, corpus: Corpus | None = None, progress: bool = False) -> None:
        if not run.finished:
            raise ModelError(
                f"the training of {run.path.name} has not ended",
                fix=f"finish it: st-align train CORPUS --out {run.path} --resume",
            )
        self.run, self.corpus, self.progress = run, corpus, progress
        self.encoders = frozen_encoders(run.config)
        for role, encoder in self.encoders.items():
            _require_same_encoder(run, role, encoder)
        run.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def of(self, corpus: Corpus | None) -> Embedder:
        """The same for slides of another corpus, or of none."""
        other = copy.copy(self)
        other.corpus = corpus
        return other

    def embed(
        self, slide: PreparedSlide, *, features: Mapping[Role, Features | None] | None = None
    ) -> SlideEmbeddings:
        """Embeddings of all spots of a slide, in the order of its rows.

        Works with image and counts or with either of them; spots without counts keep a row,
        which is 0 where counts are all there is to read.

        Args:
            slide: prepared with the run's niche and patch sizes.
            features: what the slide's `image_features` are, where they are at hand.

        Raises:
            ModelError: the slide does not fit the run (patch sizes, no gene of the panel).
            CorpusError: the slide was not prepared with the run's niche.
            SlideError: the slide has nothing that the run can read.

        """
        run = self.run
        slide, ignored = fitting_slide(run, slide)
        expression = self._expression(slide)
        seen = self.image_features(slide) if features is None else features
        frozen = {
            role: seen[role] if MODALITY[role] == "image" else self._frozen(slide, role, encoder)
            for role, encoder in self.encoders.items()
        }
        inputs = slide_inputs(slide, run.config, expression=expression, features=frozen)
        data = SpotData([inputs], n_genes=len(run.panel), frozen=run.preprocess.shapes)
        vectors = embed_spots(run.model, data, np.arange(slide.n_spots), progress=self.progress)
        readouts = {
            use: run.readouts.apply(use, vectors)
            for use in run.readouts.axes
            if vectors.of(use)[1].any()
        }
        linear, shares = _linear(run, inputs)
        measured = float(expression.measured.mean()) if expression else 0.0
        return SlideEmbeddings(
            **{f.name: getattr(vectors, f.name) for f in dataclasses.fields(SlideVectors)},
            readouts=readouts,
            linear=linear,
            training={use: run.readouts.linear[use].spots for use in linear},
            shares=shares,
            panel_measured=measured,
            warnings=(
                *slide.warnings,
                *ignored,
                *_panel_warnings(run, expression),
                *_distance_warnings(shares),
            ),
        )

    def image_features(self, slide: PreparedSlide) -> dict[Role, Features | None]:
        """What the run's frozen encoders see in a slide's image; None where it has none."""
        return {
            role: self._frozen(slide, role, encoder)
            for role, encoder in self.encoders.items()
            if MODALITY[role] == "image"
        }

    def _frozen(self, slide: PreparedSlide, role: Role, encoder: FrozenEncoder) -> Features | None:
        present = slide.has_image if MODALITY[role] == "image" else slide.counts is not None
        if not present:
            return None
        niche = self.run.config.data.niche
        if self.corpus is not None:
            return cached_features(
                self.corpus, slide.id, encoder, VIEW[role], niche_spec=niche, progress=self.progress
            )
        return slide_features(slide, encoder, VIEW[role], niche_spec=niche, progress=self.progress)

    def _expression(self, slide: PreparedSlide) -> PanelExpression | None:
        if slide.counts is None:
            return None
        if self.corpus is not None:
            return self.corpus.expression(slide.id, self.run.panel)
        return panel_expression(slide, self.run.panel)


def run_hash(run: Run) -> str:
    """12 hex digits of all that decides an embedding: weights, panel, settings, encoders."""
    digest = hashlib.sha256(f"{run.panel.hash} {config_hash(run.config)}".encode())
    for role, use in sorted(run.preprocess.frozen.items()):
        digest.update(f"{role} {use.fingerprint}".encode())
    for name, tensor in sorted(run.model.state_dict().items()):
        digest.update(name.encode() + np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()[:12]


def training_slides(run: Run) -> dict[str, str]:
    """Patient of every slide the run was trained on, those of the run it started from too."""
    seen: dict[str, str] = {}
    source: Mapping[str, Any] | None = run.provenance
    while source:
        seen |= {str(s["id"]): str(s["patient"]) for s in source.get("slides", [])}
        source = source.get("init")
    return dict(sorted(seen.items()))


def fitting_slide(run: Run, slide: PreparedSlide) -> tuple[PreparedSlide, tuple[str, ...]]:
    """The slide as the run can read it; what had to be ignored is said."""
    spec, preprocess = run.config.data.niche, run.preprocess
    ignored: tuple[str, ...] = ()
    if slide.has_image and preprocess.spot_px is None:
        slide = without_image(slide)
        ignored = ("the image is ignored: the model was trained without images",)
    niche = slide.niches.get(spec)
    if slide.spot_patches is not None and niche is not None and niche.patches is not None:
        found = (slide.spot_patches.shape[1], niche.patches.shape[1])
        expected = (preprocess.spot_px, preprocess.niche_px)
        if found != expected:
            raise ModelError(
                f"the patches of slide {slide.id!r} do not fit the model",
                expected="spot and niche patches of {} and {} px".format(*expected),
                found="{} and {} px".format(*found),
                fix="prepare the slide with the sides the model was trained with",
            )
    if not slide.has_image and slide.counts is None:
        raise SlideError(
            f"slide {slide.id!r} has nothing that the model can read",
            expected="an image or counts",
            found=ignored[0] if ignored else "neither",
        )
    return slide, ignored


def without_image(slide: PreparedSlide) -> PreparedSlide:
    """The slide with its counts alone."""
    niches = {k: dataclasses.replace(n, patches=None) for k, n in slide.niches.items()}
    return dataclasses.replace(slide, spot_patches=None, niches=niches)


def without_counts(slide: PreparedSlide) -> PreparedSlide:
    """The slide with its image alone: no counts, no library sizes, none of the source's obs."""
    own = ["barcode", keys.ARRAY_ROW, keys.ARRAY_COL, "x", "y"]
    spots = slide.spots[own].assign(**{keys.TOTAL_UMI: np.nan})
    return dataclasses.replace(slide, spots=spots, counts=None, genes=None)


def _panel_warnings(run: Run, expression: PanelExpression | None) -> tuple[str, ...]:
    if expression is None or (share := float(expression.measured.mean())) >= _LOW_SHARE:
        return ()
    text = f"only {share:.0%} of the model's {len(run.panel)} genes were measured on this slide"
    return (f"{text}: the others count as average",)


def _linear(
    run: Run, inputs: SlideInputs
) -> tuple[dict[LinearUse, NDArray[np.float32]], tuple[float, float] | None]:
    """Linear readouts, and the shares of variance on the axes; nothing without counts."""
    niches, axes = inputs.near_expression, run.readouts.linear
    if niches is None or not axes:
        return {}, None
    facts = niche_facts(niches, inputs.n_spots)
    found = {
        use: coordinates(fitted, niches, facts, use).astype(np.float32)
        for use, fitted in axes.items()
    }
    here = share_explained(axes["linear"], niches, facts, "linear")
    return found, (here, axes["linear"].explained)


def _distance_warnings(shares: tuple[float, float] | None) -> tuple[str, ...]:
    """A slide whose niches vary along other axes than those of training is of another kind."""
    if shares is None or shares[0] >= _NEAR * shares[1]:
        return ()
    here, there = shares
    text = f"this slide is unlike those of training: {here:.0%} of its variation lies on their axes"
    return (f"{text}, {there:.0%} of theirs does; another tissue, disease or technology?",)


def _require_same_encoder(run: Run, role: Role, encoder: FrozenEncoder) -> None:
    expected = run.preprocess.frozen[role]
    if encoder.fingerprint != expected.fingerprint:
        raise ModelError(
            f"the weights of {encoder.name!r} are not those the model was trained with",
            expected=f"fingerprint {expected.fingerprint}",
            found=encoder.fingerprint,
            fix="give the same weights, or train again",
        )
