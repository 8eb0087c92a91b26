"""`python -m st_align.encoders.convert FILE OUT.safetensors`: a weights file that needs pickle.

Loading it RUNS WHATEVER CODE IS IN IT. Use it for files you trust, best in a container without
network; everything else here refuses such files. It is a process of its own on purpose.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from st_align.encoders._weights import unwrap
from st_align.errors import StAlignError, require_file


def convert(source: Path, out: Path) -> int:
    """Write the state dict in `source` as safetensors; the number of tensors."""
    from safetensors.torch import save_file

    require_file(source, "the weights file")
    found = torch.load(source, map_location="cpu", weights_only=False)
    found = found.state_dict() if isinstance(found, torch.nn.Module) else found
    tensors = {name: tensor.contiguous() for name, tensor in unwrap(found, source).items()}
    save_file(tensors, out)
    return len(tensors)


def main(arguments: list[str]) -> int:
    """Exit code 2 for a file that cannot be converted."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    source, out = map(Path, arguments)
    try:
        print(f"{convert(source, out)} tensors: {out}")
    except StAlignError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
