"""One training run from its config: builds the parts, finds where to go on, trains, publishes, draws the pictures."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import gengrad
from gengrad.checks import check_fit
from gengrad.config import ConfigError, RunConfig, deciding, read_config
from gengrad.data.base import Distribution
from gengrad.data.draws import generator_for
from gengrad.files import write_atomically
from gengrad.flows.flow import Flow, load
from gengrad.methods.base import Method, Problem
from gengrad.previews import glimpse, last_pictures
from gengrad.registry import DATASETS, METHODS, NETWORKS
from gengrad.training.checkpoint import Checkpoint, CheckpointStore
from gengrad.training.lock import RunLock
from gengrad.training.loop import Outcome, Progress, Run, fit
from gengrad.training.ranks import Ranks, together
from gengrad.training.tracking import Tracker


def train(config: RunConfig, *, quiet: bool = False, again: str | None = None) -> Outcome:
    """Trains the run that ``config`` describes, or goes on with it where its folder holds a checkpoint.

    ``again``: the command that resumes it, for the message after an interruption. Raises ``ConfigError`` where the
    config does not fit the data, the processes or the checkpoint found, ``TrainingStopped`` when it diverges.
    """
    if config.data["name"] == "latents" and config.data["folder"] is None:  # what comes before it has to be made first
        from gengrad.chain import train as train_chain

        return train_chain(config, quiet=quiet, again=again)
    accelerator = _accelerator(config)
    ranks = Ranks.of_process_group()
    parts: list = []

    def build() -> None:
        target, source = build_data(config.data, config.source)
        method: Method = METHODS.build(config.method)
        check_fit(config, method, source, target, accelerator)
        parts.extend((target, source, method))

    # a file that one process cannot read ends all of them, with one message, before anything is written
    together(ranks, build, (ConfigError, OSError, ValueError))
    target, source, method = parts
    directory = Path(config.general.out)
    with RunLock(directory, ranks):
        store = CheckpointStore(directory / "checkpoints", keep=config.train.keep_checkpoints, ranks=ranks)
        found = store.load_latest()
        tracker = Tracker(directory, accelerator.is_main_process, quiet)
        if found is not None:
            _same_config(found, config)
        flow = Flow(source, units=target.units, class_weights=_class_weights(config, target))
        if found is not None:
            flow = Flow.rebuild(**found.shared["flow"]).to(accelerator.device)
        problem = _problem(config, source, target, accelerator, fresh=found is None)
        run = Run(
            directory=directory,
            accelerator=accelerator,
            store=store,
            tracker=tracker,
            seed=config.general.seed,
            config=config.resolved(),
            publish=lambda flow, progress: _publish(flow, progress, config),
            preview=lambda flow, progress: glimpse(flow, target, config, progress.total, tracker),
        )
        if accelerator.is_main_process:
            write_atomically(directory / "config.yaml", _yaml(config).encode())
            _announce(problem, config, accelerator, tracker, found)
        outcome = fit(method.stages(problem, flow), flow, config.train, run, found)
        if accelerator.is_main_process:
            _farewell(flow, target, config, outcome, tracker, again)
    if accelerator.num_processes > 1:
        accelerator.end_training()
    return outcome


def build_data(data: dict, source: dict) -> tuple[Distribution, Distribution]:
    """(target, source) from their settings; the source learns the target's event shape where it takes one."""
    target = DATASETS.build(data)
    return target, DATASETS.build(source, event_shape=tuple(target.event_shape))


def _accelerator(config: RunConfig) -> Accelerator:
    device = config.general.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but PyTorch sees no CUDA device here; use device=auto or device=cpu")
    precision = config.train.precision
    # Accelerate keeps the first precision of a process; a second run in it may ask for another
    AcceleratorState._reset_state()
    return Accelerator(cpu=device == "cpu" or not torch.cuda.is_available(), mixed_precision=precision)


def _problem(
    config: RunConfig, source: Distribution, target: Distribution, accelerator: Accelerator, fresh: bool
) -> Problem:
    """What the method is asked; the networks of a ``fresh`` run start from ``init_from`` where the config says so."""
    made: list[torch.nn.Module] = []
    start = load(config.general.init_from) if config.general.init_from and fresh else None
    networks = [network for t in start.transports for network in t.velocity_networks()] if start else []

    def make_network() -> torch.nn.Module:
        number = len(made)
        # the initial weights are a function of the seed, and no draw outside sees a difference
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for(config.general.seed, "init", number).initial_seed())
            network = NETWORKS.build(config.network, event_shape=tuple(target.event_shape))
        if start is not None:
            _take_weights(network, networks, number, config)
        made.append(network)
        return network

    return Problem(
        source=source,
        target=target,
        make_network=make_network,
        seed=config.general.seed,
        steps=config.train.steps,
        batch_size=config.train.batch_size,
        device=accelerator.device,
        classes=config.network.get("classes"),
    )


