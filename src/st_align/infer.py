"""A trained model on slides: embeddings, and the AnnData that carries them.

Nothing is fitted on the slide that is embedded, apart from its own mean (`readout`).

Shape letters: N spots, d the model's width, R axes of a readout, P genes of the panel.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from st_align import __version__, keys, store
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
from st_align.mosaic import mosaic
from st_align.provenance import config_hash, licences
from st_align.slide import SPOT_UM, PreparedSlide

if TYPE_CHECKING:
    from anndata import AnnData

    from st_align.corpus import Corpus

Thumbnail = tuple[NDArray[np.uint8], float]
"""RGB [h, w, 3] and its px per full-resolution px, as `ImageSource.thumbnail` gives it."""

_LOW_SHARE = 0.5
_NEAR = 0.5
"""Brain sections never seen keep .9 of the training slides' share, lung and breast .2 to .3."""
_OWN_PREFIX = "stalign_"


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


def to_anndata(
    run: Run,
    slide: PreparedSlide,
    embeddings: SlideEmbeddings,
    *,
    thumbnail: Thumbnail | None = None,
) -> AnnData:
    """The slide as AnnData with the keys of `keys.py`; it is readable as a slide again.

    X holds raw counts; `obsm['X_stalign']` the run's default use and dimensions (the first use
    the slide can fill where that one is absent), `X_stalign_USE` all axes of every use and of the
    linear ones; `obs` the source's columns; `uns['spatial']` the `thumbnail`, by default stitched
    from the niches' patches; `uns['stalign']` where all of it comes from.
    """
    import anndata

    use, dims = _default_use(run, embeddings), run.config.readout.dims
    obs = _obs(slide)
    adata = anndata.AnnData(
        X=None if slide.counts is None else _csr(slide.counts),
        obs=obs,
        var=None if slide.genes is None else _var(slide),
        shape=(slide.n_spots, 0) if slide.counts is None else None,
    )
    adata.obsm[keys.SPATIAL] = slide.spots[["x", "y"]].to_numpy(np.float64)
    for name, values in embeddings.readouts.items():
        adata.obsm[keys.embedding(name)] = values
    for kind, values in embeddings.linear.items():
        adata.obsm[keys.embedding(kind)] = values
    adata.uns[keys.TRAINING] = dict(embeddings.training)
    adata.obsm[keys.EMBEDDING] = embeddings.readouts[use][:, :dims]
    if slide.has_image and slide.um_per_px is not None:
        image, scale = thumbnail or mosaic(slide.niches[run.config.data.niche])
        factors = {
            "tissue_hires_scalef": float(scale),
            "spot_diameter_fullres": SPOT_UM[slide.technology] / slide.um_per_px,
        }
        adata.uns[keys.SPATIAL] = {slide.id: {"images": {"hires": image}, "scalefactors": factors}}
    if slide.licence:
        adata.uns["licence"] = slide.licence
    store.note(adata, **_notes(run, slide, embeddings, use))
    return adata


def _notes(run: Run, slide: PreparedSlide, embeddings: SlideEmbeddings, use: Use) -> dict[str, Any]:
    facts = ("technology", "patient", "patient_origin", "tissue", "species", "um_per_px")
    provenance = {k: v for k, v in run.provenance.items() if k not in ("slides", "held_out")}
    return {
        "version": __version__,
        "slide": slide.id,
        "source": Path(slide.source).name,
        **{name: getattr(slide, name) for name in facts},
        "model": run.path.resolve().name,
        "model_hash": run_hash(run),
        "use": use,
        "dims": min(run.config.readout.dims, embeddings.readouts[use].shape[1]),
        "niche": run.config.data.niche,
        "panel_size": len(run.panel),
        "panel_measured": round(embeddings.panel_measured, 4),
        "variance_on_training_axes": embeddings.shares,
        "n_masked": 0 if slide.counts is None else int((~(slide.total_umi > 0)).sum()),
        "trained_on": training_slides(run),
        "warnings": list(embeddings.warnings),
        "licences": licences(run.provenance, slide.licence),
        "provenance": provenance,
    }


def _default_use(run: Run, embeddings: SlideEmbeddings) -> Use:
    use = run.config.readout.use
    return use if use in embeddings.readouts else next(iter(embeddings.readouts))


def _obs(slide: PreparedSlide) -> pd.DataFrame:
    """The slide's columns by barcode, in types that h5ad holds; what this package wrote into
    the source before is left out, it may come from another model.
    """
    unused = {"barcode", "x", "y"}
    if (slide.spots[keys.ARRAY_ROW] < 0).all():
        unused |= {keys.ARRAY_ROW, keys.ARRAY_COL}
    if slide.counts is None:
        unused.add(keys.TOTAL_UMI)
    kept = [c for c in slide.spots if c not in unused and not str(c).startswith(_OWN_PREFIX)]
    barcodes = pd.Index(slide.spots["barcode"].astype(str).to_numpy(), dtype=object)
    obs = slide.spots[kept].set_axis(barcodes, axis=0)
    if slide.patient_origin in ("table", "study") and not set(keys.PATIENT_COLUMNS) & set(obs):
        obs = obs.assign(patient=slide.patient)
    obs.columns = pd.Index(_h5ad_names([str(c) for c in obs]), dtype=object)
    for name in obs:
        if obs[name].dtype == object:
            known = obs[name].notna()
            obs[name] = pd.Categorical(obs[name].astype(str).where(known))
    return obs


def _h5ad_names(columns: Sequence[str]) -> list[str]:
    """Names without '/', which h5ad takes for a folder; of equal ones all but the first are
    numbered, and a column that needs no new name keeps its own.
    """
    names, taken = list(columns), set()
    for i in sorted(range(len(names)), key=lambda i: "/" in names[i]):
        name = plain = names[i].replace("/", "_")
        number = 1
        while name in taken:
            number += 1
            name = f"{plain}_{number}"
        names[i] = name
        taken.add(name)
    return names


def _var(slide: PreparedSlide) -> pd.DataFrame:
    genes = slide.genes
    if genes is None:
        raise ValueError("counts without genes")
    return pd.DataFrame(
        {"ensembl": genes.ensembl.astype(object)},
        index=pd.Index(genes.symbols.astype(object), dtype=object),
    )


def _csr(counts: Any) -> Any:
    from scipy import sparse

    return sparse.csr_matrix(counts)


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
