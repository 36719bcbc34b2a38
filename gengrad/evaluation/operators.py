"""A learned operator judged step by step: against closed forms of the implicit step, or solvers of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from gengrad.data.base import Distribution
from gengrad.data.draws import generator_for
from gengrad.data.families import Members, points_of_the_cube
from gengrad.data.gaussians import Gaussian
from gengrad.evaluation.truth import GaussianTruth, RadialTruth, truth_of_flow
from gengrad.flows.cloud_step import implicit_cloud_step
from gengrad.flows.densities import doubled
from gengrad.flows.density_cloud import standing_for
from gengrad.flows.flow import Flow
from gengrad.flows.line import Line, carried, implicit_step
from gengrad.flows.operator import Evolution, OperatorTransport, energies_of, operator_of, push
from gengrad.ot import bures_map
from gengrad.registry import FAMILIES

NOTICED = 1e-3  # of the fall since the start: a rise that counts, where a rollout has come to rest
State = tuple[Tensor, Tensor | None]  # points (n, d) and log rho (n,) at them, where the energy needs it
Reference = Callable[[int], State]  # step -> the state that exact implicit steps lead to, from the same points


def reference_of(transport: OperatorTransport, law: Distribution, x: Tensor, log_rho: Tensor | None) -> Reference:
    """Where exact implicit steps bring the points x (n, d) of ``law``; raises ``ValueError`` where nothing is known.

    Gaussians under quadratic potentials and entropy, profiles that keep their shape: closed forms. Energies of
    particles: the steps of the very cloud. On the line any density under potential and internal energies:
    ``implicit_step``.
    """
    truth = truth_of_flow({"functional": transport.terms, "tau": transport.tau}, law)
    if isinstance(truth, GaussianTruth):
        return lambda k: _affine(*bures_map(*truth.implicit(0), *truth.implicit(k)), x, log_rho)
    if isinstance(truth, RadialTruth):
        eye = torch.eye(x.shape[1], dtype=torch.float64)
        return lambda k: _affine(eye * truth.implicit(k) / truth.implicit(0), torch.zeros(1).double(), x, log_rho)
    if not transport.functional().needs_density:
        return of_the_cloud(transport, x)
    if x.shape[1] > 1:
        raise ValueError("no reference is known here: neither a closed form nor a density on the line")
    return on_the_line(transport, law.log_density, x, log_rho)


def on_the_line(
    transport: OperatorTransport, log_density: Callable[[Tensor], Tensor], x: Tensor, log_rho: Tensor
) -> Reference:
    """The reference by the solver on the line, each step solved when it is first asked for."""
    reach = 2 * float(x.abs().max()) + 1
    functional, lines = transport.functional(), [Line.of(log_density, -reach, reach)]

    def state(k: int) -> State:
        while len(lines) <= k:
            lines.append(implicit_step(functional, lines[-1], transport.tau))
        return carried(lines[0], lines[k], x, log_rho)

    return state


def of_the_cloud(transport: OperatorTransport, x: Tensor) -> Reference:
    """The reference by the steps of the cloud x itself under an energy of particles."""
    functional, clouds = transport.functional(), [x.double()]

    def state(k: int) -> State:
        while len(clouds) <= k:
            clouds.append(implicit_cloud_step(functional, clouds[-1], transport.tau))
        return clouds[k], None

    return state


def _affine(q: Tensor, b: Tensor, x: Tensor, log_rho: Tensor | None) -> State:
    log_rho = None if log_rho is None else log_rho.double() - torch.linalg.slogdet(q).logabsdet
    return x.double() @ q.mT + b, log_rho


def judge_rollout(
    transport: OperatorTransport, x: Tensor, log_rho: Tensor | None, steps: int,
    reference: Reference | None = None, particles: Tensor | None = None,
) -> list[dict]:  # fmt: skip
    """One row a step of a rollout from x (n, d), the context from ``particles`` (default: x).

    ``energy``, and where a reference knows all steps ``energy_implicit``; ``gap``: their difference as a share of what
    the reference has fallen since the start; ``w2``: root of E|X - X_ref|^2 over the points, at least W2; ``moved``:
    the reference's way since the start; ``share``: w2 / moved; ``rose``: whether the energy rose in the step, by more
    than rounding and than a thousandth of its fall since the start.
    """
    functional, seen = transport.functional(), x if particles is None else particles
    needs, truths = functional.needs_density, _solved(reference, steps)
    state, rows = (x, log_rho if needs else None), []

    def energy(state: State) -> float:
        return float(energies_of(functional, state[0][None], None if not needs else state[1][None])[0])

    start = before = energy(state)
    for k in range(1, steps + 1):
        after = push(transport.network, state[0], transport.tau, state[1], seen, transport.told())
        seen, state = push(transport.network, seen, transport.tau, weights=transport.told())[0], after
        row = {"step": k, "time": k * transport.tau, "energy_before": before, "energy": energy(state)}
        row["rose"] = not row["energy"] <= before + max(1e-6 * (1 + abs(before)), NOTICED * (start - before))
        if truths is not None:
            truth = truths[k - 1]
            row["energy_implicit"] = energy(truth)
            row["gap"] = (row["energy"] - row["energy_implicit"]) / max(start - row["energy_implicit"], 1e-12)
            row["w2"] = float((state[0].double() - truth[0]).square().sum(1).mean().sqrt())
            row["moved"] = float((x.double() - truth[0]).square().sum(1).mean().sqrt())
            row["share"] = row["w2"] / max(row["moved"], 1e-12)
        before = row["energy"]
        rows.append(row)
    return rows


def _solved(reference: Reference | None, steps: int) -> list[State] | None:
    """The states after steps 1 to ``steps``; none, with a warning, where one of them cannot be solved."""
    try:
        return None if reference is None else [reference(k) for k in range(1, steps + 1)]
    except ValueError as error:
        warnings.warn(f"a rollout is judged without reference: {error}", stacklevel=3)
        return None


def judge_source(flow: Flow, steps: int, *, n: int, seed: int) -> tuple[list[dict], Evolution]:
    """(rows of a rollout from the flow's own source, the rollout itself), beside a reference where one is known."""
    transport, source = operator_of(flow), flow.source
    functional = transport.functional()
    x = standing_for(source, n, seed, "source")
    log_rho = source.log_density(x).double() if hasattr(source, "log_density") else None
    if functional.needs_density and (log_rho is None or not bool(log_rho.isfinite().all())):
        raise ValueError(f"the energy needs a density, which the source {source.name!r} does not have at its points")
    network = doubled(flow)[0]
    reference = None
    if log_rho is not None or not functional.needs_density:
        with suppress(ValueError):  # none is known
            reference = reference_of(network, source, x, log_rho)
    rows = judge_rollout(network, x, log_rho, steps, reference)
    given = log_rho if functional.needs_density else None
    return rows, flow.evolve(x, steps, log_density=given, energies=False)


def law_of(flow: Flow) -> Callable[[int], Distribution] | None:
    """step -> the law that exact implicit steps lead to from the flow's source, where a closed form knows it."""
    transport = operator_of(flow)
    truth = truth_of_flow({"functional": transport.terms, "tau": transport.tau}, flow.source)
    return partial(truth.law, kind="implicit") if isinstance(truth, GaussianTruth | RadialTruth) else None


def judge_held_out(
    flow: Flow, families: list[dict], steps: int, *, count: int, n: int, seed: int, even: bool = True
) -> dict:
    """Rollouts from ``count`` measures of the families that training has not seen (another key), n particles each.

    ``fell``: the share of them whose energy fell in every step; ``folded``: of those in which the map folded, which
    have no energy with a density from there on; where implicit steps are known, on the line (but for annuli, whose
    density has a gap), for Gaussians and for energies of particles (``referenced`` of the rollouts, without those that
    folded), ``gap`` and ``share`` of ``judge_rollout``, the largest of each rollout, their mean and (``worst_``) the
    largest of all; ``_along``: the mean after each step.
    """
    transport, (d,) = doubled(flow)[0], flow.event_shape
    fell, folded, gaps, shares = [], [], [], []  # gaps and shares: lists along the steps
    for number in range(count):
        generator = generator_for(seed, "operator/held out", number)
        settings = families[number % len(families)]
        members = FAMILIES.build(settings).members(1, d, generator)
        u = points_of_the_cube(1, n, d + members.spare, generator, even)
        x = members.cloud(u) if even else members.push(u)
        log_rho = members.log_density(x)[0]
        rows = judge_rollout(transport, x[0], log_rho, steps, _known(transport, members, settings, x[0], log_rho))
        fell.append(not any(row["rose"] for row in rows))
        folded.append(not all(math.isfinite(row["energy"]) for row in rows))
        if "gap" in rows[0] and not folded[-1]:
            gaps.append([abs(row["gap"]) for row in rows])
            shares.append([row["share"] for row in rows])
    found = {"rollouts": count, "referenced": len(gaps), "steps": steps, "fell": sum(fell) / count}
    found["folded"] = sum(folded) / count
    for name, values in (("gap", gaps), ("share", shares)):
        if values:
            largest = [max(value) for value in values]
            found |= {name: sum(largest) / len(largest), f"worst_{name}": max(largest)}
            found[f"{name}_along"] = [sum(column) / len(column) for column in zip(*values)]
    return found


def _known(
    transport: OperatorTransport, members: Members, settings: dict, x: Tensor, log_rho: Tensor
) -> Reference | None:  # fmt: skip
    """The reference for the one member of a family, where implicit steps from it may be known."""
    if not transport.functional().needs_density:
        return of_the_cloud(transport, x)
    if x.shape[1] == 1:
        gap = settings["name"] == "annuli"  # in the density, which the solver does not take
        return None if gap else on_the_line(transport, partial(_of_one, members), x, log_rho)
    if settings["name"] == "gaussians":
        mean, factor = members.means[0, 0], members.factors[0, 0]
        law = Gaussian(mean=mean.tolist(), covariance=(factor @ factor.mT).tolist())
        with suppress(ValueError):
            return reference_of(transport, law, x, log_rho)
    return None


def _of_one(members: Members, x: Tensor) -> Tensor:
    return members.log_density(x[None])[0]
