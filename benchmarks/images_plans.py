"""What a transport plan between noise and images looks like, and how much it tells of the image."""

from __future__ import annotations

import time

import torch

from gengrad.data.draws import generator_for
from gengrad.flows.particles import geodesic_taus, geodesic_times, particle_flow
from gengrad.functionals import SinkhornDivergence
from gengrad.ot import exact_assignment, sinkhorn_velocity


def plan(x: torch.Tensor, y: torch.Tensor, epsilon: float) -> dict:
    """The plan between noise x (n, d) and images y (n, d), and the flow that is solved again at each of five steps."""
    started = time.perf_counter()
    solved = sinkhorn_velocity(x, y, epsilon_rel=epsilon)
    seconds = time.perf_counter() - started
    flow = particle_flow(SinkhornDivergence(y, epsilon_rel=epsilon), x, geodesic_taus(geodesic_times(5)))
    way, times = flow.states[-1] - x, torch.tensor(geodesic_times(5))
    straight = x + times.view(-1, 1, 1) * way
    stray = (flow.states - straight).square().mean((1, 2)).sqrt().max() / way.square().mean().sqrt()
    return {
        "effective_neighbours": float(solved.effective_neighbours),
        "self_mass": float(solved.self_mass),
        "stray": float(stray),
        "seconds": seconds,
    }


def matched_cost(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean squared distance of the best matching, as a share of that of independent pairs."""
    potential = sinkhorn_velocity(x, y, epsilon_rel=0.01, tol=0.1, debias=False).g
    best = (x - y[exact_assignment(x, y, potential)]).square().sum(1).mean()
    return float(best / (x - y).square().sum(1).mean())


def explained(points: torch.Tensor, n: int, basis: torch.Tensor | None, batches: int) -> dict:
    """Share of the variance of images (N, d) that is linear in the noise, matched in batches of ``n``; seconds a batch.

    |C|^2 / tr cov(points), C = cov(noise, image): the product of two independent estimates of C, so without bias.
    """
    generator, halves, seconds = generator_for(0, "coupling", n), [0.0, 0.0], 0.0
    for number in range(batches):
        y = points[torch.randperm(len(points), generator=generator)[:n]]
        x = torch.randn(y.shape, generator=generator)
        started = time.perf_counter()
        a, b = (x, y) if basis is None else (x @ basis, y @ basis)
        potential = sinkhorn_velocity(a, b, epsilon_rel=0.01, tol=0.1, debias=False).g
        matched = y[exact_assignment(a, b, potential)]
        seconds += time.perf_counter() - started
        halves[number % 2] = halves[number % 2] + x.T @ matched / (len(y) * batches / 2)
    return {"explained": float((halves[0] * halves[1]).sum() / points.var(0).sum()), "seconds": seconds / batches}
