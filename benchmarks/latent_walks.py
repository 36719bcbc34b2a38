"""Peers of a flow on codes: ascent and Langevin dynamics of its surrogate; and what it does to molecules not seen."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import gengrad
from gengrad.chain import parts_of
from gengrad.latent.data import Latents
from gengrad.latent.population import population, start, states
from gengrad.latent.steps import Observer
from gengrad.machine import cpus
from gengrad.molecules.scoring import score
from gengrad.plotting.style import CURVES, MARKERS, curve_panel, legend_below, new_figure, save

STEP = 0.05  # length of a step of ascent, in whitened codes, where two molecules are about 11 apart
MOST = 2000  # steps
TEMPERATURES = (0.003, 0.01, 0.03)


def walk(folder: Path, kind: str, distances: list[float], n: int, seed: int) -> dict:
    """{"after", "steps"}: rows as of steps.csv, of the molecules that the flow in ``folder`` starts from, at its ways.

    ``ascent``: every point goes along -grad V, with steps of one length. ``langevin T``: x - h grad V + sqrt(2 h T)
    noise, h such that a mean gradient step is as long. Ends earlier where the points do not get so far (root mean
    square).
    """
    flow = gengrad.load(folder)
    codec, objective, surrogate, cloud = parts_of(flow)
    observer = Observer(codec, objective, surrogate, set(cloud.smiles), cloud.info["calls"] + surrogate.info["calls"])
    x, parents = start(flow, n, seed)
    first, here, rows = x, x, []
    generator = torch.Generator().manual_seed(seed)

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            return torch.autograd.grad(surrogate.potential(objective, leaf).sum(), leaf)[0]

    name, _, temperature = kind.partition(" ")
    for number in range(MOST + 1):
        moved = float((here - first).square().sum(1).mean().sqrt())
        if len(rows) < len(distances) and moved >= distances[len(rows)]:
            found = population(codec, objective, surrogate, here, parents, len(rows), seed, cpus())
            rows.append({**observer.row(found), "walked": number})
        if len(rows) == len(distances):
            break
        slope = gradient(here)
        if name == "ascent":
            here = here - STEP * slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12)
        else:
            h = STEP / float(slope.norm(dim=1).mean())
            noise = torch.randn(here.shape, generator=generator)
            here = here - h * slope + (2 * h * float(temperature)) ** 0.5 * noise
    return {"after": rows[-1], "steps": rows}


def unseen(folder: Path, smiles: list[str], n: int, seed: int) -> dict:
    """{"before", "after"}: rows as of steps.csv of n molecules that are not among the data of the flow in ``folder``:

    the first of ``smiles`` that the autoencoder takes (it may have been trained on them) and whose total is within the
    bound of the source.
    """
    flow = gengrad.load(folder)
    codec, objective, surrogate, cloud = parts_of(flow)
    config, known = flow.info["config"], set(cloud.smiles)
    fresh = [text for text in smiles if text not in known][: 12 * n]
    scores = score(objective, fresh, cpus())
    bounds = Latents.Config(**{key: value for key, value in config["source"].items() if key != "name"})
    keep = bounds.chosen(scores.total, scores.properties, objective.settings.model_dump(mode="json"))
    poor = [text for text, chosen in zip(fresh, keep.tolist()) if chosen]
    rows = {text: row for text, row in zip(poor, codec.rows(poor, cpus())) if not isinstance(row, ValueError)}
    chosen = list(rows)[:n]
    if len(chosen) < 2:
        raise SystemExit(f"unseen: {len(chosen)} of the molecules are not among the flow's data and within its bound")
    observer = Observer(codec, objective, surrogate, known, cloud.info["calls"] + surrogate.info["calls"])
    parents, found = [(str(i), text) for i, text in enumerate(chosen)], {}
    x = codec.encode([rows[text] for text in chosen])
    *_, last = states(flow, x, seed, config["evaluate"]["nfe"][0])
    for name, here in (("before", x), ("after", last)):
        found[name] = observer.row(population(codec, objective, surrogate, here, parents, 0, seed, cpus()))
    return found


KINDS = ("ascent", *(f"langevin {temperature:g}" for temperature in TEMPERATURES))


def picture(report: dict, path: Path) -> None:
    """Median QED, novelty and diversity against the way, a line for each flow and walk of seed 0."""
    panels = {"true_median": "median QED by RDKit", "novelty": "novelty", "internal_diversity": "internal diversity"}
    figure, axes = new_figure(len(panels), 12, 3.8)
    names: list[str] = []
    for key, cell in report.items():
        kind, name, *_, seed = key.split("/")
        if kind not in ("flow", "walk") or seed != "0" or name in names:
            continue
        names.append(name)
        round_, place = divmod(len(names) - 1, len(CURVES))  # the second time round with other markers
        look = {"color": CURVES[place], "linestyle": "-" if kind == "flow" else "--", "marker": MARKERS[round_]}
        for axis, column in zip(axes, panels):
            way = [row["moved"] for row in cell["steps"]]
            axis.plot(way, [row[column] for row in cell["steps"]], markersize=4, label=name, **look)
    for axis, title in zip(axes, panels.values()):
        curve_panel(axis, "root mean square way of the whitened codes", title)
    legend_below(figure, axes[0], 4)
    save(figure, path)
