"""Files of UNI and scGPT in their published layout, filled with noise: for docs/paper-run.md where
the real ones are not at hand. What a model makes of them means nothing.

    python examples/stand_in_weights.py OUT      about a minute, 1.4 GB

Every tensor is made from its name alone, so the files are the same everywhere. scGPT gets the full
table of 60,697 tokens, named by the symbols that HGNC approves.
"""

from __future__ import annotations

import gzip
import json
import math
import sys
import zlib
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from st_align.encoders.vit_timm import UNI

Shapes = dict[str, tuple[int, ...]]
SCGPT = {
    "embsize": 512, "nheads": 8, "d_hid": 512, "nlayers": 12, "n_layers_cls": 3, "dropout": 0.2,
    "n_bins": 51, "max_seq_len": 1200, "pad_token": "<pad>", "pad_value": -2, "mask_value": -1,
    "input_emb_style": "continuous",
}  # fmt: skip
ROWS, SPECIAL = 60_697, ("<pad>", "<cls>", "<eoc>")


def main(out: Path) -> None:
    """`uni/` and `scgpt/` in a folder that ST_ALIGN_WEIGHTS can name."""
    save(uni_shapes(), out / "uni" / "pytorch_model.bin")
    save(scgpt_shapes(), out / "scgpt" / "best_model.pt")
    (out / "scgpt" / "args.json").write_text(json.dumps(SCGPT))
    (out / "scgpt" / "vocab.json").write_text(json.dumps(vocabulary()))


def uni_shapes() -> Shapes:
    """Names as timm has them, which are the published ones."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in UNI.build().state_dict().items()}


def scgpt_shapes() -> Shapes:
    """Names as flash attention saves them, without the decoders, which embedding does not read."""
    d, hidden = SCGPT["embsize"], SCGPT["d_hid"]
    shapes: Shapes = {"encoder.embedding.weight": (ROWS, d)}
    matrices = {"value_encoder.linear1": (d, 1), "value_encoder.linear2": (d, d)}
    vectors = ["encoder.enc_norm", "value_encoder.norm"]
    for i in range(SCGPT["nlayers"]):
        layer = f"transformer_encoder.layers.{i}"
        matrices[f"{layer}.self_attn.Wqkv"] = (3 * d, d)
        matrices[f"{layer}.self_attn.out_proj"] = (d, d)
        matrices |= {f"{layer}.linear1": (hidden, d), f"{layer}.linear2": (d, hidden)}
        vectors += [f"{layer}.norm1", f"{layer}.norm2"]
    for name, (rows, columns) in matrices.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    for name in vectors:
        shapes |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    return shapes


def vocabulary() -> dict[str, int]:
    """Approved symbols, numbered from 0; the special tokens have the last three rows."""
    table = resources.files("st_align.encoders").joinpath("hgnc.tsv.gz").read_bytes()
    rows = (line for line in gzip.decompress(table).decode().splitlines() if line[0] != "#")
    tokens = {row.split("\t")[0]: i for i, row in enumerate(rows)}
    return tokens | {name: ROWS - 3 + i for i, name in enumerate(SPECIAL)}


def save(shapes: Shapes, path: Path) -> None:
    """A torch file of tensors made from their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: torch.from_numpy(fill(name, s)) for name, s in shapes.items()}, path)
    print(f"{path}: {len(shapes)} tensors, {path.stat().st_size / 1e9:.2f} GB")


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Noise of a size at which no layer dies: the rule of the parity fixtures."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) >= 2 and name.endswith("weight"):
        gain = 1.5 if len(shape) == 4 else 1
        values = noise * math.sqrt(gain / math.prod(shape[1:]))
    elif len(shape) >= 2 or name.endswith(".gamma"):
        values = 0.2 * noise
    else:
        values = 1 + 0.1 * noise if name.endswith(".weight") else 0.1 * noise
    return values.astype(np.float32)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
