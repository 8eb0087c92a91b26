"""Frozen gene networks: raw counts to sets of tokens to one vector a spot, for all of them.

Shape letters: B spots, G measured genes, n genes of one spot, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from st_align.encoders._ragged import TokenSet, encode_sets
from st_align.encoders.base import Encoded, Modality
from st_align.encoders.gene_vocabulary import GeneVocabulary

if TYPE_CHECKING:
    from st_align.expression import Genes


class FrozenGenes(ABC):
    """The `FrozenEncoder` of a gene network: one token [B, 1, D] that is also the pooled vector.

    Runs on the GPU where there is one, in bfloat16 there, and returns float32 of the CPU. A spot
    without a token set gets zeros.
    """

    name: str
    modality: Modality = "gene"
    n_tokens = 1

    def __init__(
        self,
        network: nn.Module,
        vocabulary: GeneVocabulary,
        *,
        dim: int,
        mark: str,
        device: torch.device | None,
    ) -> None:
        """`mark`: the fingerprint of weights and preprocessing."""
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = network.requires_grad_(False).eval().to(self._device)
        self.vocabulary, self.dim, self.fingerprint = vocabulary, dim, mark

    @abstractmethod
    def token_set(self, ids: NDArray[np.int64], counts: NDArray[Any], salt: int) -> TokenSet | None:
        """What the network reads of one spot with these genes of the vocabulary [n], ascending,
        and their raw counts [n]; None where that is nothing. `salt` seeds whatever is drawn.
        """

    def encode_images(self, patches: NDArray[np.uint8]) -> Encoded:
        """Not possible: it reads genes."""
        raise TypeError(f"{self.name} reads genes")

    def encode_genes(
        self, counts: Any, genes: Genes, total_umi: NDArray[np.float64], rng: np.random.Generator
    ) -> Encoded:
        """Raw counts (CSR [B, G]) -> float32 tokens [B, 1, D] and pooled [B, D].

        Slides with no gene of the vocabulary are a ModelError.
        """
        match = self.vocabulary.match(genes)
        found, salt = match.select(counts), int(rng.integers(2**63))
        spots = [
            self.token_set(match.tokens[found.indices[start:stop]], found.data[start:stop], salt)
            for start, stop in zip(found.indptr[:-1], found.indptr[1:], strict=True)
        ]
        pooled = encode_sets(self.network, spots, self.dim, self._device)
        return Encoded(pooled[:, None], pooled)
