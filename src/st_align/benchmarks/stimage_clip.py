"""CLIP and PLIP for images and genes after STimage-1K4M (Chen et al. 2024, arXiv 2406.06393).

A frozen image tower and log-normalised genes, each through one linear layer to 32 dimensions,
brought together by the symmetric contrastive loss; the two embeddings side by side are clustered.
Upstream's settings throughout. At a batch of 1,024 and a learning rate of 5e-5, 15 epochs of one
slide are some 60 small steps: the layers stay near their start, and that is the protocol.

Shape letters: N spots, D width of the image tower, P genes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from st_align.expression import Panel, log_normalise, panel_columns
from st_align.slide import PreparedSlide

DIM = 32
SLIDE_GENES, OVERLAP_GENES = 128, 100
EPOCHS, BATCH, LR, BETAS, DECAY = 15, 1024, 5e-5, (0.9, 0.98), 0.2
SCALE = math.log(1 / 0.07)


class Pair(NamedTuple):
    """Image vectors [N, D] and log1p CP10k [N, P] of the same spots."""

    images: NDArray[np.float32]
    genes: NDArray[np.float32]


def pair(images: NDArray[np.floating[Any]], slide: PreparedSlide, panel: Panel) -> Pair:
    """The slide's spots on the panel's genes; a gene that it did not measure is 0."""
    if slide.genes is None or slide.counts is None:
        raise ValueError(f"slide {slide.id!r} has no counts")
    columns = panel_columns(slide.genes, panel)
    genes = np.zeros((slide.n_spots, len(panel)), np.float32)
    found = columns >= 0
    genes[:, found] = log_normalise(slide.counts[:, columns[found]], slide.total_umi)[0].toarray()
    return Pair(np.asarray(images, np.float32), genes)


@dataclass(frozen=True)
class Towers:
    """The trained layers."""

    image: nn.Linear
    gene: nn.Linear

    @torch.no_grad()
    def embed(self, spots: Pair) -> NDArray[np.float32]:
        """[N, 64] image and gene embedding side by side."""
        parts = [
            functional.normalize(layer(torch.from_numpy(values)), dim=1)
            for layer, values in ((self.image, spots.images), (self.gene, spots.genes))
        ]
        joined: NDArray[np.float32] = torch.cat(parts, dim=1).numpy()
        return joined


def train(slides: Sequence[Pair], *, seed: int) -> Towers:
    """Fit the two layers on the spots of `slides`, shuffled anew each epoch."""
    images = torch.from_numpy(np.concatenate([s.images for s in slides]))
    genes = torch.from_numpy(np.concatenate([s.genes for s in slides]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        towers = Towers(_layer(images.shape[1]), _layer(genes.shape[1]))
        scale = nn.Parameter(torch.tensor(SCALE))
        parameters = [*towers.image.parameters(), *towers.gene.parameters(), scale]
        optimiser = torch.optim.Adam(parameters, lr=LR, betas=BETAS, weight_decay=DECAY)
        for _ in range(EPOCHS):
            for rows in torch.split(torch.randperm(len(images)), BATCH):
                optimiser.zero_grad()
                value = loss(towers.image(images[rows]), towers.gene(genes[rows]), scale)
                torch.autograd.backward(value)
                optimiser.step()
    return towers


def loss(image: Tensor, gene: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of scaled cosines; row i of one belongs to row i of the other."""
    logits = scale.exp() * functional.normalize(image, dim=1) @ functional.normalize(gene, dim=1).T
    true = torch.arange(len(logits))
    both = functional.cross_entropy(logits, true) + functional.cross_entropy(logits.T, true)
    return both / 2


def _layer(width: int) -> nn.Linear:
    layer = nn.Linear(width, DIM)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
