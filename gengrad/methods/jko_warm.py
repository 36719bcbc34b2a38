"""A learned operator as the start of a per-step solver: the potential is fitted to the operator's map first."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gengrad.flows.flow import load
from gengrad.flows.operator import operator_of
from gengrad.flows.operator_transport import OperatorTransport, push
from gengrad.registry import Settings

SEEN = 4096  # particles of the cloud that the operator sees
BATCH, LR = 1024, 2e-2


def objections(config: Settings, shape: tuple[int, ...]) -> list[str]:
    """Why the run that ``init_from_operator`` names cannot start this method, which moves events of this shape."""
    start = config.init_from_operator
    if start is None:
        return []
    try:
        operator = operator_of(load(start))
    except (OSError, ValueError) as error:
        return [f"init_from_operator={start}: {error}"]
    problems = []
    if operator.network.event_shape != shape:
        problems.append(f"init_from_operator={start} moves points of shape {operator.network.event_shape}, not {shape}")
    low, high = operator.taus or (operator.tau, operator.tau)
    if not low <= config.tau <= high:
        trained = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        problems.append(f"init_from_operator={start} was trained for tau={trained}; here tau={config.tau:g}")
    try:
        if told_for(operator, config.functional).terms != config.functional:
            problems.append(f"init_from_operator={start} descends another functional than method.functional")
    except ValueError as error:
        problems.append(f"init_from_operator={start}: {error}")
    return problems


def told_for(operator: OperatorTransport, terms: list[dict]) -> OperatorTransport:
    """The operator for the weights of ``terms``, where it takes several; raises ``ValueError`` outside their ranges."""
    wanted = {term["name"]: term["weight"] for term in terms if term["name"] in (operator.weights or {})}
    return operator.reweighted(wanted)


def fitted(
    network: nn.Module, operator: OperatorTransport, x: Tensor, tau: float, steps: int, log_rho: Tensor | None = None
) -> nn.Module:
    """A copy of the potential u fitted to the operator's map T: min E |grad u(x) - T x|^2 over the cloud x (n, d).

    ``log_rho`` (n,): of the cloud, where it is known, for operators that take it, and for the correction of the step.
    Adam with a rate that falls to zero; no Hessian is needed, so that a step of it costs less than one of the solver.
    """
    network = copy.deepcopy(network)
    x = x.float()
    known = None if log_rho is None else log_rho[:SEEN].float()
    step = operator.moved(x[:SEEN], known, tau)  # of what it went by, and what corrected it
    y = push(operator.network, x, tau, particles=x[:SEEN], weights=operator.told(), known=step.told)[0]
    if step.correction is not None:
        y = step.correction(y.double()).to(x)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 - step / steps)
            rows = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator).to(x.device)
            loss = (network(x[rows]) - y[rows]).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.requires_grad_(True)
