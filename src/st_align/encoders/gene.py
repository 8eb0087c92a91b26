"""Trained gene encoders (eq. 6): a linear path that starts as PCA, and a transformer beside it.

Shape letters: B spots, M rows of training expression, G genes of the panel, T tokens, d width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg
from torch import Tensor, nn

from st_align.encoders.base import Encoded, TrainedEntry, TrainedShape, register


class GeneTransformer(nn.Module):
    """Expression [B, G] -> T gene tokens by a linear map -> pre-norm transformer encoder.

    pooled = x W + (mean of the tokens) V. V starts at zero, so before training `pooled` is the
    linear path alone, and training can only add to it.
    """

    def __init__(self, shape: TrainedShape) -> None:
        super().__init__()
        self.n_tokens = shape.tokens
        self.to_tokens = nn.Linear(shape.n_genes, shape.tokens * shape.dim)
        layer = nn.TransformerEncoderLayer(
            shape.dim,
            shape.heads,
            dim_feedforward=4 * shape.dim,
            dropout=shape.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.transformer = nn.TransformerEncoder(
            layer, shape.layers, norm=nn.LayerNorm(shape.dim), enable_nested_tensor=False
        )
        self.linear = nn.Linear(shape.n_genes, shape.dim)
        self.branch = nn.Linear(shape.dim, shape.dim, bias=False)
        nn.init.zeros_(self.branch.weight)

    def forward(self, expression: Tensor) -> Encoded:
        """[B, G] -> tokens [B, T, d], pooled [B, d]."""
        tokens = self.transformer(self.to_tokens(expression).unflatten(1, (self.n_tokens, -1)))
        return Encoded(tokens, self.linear(expression) + self.branch(tokens.mean(dim=1)))

    @torch.no_grad()
    def initialise(self, values: NDArray[np.float32]) -> None:
        """Set the linear path to the first d principal axes of `values` [M, G].

        One constant scales all axes, so that the mean squared norm of the scores is d, the
        size that normalised activations have beside them. Whitening axis by axis would not do:
        the contrastive loss compares directions of whole vectors, where it would raise the
        noise of the last axes to the size of the first.
        """
        mean, axes, variances = principal_axes(values, self.linear.out_features)
        total = max(variances.sum(), np.finfo(np.float32).eps)  # values that do not vary
        scale = math.sqrt(self.linear.out_features / total)
        weight = np.zeros(self.linear.weight.shape)
        weight[: len(axes)] = axes * scale
        self.linear.weight.copy_(torch.from_numpy(weight))
        self.linear.bias.copy_(torch.from_numpy(-weight @ mean))


def principal_axes(
    values: NDArray[np.float32], n: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean [G], the first `n` principal axes [min(n, G), G] of rows `values` [M, G] and their
    variances, largest first.

    Exact and without chance: eigenvectors of the covariance, each with its largest loading
    positive. Memory is G x G whatever M is.
    """
    n_genes = values.shape[1]
    mean = values.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((n_genes, n_genes))
    for start in range(0, len(values), 4096):
        rows = values[start : start + 4096] - mean
        covariance += rows.T @ rows
    n = min(n, n_genes)
    variances, vectors = linalg.eigh(
        covariance / max(len(values), 1), subset_by_index=(n_genes - n, n_genes - 1)
    )
    axes = vectors.T[::-1]
    largest = np.abs(axes).argmax(axis=1)
    signs = np.sign(axes[np.arange(n), largest])
    return mean, axes * signs[:, None], variances[::-1].clip(min=0)


for _name in ("gene-transformer", "ae-gene"):
    register(TrainedEntry(name=_name, modality="gene", build=GeneTransformer))
