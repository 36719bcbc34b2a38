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
from gengrad.evaluation.transport import evaluate_transport, format_table
from gengrad.files import write_atomically, write_json
from gengrad.flows.flow import Flow
from gengrad.registry import DATASETS

ENDINGS = (".npy", ".pt", ".png")


def target_of(flow: Flow) -> Distribution:
    """The data that the flow was trained on, from the config that travels with it."""
    data = flow.info.get("config", {}).get("data")
    if data is None:
        raise ValueError("this flow does not say which data it was trained on, so there is nothing to compare with")
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
    if flow.source.is_image or len(flow.event_shape) == 3:
        return plotting.image_grid(samples, columns=max(1, int(len(samples) ** 0.5)))
    truth = target_of(flow).sample(len(samples), generator_for(0, "preview")) if flow.info.get("config") else None
    return plotting.scatter(samples, target=truth, title=title)


def judge(
    flow: Flow, target: Distribution, nfes: list[int], *, n: int, draws: int, seed: int, solver: str | None = None
) -> dict:
    """The transport distances of the flow's samples at each NFE, with the floor and the protocol.

    Returns ``{"table": [row per nfe], "reports": {nfe: everything}}``; the NFE in it is the counted one.
    """
    rows, reports = [], {}
    for nfe in nfes:
        counted: list[float] = []

        def draw_samples(size: int, draw_seed: int, nfe=nfe, counted=counted) -> Tensor:
            samples = flow.draw_samples(size, nfe=nfe, seed=draw_seed, solver=solver)
            counted.append(samples.nfe)
            return samples.x

        report = evaluate_transport(draw_samples, target, n=n, draws=draws, seed=seed, nfe=nfe)
        report["nfe_counted"] = counted[0]
        rows.append(_row(report, counted[0]))
        reports[str(nfe)] = report
    return {"table": rows, "reports": reports}


def _row(report: dict, nfe: float) -> dict:
    """One line of the table: each metric as mean +- deviation over draws, and its floor."""
    row: dict = {"nfe": nfe}
    for name, metric in report["metrics"].items():
        row[name] = metric["mean"]
        row[f"{name}_std"] = metric["std"]
        if metric.get("floor") is not None:
            row[f"{name}_floor"] = metric["floor"]["mean"]
    return row


def write_report(report: dict, folder: Path, name: str) -> str:
    """Writes ``NAME.json``, ``NAME.md`` and ``NAME.png`` into ``folder``; returns the table as text."""
    table = format_table(report["table"])
    write_json(folder / f"{name}.json", report)
    write_atomically(folder / f"{name}.md", (table + "\n").encode())
    if len(report["table"]) > 1:
        plotting.save(plotting.quality_against_nfe(report["table"]), folder / f"{name}.png")
    return table
