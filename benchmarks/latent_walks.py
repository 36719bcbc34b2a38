"""Peers of a flow on molecules' codes: gradient ascent and Langevin dynamics of its surrogate, as far as it went."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import gengrad
from gengrad.chain import parts_of
from gengrad.latent.population import population, start
from gengrad.latent.steps import Observer
from gengrad.machine import cpus

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


KINDS = ("ascent", *(f"langevin {temperature:g}" for temperature in TEMPERATURES))
