"""`st-align bench ablation`: Table 3, and what the method is sensitive to; both metrics.

    cell      a configuration and a seed: trained in runs/ (resumed where it was killed), scored
    domains   ARI of held-out labelled slides, their number of domains known
    genes     ridge on the run's r and e, fitted on its training slides; MSE of held-out slides
    frozen    the unimodal rows train nothing: a frozen encoder on axes of the training slides

Shape letters: N spots, D features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st_align.benchmarks.ablation_cells import TABLE_3, Ablation, sensitivity, table_3
from st_align.benchmarks.ablation_report import draw, headline, markdown
from st_align.benchmarks.audit import seen
from st_align.benchmarks.cells import Bench, Cell, Found, SkippedError, join
from st_align.benchmarks.genes_data import NINE, usable
from st_align.benchmarks.genes_models import PER_SLIDE, RidgePredictor, Task
from st_align.benchmarks.genes_scores import score_slides
from st_align.benchmarks.image_rows import Read, frozen, run_parts
from st_align.benchmarks.table import Row, to_json, write_csv
from st_align.checkpoint import MODEL, Run, load_run
from st_align.config import Config, EncoderConfig, to_dict
from st_align.corpus import Corpus
from st_align.domains import assign_domains
from st_align.encoders.base import FrozenEncoder, FrozenEntry, View, find
from st_align.encoders.lookup import find_weights, load_frozen
from st_align.errors import ConfigError, nearest
from st_align.expression import Panel
from st_align.features import cached_features
from st_align.files import replace_file
from st_align.infer import Embedder, without_counts
from st_align.job import is_first
from st_align.metrics import labelled, score_domains
from st_align.predict import top_hvg
from st_align.provenance import json_hash
from st_align.slide import PreparedSlide
from st_align.splits import Splits, split_slides
from st_align.targets import gene_panel
from st_align.train import train

RUNS = "runs"
_CLUSTERINGS = 5
_GENE_ENCODER = "scgpt"
"""The gene-only row where the base trains its own encoder of spots' genes."""


@dataclass(frozen=True, kw_only=True)
class AblationRequest:
    """Options of `st-align bench ablation`; `config` is the base of every configuration."""

    config: Config
    hold_out_slides: Sequence[str] = ()
    hold_out_patients: Sequence[str] = ()
    label_key: str
    genes: Sequence[str] = ()
    top: int | None = None
    n_seeds: int = 3
    sensitivity: bool = False


@dataclass(frozen=True, kw_only=True)
class Bed:
    """What every configuration is trained and scored on."""

    corpus: Corpus
    request: AblationRequest
    splits: Splits
    labelled: Sequence[PreparedSlide]
    imaged: Sequence[PreparedSlide]
    train: Sequence[PreparedSlide]
    """Training slides with image and counts: what expression is learnt from."""
    panel: Panel

    @property
    def key(self) -> dict[str, Any]:
        """All that decides the numbers apart from the configuration."""
        entries = {i: json_hash(self.corpus.entry(i)["sha256"]) for i in self.corpus.ids}
        return {
            "bench": "ablation",
            "data": entries,
            "splits": self.splits.hash,
            "label_key": self.request.label_key,
            "panel": self.panel.hash,
        }


def bench_ablation(corpus_path: Path, out: Path, request: AblationRequest) -> Found | None:
    """Write results.csv, results.md, figures and provenance into `out`, runs beside them; gives
    what `--json` holds and the cells that failed: a configuration that fails is a row with the
    reason, and the same command tries it again. Ranks share the cells, each run being trained by
    one of them alone; the first one has the result.

    Raises:
        ConfigError: nothing is held out, or nothing of it can be scored; unknown genes.

    """
    bed = _bed(Corpus.open(corpus_path), request)
    bench = Bench(out)
    ablations = table_3(request.config)
    if request.sensitivity:
        ablations += sensitivity(request.config)
    cells = bench.collect(
        lambda: [
            *(_unimodal(bench, bed, kind) for kind in ("image", "gene")),
            *(
                _trained(bench, bed, ablation, seed)
                for ablation in ablations
                for seed in range(request.n_seeds)
            ),
        ]
    )
    if cells is None:
        return None
    rows = join(cells)
    text = markdown(rows, _setting(bed), bench.failed)
    write_csv(out / "results.csv", rows)
    replace_file(out / "results.md", text.encode())
    draw(out, rows)
    bench.write_provenance(
        bench="ablation",
        corpus=str(bed.corpus.path),
        config=to_dict(request.config),
        seeds=list(range(request.n_seeds)),
        splits=bed.splits.to_dict(),
        key=bed.key,
        configurations={a.name: dict(a.changes) for a in ablations},
    )
    return to_json(rows, headline(rows)), bench.failed


