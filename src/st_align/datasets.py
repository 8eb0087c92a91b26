"""Slides to try things on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["simulated"]


def simulated(*, slides: int = 2, spots: int = 400, seed: int = 0) -> dict[str, AnnData]:
    """Simulated Visium slides with known domains, by slide, two a patient.

    Each holds raw counts, `obsm["spatial"]`, its image in `uns["spatial"]`, and in obs `patient`,
    `domain` (the truth) and `programme`. Equal arguments give equal values.

    Args:
        slides: 1 or more.
        spots: of each slide, 50 to 15,000.
        seed: of everything.

    Raises:
        ConfigError: an argument out of range.

    """
    from st_align.io import ReadOptions, find_slides
    from st_align.io.objects import to_anndata
    from st_align.simulate import simulate_cohort

    with tempfile.TemporaryDirectory() as folder:
        made = simulate_cohort(Path(folder, "cohort"), slides=slides, spots=spots, seed=seed)
        root = Path(folder, "cohort")
        options = ReadOptions(patients=root / made["patients"], obs=root / made["obs"])
        refs = find_slides([root / made["source"]], options).refs
        found = {ref.id: to_anndata(ref.read()) for ref in refs}
    for name, patient in made["slides"].items():
        found[name].obs["patient"] = patient
    return found
