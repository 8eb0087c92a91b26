"""scFoundation (Hao et al. 2024): the cell embedding of a spot, frozen.

Shape letters: B spots, L tokens of several spots laid end to end, D the network's width.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from st_align.encoders._genes import FrozenGenes
from st_align.encoders._layout import Layout, place
from st_align.encoders._ragged import PostNormLayer, TokenSet
from st_align.encoders._weights import fingerprint, is_state_dict, read_checkpoint
from st_align.encoders.base import EncoderInfo, FrozenEntry, register
from st_align.encoders.gene_vocabulary import GeneVocabulary, table_digest
from st_align.errors import ModelError, require_file

_WEIGHTS, _GENES = "models.ckpt", "OS_scRNA_gene_index.19264.tsv"
_PART = "cell"
_NETWORK = "mae_autobin"
_HEAD_WIDTH = 64
_TARGET_DEPTH = 4.0
"""log10 of the library that the network is asked to see: upstream's rule `t4`."""
_LAYOUT = Layout(
    unneeded=(r"decoder\.", r"decoder_embed\.", r"norm\.", r"to_final\.", r"token_emb\.emb_")
)
_PREPROCESSING = "log1p CP10k over the gene index, T = 4, S = log10(total); S, T, max, mean"


class ScFoundation(FrozenGenes):
    """The `FrozenEncoder`: one token [B, 1, 3072] that is also the pooled vector [B, 3072].

    It is the final vectors of the tokens S and T (the library seen, the library asked for) and the
    maximum and mean over the genes. A spot with fewer than two molecules of the gene index has no
    S (its logarithm is zero or less) and gets zeros. Nothing is drawn at random. As upstream, the
    library is that of the gene index alone and not the slide's `total_umi`.
    """

    name = "scfoundation"

    def __init__(self, weights: Path | None, *, device: torch.device | None = None) -> None:
        """`weights`: `models.ckpt` with the gene index beside it, or the folder of both."""
        if weights is None:
            raise ModelError("scfoundation needs weights", expected=f"{_WEIGHTS} or its folder")
        path = weights / _WEIGHTS if weights.is_dir() else weights
        tensors, bin_alpha = _read_part(path)
        network = _load(tensors, bin_alpha, path)
        names = _read_gene_index(path.parent / _GENES, network.pos_emb.num_embeddings - 3)
        self.n_genes = len(names)
        super().__init__(
            network,
            GeneVocabulary({name: place for place, name in enumerate(names)}),
            dim=4 * network.pos_emb.embedding_dim,
            mark=fingerprint(
                path, "\n".join((_PREPROCESSING, repr(bin_alpha), *names, table_digest()))
            ),
            device=device,
        )

    def token_set(
        self, ids: NDArray[np.int64], counts: NDArray[Any], salt: int = 0
    ) -> TokenSet | None:
        """What the network reads of one spot: its genes, then T and S."""
        total = counts.sum(dtype=np.float64)
        if total <= 1:
            return None
        values = np.log1p(counts / total * 1e4)
        return TokenSet(
            np.concatenate([ids, [self.n_genes, self.n_genes + 1]]),
            np.concatenate([values, [_TARGET_DEPTH, np.log10(total)]]).astype(np.float32),
        )


