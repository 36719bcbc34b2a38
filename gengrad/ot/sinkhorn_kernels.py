"""The kernel exp((x . y) / eps + s) as an operator on scalings: in memory, or in blocks of rows; any device and dtype.

Letters as in `sinkhorn_core`: s holds the column scalings' logarithms, a the row weights; every quantity has a leading
batch dimension B, and each problem its own eps.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_SCALING = 15.0  # exp-domain scalings beyond e^15 are absorbed into the kernel
# logarithm of the least kernel entry beside its row's largest: denormals would slow every product
SMALLEST = -60.0
WIDE = 16  # columns from which products="bf16" rounds row averages too


def matvec(k: Tensor, v: Tensor) -> Tensor:
    """k (B, n, m) times v (B, m); one problem goes through gemv, which a CPU runs several times faster than bmm."""
    if k.shape[0] == 1:
        return torch.mv(k[0], v[0])[None]
    return torch.bmm(k, v[..., None])[..., 0]


def product(x: Tensor, y: Tensor, products: str = "same") -> Tensor:
    """x y' for batches (B, n, d), (B, m, d); `products="bf16"` rounds the factors to bfloat16."""
    if products == "bf16":
        return torch.bmm(x.bfloat16(), y.bfloat16().mT).to(x.dtype)
    if x.shape[0] == 1:
        return torch.mm(x[0], y[0].T)[None]
    return torch.bmm(x, y.mT)


class DenseKernel:
    """The kernel in memory: two (B, n, m) buffers, the products x.y and the exponentials, both reused."""

    def __init__(self, x: Tensor, y: Tensor, products: str = "same"):
        self.dot, self.products = product(x, y, products), products
        self.k = torch.empty_like(self.dot)

    def at(self, eps: Tensor) -> DenseKernel:
        """Work at eps (B,) from now on."""
        self.inv_eps, self.s = 1.0 / eps, None
        return self

    def _scaling(self, s: Tensor) -> Tensor:
        """The factors exp(s - absorbed s) of the columns, after an absorption where they would grow too large."""
        if self.s is None or float((s - self.s).abs().max()) > MAX_LOG_SCALING:
            torch.addcmul(s[:, None, :], self.dot, self.inv_eps[:, None, None], out=self.k)
            self.top = self.k.amax(-1)
            self.k.sub_(self.top[..., None]).clamp_min_(SMALLEST).exp_()
            self.s = s
        return torch.exp(s - self.s)

    def rows(self, s: Tensor) -> Tensor:
        """log sum_j exp(x_i . y_j / eps + s_j), shape (B, n)."""
        v = self._scaling(s)
        return self.top + torch.log(matvec(self.k, v))

    def sweep(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Column masses (B, m) of the row-normalised plan, and `rows(s)`, in two passes over the kernel."""
        v = self._scaling(s)
        t = matvec(self.k, v)
        return v * matvec(self.k.mT, a / t), self.top + torch.log(t)

    def average(self, s: Tensor, z: Tensor) -> Tensor:
        """Row averages sum_j P_ij z_j / a_i of z (B, m, p)."""
        v = self._scaling(s)
        z = torch.cat([z, torch.ones_like(z[..., :1])], -1) * v[..., None]
        if self.products == "bf16" and z.shape[-1] > WIDE:
            total = torch.bmm(self.k.bfloat16(), z.bfloat16()).to(z.dtype)
        else:
            total = torch.mm(self.k[0], z[0])[None] if len(z) == 1 else torch.bmm(self.k, z)
        return total[..., :-1] / total[..., -1:]

    def newton(self, s: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """The Newton step on the semi-dual: (diag c - P' diag(1/a) P) step = b - c, gauge fixed; O(m^2 (n + m))."""
        v = self._scaling(s)
        p = self.k * v[:, None, :]
        p *= (torch.sqrt(a) / p.sum(-1))[..., None]
        hessian = torch.diag_embed(c) - p.mT @ p + c[:, :, None] * c[:, None, :]
        ridge = 1e-15 * torch.ones_like(c) + (c <= 1e-30)  # starved columns stay
        return torch.linalg.solve(hessian + torch.diag_embed(ridge), b - c)


class BlockedKernel:
    """The same operator when n x m does not fit the memory bound: blocks of rows are recomputed in every sweep."""

    def __init__(self, x: Tensor, y: Tensor, rows: int, products: str = "same"):
        self.x, self.y, self.block, self.products = x, y, rows, products

    def at(self, eps: Tensor) -> BlockedKernel:
        """See `DenseKernel.at`."""
        self.inv_eps = 1.0 / eps
        return self

    def _blocks(self, s: Tensor):
        for part in torch.arange(self.x.shape[1], device="cpu").split(self.block):
            i = slice(int(part[0]), int(part[-1]) + 1)
            k = product(self.x[:, i] * self.inv_eps[:, None, None], self.y, self.products).add_(s[:, None, :])
            top = k.amax(-1)
            yield i, k.sub_(top[..., None]).clamp_min_(SMALLEST).exp_(), top

    def rows(self, s: Tensor) -> Tensor:
        """See `DenseKernel.rows`."""
        return torch.cat([top + torch.log(k.sum(-1)) for _, k, top in self._blocks(s)], 1)

    def sweep(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """See `DenseKernel.sweep`."""
        c, log_row = torch.zeros_like(s), []
        for i, k, top in self._blocks(s):
            t = k.sum(-1)
            c += matvec(k.mT, a[:, i] / t)
            log_row.append(top + torch.log(t))
        return c, torch.cat(log_row, 1)

    def average(self, s: Tensor, z: Tensor) -> Tensor:
        """See `DenseKernel.average`."""
        return torch.cat([torch.bmm(k, z) / k.sum(-1, keepdim=True) for _, k, _ in self._blocks(s)], 1)


def make_kernel(x: Tensor, y: Tensor, max_memory: float, products: str) -> DenseKernel | BlockedKernel:
    """Dense where its two buffers stay below `max_memory` bytes, otherwise as many rows at a time as fit."""
    row_bytes = 2 * x.shape[0] * y.shape[1] * x.element_size()
    rows = int(max_memory // row_bytes)
    return DenseKernel(x, y, products) if rows >= x.shape[1] else BlockedKernel(x, y, max(rows, 1), products)
