"""Figures that grow with the number of spots: neighbours, mixtures, smoothing; and the start."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from st_align.agreement import View
from st_align.benchmarks.speed import (
    Figure,
    at_most,
    in_child,
    interleaved,
    python,
    st_align,
)
from st_align.domains import consensus, gaussian_mixture, refine_labels
from st_align.geometry import neighbors

SIZES = (1_000, 10_000, 100_000, 1_000_000)
_AXES, _DOMAINS, _ROUNDS = 30, 7, 3


def hexagon(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places [N, 2], pixels [N, 2] with noise of 1 % of the pitch, and barcodes, in any order."""
    row, column = np.divmod(rng.permutation(n), int(np.sqrt(n)))
    places = np.stack([row, 2 * column + row % 2], axis=1).astype(np.int32)
    xy = np.stack([places[:, 1] * 50.0, row * 86.6025], axis=1) + rng.normal(0, 1.0, (n, 2))
    return places, xy, np.array([f"{i:07d}" for i in range(n)])


def neighbours(seed: int, sizes: tuple[int, ...] = SIZES) -> Iterator[Figure]:
    """Of pooled slides on one lattice, with places and without."""
    for n in sizes:
        places, xy, names = hexagon(n, np.random.default_rng(seed))
        for spec in ("lattice", "k3"):
            for given, where in (("places", places), ("pixels", None)):

                def run(spec: str = spec, where: np.ndarray | None = where) -> None:
                    neighbors(spec, xy=xy, places=where, lattice="hex", barcodes=names)  # noqa: B023

                times = interleaved({"run": run})["run"]
                verdict = at_most(5, times.median) if n == SIZES[-1] else {"value": times.median}
                yield Figure(
                    figure="neighbours", case=f"{n:,} spots, {spec}, {given}", unit="s",
                    runs=times.wall, note=f"CPU {np.median(times.cpu):.2f} s", **verdict,
                )  # fmt: skip


def domains(seed: int, sizes: tuple[int, ...] = SIZES) -> Iterator[Figure]:
    """The clusterers (the default, a consensus of tied mixtures, on one view; one mixture of the
    best of many starts; 30 axes, 7 domains) and smoothing; growth is the exponent between two
    sizes (1: linear).
    """
    before: dict[str, tuple[int, float]] = {}
    for n in sizes:
        rng = np.random.default_rng(seed)
        truth = rng.integers(_DOMAINS, size=n)
        x = rng.normal(0, 1, (n, _AXES)) + rng.normal(0, 2, (_DOMAINS, _AXES))[truth]
        places, xy, names = hexagon(n, rng)
        near = neighbors("lattice", xy=xy, places=places, lattice="hex", barcodes=names)
        sides = {
            "consensus": lambda x=x: consensus([View(x)], _DOMAINS, np.random.default_rng(seed)),
            "Gaussian mixture": lambda x=x: gaussian_mixture(
                x, _DOMAINS, np.random.default_rng(seed)
            ),
            "smoothing": lambda truth=truth, near=near: refine_labels(truth, near),
        }
        for name, times in interleaved(sides, _ROUNDS).items():  # type: ignore[arg-type]
            yield Figure(
                figure=name, case=f"{n:,} spots", value=times.median, unit="s", runs=times.wall
            )
            if name in before:
                smaller, less = before[name]
                growth = float(np.log(times.best / less) / np.log(n / smaller))
                yield Figure(
                    figure=f"{name}, growth", case=f"{smaller:,} to {n:,} spots", unit="exponent",
                    **at_most(1.2, growth),
                )  # fmt: skip
            before[name] = (n, times.best)


def start() -> Iterator[Figure]:
    """Importing the package, and the help of the command, each in a fresh interpreter."""
    sides = {
        "import st_align": python("import st_align"),
        "st-align --help": st_align("--help"),
    }
    children = {name: [] for name in sides}  # type: ignore[var-annotated]
    for _ in range(5):
        for name, command in sides.items():
            children[name].append(in_child(command))
    for name, runs in children.items():
        walls, cpus = tuple(r.wall for r in runs), tuple(r.cpu for r in runs)
        note = f"CPU {np.median(cpus):.2f} s"
        median = float(np.median(walls))
        yield Figure(
            figure="start", case=name, unit="s", runs=walls, note=note, **at_most(1, median)
        )
