"""log det of symmetric positive definite Hessians: exact by Cholesky, and by random probes where d is large."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

EXACT = 64  # dimension up to which Hessians are assembled and factorised
Product = Callable[[Tensor], Tensor]  # v (n, d) -> H v (n, d), one matrix H_i for each row


class NotConvexError(ValueError):
    """A Hessian that should be positive definite is not, or is not finite."""


class _LogDet(torch.autograd.Function):
    """d log det H = tr(H^{-1} dH): the inverse from the factor, not the derivative of the factorisation."""

    @staticmethod
    def forward(ctx: FunctionCtx, h: Tensor) -> Tensor:
        factor, info = torch.linalg.cholesky_ex(h)
        if bool((info != 0).any()) or not bool(factor.diagonal(dim1=-2, dim2=-1).isfinite().all()):
            bad = int((info != 0).sum())
            raise NotConvexError(
                f"{bad} of {h[..., 0, 0].numel()} Hessians are not positive definite or not finite: the potential is "
                "not convex there, or its weights have diverged; lower the learning rate or tau"
            )
        ctx.save_for_backward(factor)
        return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (factor,) = ctx.saved_tensors
        return grad[..., None, None] * torch.cholesky_inverse(factor)


def log_det(h: Tensor) -> Tensor:
    """log det H of positive definite matrices (..., d, d) -> (...); raises ``NotConvexError`` where one is not."""
    return _LogDet.apply(h)


def conjugate_gradients(product: Product, b: Tensor, iterations: int, tol: float = 1e-6) -> Tensor:
    """x with H_i x_i = b_i for every row of b (n, d); stops when every residual is below ``tol`` of |b_i|."""
    x, r, p = torch.zeros_like(b), b, b
    rr = r.square().sum(1, keepdim=True)
    goal = tol**2 * rr
    for _ in range(iterations):
        if bool((rr <= goal).all()):
            break
        hp = product(p)
        alpha = rr / (p * hp).sum(1, keepdim=True).clamp_min(torch.finfo(b.dtype).tiny)
        x, r = x + alpha * p, r - alpha * hp
        before, rr = rr, r.square().sum(1, keepdim=True)
        p = r + rr / before.clamp_min(torch.finfo(b.dtype).tiny) * p
    return x


def log_det_surrogate(product: Product, x: Tensor, generator: torch.Generator | None, probes: int = 1) -> Tensor:
    """(n,) whose gradient in the weights is on average that of log det H; its value is not the log det.

    E z'H^{-1} dH z = tr(H^{-1} dH) for signs z (Hutchinson 1990); H^{-1} z by conjugate gradients, detached.
    """
    total = 0.0
    for _ in range(probes):
        z = signs(x, generator)
        with torch.no_grad():
            solved = conjugate_gradients(product, z, iterations=x.shape[1], tol=1e-3)
        total = total + (solved * product(z)).sum(1)
    return total / probes


@torch.no_grad()
def log_det_lanczos(
    product: Product, x: Tensor, generator: torch.Generator | None, probes: int = 16, degree: int = 24
) -> Tensor:
    """log det H_i for every row of x (n, d) by stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017, algorithm 1).

    log det H = E z' log(H) z over signs z; each z' log(H) z is d times a Gauss quadrature on the eigenvalues of the
    tridiagonal matrix of ``degree`` Lanczos steps. The standard error falls like 1 / sqrt(probes).
    """
    n, d = x.shape
    degree, total = min(degree, d), x.new_zeros(n)
    for _ in range(probes):
        basis = [signs(x, generator) / d**0.5]
        alpha, beta = x.new_zeros(n, degree), x.new_zeros(n, degree)
        for k in range(degree):
            w = product(basis[k])
            alpha[:, k] = (w * basis[k]).sum(1)
            for q in basis:  # full reorthogonalisation: cheap at this degree, and no ghost eigenvalues
                w = w - (w * q).sum(1, keepdim=True) * q
            norm = w.norm(dim=1)
            beta[:, k] = norm
            basis.append(w / norm.clamp_min(1e-12)[:, None])
        off = torch.diag_embed(beta[:, : degree - 1], offset=1)
        values, vectors = torch.linalg.eigh(torch.diag_embed(alpha) + off + off.mT)
        weights = vectors[:, 0].square()
        # an exhausted Krylov space leaves zero eigenvalues of zero weight
        total = total + d * torch.where(weights > 1e-12, weights * values.clamp_min(1e-30).log(), 0.0).sum(1)
    return total / probes


def signs(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent +1 and -1 in the shape of x, drawn on the CPU so that a GPU sees the same."""
    return (2 * torch.randint(0, 2, x.shape, generator=generator) - 1).to(x)
