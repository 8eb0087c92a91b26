"""What a training run will do, decided and checked before its first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from st_align.batch import Role
from st_align.checkpoint import FrozenUse, Preprocess, Run, build_model
from st_align.config import Config
from st_align.encoders.base import FrozenEncoder
from st_align.errors import ConfigError, CorpusError, ModelError
from st_align.expression import Panel, PanelExpression, choose_panel
from st_align.features import Features, cached_features
from st_align.job import is_first, share
from st_align.loader import VIEW, SlideInputs, SpotData, frozen_encoders, slide_inputs
from st_align.model import STAlign
from st_align.provenance import NOT_STATED, config_hash, frozen_facts, software
from st_align.sampling import batch_size, rank_rows, steps_per_epoch
from st_align.schedules import n_epochs
from st_align.slide import PreparedSlide
from st_align.splits import Splits

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from st_align.corpus import Corpus

_INITIAL_ROWS = 20_000


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long a run is: spots of a global batch, epochs, and steps of all epochs."""

    batch: int
    epochs: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Data, model and length of one run; `provenance` says where they come from."""

    config: Config
    splits: Splits
    panel: Panel
    preprocess: Preprocess
    provenance: Mapping[str, Any]
    data: SpotData
    model: STAlign
    length: Length


def plan_training(
    corpus: Corpus,
    config: Config,
    fabric: Fabric,
    *,
    splits: Splits,
    panel: Panel | None,
    init: Run | None,
    log: Callable[[str], None],
) -> Plan:
    """Panel, features and model of a run on the training slides of `corpus`.

    Nothing is written but the corpus's own caches. `panel` None: the panel of `init`, else the
    most variable genes of the training slides. Whatever does not fit is an error that names it.
    """
    slides = corpus.slides(splits.train)
    _require_niche(corpus, slides, config.data.niche)
    length = plan_length([s.n_spots for s in slides], config, fabric.world_size, log)
    encoders = frozen_encoders(config)
    preprocess = _preprocess(slides, config, encoders)
    panel = _panel(slides, config, panel, init, log)
    if init is not None:
        _require_fit(init, config, preprocess)
    reader = _Reader(
        corpus=corpus,
        config=config,
        panel=panel,
        encoders=encoders,
        progress=is_first(),
    )
    for id in share(fabric, {slide.id: slide.n_spots for slide in slides}):
        reader.cached(corpus.slide(id))  # caches of its share are filled, then all read all
    fabric.barrier()
    data = SpotData(
        [reader.inputs(slide) for slide in slides],
        n_genes=len(panel),
        frozen=preprocess.shapes,
        pin=fabric.device.type == "cuda",
    )
    provenance = {
        **_origin(corpus, slides, config, splits, panel, init),
        "encoders": {role: frozen_facts(encoder) for role, encoder in encoders.items()},
        "machine": machine(fabric),
        **dataclasses.asdict(length),
    }
    return Plan(
        config=config,
        splits=splits,
        panel=panel,
        preprocess=preprocess,
        provenance=provenance,
        data=data,
        model=_first_model(config, data, len(panel), preprocess, init),
        length=length,
    )


def plan_length(
    n_spots: Sequence[int], config: Config, ranks: int, log: Callable[[str], None]
) -> Length:
    """Batch, epochs and steps for slides of `n_spots` spots; fewer than 2 spots are an error."""
    n = sum(n_spots)
    if n < 2:
        raise CorpusError("the training slides have too few spots", expected="2", found=str(n))
    batch = batch_size(n, config.optim.batch)
    if batch < config.optim.batch:
        log(f"the batch is {batch} spots, all there are, in place of {config.optim.batch}")
    rank_rows(batch, 0, ranks)
    epochs = n_epochs(config.optim, n)
    return Length(batch=batch, epochs=epochs, steps=epochs * steps_per_epoch(n, batch))


def require_same_run(stored: Mapping[str, Any], planned: Mapping[str, Any]) -> None:
    """A run is resumed with what it was started with; anything else is a ConfigError."""
    names = ("config_hash", "panel", "splits_hash", "encoders", "batch", "epochs", "steps")
    changed = [name for name in names if stored.get(name) != planned[name]]
    slides = {slide["id"]: slide for slide in stored.get("slides", [])}
    for slide in planned["slides"]:
        old = slides.get(slide["id"], {}).get("sha256", {})
        if any(slide["sha256"].get(column) != digest for column, digest in old.items()):
            changed.append(f"the data of slide {slide['id']!r}")
    if changed:
        raise ConfigError(
            "the run was started with other settings or data",
            expected="those it was started with",
            found=f"changed: {', '.join(changed)}",
            fix="give the same options, or train into a new folder",
        )


def machine(fabric: Fabric) -> dict[str, Any]:
    """What else decides the last bits of the numbers."""
    return {
        "device": fabric.device.type,
        "precision": fabric.strategy.precision.precision,
        "ranks": fabric.world_size,
        "threads": torch.get_num_threads(),
    }


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Reads training slides of a corpus as the model wants them."""

    corpus: Corpus
    config: Config
    panel: Panel
    encoders: Mapping[Role, FrozenEncoder]
    progress: bool

    def cached(
        self, slide: PreparedSlide
    ) -> tuple[PanelExpression | None, dict[Role, Features | None]]:
        """Expression and frozen features from the corpus's caches, which are filled if need be."""
        features = {
            role: cached_features(
                self.corpus,
                slide.id,
                encoder,
                VIEW[role],
                niche_spec=self.config.data.niche,
                progress=self.progress,
            )
            for role, encoder in self.encoders.items()
        }
        counted = slide.counts is not None
        return self.corpus.expression(slide.id, self.panel) if counted else None, features

    def inputs(self, slide: PreparedSlide) -> SlideInputs:
        """What a batch is gathered from."""
        expression, features = self.cached(slide)
        return slide_inputs(slide, self.config, expression=expression, features=features)


