"""The training loop over a method's stages: a function of plain arguments that knows no method by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from gengrad.data.draws import generator_for
from gengrad.files import SaveError
from gengrad.flows.flow import Flow
from gengrad.methods.base import Part, Stage
from gengrad.registry import Settings
from gengrad.training.checkpoint import (
    Checkpoint,
    CheckpointStore,
    load_module_state,
    load_optimizer_state_by_name,
    module_state,
    optimizer_state_by_name,
)
from gengrad.training.ema import EMA
from gengrad.training.interrupt import Interrupts
from gengrad.training.ranks import together
from gengrad.training.schedule import learning_rate
from gengrad.training.tracking import Tracker

MOST_SKIPS = 10  # non-finite steps in a row after which a run gives up


class TrainSettings(Settings):
    """The ``train:`` section of a config. ``lr`` and ``warmup`` count optimiser steps, ``batch_size`` is global."""

    steps: int = Field(10_000, ge=1)
    batch_size: int = Field(256, ge=2)
    accumulate: int = Field(1, ge=1)  # pieces that the batch goes through the network in: less memory, same gradient
    lr: float = Field(1e-3, gt=0)
    lr_decay: Literal["cosine", "constant"] = "cosine"
    warmup: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    ema_share: float = Field(0.02, ge=0, le=1)  # horizon of the weight average as a share of the stage; 0: none
    precision: Literal["no", "bf16"] = "no"
    compile: bool = False  # torch.compile: minutes at the start, faster steps after; needs a C++ compiler
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=2)
    log_every: int = Field(50, ge=1)
    preview_every: int | None = Field(None, ge=1)  # steps between pictures; none: at the end only


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says where, why and what was kept."""


@dataclass
class Progress:
    """Where a run stands: ``stage`` (its number), ``step`` within it, ``total`` steps over all stages."""

    stage: int = 0
    step: int = 0
    total: int = 0
    skips: int = 0  # non-finite steps in a row
    skipped: int = 0  # non-finite steps in all


@dataclass
class Outcome:
    """How a call of ``fit`` ended: ``finished``, or stopped by a ``signal`` after a save; what this call took."""

    finished: bool
    signal: int | None
    progress: Progress
    seconds: float
    cpu_seconds: float


@dataclass
class Run:
    """What ``fit`` works with: the processes, the places to write and the callbacks."""

    directory: Path
    accelerator: Accelerator
    store: CheckpointStore
    tracker: Tracker
    seed: int
    config: dict
    publish: Callable[[Flow, Progress], None]
    preview: Callable[[Flow, Progress], None] | None = None
    progress: Progress = field(default_factory=Progress)

    def way_out(self) -> str:
        """What a user can do after a divergence, and what there is to go on from."""
        kept = (self.directory / "flow.json").exists()
        start = f" and, to keep what was learned until then, init_from={self.directory}" if kept else ""
        return f"Start again with a lower train.lr or train.grad_clip and another out=...{start}, or look at the data."


def fit(stages: Iterable[Stage], flow: Flow, settings: TrainSettings, run: Run, found: Checkpoint | None) -> Outcome:
    """Trains the stages in order, each adding its transport to ``flow``; goes on from ``found`` where there is one.

    The end of a stage is a commit point. Raises ``TrainingStopped`` after 10 non-finite steps in a row. A signal
    ends it after a save, with ``Outcome.signal`` set.
    """
    started, cpu_started = time.perf_counter(), time.process_time()

    def ended(finished: bool, signal: int | None) -> Outcome:
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        return Outcome(finished, signal, run.progress, seconds, cpu_seconds)

    if found is not None:
        run.progress = Progress(**found.shared["progress"])
    run.tracker.cut(found.shared["metrics_position"] if found is not None else 0)
    trained = False
    with Interrupts() as interrupts:
        for number, stage in enumerate(stages):
            if number < run.progress.stage:
                continue  # its transport is in the flow already
            trained = True
            if not _fit_stage(stage, flow, settings, run, found, interrupts):
                return ended(False, interrupts.signal)
            found = None
    if not trained:  # a kill may have come between the last checkpoint and its publication
        _publish(lambda: run.publish(flow, run.progress), run)
    return ended(True, None)


