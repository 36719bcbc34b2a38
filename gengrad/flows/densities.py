"""Densities of a flow whose transports have an inverse and a log determinant: the change of variables, step by step.

log rho_k(x) = log rho_0(x_0) - sum_j log det DT_j(x_{j-1}), with x_0, .., x_k = x the way back; all in float64.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gengrad.flows.transports import Transport

if TYPE_CHECKING:
    from gengrad.flows.flow import Flow


def log_density(flow: Flow, x: Tensor, step: int | None = None, chunk: int = 4096) -> Tensor:
    """log rho_step(x) for x (n, *event) -> (n,) float64; ``Flow.log_density`` says what it raises."""
    _check(flow, x, step)
    if not hasattr(flow.source, "log_density"):
        raise ValueError(f"the source {flow.source.name!r} has no log density, so the flow has none")
    transports = doubled(flow, step)
    return torch.cat([_log_density(flow, transports, part) for part in x.split(chunk)])


def to_source(flow: Flow, x: Tensor, step: int | None = None, chunk: int = 4096) -> Tensor:
    """The source points of x (n, *event), float64; ``Flow.to_source`` says what it raises."""
    _check(flow, x, step)
    transports = doubled(flow, step)
    return torch.cat([_way_back(flow, transports, part)[-1] for part in x.split(chunk)])


def doubled(flow: Flow, step: int | None = None) -> list[Transport]:
    """Copies of the first ``step`` transports in float64."""
    return [copy.deepcopy(transport).double() for transport in flow.transports[: flow.steps(step)]]


@torch.no_grad()
def _log_density(flow: Flow, transports: list[Transport], x: Tensor) -> Tensor:
    way = _way_back(flow, transports, x)
    log_rho = flow.source.log_density(way[-1].cpu()).to(way[-1])
    for transport, before in zip(transports, reversed(way[1:])):
        log_rho = log_rho - transport.log_det(before)
    volume = 0.0 if flow.units is None else x[0].numel() * math.log(flow.units[1])
    return (log_rho - volume).cpu()


@torch.no_grad()
def _way_back(flow: Flow, transports: list[Transport], x: Tensor) -> list[Tensor]:
    """x and the points before it, the source's last, without the units."""
    x = x.to(flow.device, torch.float64)
    way = [x if flow.units is None else (x - flow.units[0].to(x)) / flow.units[1]]
    for transport in reversed(transports):
        way.append(transport.inverse(way[-1]))
    return way


def _check(flow: Flow, x: Tensor, step: int | None) -> None:
    if not isinstance(x, Tensor) or not x.ndim or tuple(x.shape[1:]) != flow.event_shape:
        found = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        shape = f"(n, {', '.join(map(str, flow.event_shape))})"
        raise ValueError(f"x must be points of the flow, a tensor of shape {shape}; found {found}")
    if not bool(x.isfinite().all()):
        rows = (~x.flatten(1).isfinite().all(1)).nonzero()[:, 0]
        raise ValueError(f"x must be finite; {len(rows)} of {len(x)} points are not, first that of row {int(rows[0])}")
    for number, transport in enumerate(flow.transports[: flow.steps(step)]):
        if not transport.has_density:
            raise ValueError(
                f"this flow has no densities: its transport {number + 1} is a {transport.kind!r}, which has no log det "
                "here; the flows of method jko_icnn have them"
            )
