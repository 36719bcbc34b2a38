"""What the schema of a config cannot see: its sizes against the data, the processes and the memory of the machine."""

from __future__ import annotations

import os
import shutil

import torch
from accelerate import Accelerator

from gengrad.config import ConfigError, RunConfig
from gengrad.data.base import LARGEST, Distribution
from gengrad.data.draws import generator_for
from gengrad.methods.base import Method


def check_fit(
    config: RunConfig, method: Method, source: Distribution, target: Distribution, accelerator: Accelerator
) -> None:
    """Refuses what the schema cannot see: sizes against the data, the number of processes, the memory."""
    problems, world = method.objections(source, target), accelerator.num_processes
    trains = method.learns != "nothing"
    batches = {"train.batch_size": (config.train.batch_size, True)} if trains else {}
    for key, (size, shared) in {**batches, **method.batches()}.items():
        if len(target) and size > len(target):
            problems.append(f"{key}={size} is larger than the data, which have {len(target)} training points")
        if shared and size % world:
            problems.append(f"{key}={size} does not divide by the {world} processes")
    pieces = config.train.accumulate
    if trains and config.train.batch_size % (world * pieces):
        each = f"train.accumulate={pieces}" + (f" on {world} processes" if world > 1 else "")
        problems.append(f"train.batch_size={config.train.batch_size} does not divide into the pieces of {each}")
    problems += _class_problems(config, method, target) + _memory_problems(
        config, method, accelerator.device, len(source), len(target)
    )
    compilers = ("g++", "clang++", "c++", "cl")
    if config.train.compile and not os.environ.get("CXX") and not any(map(shutil.which, compilers)):
        problems.append(f"train.compile needs a C++ compiler, and none of {', '.join(compilers)} is here; leave it out")
    if min(config.evaluate.nfe) < method.least_nfe():
        problems.append(
            f"evaluate.nfe={config.evaluate.nfe}: a sample of this method takes {method.least_nfe()} network "
            f"evaluations, one for each of its transports; give evaluate.nfe=[{method.least_nfe()}]"
        )
    problems += _point_problems(config, source, target)
    if problems:
        raise ConfigError("\n".join(["the config does not fit; nothing was started.", *(f"  {p}" for p in problems)]))


def _class_problems(config: RunConfig, method: Method, target: Distribution) -> list[str]:
    """What is wrong where the network takes classes: labels that are missing or that it has no number for."""
    classes, name = config.network.get("classes"), config.data["name"]
    problems = method.refusals(config.network)
    labels = getattr(target, "labels", None)
    if classes and labels is None:
        place = f" in {config.data['path']!r}" if "path" in config.data else ""
        mend = f"{target.labelled_by}, or " if getattr(target, "labelled_by", "") else ""
        problems.append(
            f"network.classes={classes} needs labels, which data {name!r}{place} have none of; {mend}leave it out"
        )
    elif classes and int(labels.max()) >= classes:
        problems.append(
            f"network.classes={classes}, but data {name!r} have labels up to {int(labels.max())}; "
            f"use network.classes={int(labels.max()) + 1}"
        )
    return problems


def _point_problems(config: RunConfig, source: Distribution, target: Distribution) -> list[str]:
    """What is wrong with the points themselves: all of them equal, or too large for squared distances."""
    problems = []
    for section, distribution in (("data", target), ("source", source)):
        if not distribution.has_samples:
            continue
        finite = len(distribution) > 0
        some = distribution.points if finite else distribution.sample(64, generator_for(0, "check"))
        what, size = f"{section} {getattr(config, section)['name']!r}", float(some.abs().max())
        if not size <= LARGEST:
            problems.append(
                f"{what}: its points reach {size:.3g}; beyond {LARGEST:g} squared distances leave float32: lower its "
                "settings"
            )
        if section == "data" and (some == some[0]).all():
            problems.append(f"{what}: all points are identical; there is no distribution to learn")
    return problems


def _memory_problems(
    config: RunConfig, method: Method, device: torch.device, source_size: int, target_size: int
) -> list[str]:
    """Transport problems whose costs alone would not fit the machine: the system ends such a run without a word."""
    problems, memory = [], _memory(device)
    for keys, (rows, columns) in method.plans(config.train.batch_size, source_size, target_size).items():
        size = 4 * rows * columns  # float32
        if size > memory:
            problems.append(
                f"{keys}: one transport problem of {rows:,} x {columns:,} points has {size:,} bytes of costs, and "
                f"{'the GPU' if device.type == 'cuda' else 'this machine'} has {memory:,} bytes of memory; lower "
                f"{keys.split('=')[0]}"
            )
    return problems


def _memory(device: torch.device) -> float:
    """The bytes of memory of the device; infinity where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return float("inf")
