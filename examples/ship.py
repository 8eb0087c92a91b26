"""Make of a finished run the small folder that ships in `src/st_align/models/NAME`.

    python examples/ship.py RUN src/st_align/models/NAME

Weights are kept as float16 and loaded as float32; resume points, metrics and the split are left
behind. The same run gives the same files.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from st_align.checkpoint import (
    CARD,
    CONFIG,
    GENES,
    MODEL,
    PREPROCESS,
    PROVENANCE,
    READOUT,
    load_run,
)
from st_align.files import read_json, read_tensors, write_json, write_tensors


def ship(run: Path, out: Path) -> int:
    """Write the folder and return its size in bytes."""
    load_run(run)  # whole, or an error that says what is missing
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: values.half() for name, values in read_tensors(run / MODEL).items()}
    write_tensors(out / MODEL, weights)
    write_tensors(out / READOUT, read_tensors(run / READOUT))
    for name in (CONFIG, GENES, PREPROCESS):
        shutil.copyfile(run / name, out / name)
    write_json(out / PROVENANCE, read_json(run / PROVENANCE))
    if not (out / CARD).exists():
        shutil.copyfile(run / CARD, out / CARD)
    return sum(path.stat().st_size for path in out.iterdir())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(f"{ship(Path(sys.argv[1]), Path(sys.argv[2])) / 1e6:.1f} MB")
