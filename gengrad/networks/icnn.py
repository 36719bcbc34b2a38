"""The input-convex network: a dense softplus network beyond a quadratic; gradient and Hessian by hand."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from gengrad.networks.convex import ConvexPotential
from gengrad.registry import NETWORKS, Settings


@NETWORKS.register("icnn")
class ICNN(ConvexPotential):
    """``ConvexPotential`` with phi = kappa (d / width) sum_l s_l . h_l, a DenseICNN on whitened points x_:

        z_l = W_l x_ + c_l + P_l h_{l-1} + sum_r (R_lr x_)^2 / 2,   h_l = softplus(z_l),   P_l = softplus(U_l) / width

    (Amos et al. 2017; Korotin et al. 2021, arXiv 1909.13082, appendix B). Convex, as P_l > 0 and s >= 0.
    """

    class Config(Settings):
        width: int = Field(64, ge=1)
        depth: int = Field(2, ge=1)
        rank: int = Field(2, ge=0)  # quadratic skips of every unit above the first layer
        floor: float = Field(1e-3, gt=0, lt=1)  # e, the least curvature of u
        gain: float = Field(6.0, gt=0)  # size of the first weights on whitened points: how sharp the bends can be

    def __init__(self, config: Settings | None = None, *, event_shape: tuple[int, ...], **settings):
        super().__init__(config, event_shape, settings)
        d, c = self.d, self.config
        self.scales = nn.Parameter(torch.zeros(c.depth, c.width))  # t
        w = torch.randn(c.depth, c.width, d) * c.gain / d**0.5
        self.weights = nn.Parameter(w)  # W
        # every unit bends at a random place of a cloud a little wider than the whitened points
        self.offsets = nn.Parameter(-1.5 * (w * torch.randn(c.depth, c.width, d)).sum(-1))  # c
        self.inner = nn.Parameter(torch.randn(c.depth - 1, c.width, c.width) - 1.0)  # U
        self.skips = nn.Parameter(torch.randn(c.depth - 1, c.width, c.rank, d) * 0.3 / d**0.5)  # R

    def _phi(self, x: Tensor) -> Tensor:
        return self._outer() * (torch.stack(self._layers(x)[2]) * self.s[:, None]).sum((0, 2))

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
