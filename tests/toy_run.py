"""A run that was never trained, made in a fraction of a second: random encoders of a fixed seed,
a frozen niche encoder of six numbers, and readouts fitted on the toy slides.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from st_align.checkpoint import FrozenUse, Preprocess, Run, build_model, save_model, save_run
from st_align.checkpoint import save_readouts as _save_readouts
from st_align.config import Config, DataConfig, ModelConfig, ReadoutConfig
from st_align.encoders.base import Encoded, EncoderInfo, FrozenEntry, register
from st_align.expression import choose_panel, panel_expression
from st_align.geometry import ring_mean
from st_align.infer import Embedder
from st_align.readout import Readouts, TrainingSpots, fit_readouts
from st_align.slide import PreparedSlide


class ColourEncoder:
    """Mean and spread of each colour of a patch."""

    name = "toy-colour"
    modality = "image"
    n_tokens, dim = 1, 6
    fingerprint = "c0" * 6

    def encode_images(self, patches: np.ndarray) -> Encoded:
        pixels = patches.reshape(len(patches), -1, 3).astype(np.float32) / 255
        pooled = torch.from_numpy(np.concatenate([pixels.mean(axis=1), pixels.std(axis=1)], axis=1))
        return Encoded(pooled[:, None], pooled)


register(
    FrozenEntry(
        name="toy-colour",
        modality="image",
        info=EncoderInfo(title="toy", licence="BSD-3-Clause", gated=False, source="here"),
        load=lambda _: ColourEncoder(),
    )
)

CONFIG = Config(
    model=ModelConfig(dim=8, heads=2, tokens=4, gene_layers=1, niche_image="toy-colour"),
    data=DataConfig(panel=20),
    readout=ReadoutConfig(use="gene", dims=4),
)


def toy_run(
    slides: list[PreparedSlide], *, config: Config = CONFIG, path: Path = Path("toy-run")
) -> Run:
    """`slides` are its training slides."""
    panel = choose_panel(slides, config.data.panel)
    image = any(s.has_image for s in slides)
    use = FrozenUse(name="toy-colour", fingerprint=ColourEncoder.fingerprint, n_tokens=1, dim=6)
    preprocess = Preprocess(
        spot_px=16 if image else None,
        niche_px=24 if image else None,
        niche=config.data.niche,
        frozen={"niche_image": use},
    )
    encoder = {"name": "toy-colour", "licence": "BSD-3-Clause", "fingerprint": use.fingerprint}
    provenance = {
        "finished": True,
        "slides": [{"id": s.id, "patient": s.patient, "n_spots": s.n_spots} for s in slides],
        "held_out": {"slides": ["z"], "patients": ["Z"]},
        "same_patient": [],
        "encoders": {"niche_image": encoder},
        "panel": {"hash": panel.hash, "n_genes": len(panel)},
        "machine": {"device": "cpu", "precision": "32-true", "ranks": 1, "threads": 1},
        "init": None,
        "seed": 0,
        "batch": 24,
        "epochs": 2,
        "steps": 6,
        "step": 6,
    }
    model = build_model(config, len(panel), preprocess.shapes).eval()
    run = Run(
        path=path,
        model=model,
        config=config,
        panel=panel,
        preprocess=preprocess,
        provenance=provenance,
        readouts=Readouts({}),
    )
    reader = Embedder(run)
    readouts = fit_readouts([training_spots(reader, s) for s in slides])
    return dataclasses.replace(run, readouts=readouts)


def training_spots(reader: Embedder, slide: PreparedSlide) -> TrainingSpots:
    """All spots of a slide, as training hands them to `fit_readouts`."""
    niches = None
    if slide.counts is not None:
        found = panel_expression(slide, reader.run.panel)
        members = slide.niches[reader.run.config.data.niche].neighbors
        niches = ring_mean(found.values, members, found.valid)
    return TrainingSpots(vectors=reader.embed(slide), niches=niches)


def save(run: Run, folder: Path) -> Path:
    """The run as a run folder."""
    splits = {"train": {"slides": sorted(s["id"] for s in run.provenance["slides"])}}
    splits |= {"held_out": run.provenance["held_out"], "same_patient": []}
    save_run(folder, run.config, run.panel, run.preprocess, splits)
    save_model(folder, run.model, run.provenance)
    _save_readouts(folder, run.readouts)
    return folder
