"""A process of its own for the largest encoders, so that its peak memory is the encoder's.

`encoder_worker.py fill FIXTURE FILE` writes stand-in weights; `encoder_worker.py run NAME FIXTURE
FILE` prints JSON with the relative differences, peak memory in bytes and CPU seconds.
"""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from st_align.encoders.base import find
from weights_files import stand_in, write


def peak_bytes() -> int:
    """The most memory this process has held (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def run(name: str, fixture: Path, file: Path) -> dict[str, object]:
    inputs, outputs = (np.load(fixture / f"{part}puts.npz") for part in ("in", "out"))
    before, start = peak_bytes(), time.process_time()
    encoder = find(name).load(file)
    encoder.pixels = replace(encoder.pixels, side=None)  # the fixture's pictures have its size
    loaded = time.process_time()
    encoded = encoder.encode_images(inputs["images"])
    done = time.process_time()
    photo = encoder.encode_images(inputs["photo_resized"][None])
    pairs = ((encoded.pooled, outputs["features"]), (photo.pooled, outputs["photo_features"]))
    return {
        "differences": [
            float(np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected))
            for found, expected in pairs
        ],
        "tokens": list(encoded.tokens.shape),
        "before": before,
        "peak": peak_bytes(),
        "load_seconds": loaded - start,
        "image_seconds": (done - loaded) / len(inputs["images"]),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "fill":
        write(stand_in(Path(sys.argv[2])), Path(sys.argv[3]))
    else:
        print(json.dumps(run(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
