"""scGPT (Cui et al. 2024): the embedding of a spot's expressed genes, frozen.

Shape letters: B spots, n genes expressed in a spot, L tokens of several spots laid end to end,
D width.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, fields
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
from st_align.encoders._weights import fingerprint, read_state_dict
from st_align.encoders.base import EncoderInfo, FrozenEntry, register
from st_align.encoders.gene_vocabulary import GeneVocabulary, table_digest
from st_align.errors import ModelError, require_file

_FILES = ("args.json", "vocab.json", "best_model.pt")
_CLS = "<cls>"
_LARGEST_VALUE = 512
_LAYOUT = Layout(unneeded=(r"decoder\.", r"cls_decoder\.", r"mvc_decoder\.", r"flag_encoder\."))
_PREPROCESSING = "raw counts in quantile bins, chance seeded by the spot's own counts, cls / |cls|"


class ScGpt(FrozenGenes):
    """The `FrozenEncoder`: one token [B, 1, D] that is also the pooled vector [B, D], of length 1.

    Chance decides ties of the binning and which genes are read where there are too many. Each spot
    draws from a generator of its own, seeded by the run's seed and by the spot's counts, so the
    other spots of a batch and the order of spots and genes do not matter. A spot without any gene
    of the vocabulary gets zeros.
    """

    name = "scgpt"

    def __init__(self, weights: Path | None, *, device: torch.device | None = None) -> None:
        """`weights`: the folder of a published checkpoint, or its `best_model.pt`."""
        folder = _folder(weights)
        args_path, vocab_path, weights_path = (folder / name for name in _FILES)
        self.args = _Args.read(args_path)
        tokens = _read_vocabulary(vocab_path)
        self._cls = tokens[_CLS]
        super().__init__(
            _load(weights_path, self.args, n_tokens=max(tokens.values()) + 1),
            GeneVocabulary({n: i for n, i in tokens.items() if n[:1] != "<"}),
            dim=self.args.embsize,
            mark=fingerprint(
                weights_path,
                "\n".join((_PREPROCESSING, repr(self.args), json.dumps(tokens), table_digest())),
            ),
            device=device,
        )

    def token_set(
        self, ids: NDArray[np.int64], counts: NDArray[Any], salt: int = 0
    ) -> TokenSet | None:
        """What the network reads of one spot: `<cls>`, then its genes [n] with their bins; at most
        `max_seq_len` tokens, drawn at random where there are more.
        """
        if not len(ids):
            return None
        counts = counts.astype(np.float32)
        content = hashlib.blake2b(ids.tobytes() + counts.tobytes(), digest_size=16).digest()
        rng = np.random.default_rng([salt, int.from_bytes(content)])
        bins = bin_values(counts, rng.random(len(counts)), self.args.n_bins)
        most = self.args.max_seq_len - 1
        if len(ids) > most:
            kept = np.sort(rng.choice(len(ids), most, replace=False))
            ids, bins = ids[kept], bins[kept]
        return TokenSet(
            np.concatenate([[self._cls], ids]),
            np.concatenate([[self.args.pad_value], bins]).astype(np.float32),
        )


def bin_values(
    values: NDArray[np.float32], uniform: NDArray[np.float64], n_bins: int
) -> NDArray[np.int64]:
    """Bins 1 to `n_bins` - 1 by the quantiles of the spot's own non-zero `values` [n].

    A value that lies on several edges gets a bin between them, by `uniform` [n] in [0, 1).
    """
    edges = np.quantile(values, np.linspace(0, 1, n_bins - 1))
    left, right = np.digitize(values, edges), np.digitize(values, edges, right=True)
    return np.ceil(uniform * (right - left) + left).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class _Args:
    """What `args.json` says about the network and its input."""

    embsize: int
    nheads: int
    d_hid: int
    nlayers: int
    n_bins: int
    max_seq_len: int
    pad_value: int
    input_emb_style: str

    @classmethod
    def read(cls, path: Path) -> _Args:
        found = _read_json(path)
        missing = [f.name for f in fields(cls) if f.name not in found]
        if missing:
            raise ModelError(f"{path} lacks {', '.join(missing)}", fix="fetch the file again")
        args = cls(**{f.name: found[f.name] for f in fields(cls)})
        if args.input_emb_style != "continuous":
            raise ModelError(
                f"{path} describes another kind of scGPT",
                expected="input_emb_style continuous",
                found=args.input_emb_style,
            )
        return args


class _Network(nn.Module):
    """Gene and value embeddings, added; post-norm layers. Names are the checkpoint's."""

    def __init__(self, args: _Args, n_tokens: int) -> None:
        super().__init__()
        dim = args.embsize
        self.encoder = nn.ModuleDict(
            {"embedding": nn.Embedding(n_tokens, dim), "enc_norm": nn.LayerNorm(dim)}
        )
        self.value_encoder = nn.ModuleDict(
            {
                "linear1": nn.Linear(1, dim),
                "linear2": nn.Linear(dim, dim),
                "norm": nn.LayerNorm(dim),
            }
        )
        layers = [PostNormLayer(dim, args.nheads, args.d_hid) for _ in range(args.nlayers)]
        self.transformer_encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def forward(self, ids: Tensor, values: Tensor, sizes: list[int]) -> Tensor:
        """Tokens [L] of spots of `sizes`, `<cls>` first in each -> [spots, D] of length 1."""
        return F.normalize(self.cls(ids, values, sizes).float(), dim=1)

    def cls(self, ids: Tensor, values: Tensor, sizes: list[int]) -> Tensor:
        """[spots, D]: what the layers make of the first token of each spot."""
        x: Tensor = self.encoder["enc_norm"](self.encoder["embedding"](ids))
        x = x + self.value_tokens(values)
        for layer in self.transformer_encoder["layers"].children():
            x = layer(x, sizes)
        starts = torch.tensor([0, *sizes[:-1]], device=x.device).cumsum(0)
        return x[starts]

    def value_tokens(self, values: Tensor) -> Tensor:
        """[L] -> [L, D]."""
        encoder = self.value_encoder
        hidden = F.relu(encoder["linear1"](values.clamp(max=_LARGEST_VALUE)[:, None]))
        out: Tensor = encoder["norm"](encoder["linear2"](hidden))
        return out


