"""Convex potentials whose gradients are transport maps: a full-rank quadratic plus a convex phi on whitened points."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from gengrad.networks.curvature import EXACT, log_det, log_det_lanczos, log_det_surrogate
from gengrad.registry import Configured, Settings


class ConvexPotential(nn.Module, Configured):
    """The convex potential u(x) = x'Qx/2 + b'x + phi(x), Q = e I + L L', and its gradient, a transport map.

    phi = sum_l s_l phi_l(A (x - m)) is a sum of convex functions of centred, whitened points with weights
    s = kappa max(t, 0): convex whatever the weights, nothing is ever clamped. At t = 0, where it starts, grad u is
    affine: the identity first, and every optimal map between Gaussians is in reach. The gradient of s is passed on to t
    also below zero, as the one-sided derivative, so that a part at rest can come back.

    ``net(x)`` is grad u(x), like x; ``net(x, log_det=True)`` also gives log det Hess u(x) (n,): exact up to d = 64,
    above it a random surrogate with the right mean gradient (``log_det`` gives the value). x: (n, *event).

    A subclass has ``scales`` (t) among its parameters and the three functions ``_phi``, ``_gradient`` and
    ``gradient_and_hessian``; its settings have the ``floor`` e, the least curvature of u.
    """

    learns = "potential"

    def __init__(self, config: Settings | None, event_shape: tuple[int, ...], settings: dict):
        nn.Module.__init__(self)
        Configured.__init__(self, config, **settings)
        self.event_shape = tuple(event_shape)
        self.d = d = prod(event_shape)
        self.factor = nn.Parameter((1 - self.config.floor) ** 0.5 * torch.eye(d))  # L
        self.shift = nn.Parameter(torch.zeros(d))  # b
        self.register_buffer("centre", torch.zeros(d))  # m
        self.register_buffer("whitening", torch.eye(d))  # A
        self.register_buffer("strength", torch.ones(()))  # kappa

    def _phi(self, x: Tensor) -> Tensor:
        """phi(x), (n, d) -> (n,)."""
        raise NotImplementedError

    def _gradient(self, x: Tensor) -> Tensor:
        """grad u(x), (n, d) -> (n, d)."""
        raise NotImplementedError

    def gradient_and_hessian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """grad u (n, d) and Hess u (n, d, d) at x (n, d)."""
        raise NotImplementedError

    # ---------------------------------------------------------------- the potential and its derivatives

    @property
    def s(self) -> Tensor:
        """max(t, 0), with the gradient of t."""
        return self.scales + (self.scales.clamp_min(0.0) - self.scales).detach()

    @property
    def quadratic(self) -> Tensor:
        """Q = e I + L L', (d, d)."""
        return self.config.floor * torch.eye(self.d).to(self.factor) + self.factor @ self.factor.mT

    @property
    def is_affine(self) -> bool:
        """Whether phi vanishes, so that the map is Qx + b."""
        return not bool((self.scales > 0).any())

    def potential(self, x: Tensor) -> Tensor:
        """u(x), (n, *event) -> (n,)."""
        x = x.flatten(1)
        return (x @ self.quadratic * x).sum(1) / 2 + x @ self.shift + self._phi(x)

    def forward(
        self, x: Tensor, log_det: bool = False, generator: torch.Generator | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # a Hessian in half precision is not positive definite
            return self._forward(x, log_det, generator)

    def _forward(self, x: Tensor, log_det: bool, generator: torch.Generator | None):
        flat = x.flatten(1)
        if not log_det:
            if not torch.is_grad_enabled() and self.is_affine:
                return (flat @ self.quadratic + self.shift).view_as(x)
            return self._gradient(flat).view_as(x)
        if self.d > EXACT:
            value = log_det_surrogate(lambda v: self.hessian_product(flat, v), flat, generator)
            return self._gradient(flat).view_as(x), value
        gradient, hessian = self.gradient_and_hessian(flat)
        return gradient.view_as(x), _log_det(hessian)

    def hessian(self, x: Tensor) -> Tensor:
        """Hess u(x), (n, *event) -> (n, d, d), positive definite."""
        if not torch.is_grad_enabled() and self.is_affine:
            return self.quadratic.expand(len(x), -1, -1)
        return self.gradient_and_hessian(x.flatten(1))[1]

    def correction(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """grad phi (n, d) and Hess phi (n, d, d): what the map has beyond Qx + b."""
        gradient, hessian = self.gradient_and_hessian(x)
        return gradient - x @ self.quadratic - self.shift, hessian - self.quadratic

    def log_det(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """log det Hess u(x), (n, *event) -> (n,): exact up to d = 64, by stochastic Lanczos quadrature above."""
        x = x.flatten(1)
        if not torch.is_grad_enabled() and self.is_affine:
            return _log_det(self.quadratic).expand(len(x))
        if self.d <= EXACT:
            return _log_det(self.hessian(x))
        return log_det_lanczos(lambda v: self.hessian_product(x, v), x, generator)

    def moved(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """grad u(x) and the value of log det Hess u(x), in one pass where that is exact; x (n, d)."""
        if self.d > EXACT or self.is_affine:
            return self(x), self.log_det(x, generator)
        gradient, hessian = self.gradient_and_hessian(x)
        return gradient, _log_det(hessian)

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """Hess u(x_i) v_i for every row, without the Hessian; x, v: (n, d)."""
        return torch.func.jvp(self._gradient, (x,), (v,))[1]

    # ---------------------------------------------------------------- starts

    @torch.no_grad()
    def whiten(self, x: Tensor) -> None:
        """Sets m, A and kappa so that phi sees the cloud x (n, d) centred with unit covariance."""
        x = x.double()
        mean = x.mean(0)
        covariance = (x - mean).mT @ (x - mean) / len(x)
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp_min(1e-8 * values.max().clamp_min(1e-30))
        self.centre.copy_(mean)
        self.whitening.copy_((vectors / values.sqrt()) @ vectors.mT)
        self.strength.copy_(values.mean())

    @torch.no_grad()
    def set_affine(self, q: Tensor, b: Tensor) -> None:
        """Sets Q = max(q, just above e) by eigenvalues, and b."""
        values, vectors = torch.linalg.eigh((q + q.mT) / 2)
        roots = (values - self.config.floor).clamp_min(1e-8).sqrt()
        self.factor.copy_((vectors * roots) @ vectors.mT)
        self.shift.copy_(b)


_log_det = log_det  # the method of that name hides it inside the class
