"""The log-sum-exp potential: soft maxima of affine functions beyond a quadratic; gradient and Hessian by hand."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from gengrad.networks.convex import ConvexPotential
from gengrad.registry import NETWORKS, Settings


@NETWORKS.register("log_sum_exp")
class LogSumExp(ConvexPotential):
    """``ConvexPotential`` with a mean of G = ``groups`` soft maxima of K = ``pieces`` affine functions of x_:

        phi = kappa (d / G) sum_g s_g log sum_k exp(w_gk . x_ + c_gk),   x_ = A (x - m),

    a universal approximator of convex functions (Calafiore, Gaubert, Possieri 2020, arXiv 1806.07850). With
    the softmax p_g of a group, its gradient is A' m_g, m_g = sum_k p_gk w_gk, and its Hessian the covariance of w_gk
    under p_g. A soft maximum is what parts mass between several modes: the score of a Gaussian mixture with one common
    covariance is one group. One layer, so that a training step costs little.
    """

    class Config(Settings):
        groups: int = Field(32, ge=1)
        pieces: int = Field(16, ge=2)
        floor: float = Field(1e-3, gt=0, lt=1)  # e, the least curvature of u
        gain: float = Field(3.0, gt=0)  # size of the first weights on whitened points: how sharp the bends can be

    def __init__(self, config: Settings | None = None, *, event_shape: tuple[int, ...], **settings):
        super().__init__(config, event_shape, settings)
        c = self.config
        self.scales = nn.Parameter(torch.zeros(c.groups))  # t
        self.weights = nn.Parameter(torch.randn(c.groups, c.pieces, self.d) * c.gain / self.d**0.5)  # w
        self.offsets = nn.Parameter(torch.randn(c.groups, c.pieces) * c.gain / 2)  # c

    def _phi(self, x: Tensor) -> Tensor:
        return self._values(x)[1].logsumexp(-1) @ self._outer()

    def _gradient(self, x: Tensor) -> Tensor:
        w, z = self._values(x)
        return self._gather(x, w, z.softmax(-1) * self._outer()[:, None])

    def _gather(self, x: Tensor, w: Tensor, shares: Tensor) -> Tensor:
        return x @ self.quadratic + self.shift + shares.flatten(1) @ w.flatten(0, 1)

    def gradient_and_hessian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """grad u (n, d) and Hess u = Q + sum_g s_g (sum_k p_gk w_gk w_gk' - m_g m_g') (n, d, d) at x (n, d)."""
        w, z = self._values(x)
        p, outer, flat = z.softmax(-1), self._outer(), w.flatten(0, 1)
        shares, means = p * outer[:, None], torch.einsum("ngk,gkd->ngd", p, w)
        squares = (flat[:, :, None] * flat[:, None, :]).flatten(1)
        seconds = (shares.flatten(1) @ squares).view(len(x), self.d, self.d)
        hessian = self.quadratic + seconds - (means * outer[:, None]).mT @ means
        return self._gather(x, w, shares), hessian

    def _outer(self) -> Tensor:
        """The weights of the groups, kappa (d / G) s, (G,)."""
        return self.strength * self.d / self.config.groups * self.s

    def _values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """w A (G, K, d), and the affine functions at x, (n, G, K)."""
        w = self.weights @ self.whitening
        z = (x - self.centre) @ w.flatten(0, 1).mT
        return w, z.view(len(x), *self.offsets.shape) + self.offsets
