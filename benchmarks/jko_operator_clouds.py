"""What a cloud says of its measure: a network that is told exact steps, for clouds of the same measures made otherwise.

Heat steps (tau = 0.1) of measures in the plane whose exact steps are known: independent coordinates along turned axes,
each a mixture of one or two Gaussians. The network of configs/operator/fokker_planck.yaml learns 736 of them by plain
regression, and is judged on 64 others: root of E|T x - x_exact|^2 as a share of the way, mean and worst. What it cannot
learn, the clouds do not say. ``told``: it sees log rho at the points too. And what their points alone, and log rho
there, say of the score. Called by benchmarks/jko_operator.py --parts clouds,scores.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from gengrad.data.draws import generator_for
from gengrad.data.even_clouds import lattice
from gengrad.data.families import clouds as drawn
from gengrad.data.families import points_of_the_cube, read_families
from gengrad.data.family_members import GaussianMembers, ProductMembers
from gengrad.data.moments import moved_to
from gengrad.flows.implicit_steps import of_coordinates
from gengrad.functionals.internal import Entropy
from gengrad.networks import SetOperator
from gengrad.networks.kernels import smoothed
from gengrad.networks.local_fit import fitted
from gengrad.training.fitter import TrainSettings, make_optimizer

TAU, MEASURES, HELD_OUT, BATCH, ASKED = 0.1, 800, 64, 16, 128
# independent points; a Sobol net, each coordinate at its ranks, pushed through quantiles and moved to the measure's
# moments; a lattice in its place; points of the lattice that have settled (Members.cloud)
KINDS = ("independent", "net", "lattice", "settled", "independent told", "settled told")


def _coordinate(generator: torch.Generator) -> GaussianMembers:
    """One or two Gaussians on the line: centres in [-1, 1], deviations from 0.4 to 1.5."""
    count = 1 + int(torch.randint(2, (1,), generator=generator))
    centres, sizes, weights = torch.rand(3, 1, count, generator=generator, dtype=torch.float64)
    stds = 0.4 * (sizes * math.log(1.5 / 0.4)).exp()
    weights = 0.5 + weights
    return GaussianMembers((2 * centres - 1)[..., None], stds[..., None, None], weights / weights.sum())


def _cloud(kind: str, members: ProductMembers, u: Tensor) -> Tensor:
    if kind == "independent":
        return members.push(u)
    if kind == "settled":
        return members.cloud(u)
    return members.net(u) if kind == "net" else moved_to(members.push(lattice(u, 2)), *members.moments())


def steps(kind: str, n: int, seed: int, measures: int = MEASURES) -> tuple[Tensor, Tensor, Tensor]:
    """Clouds (measures, n, 2) of that kind, where exact steps bring them, and log rho (measures, n)."""
    clouds, moved, known = [], [], []
    for number in range(measures):
        generator = generator_for(seed, "clouds", number)
        angle = float(torch.rand((), generator=generator)) * 2 * math.pi
        turn = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
        members = ProductMembers([_coordinate(generator), _coordinate(generator)], torch.tensor(turn).double())
        u = points_of_the_cube(1, n, 3, generator, kind != "independent")
        x = _cloud(kind, members, u)[0]
        log_rho = members.log_density(x[None])[0]
        state = of_coordinates(Entropy(), TAU, members, x, log_rho)(1)
        for values, one in ((clouds, x), (moved, state[0]), (known, log_rho)):
            values.append(one.float())
    return torch.stack(clouds), torch.stack(moved), torch.stack(known)


def learned(x: Tensor, y: Tensor, known: Tensor | None, updates: int) -> SetOperator:
    """The network after so many updates of plain regression on the steps x -> y (measures, n, 2)."""
    settings = TrainSettings(optimizer="soap", lr=0.02)
    torch.manual_seed(0)
    small = {"width": 48, "tokens": 8, "heads": 2, "blocks": 1, "translation_equivariant": True}
    network = SetOperator(event_shape=(2,), log_density=known is not None, **small)
    optimizer = make_optimizer(network.parameters(), settings)
    for update in range(updates):
        share = min(1.0, (update + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * update / updates))
        optimizer.param_groups[0]["lr"] = settings.lr * share
        rows, points = torch.randint(len(x), (BATCH,)), torch.randperm(x.shape[1])[:ASKED]
        moved = network(x[rows][:, points], x[rows], TAU, log_density=None if known is None else known[rows])
        loss = (moved - y[rows][:, points]).square().sum(-1).mean() / (2 * TAU)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.03)
        optimizer.step()
    return network


def scores(d: int, seed: int, quick: bool) -> dict:
    """How far off scores are, root of E|s - grad log rho|^2 as a share of its size: the mean over 16 mixtures.

    ``fitted`` to log rho at the points, and of a ``kernel`` estimate at the best of the widths that a network sees.
    """
    found, families = {}, read_families({"name": "mixtures", "reach": 1.0, "smallest": 0.4})
    count, n = (2, 64) if quick else (16, 1024)
    for kind, independent in (("even", 0.0), ("independent", 1.0)):
        generator = generator_for(seed, f"scores/{kind}", d)
        x, log_rho, score, _ = drawn(families, count, n, d, generator, independent=independent)
        x, log_rho, score = x.double(), log_rho.double(), score.double()
        seen = fitted(x, log_rho, torch.ones(count, 1, 1, dtype=x.dtype)).at(x)[..., :d]
        widest = math.sqrt(8 * TAU) * torch.ones(count, 1, 1, dtype=x.dtype)
        slopes = smoothed(x, x, widest, 4)[1] / (widest[..., None] / 2 ** torch.arange(4.0)[:, None])
        found[f"{kind}_fitted"] = float(_off(seen, score))
        found[f"{kind}_kernel"] = min(float(_off(slopes[:, :, k], score)) for k in range(4))
    return found


def _off(found: Tensor, score: Tensor) -> Tensor:
    return ((found - score).square().sum(-1).mean(1) / score.square().sum(-1).mean(1)).sqrt().mean()


def clouds(kind: str, seed: int, quick: bool) -> dict:
    """Share of the way on held-out measures, of a network that has learned exact steps of clouds of that ``kind``."""
    started, held = time.process_time(), 4 if quick else HELD_OUT
    kind, _, told = kind.partition(" ")
    x, y, known = steps(kind, 128 if quick else 1024, seed, 12 if quick else MEASURES)
    network = learned(x[held:], y[held:], known[held:] if told else None, 8 if quick else 1000)
    with torch.no_grad():
        error = (network(x[:held], x[:held], TAU, log_density=known[:held]) - y[:held]).square().sum(-1).mean(1)
    shares = (error / (x[:held] - y[:held]).square().sum(-1).mean(1)).sqrt()
    return {
        "share": float(shares.mean()),
        "worst_share": float(shares.max()),
        "cpu_seconds": time.process_time() - started,
    }