def _bed(corpus: Corpus, request: AblationRequest) -> Bed:
    splits = split_slides(
        {i: str(corpus.entry(i)["patient"]) for i in corpus.ids},
        hold_out_slides=request.hold_out_slides,
        hold_out_patients=request.hold_out_patients,
    )
    if not splits.held_out:
        raise ConfigError(
            "no slide is held out to be scored",
            fix="name slides or patients: --hold-out-slide ID, --hold-out-patient P",
        )
    held = corpus.slides(splits.held_out)
    train, _ = usable(corpus.slides(splits.train))
    named = [s for s in held if _labels(s, request.label_key) is not None]
    imaged = [s for s in held if s.has_image and s.counts is not None]
    if not named:
        columns = sorted({str(c) for s in held for c in s.spots})
        raise ConfigError(
            f"no slide held out has labels {request.label_key!r}",
            fix=nearest(request.label_key, columns),
        )
    names = top_hvg(train, request.top) if request.top else list(request.genes) or list(NINE)
    return Bed(corpus=corpus, request=request, splits=splits, labelled=named, imaged=imaged,
               train=train, panel=gene_panel(names, train))  # fmt: skip


def _trained(bench: Bench, bed: Bed, ablation: Ablation, seed: int) -> Cell:
    """A configuration trained with a seed and scored."""
    config = ablation.config(bed.request.config, seed)
    key = {**bed.key, "config": to_dict(config)}
    of = Row(slide="", method=ablation.name, track=ablation.track, seed=seed)
    folder = bench.out / RUNS / json_hash(key)

    def make() -> Cell:
        run = _train(bed, config, folder, ablation.name, seed)
        reader = Embedder(run, corpus=bed.corpus)
        use, dims = config.readout.use, config.readout.dims

        def embedded(slide: PreparedSlide) -> NDArray[np.floating]:
            return reader.embed(slide).readouts[use][:, :dims]

        rows = _domain_rows(bed, of, embedded, seed)
        return Cell(rows=(*rows, *_gene_rows(bed, of, run_parts(run, bed.corpus)["r+e"])))

    return bench.cell(f"{ablation.name} seed {seed}", key, of, make)


def _train(bed: Bed, config: Config, folder: Path, name: str, seed: int) -> Run:
    """A finished run in `folder`: the one that is there, or trained, from where it stopped."""
    if (folder / MODEL).is_file():
        found = load_run(folder)
        if found.finished:
            return found
    if is_first():
        print(f"{name}, seed {seed}: {folder}")
    run = train(
        bed.corpus,
        config,
        folder,
        hold_out_slides=bed.request.hold_out_slides,
        hold_out_patients=bed.request.hold_out_patients,
        resume=folder.exists(),
        command=f"bench ablation: {name}",
        alone=True,
    )
    if not run.finished:
        raise KeyboardInterrupt  # asked to stop: it is saved, and the same command goes on
    return run


def _unimodal(bench: Bench, bed: Bed, kind: str) -> Cell:
    """A frozen encoder alone: images of the niche, or genes of the spot (it predicts none)."""
    model = bed.request.config.model
    name = model.niche_image if kind == "image" else model.spot_gene
    entry = find(name)
    if not isinstance(entry, FrozenEntry):
        name, entry = _GENE_ENCODER, find(_GENE_ENCODER)
    view: View = "niche" if kind == "image" else "spot"
    of = Row(slide="", method=f"{kind} only ({name}, frozen)", track=TABLE_3)
    given = bed.request.config.encoders.get(name, EncoderConfig()).weights
    key = {**bed.key, "unimodal": name, "weights": given, "view": view,
           "niche": bed.request.config.data.niche}  # fmt: skip

    def make() -> Cell:
        if not isinstance(entry, FrozenEntry):
            raise SkippedError(f"{name} is no pretrained encoder")
        if given is None and find_weights(entry, None) is None and entry.info.files:
            raise SkippedError("no weights")
        encoder = load_frozen(entry, given)
        niche = bed.request.config.data.niche
        rows = _domain_rows(bed, of, _on_training_axes(bed, encoder, view), 0)
        if kind == "image":
            rows += _gene_rows(bed, of, frozen(bed.corpus, encoder, view, niche))
        return Cell(rows=tuple(rows))

    return bench.cell(of.method, key, of, make)