class _Network(nn.Module):
    """Value and place embeddings, added; post-norm layers. Names are the checkpoint's."""

    def __init__(self, shape: Mapping[str, int], bin_alpha: float) -> None:
        super().__init__()
        dim, bins = shape["dim"], shape["bins"]
        self.bin_alpha = bin_alpha
        self.token_emb = nn.ModuleDict(
            {
                "mlp": nn.Linear(1, bins),
                "mlp2": nn.Linear(bins, bins),
                "emb": nn.Embedding(bins, dim),
            }
        )
        self.pos_emb = nn.Embedding(shape["places"], dim)
        layers = [
            PostNormLayer(dim, dim // _HEAD_WIDTH, shape["hidden"]) for _ in range(shape["layers"])
        ]
        self.encoder = nn.ModuleDict(
            {"transformer_encoder": nn.ModuleList(layers), "norm": nn.LayerNorm(dim)}
        )

    def forward(self, places: Tensor, values: Tensor, sizes: list[int]) -> Tensor:
        """Tokens [L] of spots of `sizes`, T and S last in each -> [spots, 4 D]."""
        x = self.value_tokens(values) + self.pos_emb(places)
        for layer in self.encoder["transformer_encoder"].children():
            x = layer(x, sizes)
        x = self.encoder["norm"](x)
        return torch.stack(
            [
                torch.cat([spot[-1], spot[-2], spot[:-2].amax(dim=0), spot[:-2].mean(dim=0)])
                for spot in x.split(sizes)
            ]
        )

    def value_tokens(self, values: Tensor) -> Tensor:
        """[L] -> [L, D]: a mixture of the bins' vectors, its weights a function of the value."""
        embed = self.token_emb
        hidden = F.leaky_relu(embed["mlp"](values[:, None]), 0.1)
        weights = torch.softmax(self.bin_alpha * hidden + embed["mlp2"](hidden), dim=1)
        return weights @ embed["emb"].get_parameter("weight")


def _read_part(path: Path) -> tuple[dict[str, Tensor], float]:
    """The tensors of the cell encoder by their plain names, and `bin_alpha`.

    The published file holds three networks, each with its config; a plain state dict of the one
    is read too.
    """
    found = read_checkpoint(path, mapped=True)
    config: Any = None
    if isinstance(found, dict) and isinstance(found.get(_PART), dict):
        config, found = found[_PART].get("config"), found[_PART].get("state_dict")
    if not is_state_dict(found):
        raise ModelError(
            f"{path} is no checkpoint of scFoundation",
            expected=f"a dict with {_PART!r}, in it 'config' and 'state_dict'",
        )
    return {name.split("model.")[-1]: t for name, t in found.items()}, _bin_alpha(config, path)


def _bin_alpha(config: Any, path: Path) -> float:
    """The one setting that shapes do not tell; what is not said is as published."""
    if not isinstance(config, dict):
        return 1.0
    kind = config.get("model", _NETWORK)
    options = config.get("model_config", {}).get(kind, config)
    norm_first = options.get("encoder", {}).get("norm_first", False)
    if kind != _NETWORK or norm_first:
        raise ModelError(
            f"{path} is a checkpoint of another network",
            expected=f"{_NETWORK}, norm_first False",
            found=f"{kind}, norm_first {norm_first}",
        )
    return float(options.get("bin_alpha", 1.0))


def _load(tensors: Mapping[str, Tensor], bin_alpha: float, path: Path) -> _Network:
    shape = {
        "layers": len({n.split(".")[2] for n in tensors if ".transformer_encoder." in f".{n}"}),
        "bins": len(tensors.get("token_emb.emb.weight", ())),
        "places": len(tensors.get("pos_emb.weight", ())),
        "dim": tensors["pos_emb.weight"].shape[-1] if "pos_emb.weight" in tensors else 0,
        "hidden": len(tensors.get("encoder.transformer_encoder.0.linear1.bias", ())),
    }
    if not all(shape.values()):
        raise ModelError(
            f"{path} is a checkpoint of another network",
            expected="token_emb.emb.weight, pos_emb.weight, encoder.transformer_encoder.*",
            found=", ".join(list(tensors)[:3]),
        )
    with torch.device("meta"):
        network = _Network(shape, bin_alpha)
    placed = place(tensors, network.state_dict(), path, ScFoundation.name, [_LAYOUT])
    copies = {name: tensor.clone() for name, tensor in placed.items()}  # out of the mapped file
    network.load_state_dict(copies, assign=True)
    return network


def _read_gene_index(path: Path, n_genes: int) -> list[str]:
    """Gene names by place."""
    require_file(path, "the gene index of scFoundation", ModelError)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        names = [row["gene_name"] for row in rows if row.get("gene_name")]
    if len(names) != n_genes:
        raise ModelError(
            f"{path} does not fit the weights beside it",
            expected=f"{n_genes:,} genes in a column gene_name",
            found=f"{len(names):,}",
        )
    return names


register(
    FrozenEntry(
        name=ScFoundation.name,
        modality="gene",
        info=EncoderInfo(
            title="scFoundation, 100 M parameters, cell encoder",
            licence="non-commercial (scFoundation model licence)",
            gated=False,
            source="models.ckpt as its authors share it, the gene index from "
            "github.com/biomap-research/scFoundation",
            files=(_WEIGHTS,),
            beside=(_GENES,),
        ),
        load=ScFoundation,
        recognises=lambda tensors: any("token_emb.mlp2.weight" in name for name in tensors),
    )
)
