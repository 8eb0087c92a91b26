"""Attention-based fusion of the two modalities of one scale (eq. 7-9).

Shape letters: B spots, T tokens of a modality, d the model's width, n heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from st_align import config
from st_align.encoders.base import Encoded


class Fusion(nn.Module):
    """Image and gene encodings of B spots -> h [B, 2d] = [z^I W_I ; z^G W_G]  (eq. 9).

    A modality that a spot lacks is replaced by a learned token, so that slides without an image
    still get an h; a spot without either gets zeros. All parameters take part whatever is
    absent: ranks of one job may differ in what their spots lack.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_image, self.norm_gene = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.missing_image = nn.Parameter(torch.zeros(dim))
        self.missing_gene = nn.Parameter(torch.zeros(dim))
        self.out_image, self.out_gene = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def forward(self, image: Encoded, gene: Encoded, has_image: Tensor, has_gene: Tensor) -> Tensor:
        """`has_image`, `has_gene`: [B] bool. Returns h [B, 2d]."""
        z_image, z_gene = self.mix(*self.present(image, gene, has_image, has_gene))
        h = torch.cat([self.out_image(z_image), self.out_gene(z_gene)], dim=-1)
        return torch.where((has_image | has_gene)[:, None], h, 0.0)

    def present(
        self, image: Encoded, gene: Encoded, has_image: Tensor, has_gene: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Normalised tokens [B, T, d] of both modalities, the absent ones replaced."""
        f_image, f_gene = self.norm_image(self.read(image)), self.norm_gene(self.read(gene))
        return (
            torch.where(has_image[:, None, None], f_image, self.missing_image.to(f_image.dtype)),
            torch.where(has_gene[:, None, None], f_gene, self.missing_gene.to(f_gene.dtype)),
        )

    def read(self, encoded: Encoded) -> Tensor:
        """What of an encoding is fused, as tokens [B, T, d]: the pooled vector by default."""
        # The zero keeps the encoder's map to tokens in the graph: see STAlign on gradients.
        return encoded.pooled[:, None] + 0 * encoded.tokens.mean()

    def mix(self, f_image: Tensor, f_gene: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of both modalities -> z^I, z^G [B, d]."""
        raise NotImplementedError


class ConcatFusion(Fusion):
    """The ablation without attention: z^I = f^I, z^G = f^G."""

    def mix(self, f_image: Tensor, f_gene: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors themselves."""
        return f_image.mean(dim=1), f_gene.mean(dim=1)


class VectorFusion(Fusion):
    """Symmetric cross-attention on one vector per modality: eq. 7-8 read literally.

    The softmax runs over a single key and is always 1, so z^I = f^G W_v and z^G = f^I W_v.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim)
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))

    def mix(self, f_image: Tensor, f_gene: Tensor) -> tuple[Tensor, Tensor]:
        """Each modality asks the other, with the same W_q, W_k, W_v in both directions."""
        return self._ask(f_image, f_gene), self._ask(f_gene, f_image)

    def attention(self, asking: Tensor, asked: Tensor) -> Tensor:
        """softmax(f W_q (f' W_k)^T / sqrt(d / n)) of every head: [B, n, T, T']."""
        query, key = self._split(self.query(asking)), self._split(self.key(asked))
        scale = query.shape[-1] ** -0.5
        return torch.softmax(query * scale @ key.transpose(-1, -2), dim=-1)

    def _ask(self, asking: Tensor, asked: Tensor) -> Tensor:
        # The mean over the asking tokens is taken on the weights: the same z, T times cheaper.
        weights = self.attention(asking, asked).mean(dim=2, keepdim=True)
        return torch.flatten(weights @ self._split(self.value(asked)), start_dim=1)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class TokenFusion(VectorFusion):
    """The same cross-attention over the tokens of both modalities, z pooled over the queries."""

    def read(self, encoded: Encoded) -> Tensor:
        """The tokens."""
        return encoded.tokens


def build_fusion(kind: config.Fusion, *, dim: int, heads: int) -> Fusion:
    """The fusion named by `ModelConfig.fusion`."""
    if kind == "concat":
        return ConcatFusion(dim)
    return (VectorFusion if kind == "vector" else TokenFusion)(dim, heads)
