"""A learned operator judged step by step: against closed forms of the implicit step, or solvers of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from torch import Tensor

from gengrad.data.base import Distribution
from gengrad.data.draws import generator_for
from gengrad.data.families import points_of_the_cube
from gengrad.evaluation.references import reference_of, reference_of_member
from gengrad.evaluation.truth import GaussianTruth, RadialTruth, truth_of_flow
from gengrad.flows.densities import doubled
from gengrad.flows.density_cloud import standing_for
from gengrad.flows.flow import Flow
from gengrad.flows.implicit_steps import Reference, State
from gengrad.flows.operator import Evolution, energies_of, operator_of, rises
from gengrad.flows.operator_transport import OperatorTransport
from gengrad.registry import FAMILIES


def judge_rollout(
    transport: OperatorTransport, x: Tensor, log_rho: Tensor | None, steps: int,
    reference: Reference | None = None, told: bool = True,
) -> list[dict]:  # fmt: skip
    """One row a step of a rollout from x (n, d); not ``told``, it goes by the points alone.

    ``energy``, and where a reference knows all steps ``energy_implicit``; ``gap``: their difference as a share of what
    the reference has fallen since the start; ``w2``: root of E|X - X_ref|^2 over the points, at least W2; ``moved``:
    the reference's way since the start; ``share``: w2 / moved; ``rose``: whether the energy rose (``rises``).
    """
    functional = transport.functional()
    needs, truths = functional.needs_density, _solved(reference, steps)
    state, rows = (x, log_rho if needs else None), []

    def energy(state: State) -> float:
        return float(energies_of(functional, state[0][None], None if not needs else state[1][None])[0])

    start = before = energy(state)
    for k in range(1, steps + 1):
        state = transport.moved(*state, told=told)[:2]
        row = {"step": k, "time": k * transport.tau, "energy_before": before, "energy": energy(state)}
        if truths is not None:
            truth = truths[k - 1]
            row["energy_implicit"] = energy(truth)
            row["gap"] = (row["energy"] - row["energy_implicit"]) / max(start - row["energy_implicit"], 1e-12)
            row["w2"] = float((state[0].double() - truth[0]).square().sum(1).mean().sqrt())
            row["moved"] = float((x.double() - truth[0]).square().sum(1).mean().sqrt())
            row["share"] = row["w2"] / max(row["moved"], 1e-12)
        before = row["energy"]
        rows.append(row)
    for row, rose in zip(rows, rises([start, *(row["energy"] for row in rows)])):
        row["rose"] = rose
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
    flow: Flow, families: list[dict], steps: int, *, count: int, n: int, seed: int, even: bool = True, told: bool = True
) -> dict:
    """Rollouts from ``count`` measures of the families that training has not seen (another key), n particles each,

    as ``even`` clouds or independent ones, the network ``told`` their log densities, if it takes them, or not.

    ``fell``: the share of them whose energy fell in every step; ``folded``: of those in which the map folded, which
    have no energy with a density from there on; where implicit steps are known, by ``reference_of_member``
    (``referenced`` of the rollouts, without those that folded), ``gap`` and ``share`` of ``judge_rollout``, the largest
    of each rollout, their mean and (``worst_``) the largest of all; ``_along``: the mean after each step. A cloud of
    independent points near the equilibrium may have less energy than its law, so that exact steps raise it: there is
    no gap of such; ``rose_alone``: the share of those with a reference whose energy rose, where that of exact steps
    did not.
    """
    transport, (d,) = doubled(flow)[0], flow.event_shape
    fell, folded, alone, gaps, shares = [], [], [], [], []  # gaps and shares: lists along the steps
    for number in range(count):
        generator = generator_for(seed, "operator/held out", number)
        settings = families[number % len(families)]
        members = FAMILIES.build(settings).members(1, d, generator)
        u = points_of_the_cube(1, n, d + members.spare, generator, even)
        x = members.cloud(u) if even else members.push(u)
        log_rho = members.log_density(x)[0]
        reference = reference_of_member(transport, members, x[0], log_rho)
        rows = judge_rollout(transport, x[0], log_rho, steps, reference, told)
        fell.append(not any(row["rose"] for row in rows))
        folded.append(not all(math.isfinite(row["energy"]) for row in rows))
        if "gap" in rows[0] and not folded[-1]:
            shares.append([row["share"] for row in rows])
            exact = rises([rows[0]["energy_before"], *(row["energy_implicit"] for row in rows)])
            alone.append(not fell[-1] and not any(exact))
            if all(row["energy_implicit"] < rows[0]["energy_before"] for row in rows):
                gaps.append([abs(row["gap"]) for row in rows])
    found = {"rollouts": count, "referenced": len(shares), "steps": steps, "fell": sum(fell) / count}
    found["folded"] = sum(folded) / count
    if alone:
        found["rose_alone"] = sum(alone) / len(alone)
    for name, values in (("gap", gaps), ("share", shares)):
        if values:
            largest = [max(value) for value in values]
            found |= {name: sum(largest) / len(largest), f"worst_{name}": max(largest)}
            found[f"{name}_along"] = [sum(column) / len(column) for column in zip(*values)]
    return found