def _load(path: Path, args: _Args, n_tokens: int) -> _Network:
    """The network with the tensors of `best_model.pt`, whatever attention it was saved with."""
    tensors = {_torch_name(name): t for name, t in read_state_dict(path).items()}
    table = tensors.get("encoder.embedding.weight")
    if table is not None and len(table) < n_tokens:
        raise ModelError(
            f"{path} and vocab.json belong to different checkpoints",
            expected=f"at least {n_tokens:,} rows in encoder.embedding.weight",
            found=f"{len(table):,}",
        )
    with torch.device("meta"):
        network = _Network(args, n_tokens if table is None else len(table))
    placed = place(tensors, network.state_dict(), path, ScGpt.name, [_LAYOUT])
    network.load_state_dict(placed, assign=True)
    return network


def _torch_name(name: str) -> str:
    """The name that plain torch attention has; flash attention saves under two others."""
    return re.sub(r"self_attn\.(_impl\.)?", "self_attn.", name).replace("Wqkv.", "in_proj_")


def _folder(weights: Path | None) -> Path:
    if weights is None:
        raise ModelError("scgpt needs weights", expected=f"a folder with {', '.join(_FILES)}")
    folder = weights.parent if weights.is_file() else weights
    for name in _FILES:
        require_file(folder / name, f"{name} of scGPT", ModelError)
    return folder


def _read_vocabulary(path: Path) -> dict[str, int]:
    tokens: dict[str, int] = _read_json(path)
    if not all(type(token) is int and token >= 0 for token in tokens.values()):
        raise ModelError(f"{path} is no vocabulary", expected="a number for each gene")
    if _CLS not in tokens:
        raise ModelError(f"{path} is no vocabulary of scGPT", expected=f"{_CLS} in it")
    return tokens


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{path} is no JSON file", found=str(error), fix="fetch the file again"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object", found=type(found).__name__)
    return found


register(
    FrozenEntry(
        name=ScGpt.name,
        modality="gene",
        info=EncoderInfo(
            title="scGPT, whole-human",
            licence="MIT",
            gated=False,
            source="the whole-human folder of its authors' model zoo (github.com/bowang-lab/scGPT)",
            files=_FILES[-1:],
            beside=_FILES[:-1],
        ),
        load=ScGpt,
        recognises=lambda tensors: "value_encoder.linear1.weight" in tensors,
    )
)