class _Fitter:
    """The moving parts of one stage: wrapped networks, optimiser, average; and their state by name."""

    def __init__(self, stage: Stage, settings: TrainSettings, run: Run):
        self.stage, self.settings, self.run = stage, settings, run
        device = run.accelerator.device
        for network in stage.networks.values():
            network.to(device)
        self.ema = EMA(stage.networks, settings.ema_share * stage.steps)
        self.networks: dict[str, nn.Module] = {
            name: run.accelerator.prepare(network) for name, network in stage.networks.items()
        }
        if settings.compile:
            for network in self.networks.values():
                network.compile()
        self.spent: dict[str, float] = {}  # what the stage has logged as ..._seconds since the last line
        self.named = {f"{n}.{p}": w for n, net in stage.networks.items() for p, w in net.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.named.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )

    def step(self, progress: Progress) -> tuple[Tensor, Tensor, dict[str, float]] | None:
        """One optimiser step; (loss, gradient norm, logs), or None when something was not finite and it was skipped."""
        run, settings, stage = self.run, self.settings, self.stage
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                progress.step, stage.steps, settings.lr, settings.warmup, settings.lr_decay
            )
        self.optimizer.zero_grad(set_to_none=True)
        # `prepare` has wrapped the networks' forward for mixed precision; transport problems keep full precision
        try:
            loss, logs = self._gradient(progress.step)
        except torch.OutOfMemoryError as error:
            raise TrainingStopped(
                f"stage {stage.name!r}, step {progress.step}: out of GPU memory ({str(error).split('. ')[0]}). Lower "
                "train.batch_size or the network's width, or try train.precision=bf16 or train.accumulate=2; the last "
                "checkpoint is kept"
            ) from error
        norm = nn.utils.clip_grad_norm_(self.named.values(), settings.grad_clip)
        # the gradient is averaged over processes, so its norm tells all of them the same; the loss does not
        finite = torch.stack([loss.detach().float(), norm.float()]).isfinite().all()
        if run.accelerator.num_processes > 1:
            finite = run.accelerator.reduce(finite.float(), reduction="sum") == run.accelerator.num_processes
        if not finite:
            return None
        self.optimizer.step()
        self.ema.update(stage.networks, progress.step)
        return loss.detach(), norm.detach(), logs

    def _gradient(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss and logs of the batch of ``step``, taken in pieces; its gradient is left in the weights."""
        accelerator, stage, settings = self.run.accelerator, self.stage, self.settings
        place = (settings.batch_size, accelerator.process_index, accelerator.num_processes)
        losses, logs = [], {}
        for piece in range(settings.accumulate):
            part = Part(step, *place, piece, settings.accumulate)
            with ExitStack() as stack:
                if piece < settings.accumulate - 1:  # processes meet once, at the last piece
                    for network in self.networks.values():
                        stack.enter_context(accelerator.no_sync(network))
                generator = generator_for(self.run.seed, f"train/{stage.name}", step)  # the same for all pieces
                loss, logs = stage.objective(self.networks, part, generator)
                accelerator.backward(loss / settings.accumulate)
            for key in logs:
                if key.endswith("_seconds"):
                    self.spent[key] = self.spent.get(key, 0.0) + logs[key]
            losses.append(loss.detach())
        return torch.stack(losses).mean(), logs

    def check_finite(self, run: Run) -> None:
        """Raises ``TrainingStopped`` where a weight is not finite: such a state is never committed."""
        for name, parameter in self.named.items():
            if not parameter.isfinite().all():
                raise TrainingStopped(
                    f"stage {self.stage.name!r}: the weights {name} are not finite after step {run.progress.step}; "
                    f"nothing of this step is saved. {run.way_out()}"
                )

    def state(self) -> dict:
        return {
            "networks": {name: module_state(network) for name, network in self.stage.networks.items()},
            "average": {name: module_state(network) for name, network in self.ema.networks.items()},
            "optimizer": optimizer_state_by_name(self.optimizer, self.named),
        }

    def load(self, state: dict) -> None:
        for name, network in self.stage.networks.items():
            load_module_state(network, state["networks"][name])
            load_module_state(self.ema.networks[name], state["average"][name])
        load_optimizer_state_by_name(self.optimizer, self.named, state["optimizer"])


def _fit_stage(
    stage: Stage, flow: Flow, settings: TrainSettings, run: Run, found: Checkpoint | None, interrupts: Interrupts
) -> bool:
    """Trains one stage to its end and commits it; False when a signal ended it first (after a save)."""
    if not stage.networks:  # nothing to learn, as for particles alone
        _end_stage(stage, {}, flow, run)
        return True
    fitter, progress, tracker = _Fitter(stage, settings, run), run.progress, run.tracker
    if found is not None and found.shared["fitter"] is not None:
        fitter.load(found.shared["fitter"])
        if found.rank is not None:  # None when the number of processes changed: stages then make it anew
            stage.load_state(found.rank["stage"])
    tracker.start(stage.name, stage.steps, progress.step)
    clock, first = time.perf_counter(), progress.step
    while progress.step < stage.steps:
        result = fitter.step(progress)
        progress.step, progress.total = progress.step + 1, progress.total + 1
        if result is None:
            _count_skip(fitter, flow, run)
        else:
            progress.skips = 0
        if result is not None and (progress.step % settings.log_every == 0 or progress.step == stage.steps):
            _log(fitter, result, run, (progress.step - first) / (time.perf_counter() - clock))
        tracker.advance()
        stopping = interrupts.agreed(lambda number: _largest(run.accelerator, number))
        if progress.step == stage.steps:
            break  # the end of a stage is a commit point of its own
        if stopping or progress.step % settings.checkpoint_every == 0:
            _commit(fitter, flow, run)
        if stopping:
            tracker.finish()
            return False
        due = settings.preview_every and progress.step % settings.preview_every == 0
        if run.preview and due and run.accelerator.is_main_process:
            _with_current(fitter, flow, run.preview, progress)
    _end_stage(stage, fitter.ema.networks, flow, run)
    tracker.finish()
    return True


def _end_stage(stage: Stage, networks: dict[str, nn.Module], flow: Flow, run: Run) -> None:
    """Adds what the stage leaves to the flow and commits both."""
    _attach(stage, flow, networks)
    if summary := stage.summary():
        run.tracker.log({"stage": stage.name, "step": stage.steps, **summary})
        run.tracker.say(f"{stage.name}  " + "  ".join(f"{key} {value:.4g}" for key, value in summary.items()))
    run.progress = Progress(run.progress.stage + 1, 0, run.progress.total, 0, run.progress.skipped)
    run.accelerator.free_memory()  # it holds every network it has prepared, and a method may have many stages
    _commit(None, flow, run)


def _count_skip(fitter: _Fitter, flow: Flow, run: Run) -> None:
    """Notes a non-finite step; after ten in a row saves what is needed to replay it and gives up."""
    progress = run.progress
    progress.skips, progress.skipped = progress.skips + 1, progress.skipped + 1
    run.tracker.say(
        f"{fitter.stage.name} step {progress.step}: loss or gradient not finite; step skipped "
        f"({progress.skips} in a row)"
    )
    if progress.skips < MOST_SKIPS:
        return
    replay, advice = run.directory / "replay", run.way_out()
    CheckpointStore(replay, keep=2, ranks=run.store.ranks).save(progress.total, _shared_state(fitter, flow, run))
    raise TrainingStopped(
        f"stage {fitter.stage.name!r}, step {progress.step}: loss or gradient was not finite {MOST_SKIPS} times in a "
        f"row. {advice} The state after this step is in {replay}"
    )


def _log(fitter: _Fitter, result: tuple, run: Run, speed: float) -> None:
    loss, norm, logs = result
    if run.accelerator.num_processes > 1:
        loss = run.accelerator.reduce(loss, reduction="mean")
    row = {
        "stage": fitter.stage.name,
        "step": run.progress.step,
        "loss": float(loss),
        "grad_norm": float(norm),
        "lr": fitter.optimizer.param_groups[0]["lr"],
        **{key: float(value) for key, value in logs.items()},
        **fitter.spent,
    }
    fitter.spent = {}
    run.tracker.log(row)
    if not run.tracker.has_bar and (run.progress.step % (10 * fitter.settings.log_every) == 0):
        run.tracker.say(
            f"{row['stage']} {row['step']}/{fitter.stage.steps}  loss {row['loss']:.4g}  {speed:.0f} steps/s"
        )


def _shared_state(fitter: _Fitter | None, flow: Flow, run: Run) -> dict:
    """Everything a resumed run needs, by name: the stages done are in the flow, the current one in its fitter."""
    return {
        "progress": asdict(run.progress),
        "metrics_position": run.tracker.position,
        "config": run.config,
        "flow": {"description": flow.describe(), "tensors": dict(flow.state_dict())},
        "fitter": fitter.state() if fitter is not None else None,
    }


def _commit(fitter: _Fitter | None, flow: Flow, run: Run) -> None:
    """Saves a checkpoint on all processes, then publishes the flow as it stands."""
    rank_state = {"stage": fitter.stage.state()} if fitter is not None else {}
    if fitter is not None:
        fitter.check_finite(run)
    run.store.save(run.progress.total, _shared_state(fitter, flow, run), rank_state)
    if fitter is None:
        _publish(lambda: run.publish(flow, run.progress), run)
    else:
        _publish(lambda: _with_current(fitter, flow, run.publish, run.progress), run)


def _publish(write: Callable[[], None], run: Run) -> None:
    """Lets the main process write; where it cannot, every process raises the same error."""
    together(run.store.ranks, write if run.accelerator.is_main_process else lambda: None, (SaveError, ValueError))


def _with_current(fitter: _Fitter, flow: Flow, use: Callable[[Flow, Progress], None], progress: Progress) -> None:
    """Calls ``use`` with the flow as if the current stage ended here."""
    before = list(flow.transports)
    _attach(fitter.stage, flow, fitter.ema.networks)
    try:
        use(flow, progress)
    finally:
        flow.transports = nn.ModuleList(before)


def _attach(stage: Stage, flow: Flow, networks: dict[str, nn.Module]) -> None:
    """Adds what the stage leaves to the flow."""
    transport = stage.transport(networks)
    if stage.replaces:
        del flow.transports[-1]
    flow.transports.append(transport)


def _largest(accelerator: Accelerator, number: int) -> int:
    """The largest number of all processes, the same answer on each."""
    if accelerator.num_processes == 1:
        return number
    numbers = accelerator.gather(torch.tensor([number], device=accelerator.device))
    return int(numbers.max())
