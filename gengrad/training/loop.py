"""The training loop over a method's stages: a function of plain arguments that knows no method by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from gengrad.files import SaveError
from gengrad.flows.flow import Flow
from gengrad.methods.base import Stage
from gengrad.training.checkpoint import Checkpoint, CheckpointStore
from gengrad.training.fitter import Fitter, TrainingStopped, TrainSettings
from gengrad.training.interrupt import Interrupts
from gengrad.training.ranks import together
from gengrad.training.tracking import Tracker

MOST_SKIPS = 10  # non-finite steps in a row after which a run gives up
SILENCE = 20.0  # seconds without a line after which a run without a bar speaks


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
    with Interrupts() as interrupts, _told_what_is_kept(run):
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


@contextmanager
def _told_what_is_kept(run: Run) -> Iterator[None]:
    """Notes on a ``ValueError`` of a later stage that the flow of those before it stands, unless it says so itself."""
    try:
        yield
    except ValueError as error:
        done = run.progress.stage
        if done and "is kept" not in str(error):
            error.add_note(f"This was in stage {done + 1}; the flow of the {done} before is kept in {run.directory}")
        raise


def _fit_stage(
    stage: Stage, flow: Flow, settings: TrainSettings, run: Run, found: Checkpoint | None, interrupts: Interrupts
) -> bool:
    """Trains one stage to its end and commits it; False when a signal ended it first (after a save)."""
    if not stage.networks:  # nothing to learn, as for particles alone
        _end_stage(stage, {}, flow, run)
        return True
    fitter, progress, tracker = Fitter(stage, settings, run), run.progress, run.tracker
    if found is not None and found.shared["fitter"] is not None:
        fitter.load(found.shared["fitter"])
        if found.rank is not None:  # None when the number of processes changed: stages then make it anew
            stage.load_state(found.rank["stage"])
    tracker.start(stage.name, stage.steps, progress.step)
    clock, first = time.perf_counter(), progress.step
    spoken = clock
    while progress.step < stage.steps:
        before = time.process_time()
        result = fitter.step(progress)
        fitter.spend("cpu_seconds", time.process_time() - before)
        progress.step, progress.total = progress.step + 1, progress.total + 1
        if result is None:
            _count_skip(fitter, flow, run)
        else:
            progress.skips = 0
        if result is not None and (progress.step % settings.log_every == 0 or progress.step == stage.steps):
            _log(fitter, result, run)
        now = time.perf_counter()
        if result is not None and not tracker.has_bar and (_worth_a_line(progress, settings) or now - spoken > SILENCE):
            spoken = now
            _speak(fitter, float(result[0]), run, (progress.step - first) / (now - clock))
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


def _count_skip(fitter: Fitter, flow: Flow, run: Run) -> None:
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


def _worth_a_line(progress: Progress, settings: TrainSettings) -> bool:
    """Every ten logged rows, and at each quarter of a run that is shorter than that."""
    quarters = [4 * total // settings.steps for total in (progress.total - 1, progress.total)]
    return progress.step % (10 * settings.log_every) == 0 or quarters[0] < quarters[1]


def _speak(fitter: Fitter, loss: float, run: Run, speed: float) -> None:
    """A line for the reader; ``loss`` is that of this process's rows, ``speed`` in steps a second."""
    pace = f"{speed:.0f} steps/s" if speed >= 10 else f"{speed:.2g} steps/s"
    run.tracker.say(f"{fitter.stage.name} {run.progress.step}/{fitter.stage.steps}  loss {loss:.4g}  {pace}")


def _log(fitter: Fitter, result: tuple, run: Run) -> None:
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


def _shared_state(fitter: Fitter | None, flow: Flow, run: Run) -> dict:
    """Everything a resumed run needs, by name: the stages done are in the flow, the current one in its fitter."""
    return {
        "progress": asdict(run.progress),
        "metrics_position": run.tracker.position,
        "config": run.config,
        "flow": {"description": flow.describe(), "tensors": dict(flow.state_dict())},
        "fitter": fitter.state() if fitter is not None else None,
    }


def _commit(fitter: Fitter | None, flow: Flow, run: Run) -> None:
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


def _with_current(fitter: Fitter, flow: Flow, use: Callable[[Flow, Progress], None], progress: Progress) -> None:
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
