"""The training loop.

    plan        split, panel, features, model                         (plan.py)
    each step   a global batch by (seed, step)                        (sampling.py)
                its rows of this rank, augmented                      (loader.py)
                embeddings, losses over all ranks, gradients          (model.py, loss.py)
                AdamW by its schedules                                (optim.py, schedules.py)
    now and then  a line of metrics, a checkpoint                     (runlog.py, checkpoint.py)
    at the end  the readout axes                                      (readout.py)

A run that is killed at any moment and resumed ends in the same weights, bit for bit (one machine,
same versions, threads and ranks, on CPU): a step depends on the weights, the optimizer's moments,
(seed, step, rank) and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from st_align import runlog
from st_align.batch import Batch
from st_align.checkpoint import (
    GENES,
    METRICS,
    PROVENANCE,
    TRAINER,
    Run,
    TrainerState,
    load_run,
    load_state,
    load_weights,
    save_model,
    save_readouts,
    save_run,
    save_state,
)
from st_align.config import Config, LossConfig
from st_align.errors import OutputError, TrainingError, require_new_or_empty
from st_align.expression import Panel, read_panel
from st_align.files import read_json
from st_align.job import StopSignals, is_first, launch, require_agreed, step_rng, together
from st_align.loader import prefetch
from st_align.loss import StAlignLoss, clamp_logit_scale
from st_align.model import STAlign
from st_align.optim import build_optimizer, moments, restore_moments, set_rates
from st_align.plan import Plan, plan_training, require_same_run
from st_align.readout import fit_readouts, training_spots
from st_align.sampling import global_batch, rank_rows, steps_per_epoch
from st_align.schedules import learning_rate, weight_decay
from st_align.splits import Splits, split_slides

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from st_align.corpus import Corpus

SAVE_EVERY_S = 300.0
_LINES = 200
"""About as many lines of metrics a run has, whatever its length."""
_SAY_EVERY_S = 10.0


def train(
    corpus: Corpus,
    config: Config,
    out: Path,
    *,
    hold_out_slides: Collection[str] = (),
    hold_out_patients: Collection[str] = (),
    panel: Path | None = None,
    init: str | Path | None = None,
    resume: bool = False,
    command: str = "",
    save_every_s: float = SAVE_EVERY_S,
    log: Callable[[str], None] = print,
    alone: bool = False,
) -> Run:
    """Pretrain a model on `corpus` into the run folder `out`.

    Args:
        corpus: prepared slides; those held out are never read, but for their patients.
        config: settings, such as `config.preset("tiny")`.
        out: a new or empty folder, or with `resume` one of an unfinished run.
        hold_out_slides: ids of slides not to train on.
        hold_out_patients: patients none of whose slides are trained on.
        panel: file of genes; None: the most variable genes of the training slides.
        init: run folder or shipped checkpoint to start from; it brings its panel.
        resume: go on where a stopped or killed run was last saved.
        command: what the user typed, for the provenance.
        save_every_s: seconds between two saves.
        log: takes a line for the user; called on the first rank only.
        alone: this process trains by itself, whatever other ranks there are; `out` is its own.

    Returns:
        The run. `run.finished` is False when SIGINT or SIGTERM stopped it: the step was finished
        and saved, and `resume` goes on.

    Raises:
        ConfigError, CorpusError, ModelError: the parts do not fit each other.
        OutputError: `out` is in use or cannot be written.
        TrainingError: the loss is not finite; the last good checkpoint stays.

    """
    fabric = launch(alone=alone)
    say = log if is_first() else _say_nothing
    state = _resume_point(out, resume, say)
    fresh = state is None
    with together(fabric):
        # Planning waits for all ranks: each has looked before the first one writes.
        require_agreed(fabric, None if state is None else state.step)
        plan = plan_training(
            corpus,
            config,
            fabric,
            splits=_split(corpus, hold_out_slides, hold_out_patients, say),
            panel=read_panel(panel) if panel else None if fresh else Panel.load(out / GENES),
            init=load_run(init) if fresh and init is not None else None,
            log=say,
        )
        provenance = _begin(out, plan, command, resumed=not fresh, first=fabric.is_global_zero)
        _Trainer(plan, out, fabric, provenance, say).train(state, save_every_s)
        fabric.barrier()
    return load_run(out)


class StepModule(nn.Module):
    """Model and loss in one module, so that data parallelism sees all parameters at work."""

    def __init__(self, model: STAlign, config: LossConfig, *, alone: bool = False) -> None:
        super().__init__()
        self.model, self.loss = model, StAlignLoss(config, alone=alone)

    def forward(self, **fields: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Fields of a `Batch` -> total loss, its terms, and the rows that took part in each."""
        batch = Batch(**fields)
        loss = self.loss(self.model(batch), batch, self.model.logit_scale)
        return loss.total, loss.terms, loss.rows


