"""The Sinkhorn divergence to a cloud of target samples."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from gengrad.functionals.base import Functional, VelocityField, samples_of
from gengrad.ot import SinkhornResult, sinkhorn_divergence, sinkhorn_velocity
from gengrad.registry import FUNCTIONALS, Settings


@FUNCTIONALS.register("sinkhorn_divergence")
class SinkhornDivergence(Functional):
    """S_eps(mu, nu) = OT_eps(mu, nu) - OT_eps(mu, mu) / 2 - OT_eps(nu, nu) / 2 with cost |x - y|^2 / 2.

    Its velocity is v(x_i) = sum_j P^xy_ij y_j - sum_j P^xx_ij x_j, rows normalised to one (Neural Sinkhorn Gradient
    Flow, arXiv 2401.14069, section 3; Feydy et al. 2019): two barycentric maps, no autograd through iterations.

    target: (m, *event) samples of nu. ``epsilon`` is absolute, in units of the cost; without it
    epsilon = ``epsilon_rel`` x the mean cost between x and the target. ``tol``: relative error of the velocity.
    With ``epsilon_rel`` the strength follows the particles: the velocity is the gradient at that epsilon held fixed,
    and values at different x are of slightly different functionals. Give ``epsilon`` to compare values along a flow.
    """

    class Config(Settings):
        epsilon: float | None = Field(None, gt=0)
        epsilon_rel: float = Field(0.05, gt=0)
        tol: float = Field(1e-2, gt=0)

    def __init__(self, target: Tensor, config: Settings | None = None, **settings):
        super().__init__(config, **settings)
        self.target = samples_of(target, self)

    def value(self, x: Tensor) -> Tensor:
        c, target = self.config, self.target.to(x)
        return sinkhorn_divergence(x.flatten(1), target, epsilon=c.epsilon, epsilon_rel=c.epsilon_rel, tol=c.tol)

    def velocity(self, x: Tensor, memory: dict | None = None) -> Tensor:
        c, memory = self.config, {} if memory is None else memory
        before = memory.get("sinkhorn")
        if before is not None and len(before.g) != len(self.target):
            before = None  # the caller changed to a target batch of another size
        target = self.target.to(x)
        result = sinkhorn_velocity(
            x.flatten(1), target, epsilon=c.epsilon, epsilon_rel=c.epsilon_rel, tol=c.tol, warm_start=before
        )
        memory["sinkhorn"] = result
        memory["log"] = sinkhorn_log(result)
        return result.velocity.view_as(x)

    def field(self, x: Tensor) -> VelocityField:
        """The two barycentric maps at any point, by the solved problem's potentials (Pooladian, Niles-Weed 2021)."""
        x, target, c = x.flatten(1), self.target.to(x), self.config
        result = sinkhorn_velocity(
            x, target, epsilon=c.epsilon, epsilon_rel=c.epsilon_rel, tol=c.tol, skip_self_mass=2.0
        )

        def velocity(y: Tensor) -> Tensor:
            points = y.flatten(1)
            there = _barycentre(points, target.to(y), result.g.to(y), result.epsilon.to(y))
            here = _barycentre(points, x.to(y), result.self_potential.to(y), result.epsilon.to(y))
            return (there - here).view_as(y)

        return velocity


def _barycentre(points: Tensor, y: Tensor, g: Tensor, epsilon: Tensor) -> Tensor:
    """sum_j P_j(x) y_j at points x (n, d), P_j(x) proportional to exp((g_j - |x - y_j|^2 / 2) / epsilon)."""
    logits = (points @ y.mT + g - y.square().sum(1) / 2) / epsilon
    return torch.softmax(logits, dim=1) @ y


def sinkhorn_log(result: SinkhornResult) -> dict[str, float]:
    """The diagnosis of a Sinkhorn solve as plain numbers, under the names that the metrics use."""
    log = {
        "epsilon": float(torch.as_tensor(result.epsilon).mean()),
        "iterations": float(torch.as_tensor(result.iterations, dtype=torch.float).mean()),
        "marginal_error": float(torch.as_tensor(result.marginal_error).max()),
        "effective_neighbours": float(torch.as_tensor(result.effective_neighbours).mean()),
        "converged": float(torch.as_tensor(result.converged).all()),
    }
    if result.self_mass is not None:  # there is a self problem only where the velocity is debiased
        log["self_mass"] = float(torch.as_tensor(result.self_mass).mean())
    return log
