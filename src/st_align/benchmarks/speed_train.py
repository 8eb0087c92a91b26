"""Figures of training and of frozen features, and how they grow with the corpus."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from st_align.batch import Batch
from st_align.benchmarks.speed import (
    Figure,
    at_least,
    at_most,
    in_child,
    interleaved,
    python,
    ratios,
)
from st_align.config import Config, preset
from st_align.corpus import Corpus
from st_align.encoders.base import Encoded
from st_align.errors import ConfigError
from st_align.expression import Panel
from st_align.job import launch
from st_align.optim import build_optimizer
from st_align.plan import Plan, plan_training
from st_align.sampling import global_batch, steps_per_epoch
from st_align.splits import split_slides
from st_align.train import StepModule, _Trainer, step_fields

_RAW = "resnet-small-gn"
"""Reads niche patches themselves: a corpus of a million spots has no frozen features yet."""
_STEPS = {"tiny": 4, "open": 1}
_BATCH = {"tiny": 256, "open": 16}
_MEMORY_STEPS = 12


def training(corpus: Corpus, name: str, work: Path) -> Iterator[Figure]:
    """The loop against forward, loss, backward and step of the same model on random tensors."""
    config = preset(name)
    config = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, batch=_BATCH[name], epochs=1_000)
    )
    plan = planned(corpus, config)
    fabric = launch()
    bare_model = copy.deepcopy(plan.model)
    loop = _Trainer(plan, work, fabric, {}, lambda _: None)
    loop.module.train()
    batches, step = loop.batches(0), iter(range(10**9))
    bare = StepModule(bare_model, config.loss).to(fabric.device).train()
    optimizer = build_optimizer(bare, fused=fabric.device.type == "cuda")
    fields = step_fields(_random_like(plan.data.batch(np.arange(plan.length.batch))))

    def ours() -> None:
        for _ in range(_STEPS[name]):
            number = next(step)
            values = loop.step(number, next(batches))
        loop.write_line(number + 1, _STEPS[name], values)

    def theirs() -> None:
        for _ in range(_STEPS[name]):
            bare(**fields)[0].backward()
            optimizer.step()
            optimizer.zero_grad()

    theirs()
    ours()
    times = interleaved({"bare": theirs, "ours": ours})
    batches.close()
    runs = ratios(times["bare"].wall, times["ours"].wall)
    yield Figure(
        figure="training, share of the bare model's speed",
        case=f"{name}, batch {plan.length.batch}, {fabric.device.type}",
        unit="x",
        runs=runs,
        **at_least(0.95, float(np.median(runs))),
    )
    spots = _STEPS[name] * plan.length.batch
    speeds = tuple(spots / wall for wall in times["ours"].wall)
    yield Figure(
        figure="training", case=name, value=float(np.median(speeds)), unit="spots/s", runs=speeds
    )


def planned(corpus: Corpus, config: Config) -> Plan:
    """The plan of a run on all slides; its panel is the first genes of the first slide, because
    to choose one reads all counts.
    """
    genes = corpus.slide(corpus.ids[0]).genes
    if genes is None:
        raise ConfigError("the corpus has no counts", found=str(corpus.path))
    n = config.data.panel
    panel = Panel(
        genes=tuple(genes.symbols[:n].tolist()), ensembl=tuple(genes.ensembl[:n].tolist())
    )
    splits = split_slides({id: corpus.entry(id)["patient"] for id in corpus.ids})
    return plan_training(
        corpus, config, launch(), splits=splits, panel=panel, init=None, log=lambda _: None
    )


def _random_like(batch: Batch) -> Batch:
    """Random inputs of the same shapes, already in memory; who is whose neighbour stays."""

    def drawn(value: Any) -> Any:
        if isinstance(value, Encoded):
            return Encoded(*(torch.randn_like(t) for t in value))
        if isinstance(value, Tensor) and value.dtype == torch.uint8:
            return torch.randint_like(value, 256)
        if isinstance(value, Tensor) and value.is_floating_point():
            return torch.randn_like(value)
        return value

    names = [field.name for field in dataclasses.fields(batch)]
    return dataclasses.replace(batch, **{name: drawn(getattr(batch, name)) for name in names})


def features(corpus: Corpus, name: str) -> Iterator[Figure]:
    """Frozen features of niche patches, written to a cache, against the bare network."""
    from st_align.encoders.base import FrozenEntry, find
    from st_align.encoders.lookup import load_frozen
    from st_align.features import batch_size, cached_features, feature_folder

    entry = find(name)
    if not isinstance(entry, FrozenEntry) or entry.modality != "image":
        raise ConfigError(f"{name} is no frozen image encoder")
    encoder: Any = load_frozen(entry, None)
    id = corpus.ids[0]
    slide = corpus.slide(id)
    spec = sorted(slide.niches)[0]
    patches = slide.niches[spec].patches
    if patches is None:
        raise ConfigError(f"slide {id!r} has no image")
    size = batch_size()
    pixels = encoder.pixels.read(np.array(patches[:size]), encoder._device)
    blocks = -(-slide.n_spots // size)

    def ours() -> None:
        cached_features(corpus, id, encoder, "niche", niche_spec=spec)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(blocks):
            encoder._read(encoder._network, pixels)

    bare()  # the network is built when it is first asked for
    folder = feature_folder(corpus, id, encoder, "niche", spec)
    times = interleaved(
        {"bare": bare, "ours": ours}, before=lambda: shutil.rmtree(folder, ignore_errors=True)
    )
    # The last batch of ours may be smaller: compare images, not blocks.
    scale = slide.n_spots / (blocks * size)
    runs = tuple(scale * r for r in ratios(times["bare"].wall, times["ours"].wall))
    yield Figure(
        figure="frozen features, share of the bare network's speed",
        case=f"{name}, {slide.n_spots} patches",
        unit="x",
        runs=runs,
        **at_least(0.95, float(np.median(runs))),
    )
    speeds = tuple(slide.n_spots / wall for wall in times["ours"].wall)
    yield Figure(
        figure="frozen features", case=name, value=float(np.median(speeds)), unit="images/s",
        runs=speeds,
    )  # fmt: skip


def raw_config(batch: int = 256) -> Config:
    """`tiny` that reads niche patches with a trained encoder."""
    config = preset("tiny")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, niche_image=_RAW),
        optim=dataclasses.replace(config.optim, batch=batch, epochs=2),
    )


def epoch(corpus: Corpus) -> Iterator[Figure]:
    """From the end of an epoch to the first batch of the next: order, sampler, gathering."""
    config = raw_config()
    data, n = planned(corpus, config).data, corpus.n_spots
    numbers = iter(range(1, 1_000))

    def start() -> None:
        number = next(numbers)
        step = number * steps_per_epoch(n, config.optim.batch)
        ids = global_batch(0, step, n, config.optim.batch)
        data.batch(ids, augment_key=(0, number))

    walls = interleaved({"start": start})["start"].wall
    yield Figure(
        figure="start of an epoch", case=f"{n:,} spots", unit="s", runs=walls,
        **at_most(5, float(np.median(walls))),
    )  # fmt: skip


def memory(small: Corpus, large: Corpus) -> Iterator[Figure]:
    """Peak anonymous memory of a process that trains some steps, once its expression is cached."""
    module = "st_align.benchmarks.speed_train"
    code = f"import sys; from {module} import some_steps; some_steps(sys.argv[1])"
    peaks = []
    for corpus in (small, large):
        in_child(python(code, str(corpus.path)))  # fills the cache of expression
        child = in_child(python(code, str(corpus.path)))
        peaks.append(child.peak)
        yield Figure(
            figure="peak memory of training", case=f"{corpus.n_spots:,} spots",
            value=child.peak / 1e6, unit="MB", note=f"{child.wall:.1f} s in all",
        )  # fmt: skip
    yield Figure(
        figure="peak memory of training, large over small", case="", unit="x",
        **at_most(1.2, peaks[1] / peaks[0]),
    )  # fmt: skip


def some_steps(path: str) -> None:
    """Plan a run on a corpus and train a few steps of it; run in a process of its own."""
    plan = planned(Corpus.open(path), raw_config())
    loop = _Trainer(plan, Path(), launch(), {}, lambda _: None)
    loop.module.train()
    batches = loop.batches(0)
    for step in range(_MEMORY_STEPS):
        loop.step(step, next(batches))
    batches.close()