class _Trainer:
    """One run on one rank."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        fabric: Fabric,
        provenance: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.plan, self.out, self.fabric, self.say = plan, out, fabric, say
        self.provenance = provenance
        self.optimizer = build_optimizer(plan.model, fused=fabric.device.type == "cuda")
        self.module, self.stepper = fabric.setup(
            StepModule(plan.model, plan.config.loss, alone=fabric.world_size == 1), self.optimizer
        )
        self.unseen: list[tuple[int, Tensor]] = []
        """Steps whose loss and gradient norm nobody has looked at: looking waits for the GPU."""
        self.clock = self.said = time.monotonic()

    def train(self, state: TrainerState | None, save_every_s: float) -> None:
        """From a resume point or the beginning to the end, or until asked to stop."""
        done, steps = self.run(self.restore(state), save_every_s), self.plan.length.steps
        if done == steps:
            self.finish()
        else:
            self.say(f"asked to stop: saved after step {done} of {steps}; go on with --resume")

    def restore(self, state: TrainerState | None) -> int:
        """Take up a resume point, or write the first one; returns the steps done."""
        if state is None:
            self.save(0)
            return 0
        load_weights(self.plan.model, state.weights, self.out)
        restore_moments(self.plan.model, self.optimizer, state.moments)
        if self.fabric.is_global_zero:
            runlog.truncate(self.out / METRICS, state.step)
        return state.step

    def run(self, first: int, save_every_s: float) -> int:
        """Steps from `first` on; returns how many are done: all, or fewer when asked to stop."""
        steps = self.plan.length.steps
        lines_every = max(steps // _LINES, 1)
        self.module.train()
        self.clock = saved = time.monotonic()
        with StopSignals() as signals, closing(self.batches(first)) as batches:
            for done, batch in enumerate(batches, start=first + 1):
                values = self.step(done - 1, batch)
                if done % lines_every == 0 or done == steps:
                    self.write_line(done, lines_every, values)
                stop = signals.agreed(self.fabric, done)
                if stop or done == steps or time.monotonic() - saved >= save_every_s:
                    self.save(done)
                    saved = time.monotonic()
                if stop:
                    return done
        return steps

    def batches(self, first: int) -> Generator[Batch]:
        """The rows of this rank of every global batch from step `first` on, made ahead."""
        plan, optim, data = self.plan, self.plan.config.optim, self.plan.config.data
        n, size = plan.data.n_spots, plan.length.batch
        rows = rank_rows(size, self.fabric.global_rank, self.fabric.world_size)

        def make(step: int) -> Batch:
            epoch = step // steps_per_epoch(n, size)
            ids = global_batch(optim.seed, step, n, size, block=data.block)[rows]
            key = (optim.seed, epoch) if data.augment else None
            return plan.data.batch(ids, augment_key=key)

        return prefetch(make, range(first, plan.length.steps))

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """One update. Returns what a line of metrics needs, still on the device."""
        plan, length = self.plan, self.plan.length
        optim = plan.config.optim
        set_rates(
            self.optimizer,
            lr=learning_rate(optim, step, length.steps, length.batch),
            weight_decay=weight_decay(optim, step, length.steps),
        )
        batch = batch.to(self.fabric.device)
        with step_rng(optim.seed, step, self.fabric.global_rank, self.fabric.device):
            total, terms, rows = self.module(**step_fields(batch))
            self.fabric.backward(total)
        norm = self.fabric.clip_gradients(
            self.module, self.stepper, max_norm=optim.clip, error_if_nonfinite=False
        )
        norm = cast(Tensor, norm)
        self.stepper.step()
        self.stepper.zero_grad()
        clamp_logit_scale(plan.model.logit_scale)
        self.unseen.append((step, torch.stack([total.detach(), norm])))
        chance = {f"ln_{name}": n.clamp(min=1).log() for name, n in rows.items()}
        return {"loss": total.detach(), **terms, **chance, "grad_norm": norm}

    def write_line(self, done: int, since: int, values: Mapping[str, Tensor]) -> None:
        """A line of `metrics.jsonl`, the mean over ranks, and now and then one to read."""
        self.check_finite()
        means = torch.stack(list(values.values()))
        if self.fabric.world_size > 1:
            means = cast(Tensor, self.fabric.all_reduce(means, reduce_op="mean"))
        length, now = self.plan.length, time.monotonic()
        speed = since * length.batch / max(now - self.clock, 1e-9)
        self.clock = now
        if not self.fabric.is_global_zero:
            return
        matrices = self.optimizer.param_groups[0]
        line = {
            "step": done,
            "epoch": self.epoch(done - 1),
            **dict(zip(values, means.tolist(), strict=True)),
            "ln_batch": math.log(length.batch),
            "logit_scale": self.plan.model.logit_scale.item(),
            "lr": matrices["lr"],
            "weight_decay": matrices["weight_decay"],
            "spots_per_s": speed,
        }
        runlog.append(self.out / METRICS, line)
        if now - self.said >= _SAY_EVERY_S or done == length.steps:
            self.said = now
            self.say(runlog.readable(line, length.steps, length.epochs, length.batch))

    def check_finite(self) -> None:
        """Stop when a step since the last look was not finite."""
        steps = [step for step, _ in self.unseen]
        looked = torch.stack([values for _, values in self.unseen]).tolist() if steps else []
        self.unseen.clear()
        for step, (loss, norm) in zip(steps, looked, strict=True):
            if not math.isfinite(loss + norm):
                raise self.not_finite(step, f"loss {loss}, norm of its gradient {norm}")

    def not_finite(self, step: int, found: str) -> TrainingError:
        """What a person is told; nothing that is not finite was saved."""
        return TrainingError(
            f"the numbers ran out of range at step {step + 1} of {self.plan.length.steps}, "
            f"in epoch {self.epoch(step)}",
            expected="a finite loss and finite weights",
            found=found,
            fix="train into a new folder with a lower optim.lr; the last good checkpoint is kept "
            f"in {self.out}",
        )

    def epoch(self, step: int) -> int:
        """The epoch of a step, counted from 1."""
        return step * self.plan.length.epochs // self.plan.length.steps + 1

    def save(self, done: int) -> None:
        """Model, provenance and resume point after `done` steps; the first rank writes."""
        self.check_finite()
        if not self.fabric.is_global_zero:
            return
        model = self.plan.model
        for name, value in model.state_dict().items():
            if not value.isfinite().all():
                raise self.not_finite(done - 1, f"{name} after the step")
        self.save_model(done, finished=False)
        state = TrainerState(
            step=done, weights=model.state_dict(), moments=moments(model, self.optimizer)
        )
        save_state(self.out, state)

    def save_model(self, done: int, *, finished: bool) -> None:
        """Weights, and where they come from."""
        facts = {**self.provenance, "step": done, "finished": finished}
        save_model(self.out, self.plan.model, facts)

    def finish(self) -> None:
        """Fit the readouts on training slides and mark the run as finished."""
        if not self.fabric.is_global_zero:
            return
        spots = training_spots(self.plan.model, self.plan.data)
        save_readouts(self.out, fit_readouts(spots))
        self.save_model(self.plan.length.steps, finished=True)


def _resume_point(out: Path, resume: bool, say: Callable[[str], None]) -> TrainerState | None:
    if not resume:
        require_new_or_empty(
            out, "the run folder", "choose another, or add --resume to go on with the run in it"
        )
        return None
    state, damaged = load_state(out)
    for problem in damaged:
        say(f"a resume point is damaged and is passed over: {problem}")
    if state is None and (out / PROVENANCE).is_file() and read_json(out / PROVENANCE)["step"] > 0:
        raise OutputError(
            f"{out} holds a model but no resume point",
            expected=f"{out / TRAINER}",
            fix="train into a new folder; --init takes the weights of this one",
        )
    if state is None:
        say(f"nothing to resume in {out}: starting from the beginning")
    else:
        say(f"resuming after step {state.step}")
    return state


def _begin(out: Path, plan: Plan, command: str, *, resumed: bool, first: bool) -> dict[str, Any]:
    """The run's provenance. The first rank writes a new run folder; a resumed run must be as it
    was planned, and its own beginning stays.
    """
    provenance = {**plan.provenance, "command": command}
    if resumed:
        stored = read_json(out / PROVENANCE)
        require_same_run(stored, provenance)
        provenance |= {key: stored[key] for key in ("command", "init")}
    elif first:
        save_run(out, plan.config, plan.panel, plan.preprocess, plan.splits.to_dict())
    return provenance


def _split(
    corpus: Corpus, slides: Collection[str], patients: Collection[str], say: Callable[[str], None]
) -> Splits:
    """The corpus without the `slides` and `patients` held out."""
    splits = split_slides(
        {id: corpus.entry(id)["patient"] for id in corpus.ids},
        hold_out_slides=slides,
        hold_out_patients=patients,
    )
    if splits.same_patient:
        shared = ", ".join(splits.same_patient)
        say(
            f"warning: other slides of the same patient train: scores on {shared} will be "
            "section-held-out, not patient-held-out (hold out the patient to change that)"
        )
    return splits


def step_fields(batch: Batch) -> dict[str, Any]:
    """By name: data parallelism looks for tensors in what it is called with."""
    return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}


def _say_nothing(_: str) -> None:
    """What ranks other than the first say."""