def _on_training_axes(
    bed: Bed, encoder: FrozenEncoder, view: View
) -> Callable[[PreparedSlide], NDArray[np.floating]]:
    """Features centred on their slide, on principal axes of the training slides: as a run's are."""
    config = bed.request.config

    def centred(slide: PreparedSlide) -> NDArray[np.float64]:
        found = cached_features(bed.corpus, slide.id, encoder, view, niche_spec=config.data.niche)
        if found is None:
            raise SkippedError(f"slide {slide.id} has no {encoder.modality}s")
        values = np.asarray(found.pooled, np.float64)
        return np.asarray(values - values.mean(axis=0))

    covariance = sum(x.T @ x for x in map(centred, bed.train))
    _, vectors = np.linalg.eigh(covariance)
    axes = vectors[:, ::-1][:, : config.readout.dims]
    return lambda slide: centred(slide) @ axes


def _domain_rows(
    bed: Bed, of: Row, embedded: Callable[[PreparedSlide], NDArray[np.floating]], seed: int
) -> list[Row]:
    """ARI and NMI of the labelled slides, their K known, smoothed over the lattice and not."""
    rows = []
    for slide in bed.labelled:
        labels = _labels(slide, bed.request.label_key)
        if labels is None:
            continue
        n = len(set(labels[labelled(labels)].astype(str)))
        ring = slide.niches["lattice"].neighbors if "lattice" in slide.niches else None
        found = assign_domains(
            embedded(slide), n, runs=_CLUSTERINGS, seed=seed, neighbors=ring, refine=False
        )
        scores = score_domains(found, labels)
        values = {
            "ari": scores["ari"]["mean"],
            "ari refined": scores["ari_refined"],
            "nmi": scores["nmi"],
        }
        rows += [
            dataclasses.replace(of, slide=slide.id, metric=name, value=value,
                                protocol=_protocol(bed, slide))
            for name, value in values.items()
            if value is not None
        ]  # fmt: skip
    return rows


def _gene_rows(bed: Bed, of: Row, read: Read) -> list[Row]:
    """Scores of ridge on image features, mean over genes, of held-out slides with an image."""
    if not bed.imaged:
        return []
    task = Task(train=bed.train, test=[without_counts(s) for s in bed.imaged], panel=bed.panel)
    predicted = RidgePredictor(of.method, read, "").predict(task, PER_SLIDE)
    cell = score_slides(of, bed.imaged, predicted, bed.panel, task.means())
    protocols = {s.id: _protocol(bed, s) for s in bed.imaged}
    return [
        dataclasses.replace(row, protocol=protocols[row.slide])
        for row in cell.rows
        if row.slide in protocols
    ]


def _protocol(bed: Bed, slide: PreparedSlide) -> str:
    return seen({i: bed.splits.patients[i] for i in bed.splits.train}, slide).protocol


def _labels(slide: PreparedSlide, key: str) -> NDArray[Any] | None:
    """[N] labels; None where the slide has none, or fewer than two."""
    if key not in slide.spots:
        return None
    labels: NDArray[Any] = slide.spots[key].astype(object).to_numpy()
    return labels if len(set(labels[labelled(labels)].astype(str))) > 1 else None


def _setting(bed: Bed) -> list[str]:
    genes = ", ".join(bed.panel.genes) if len(bed.panel) <= 12 else f"{len(bed.panel)} genes"
    return [
        f"trained on {', '.join(bed.splits.train)}",
        f"domains of {', '.join(s.id for s in bed.labelled)} against {bed.request.label_key!r}",
        f"genes of {', '.join(s.id for s in bed.imaged) or 'no slide'}: {genes}",
        *(f"{s.id}: {_protocol(bed, s)}" for s in bed.labelled),
    ]