def _take_weights(network: torch.nn.Module, networks: list, number: int, config: RunConfig) -> None:
    where = f"init_from={config.general.init_from}"
    if number >= len(networks):
        raise ConfigError(f"{where} holds {len(networks)} networks, this method's network {number + 1} has none there")
    try:
        network.load_state_dict(networks[number].state_dict())
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ConfigError(f"{where}: its network does not fit this config's `network:` section ({detail})") from None


def _class_weights(config: RunConfig, target: Distribution) -> list[float] | None:
    """The share of each class in the data, for a network that takes classes."""
    classes = config.network.get("classes")
    if not classes:
        return None
    counts = torch.bincount(target.labels, minlength=classes).double()
    return (counts / counts.sum()).tolist()


def _same_config(found: Checkpoint, config: RunConfig) -> None:
    """A run goes on only under the config it began with; a key that has come since has its default there."""
    begun = found.shared["config"]
    with suppress(ConfigError):  # a key of that time is no more: told below, as any other difference
        begun = read_config(begun).resolved()
    before, now = deciding(begun), deciding(config.resolved())
    if before == now:
        return
    changed = [f"{key}: {a!r} there, {b!r} here" for key, a, b in _differences(before, now)]
    raise ConfigError(
        f"{config.general.out} holds a run with another config ({'; '.join(changed)}). Nothing was changed there. "
        f"Give another out=..., and init_from={config.general.out} to start from its weights"
    )


def _differences(a: dict, b: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    found = []
    for key in sorted(a.keys() | b.keys()):
        one, two = a.get(key), b.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            found += _differences(one, two, f"{prefix}{key}.")
        elif one != two:
            found.append((prefix + key, one, two))
    return found


def _publish(flow: Flow, progress: Progress, config: RunConfig) -> None:
    """Writes the flow as it stands for ``sample.py``, which reads nothing else."""
    flow.info = {"config": config.resolved(), "progress": asdict(progress), "versions": versions()}
    flow.save(config.general.out)


def versions() -> dict[str, str]:
    """What a flow and a report are signed with: the versions of gengrad, torch, numpy and Python."""
    import numpy

    return {
        "gengrad": gengrad.__version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": sys.version.split()[0],
    }


def _yaml(config: RunConfig) -> str:
    head = "# The resolved config of this run, every default filled in.\n"
    return head + yaml.safe_dump(config.resolved(), sort_keys=False)


# ------------------------------------------------------------------ what the user sees


def _announce(
    problem: Problem, config: RunConfig, accelerator: Accelerator, tracker: Tracker, found: Checkpoint | None
) -> None:
    with torch.device("meta"):  # counted without drawing or holding a weight
        network = NETWORKS.build(config.network, event_shape=tuple(problem.target.event_shape))
    size = sum(p.numel() for p in network.parameters())
    train, world = config.train, accelerator.num_processes
    learns = METHODS.get(config.method["name"]).learns != "nothing"
    lines = [
        f"gengrad {gengrad.__version__}: {config.method['name']}, {config.source['name']} -> {config.data['name']}",
        f"  network   {config.network['name']}, {size:,} parameters" if learns else "  network   none",
        f"  device    {accelerator.device}, {world} process{'es' if world > 1 else ''}, precision {train.precision}",
    ]
    if learns:
        lines.append(f"  batch     {train.batch_size} in all, {train.batch_size // world} a process")
        lines.append(f"  steps     {train.steps:,}, a checkpoint every {train.checkpoint_every:,}")
    lines.append(f"  output    {config.general.out}")
    lines += [f"  data      {note}" for note in problem.target.notes]
    if problem.target.units is not None:
        lines.append("  units     trained on normalised data; the samples are in the units of the file")
    if found is not None:
        progress = Progress(**found.shared["progress"])
        lines.append(f"  goes on   at step {progress.total:,} (stage {progress.stage + 1}), from {found.path}")
    tracker.say("\n".join(lines))


def _farewell(
    flow: Flow, target: Distribution, config: RunConfig, outcome: Outcome, tracker: Tracker, again: str | None
) -> None:
    out = config.general.out
    if not outcome.finished:
        command = again or f"the same command (out={out})"
        tracker.say(f"stopped at step {outcome.progress.total:,}, saved in {out}; to go on: {command}")
        return
    picture = last_pictures(flow, target, config)
    skipped = f", {outcome.progress.skipped} steps skipped as not finite" if outcome.progress.skipped else ""
    tracker.say(f"done: {outcome.progress.total:,} steps in {outcome.seconds:.0f} s{skipped}; picture: {picture}")
    suffix = "png" if target.is_image else "npy"
    n = 64 if target.is_image else 2048
    nfe = config.evaluate.nfe[0]
    tracker.say(f"to sample:   python sample.py {shlex.quote(out)} --n {n} --nfe {nfe} --seed 0 --out samples.{suffix}")
    tracker.say(f"to evaluate: gengrad evaluate {shlex.quote(out)}")