def _require_niche(corpus: Corpus, slides: Sequence[PreparedSlide], spec: str) -> None:
    lacking = [slide for slide in slides if spec not in slide.niches]
    if lacking:
        raise CorpusError(
            f"{len(lacking)} of {len(slides)} training slides have no niches {spec!r}",
            expected=f"niches {spec!r} for slide {lacking[0].id!r}",
            found=", ".join(sorted(lacking[0].niches)),
            fix=f"run: st-align prepare SRC... --out {corpus.path} --niche {spec}",
        )


def _panel(
    slides: Sequence[PreparedSlide],
    config: Config,
    given: Panel | None,
    init: Run | None,
    log: Callable[[str], None],
) -> Panel:
    if init is not None:
        if given is not None and given.hash != init.panel.hash:
            raise ModelError(
                "the panel is not the one of the model to start from",
                expected=f"its {len(init.panel)} genes",
                found=f"{len(given)} genes",
                fix="leave out --panel: the model brings its own",
            )
        return init.panel
    if given is not None:
        return given
    chosen = choose_panel(slides, config.data.panel)
    if len(chosen) < config.data.panel:
        log(f"the panel has {len(chosen)} genes, all there are, in place of {config.data.panel}")
    return chosen


def _preprocess(
    slides: Sequence[PreparedSlide], config: Config, encoders: Mapping[Role, FrozenEncoder]
) -> Preprocess:
    patches = [s.spot_patches for s in slides if s.spot_patches is not None]
    niches = [p for s in slides if (p := s.niches[config.data.niche].patches) is not None]
    return Preprocess(
        spot_px=patches[0].shape[1] if patches else None,
        niche_px=niches[0].shape[1] if niches else None,
        niche=config.data.niche,
        frozen={
            role: FrozenUse(
                name=encoder.name,
                fingerprint=encoder.fingerprint,
                n_tokens=encoder.n_tokens,
                dim=encoder.dim,
            )
            for role, encoder in encoders.items()
        },
    )


def _require_fit(init: Run, config: Config, preprocess: Preprocess) -> None:
    """The model to start from is of the same architecture and reads the same features."""
    old, new = dataclasses.asdict(init.config.model), dataclasses.asdict(config.model)
    changed = [
        f"model.{key} is {old[key]!r}, not {new[key]!r}" for key in new if old[key] != new[key]
    ]
    for role, use in preprocess.frozen.items():
        if init.preprocess.frozen.get(role) != use:
            changed.append(f"{role} was read through other weights of {use.name}")
    if changed:
        raise ModelError(
            f"the model in {init.path} is of another architecture",
            expected="the same [model] section",
            found="; ".join(changed),
            fix="use the preset or config that the model was trained with",
        )


def _first_model(
    config: Config, data: SpotData, n_genes: int, preprocess: Preprocess, init: Run | None
) -> STAlign:
    """The weights of `init`, else new ones whose gene encoders begin as the linear baseline."""
    model = build_model(config, n_genes, preprocess.shapes)
    if init is None:
        roles: tuple[Role, Role] = ("spot_gene", "niche_gene")
        model.initialise(*(_gene_values(data, role, n_genes) for role in roles))
    else:
        model.load_state_dict(init.model.state_dict())
    return model


def _gene_values(data: SpotData, role: Role, n_genes: int) -> NDArray[np.float32]:
    """[M, P] what a trained gene encoder reads of at most 20,000 spots with counts, spread evenly
    over the slides' rows; no rows where a frozen encoder fills the role.
    """
    with_counts = [(s, np.flatnonzero(s.has_counts)) for s in data.slides if s.has_counts.any()]
    step = max(sum(len(rows) for _, rows in with_counts) // _INITIAL_ROWS, 1)
    values = [slide.sources[role].read(rows[::step])[0] for slide, rows in with_counts]
    return np.concatenate(values) if values else np.zeros((0, n_genes), np.float32)


def _origin(
    corpus: Corpus,
    slides: Sequence[PreparedSlide],
    config: Config,
    splits: Splits,
    panel: Panel,
    init: Run | None,
) -> dict[str, Any]:
    """Software, settings, slides and starting point of a run, for its provenance."""
    return {
        "software": software(),
        "seed": config.optim.seed,
        "config_hash": config_hash(config),
        "panel": {"hash": panel.hash, "n_genes": len(panel)},
        "splits_hash": splits.hash,
        "slides": [_slide_facts(corpus, slide) for slide in slides],
        "held_out": splits.to_dict()["held_out"],
        "same_patient": list(splits.same_patient),
        "init": None if init is None else _init_facts(init),
    }


def _slide_facts(corpus: Corpus, slide: PreparedSlide) -> dict[str, Any]:
    return {
        "id": slide.id,
        "patient": slide.patient,
        "n_spots": slide.n_spots,
        "licence": slide.licence or NOT_STATED,
        "sha256": corpus.entry(slide.id)["sha256"],
    }


def _init_facts(init: Run) -> dict[str, Any]:
    """What a run inherits from the model it started from: its slides stay seen."""
    keys = ("config_hash", "panel", "slides", "encoders", "init")
    return {key: init.provenance.get(key) for key in keys}
