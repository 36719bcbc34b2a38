"""The value of the Sinkhorn divergence, differentiable in the moving cloud."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .sinkhorn import MAX_MEMORY, _options, _run
from .sinkhorn_problem import read_problem
from .sinkhorn_solve import SelfMap


class _Divergence(torch.autograd.Function):
    """S_eps with the gradient of the envelope theorem: dS/dx_i = -a_i v(x_i)."""

    @staticmethod
    def forward(ctx, x, y, epsilon, epsilon_rel, a, b, options):
        problem = read_problem(x, y, epsilon, epsilon_rel, a, b)
        given = problem.eps[0] if problem.single else problem.eps
        result = _run(x, y, given, epsilon_rel, a, b, None, options)
        p = problem
        swapped = replace(
            p, x=p.y, y=p.x, a=p.b, b=p.a, mean_x=p.mean_y, mean_y=p.mean_x, half_x=p.half_y, half_y=p.half_x
        )
        other = SelfMap(swapped, options, None)
        other.reach(0.1 * options.tol * torch.sqrt(problem.mean_cost))
        own = other.value()[0] if problem.single else other.value()
        a = problem.a[0] if problem.single else problem.a
        ctx.save_for_backward(a[..., None] * result.velocity)
        ctx.dtype = x.dtype
        return result.value - 0.5 * result.self_value - 0.5 * own

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (descent,) = ctx.saved_tensors
        return (-(grad[..., None, None] * descent)).to(ctx.dtype), *[None] * 6


def sinkhorn_divergence(
    x: Tensor, y: Tensor, epsilon=None, epsilon_rel: float = 0.05, a=None, b=None, tol: float = 1e-3,
    max_iter: int = 2000, *, max_memory: float = MAX_MEMORY, products: str = "same", backend: str = "auto",
) -> Tensor:  # fmt: skip
    """S_eps(x, y) = OT_eps(x, y) - OT_eps(x, x) / 2 - OT_eps(y, y) / 2, a scalar or one per problem (B,).

    Differentiable in x at fixed epsilon: the gradient is -a_i v(x_i) with v of `sinkhorn_velocity`, whose relative
    error `tol` is; the value's own error is of second order in it (Feydy et al. 2019, arXiv 1810.08278, section 3).
    With `epsilon_rel` the gradient leaves out that epsilon moves with x. Second derivatives are not available.
    Arguments, shapes and errors are those of `sinkhorn`; besides, ValueError if y, a or b require a gradient.
    """
    for name, t in (("y", y), ("a", a), ("b", b)):
        if isinstance(t, Tensor) and t.requires_grad:
            raise ValueError(
                f"sinkhorn_divergence: {name} requires a gradient, but only the one in x is provided; pass "
                f"{name}.detach(), or swap the clouds (the divergence is symmetric)."
            )
    # the value is sensitive to a skipped self solve where its gradient is not
    options = _options(tol, max_iter, True, 1 - 1e-6, max_memory, products, backend)
    return _Divergence.apply(x, y, epsilon, epsilon_rel, a, b, options)
