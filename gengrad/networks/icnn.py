"""The input-convex potential: a full-rank quadratic plus a dense softplus network; gradient and Hessian by hand."""

from __future__ import annotations

from math import prod

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from gengrad.networks.curvature import EXACT, log_det, log_det_lanczos, log_det_surrogate
from gengrad.registry import NETWORKS, Configured, Settings


@NETWORKS.register("icnn")
class ICNN(nn.Module, Configured):
    """The convex potential u(x) = x'Qx/2 + b'x + phi(x), Q = e I + L L', and its gradient, a transport map.

    phi = kappa (d / width) sum_l s_l . h_l is a DenseICNN on centred, whitened points x_ = A (x - m):

        z_l = W_l x_ + c_l + P_l h_{l-1} + sum_r (R_lr x_)^2 / 2,   h_l = softplus(z_l),   P_l = softplus(U_l) / width

    (Amos et al. 2017; Korotin et al. 2021, arXiv 1909.13082, appendix B). Convex whatever the weights: P_l > 0 and
    s = max(t, 0), nothing is ever clamped. At t = 0, where it starts, grad u is affine: the identity first, and every
    optimal map between Gaussians is in reach. The gradient of s is passed on to t also below zero, as the one-sided
    derivative, so that a unit at rest can come back.

    ``net(x)`` is grad u(x), like x; ``net(x, log_det=True)`` also gives log det Hess u(x) (n,): exact up to d = 64,
    above it a random surrogate with the right mean gradient (``log_det`` gives the value). x: (n, *event).
    """

    learns = "potential"

    class Config(Settings):
        width: int = Field(64, ge=1)
        depth: int = Field(2, ge=1)
        rank: int = Field(2, ge=0)  # quadratic skips of every unit above the first layer
        floor: float = Field(1e-3, gt=0, lt=1)  # e, the least curvature of u
        gain: float = Field(6.0, gt=0)  # size of the first weights on whitened points: how sharp the bends can be

    def __init__(self, config: Settings | None = None, *, event_shape: tuple[int, ...], **settings):
        nn.Module.__init__(self)
        Configured.__init__(self, config, **settings)
        self.event_shape = tuple(event_shape)
        d, c = prod(event_shape), self.config
        self.d = d
        self.factor = nn.Parameter((1 - c.floor) ** 0.5 * torch.eye(d))  # L
        self.shift = nn.Parameter(torch.zeros(d))  # b
        self.scales = nn.Parameter(torch.zeros(c.depth, c.width))  # t
        w = torch.randn(c.depth, c.width, d) * c.gain / d**0.5
        self.weights = nn.Parameter(w)  # W
        # every unit bends at a random place of a cloud a little wider than the whitened points
        self.offsets = nn.Parameter(-1.5 * (w * torch.randn(c.depth, c.width, d)).sum(-1))  # c
        self.inner = nn.Parameter(torch.randn(c.depth - 1, c.width, c.width) - 1.0)  # U
        self.skips = nn.Parameter(torch.randn(c.depth - 1, c.width, c.rank, d) * 0.3 / d**0.5)  # R
        self.register_buffer("centre", torch.zeros(d))  # m
        self.register_buffer("whitening", torch.eye(d))  # A
        self.register_buffer("strength", torch.ones(()))  # kappa

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
        h = self._layers(x)[2]
        phi = self._outer() * (torch.stack(h) * self.s[:, None]).sum((0, 2))
        return (x @ self.quadratic * x).sum(1) / 2 + x @ self.shift + phi

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

    # ---------------------------------------------------------------- the two passes

    def _outer(self) -> Tensor:
        return self.strength * self.d / self.config.width

    def _layers(self, x: Tensor):
        """Upwards: (W_l A, R_lr A), the skips' values q = R_lr A (x - m), h_l, sigma(z_l) and P_l, layer by layer."""
        c, centred = self.config, x - self.centre
        w, r = self.weights @ self.whitening, self.skips @ self.whitening
        p = softplus(self.inner) / c.width
        values, h, slopes = [], [], []
        for layer in range(c.depth):
            z = centred @ w[layer].mT + self.offsets[layer]
            if not layer:  # weights that this size has none of keep their place in the graph, for several processes
                z = z + sum(part.sum() for part in (self.inner, self.skips) if not part.numel())
            if layer:
                z = z + h[-1] @ p[layer - 1].mT
                values.append(centred @ r[layer - 1].flatten(0, 1).mT)
                z = z + values[-1].view(len(x), c.width, c.rank).square().sum(-1) / 2
            h.append(softplus(z))
            slopes.append(torch.sigmoid(z))
        return (w, r, p), values, h, slopes

    def _adjoints(self, p: Tensor, slopes: list[Tensor]) -> list[Tensor]:
        """Downwards: g_l = dphi / dh_l = outer s_l + P_{l+1}' (g_{l+1} sigma(z_{l+1})), all >= 0."""
        s = self._outer() * self.s
        g = [s[-1].expand_as(slopes[-1])]
        for layer in range(self.config.depth - 2, -1, -1):
            g.insert(0, s[layer] + (g[0] * slopes[layer + 1]) @ p[layer])
        return g

    def _gradient(self, x: Tensor) -> Tensor:
        """grad u = Qx + b + sum_l a_l W_l A + sum_lr (a_l q_lr) R_lr A, with a_l = dphi / dz_l."""
        (w, r, p), values, _, slopes = self._layers(x)
        return self._gather(x, w, r, values, [g * e for g, e in zip(self._adjoints(p, slopes), slopes)])

    def _gather(self, x: Tensor, w: Tensor, r: Tensor, values: list[Tensor], a: list[Tensor]) -> Tensor:
        total = x @ self.quadratic + self.shift
        for layer, a_l in enumerate(a):
            total = total + a_l @ w[layer]
            if layer and self.config.rank:
                pulled = a_l[:, :, None] * values[layer - 1].view(len(x), -1, self.config.rank)
                total = total + pulled.flatten(1) @ r[layer - 1].flatten(0, 1)
        return total

    def gradient_and_hessian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """grad u (n, d) and Hess u (n, d, d) at x (n, d):

        Hess u = Q + sum_l J_l' diag(g_l sigma'(z_l)) J_l + sum_lr a_l R_lr R_lr', J_l = dz_l / dx.

        Every term is positive semidefinite. Jacobians are kept as (n, d, width), so that P_l meets them in one product.
        """
        (w, r, p), values, _, slopes = self._layers(x)
        g = self._adjoints(p, slopes)
        a = [g_l * slope for g_l, slope in zip(g, slopes)]
        bends = [a_l * (1 - slope) for a_l, slope in zip(a, slopes)]  # g sigma' = g sigma (1 - sigma)
        d, n, rank = self.d, len(x), self.config.rank
        # the first Jacobian is W_0 A for every point: its terms are one product with the outer squares of its rows
        squares = (w[0][:, :, None] * w[0][:, None, :]).flatten(1)
        hessian = self.quadratic + (bends[0] @ squares).view(n, d, d)
        jacobian = w[0].mT.expand(n, d, -1)
        for layer in range(1, self.config.depth):
            jacobian = w[layer].mT + (jacobian * slopes[layer - 1][:, None, :]) @ p[layer - 1].mT
            if rank:
                skips = r[layer - 1]
                pulled = values[layer - 1].view(n, -1, rank)
                jacobian = jacobian + torch.einsum("nwr,wrd->ndw", pulled, skips)
                squares = torch.einsum("wri,wrj->wij", skips, skips).flatten(1)
                hessian = hessian + (a[layer] @ squares).view(n, d, d)
            hessian = hessian + (jacobian * bends[layer][:, None, :]) @ jacobian.mT
        return self._gather(x, w, r, values, a), hessian

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
