"""Sampling a run: files of samples, the quality at several NFE, a film of the particles on their way."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gengrad import plotting
from gengrad.data.base import Distribution, FiniteData
from gengrad.data.draws import generator_for
from gengrad.data.images import as_bytes
from gengrad.evaluation.features import Extractor, extractor, inception_weights
from gengrad.evaluation.fid import Statistics, image_scores, reference_statistics
from gengrad.evaluation.report import format_table, image_row, table_row
from gengrad.evaluation.shards import Shards
from gengrad.evaluation.transport import Reference, evaluate_transport, sampling_seeds, summary
from gengrad.files import write_atomically, write_json
from gengrad.flows.flow import Flow
from gengrad.flows.operator_transport import OperatorTransport
from gengrad.registry import DATASETS
from gengrad.run import versions
from gengrad.training.ranks import Ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

ENDINGS = (".npy", ".pt", ".png")
SILENCE = 30.0  # seconds of drawing samples after which a line says how far it is


def target_of(flow: Flow) -> Distribution:
    """The data that the flow was trained on, from the config that travels with it."""
    data = flow.info.get("config", {}).get("data")
    if data is None:
        raise ValueError("this flow does not say which data it was trained on, so there is nothing to compare with")
    if flow.units is not None:
        data = {**data, "normalise": False}  # the flow's samples are in the units of the file
    return DATASETS.build(data, event_shape=flow.event_shape)


def writable_folder(folder: Path) -> Path:
    """``folder`` if reports can be written there; raises ``PermissionError`` before any work is done."""
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write the report in {folder}: the folder is not writable")
    return folder


def write_samples(samples: Tensor, path: Path, flow: Flow, title: str = "") -> None:
    """Samples (n, *event) as an array (.npy), a tensor (.pt) or a picture (.png), written atomically."""
    ending = path.suffix.lower()
    if ending == ".npy":
        write_atomically(path, lambda file: np.save(file, samples.numpy()))
    elif ending == ".pt":
        write_atomically(path, lambda file: torch.save(samples, file))
    else:
        plotting.save(picture(samples, flow, title), path)


def picture(samples: Tensor, flow: Flow, title: str = "") -> Figure | Image:
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


def write_strip(flow: Flow, nfes: list[int], file: Path, *, n: int = 12, **options) -> None:
    """Images of the same seeds at each NFE, a row for each, into a PNG."""
    rows = {f"NFE {nfe}": flow.sample(n, nfe, **options) for nfe in nfes}
    plotting.save(plotting.strips(rows), file)


def features_at_hand(target: FiniteData) -> str:
    """The best features that need nothing more: Inception's where its weights are, else a classifier's, else pixels.

    Raises ``ValueError`` where a file lies in the weights' place that is not them.
    """
    try:
        inception_weights()
        return "inception"
    except FileNotFoundError:
        return "classifier" if getattr(target, "held_out_labels", None) is not None else "identity"


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

        def draw_samples(size: int, draw_seed: int, nfe: int = nfe, counted: list = counted) -> Tensor:
            samples = flow.draw_samples(size, nfe=nfe, seed=draw_seed, solver=solver)
            counted.append(samples.nfe)
            return samples.x

        result = evaluate_transport(draw_samples, target, reference=reference)
        result["nfe"] = counted[0] if counted[0] != int(counted[0]) else int(counted[0])
        rows.append(table_row(result))
        results.append(result)
    return {"table": rows, "results": results, "solver": solver, "run": flow.info, "versions": versions()}


def judge_images(
    flow: Flow,
    target: FiniteData,
    nfes: list[int],
    *,
    n: int,
    draws: int,
    seed: int,
    features: str,
    folder: Path,
    reference: str | None = None,
    solver: str | None = None,
    label: int | None = None,
    guidance: float = 1.0,
    inception: Path | None = None,
    keep: bool = False,
    ranks: Ranks | None = None,
) -> dict:
    """Frechet and kernel distance, Inception score, precision and recall of the flow's images at each NFE.

    ``features``: inception, classifier or identity. ``reference``: which images they are compared with, ``train`` (the
    default for inception, as published FIDs) or ``held_out``; the floor compares the images of the other part. With a
    ``label`` samples, reference and floor are of that class alone. Samples and features lie in shards under ``folder``
    until the end (``keep``: after it), so that an interrupted evaluation goes on; several processes (``ranks``) share
    them out. The same dict as ``judge``, on the first process.
    """
    ranks = ranks or Ranks()
    if ranks.first:
        extract = extractor(features, target, inception)  # trains a classifier where none is cached: once
    ranks.barrier()
    if not ranks.first:
        extract = extractor(features, target, inception)
    extract = extract.to(flow.device)
    options = {"solver": solver, "label": label, "guidance": guidance}
    seeds = sampling_seeds(seed, draws)
    drawn = _drawn(flow, extract, [(nfe, s) for nfe in nfes for s in seeds], n, folder, ranks, options)
    ranks.barrier()
    if not ranks.first:
        return {}
    protocol, truth, floor = _image_reference(target, extract, reference, n, label)
    protocol |= {"n": n, "seeds": seeds, **options}
    results = []
    for nfe in nfes:
        scores = [image_scores(Statistics.of(drawn[nfe, s].features(extract)), truth, extract) for s in seeds]
        bill = drawn[nfe, seeds[0]].bill
        result = {"nfe": int(bill["nfe"]) if bill["nfe"].is_integer() else bill["nfe"], "protocol": protocol}
        result["others"] = {name: count for name, count in bill.items() if name != "nfe"}
        for name in scores[0]:
            values = [score[name] for score in scores]
            result[name] = {**summary(values), **({"floor": summary([floor[name]])} if floor else {})}
        results.append(result)
    if not keep:
        for shards in drawn.values():
            shards.remove()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    rows = [image_row(result, extract.distance) for result in results]
    about = {"solver": solver, "run": flow.info, "versions": versions(), "metric": extract.distance}
    return {"table": rows, "results": results, **about}


def _drawn(
    flow: Flow, extract: Extractor, asked: list[tuple[int, int]], n: int, folder: Path, ranks: Ranks, options: dict
) -> dict[tuple[int, int], Shards]:
    """Samples and features at each (NFE, seed), in shards; long work is told on standard error, every half minute."""
    drawn, spoken = {}, time.perf_counter()

    def tell(place: str, what: str, count: int) -> None:
        nonlocal spoken
        if ranks.first and time.perf_counter() - spoken > SILENCE:
            spoken = time.perf_counter()
            print(f"{place}, {what} {count:,} of {n:,}", file=sys.stderr)

    for number, (nfe, seed) in enumerate(asked):
        settings = {"nfe": nfe, "seed": seed, **options}
        place = {**settings, "flow": flow.describe()["transports"], "weights": flow.fingerprint()}
        key = hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()[:16]
        shards = Shards(flow, folder / key, n, rank=ranks.rank, world=ranks.world, **settings)
        said = f"{number + 1} of {len(asked)}: NFE {nfe}, seed {seed}"
        shards.draw(partial(tell, said, "samples"))
        shards.extract(extract, partial(tell, said, "features"))
        drawn[nfe, seed] = shards
    return drawn


def _image_reference(
    target: FiniteData, extract: Extractor, reference: str | None, n: int, label: int | None
) -> tuple[dict, Statistics, dict | None]:
    """(what was compared with what, statistics of the reference, scores of data against data)."""
    parts = {"train": target.points, "held_out": target.held_out}
    named = target.name
    if label is not None:
        labels = {"train": target.labels, "held_out": target.held_out_labels}
        parts, named = {part: x[labels[part] == label] for part, x in parts.items()}, f"class {label} of {named}"
    chosen = reference or ("train" if extract.kind == "inception" or len(parts["held_out"]) < 2 else "held_out")
    other = "held_out" if chosen == "train" else "train"
    if len(parts[chosen]) < 2:
        raise ValueError(f"{named} has {len(parts[chosen])} images in part {chosen!r}: use {other!r}")
    truth = reference_statistics(as_bytes(parts[chosen]), extract)
    rows = torch.randperm(len(parts[other]), generator=generator_for(0, "image floor"))[:n].sort().values
    floor = None
    if len(rows) > 1:
        floor = image_scores(reference_statistics(as_bytes(parts[other][rows]), extract), truth, extract)
    return (
        {
            "reference": f"{truth.n:,} images of {named} ({chosen})",
            "floor": f"{len(rows):,} images of {named} ({other})",
            **extract.describe(),
        },
        truth,
        floor,
    )


def judge_along(flow: Flow, folder: Path, *, n: int, seed: int) -> dict | None:
    """Judges a flow of recorded steps after each of them; writes ``steps.json``, ``steps.md`` and pictures.

    Energies beside the closed form where there is one, densities beside the truth or the target, and what the data say
    of the samples. Returns the report, None for a flow without recorded steps.
    """
    from gengrad.evaluation.steps import errors_table, forward_densities, judge_end, judge_steps, steps_table
    from gengrad.evaluation.truth import truth_of_flow

    if any(isinstance(t, OperatorTransport) for t in flow.transports):
        from gengrad.rollouts import judge_operator

        return judge_operator(flow, folder, n=n, seed=seed)
    if not len(flow.transports) or not all(getattr(t, "record", None) for t in flow.transports):
        return None
    config, report, pictures = flow.info["config"], {}, ["energy.png"]
    rows = [t.record for t in flow.transports if "step" in t.record]
    method, known = config["method"], hasattr(flow.source, "log_density")
    target = target_of(flow)
    if known:
        truth = truth_of_flow(method, flow.source)
        rows = judge_steps(flow, truth, n=n, seed=seed)
        law = truth.law if truth else (lambda k: target) if hasattr(target, "mixture") else None
        ends = [0, *(k + 1 for k, t in enumerate(flow.transports) if "step" in t.record)]
        states = [state for k, state in enumerate(forward_densities(flow, min(n, 4000), seed)) if k in ends]
        times = [0.0] + [row["time"] for row in rows]
        chosen = sorted({round(share * len(rows) / 4) for share in range(5)})
        plotting.save(plotting.density_figure(states, law, times, chosen), folder / "density.png")
        pictures.append("density.png")
        if len(flow.event_shape) == 1 and flow.event_shape[0] <= 2:
            plotting.density_gif(states, law, times, folder / "density.gif")
            pictures.append("density.gif")
        if target.has_samples and hasattr(target, "log_density"):
            report["end"] = judge_end(flow, target, n=n, seed=seed)
    plotting.save(plotting.energy_figure(rows), folder / "energy.png")
    x = flow.sample(n, seed=seed)
    report["samples"] = target.score_samples(x)
    if (named := target.table_of(x)) is not None:
        lines = [",".join(named[0]), *(",".join(f"{value:.9g}" for value in row) for row in named[1].tolist())]
        write_atomically(folder / "samples.csv", ("\n".join(lines) + "\n").encode())
    table = "\n\n".join(filter(None, [steps_table(rows), errors_table(rows)]))
    write_atomically(folder / "steps.md", (table + "\n").encode())
    report = {**report, "steps": rows, "table": table, "pictures": ", ".join(pictures)}
    write_json(folder / "steps.json", report)
    return report


def write_report(report: dict, folder: Path, name: str) -> str:
    """Writes ``NAME.json`` and ``NAME.md``, and ``NAME.png`` for several NFE, into ``folder``; returns the table."""
    table = format_table(report["table"])
    write_json(folder / f"{name}.json", report)
    write_atomically(folder / f"{name}.md", (table + "\n").encode())
    if len(report["results"]) > 1:
        figure = plotting.quality_against_nfe(report["results"], report.get("metric", "w2"))
        plotting.save(figure, folder / f"{name}.png")
    return table
