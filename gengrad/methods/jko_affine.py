"""The JKO step among affine maps, solved by quasi-Newton on the cloud: before the training of each step and after."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gengrad.flows.density_cloud import Cloud
from gengrad.functionals.base import Density, Functional
from gengrad.networks.curvature import log_det

FAR = 1e5  # stretching, or way in units of the cloud, beyond which a step has lost its minimum


class NoMinimumError(ValueError):
    """The objective of a step falls without bound."""


@dataclass(frozen=True)
class JKOProblem:
    """min over convex u of F(T_# rho) + E |T x - x|^2 / (2 tau), T = grad u (JKO-ICNN, arXiv 2106.00774, eq. 9).

    ``weights``: those of the functional that a learned operator is told.
    """

    functional: Functional
    tau: float
    weights: tuple[float, ...] = ()

    @property
    def needs_density(self) -> bool:
        return self.functional.needs_density

    def energy(self, y: Tensor, log_rho: Tensor | None, log_det: Tensor | None) -> Tensor:
        """F of the pushed particles y = T(x), with log rho(x) and log det Hess u(x) where F needs a density."""
        return self.functional(y, Density(log_rho - log_det) if self.needs_density else None)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """E |T x - x|^2 / 2, which at the minimum is W_2^2 / 2."""
        return (y - x).flatten(1).square().sum(1).mean() / 2

    def objective(self, x: Tensor, y: Tensor, log_rho: Tensor | None, log_det: Tensor | None) -> Tensor:
        """tau F + E |T x - x|^2 / 2: the step's objective times tau, so that its gradients keep one size."""
        return self.tau * self.energy(y, log_rho, log_det) + self.distance(x, y.flatten(1))


def solve_affine(problem: JKOProblem, network: nn.Module, cloud: Cloud) -> tuple[Tensor, Tensor]:
    """(Q, b) that minimise the objective over T(x) = Qx + b + grad phi(x), with the network's phi as it stands.

    L-BFGS in float64 over L and b, Q = e I + L L', from the network's own; gradient and Hessian of phi are computed
    once. Where phi vanishes and rho and its minimiser are Gaussian, it is the exact step. Raises ``NoMinimumError``.
    """
    x, floor = cloud.x, network.config.floor
    extra, bend = None, None
    if not network.is_affine:
        with torch.no_grad():
            extra, bend = copy.deepcopy(network).to(x.dtype).correction(x)
    # with a curved potential training goes on anyway: a dozen iterations bring nearly all there is
    iterations = 80 if network.is_affine else 12
    factor = network.factor.detach().to(x).clone().requires_grad_(True)
    shift = network.shift.detach().to(x).clone().requires_grad_(True)
    reach = 1 + float(x.abs().max())
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    optimizer = torch.optim.LBFGS(
        [factor, shift], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-13
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        q = floor * eye + factor @ factor.mT
        if not max(float(q.detach().abs().max()), float(shift.detach().abs().max()) / reach) < FAR:  # NaN as well
            raise NoMinimumError
        y = x @ q + shift if extra is None else x @ q + shift + extra
        volume = None
        if problem.needs_density:
            volume = log_det(q).expand(len(x)) if bend is None else log_det(q + bend)
        loss = problem.objective(x, y, cloud.log_rho, volume)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return (floor * eye + factor @ factor.mT).detach(), shift.detach()
