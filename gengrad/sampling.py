"""Sampling a run: files of samples, the quality at several NFE, a film of the particles on their way."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gengrad import plotting
from gengrad.data.base import Distribution
from gengrad.data.draws import generator_for
from gengrad.evaluation.report import format_table, table_row
from gengrad.evaluation.transport import Reference, evaluate_transport
from gengrad.files import write_atomically, write_json
from gengrad.flows.flow import Flow
from gengrad.registry import DATASETS
from gengrad.run import versions

ENDINGS = (".npy", ".pt", ".png")


def target_of(flow: Flow) -> Distribution:
    """The data that the flow was trained on, from the config that travels with it."""
    data = flow.info.get("config", {}).get("data")
    if data is None:
        raise ValueError("this flow does not say which data it was trained on, so there is nothing to compare with")
    if flow.units is not None:
        data = {**data, "normalise": False}  # the flow's samples are in the units of the file
    return DATASETS.build(data, event_shape=flow.event_shape)


def writable(path: Path, endings: tuple[str, ...]) -> Path:
    """``path`` if a file can be written there; raises ``ValueError`` for a wrong ending, ``OSError`` otherwise.

    Asked before the sampling starts, so that no work is lost.
    """
    if path.suffix not in endings:
        raise ValueError(f"cannot tell the format of {path}: its name must end in {', '.join(endings)}")
    parent = path.parent
    if not parent.is_dir():
        raise FileNotFoundError(f"no folder {parent} to write {path.name} in; make it first")
    if path.is_dir() or not os.access(path if path.exists() else parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: it is a folder or not writable")
    return path


def writable_folder(folder: Path) -> Path:
    """``folder`` if reports can be written there; raises ``PermissionError`` before any work is done."""
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write the report in {folder}: the folder is not writable")
    return folder


def write_samples(samples: Tensor, path: Path, flow: Flow, title: str = "") -> None:
    """Samples (n, *event) as an array (.npy), a tensor (.pt) or a picture (.png), written atomically."""
    if path.suffix == ".npy":
        write_atomically(path, lambda file: np.save(file, samples.numpy()))
    elif path.suffix == ".pt":
        write_atomically(path, lambda file: torch.save(samples, file))
    else:
        plotting.save(picture(samples, flow, title), path)


def picture(samples: Tensor, flow: Flow, title: str = ""):
    """A grid of images, or a scatter of points over the target's."""
    if flow.is_image:
        return plotting.image_grid(samples, columns=max(1, int(len(samples) ** 0.5)))
    return plotting.scatter(samples, target=truth_of(flow, len(samples)), title=title)


def truth_of(flow: Flow, n: int) -> Tensor | None:
    """Points of the flow's target to draw beside its samples, where it is known and they are points."""
    if flow.is_image or "config" not in flow.info:
        return None
    try:
        return target_of(flow).sample(n, generator_for(0, "preview"))
    except (OSError, ValueError):  # a data file that is not here: the samples are drawn without it
        return None


def judge(
    flow: Flow, target: Distribution, nfes: list[int], *, n: int, draws: int, seed: int, solver: str | None = None
) -> dict:
    """The transport distances of the flow's samples at each NFE, with the floor and the protocol.

    Returns ``{"table": [row of text per nfe], "results": [everything per nfe]}``; the NFE in it is the counted one,
    and all of them meet the same points of the target.
    """
    reference, rows, results = Reference(target, n=n, draws=draws, seed=seed), [], []
    for nfe in nfes:
        counted: list[float] = []

        def draw_samples(size: int, draw_seed: int, nfe=nfe, counted=counted) -> Tensor:
            samples = flow.draw_samples(size, nfe=nfe, seed=draw_seed, solver=solver)
            counted.append(samples.nfe)
            return samples.x

        result = evaluate_transport(draw_samples, target, reference=reference)
        result["nfe"] = counted[0] if counted[0] != int(counted[0]) else int(counted[0])
        rows.append(table_row(result))
        results.append(result)
    return {"table": rows, "results": results, "solver": solver, "run": flow.info, "versions": versions()}


def write_report(report: dict, folder: Path, name: str) -> str:
    """Writes ``NAME.json`` and ``NAME.md``, and ``NAME.png`` for several NFE, into ``folder``; returns the table."""
    table = format_table(report["table"])
    write_json(folder / f"{name}.json", report)
    write_atomically(folder / f"{name}.md", (table + "\n").encode())
    if len(report["results"]) > 1:
        plotting.save(plotting.quality_against_nfe(report["results"]), folder / f"{name}.png")
    return table
