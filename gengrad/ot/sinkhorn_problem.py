"""What a Sinkhorn call was given, checked and made uniform: batched, centred, weighted, with epsilon per problem."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """B transport problems between clouds x (B, n, d) and y (B, m, d) with the cost |x - y|^2 / 2."""

    x: Tensor
    y: Tensor
    a: Tensor  # (B, n), rows sum to one
    b: Tensor  # (B, m)
    eps: Tensor  # (B,)
    mean_cost: Tensor  # (B,)
    centre: Tensor | None  # (B, 1, d), already taken off both clouds; None where they lie near the origin anyway
    mean_x: Tensor  # (B, d)
    mean_y: Tensor  # (B, d)
    half_x: Tensor  # (B, n) half the squared norms, after centring
    half_y: Tensor  # (B, m)
    single: bool  # the caller gave (n, d), and gets results without the batch dimension
    arrays: tuple | None = field(default=None, repr=False)  # x, y, a, b, half_x, half_y, mean_x, mean_y, where at hand

    def part(self, i: int) -> Problem:
        """The i-th problem, as a batch of one."""
        cut = {k: v[i : i + 1] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **cut, arrays=None)

    def back(self, points: Tensor) -> Tensor:
        """Centred points in the caller's coordinates."""
        return points if self.centre is None else points + self.centre


def _cloud(name: str, points: Tensor) -> Tensor:
    if not isinstance(points, Tensor):
        raise ValueError(
            f"sinkhorn: {name} is a {type(points).__name__}; it must be a torch.Tensor of shape (n, d) or "
            f"(batch, n, d): use torch.as_tensor({name})."
        )
    if points.ndim not in (2, 3):
        raise ValueError(
            f"sinkhorn: {name} has shape {tuple(points.shape)}; allowed are (n, d) and (batch, n, d): "
            f"use {name}.flatten({'1' if points.ndim > 3 else '0'}) or {name}[:, None]."
        )
    if 0 in points.shape:
        raise ValueError(
            f"sinkhorn: {name} has shape {tuple(points.shape)}, so it is empty; a cloud needs at least one point "
            "and one coordinate."
        )
    if not points.is_floating_point():
        raise ValueError(f"sinkhorn: {name} has dtype {points.dtype}; use {name}.float() or {name}.double().")
    if points.dtype in (torch.float16, torch.bfloat16):
        points = points.float()  # documented: half precision is read as fp32
    return points


def _refuse_infinite(name: str, points: Tensor) -> None:
    finite = torch.isfinite(points)
    if not bool(finite.all()):
        where = tuple(int(k) for k in (~finite).nonzero()[0])
        raise ValueError(
            f"sinkhorn: {name}{list(where)} is {float(points[where])}, and {int((~finite).sum())} of its entries "
            "are not finite; drop those points, or lower the step of the flow that made them."
        )


def _weights(name: str, w: Tensor | None, points: Tensor, single: bool) -> Tensor:
    shape = points.shape[:2]
    if w is None:
        return points.new_full(shape, 1.0 / shape[1])
    given = w = torch.as_tensor(w, dtype=points.dtype, device=points.device)
    w = w[None].expand(shape[0], -1) if w.ndim == 1 else w
    if w.shape != shape:
        allowed = tuple(shape[1:]) if single else f"{tuple(shape)} or {tuple(shape[1:])}"
        raise ValueError(f"sinkhorn: the weights {name} have shape {tuple(given.shape)}; allowed: {allowed}.")
    if not bool(torch.isfinite(w).all()) or bool((w < 0).any()):
        raise ValueError(
            f"sinkhorn: the weights {name} must be finite and non-negative; their smallest is {float(w.min())}."
        )
    total = w.sum(1)
    if bool(((total - 1).abs() > 1e-3).any()):
        raise ValueError(
            f"sinkhorn: the weights {name} sum to {float(total[(total - 1).abs().argmax()]):.6g}; they must sum to 1 "
            f"(within 1e-3, then normalised exactly): pass {name} / {name}.sum(-1, keepdim=True)."
        )
    return w / total[:, None]


def _epsilon(epsilon, epsilon_rel: float, costs: list[float], dtype: torch.dtype, single: bool) -> list[float]:
    """One strength per problem, from the mean costs; plain numbers, as small solves are bound by their calls."""
    if epsilon is None:
        if not epsilon_rel > 0:
            raise ValueError(f"sinkhorn: epsilon_rel is {epsilon_rel}; it must be positive (useful: 0.005 to 0.5).")
        # no spread at all (every x equals every y): any epsilon gives the same answer, so take epsilon_rel itself
        return [epsilon_rel * c if epsilon_rel * c > 1e-30 else epsilon_rel for c in costs]
    values = epsilon.tolist() if isinstance(epsilon, Tensor) else epsilon
    values = list(values) if isinstance(values, (list, tuple)) else [float(values)] * len(costs)
    if len(values) != len(costs) or (isinstance(epsilon, Tensor) and epsilon.ndim > 1):
        allowed = "a number" if single else f"a number or a tensor of shape ({len(costs)},)"
        raise ValueError(f"sinkhorn: epsilon has shape {tuple(torch.as_tensor(epsilon).shape)}; allowed: {allowed}.")
    if not all(0 < e < math.inf for e in values):
        raise ValueError(
            f"sinkhorn: epsilon is {epsilon}; it must be positive and finite, in the units of |x - y|^2. For exact "
            "transport (epsilon = 0) use gengrad.ot.exact_plan."
        )
    most = 1e9 if dtype == torch.float64 else 1e6
    if not all(c < most * e for c, e in zip(costs, values)):
        raise ValueError(
            f"sinkhorn: epsilon {min(values):.3g} is less than 1/{most:.0e} of the mean cost {max(costs):.3g}, "
            f"beyond what {dtype} resolves; raise epsilon, use .double(), or exact_plan."
        )
    return values


def read_problem(x, y, epsilon=None, epsilon_rel: float = 0.05, a=None, b=None) -> Problem:
    """Check everything that a caller passed; ValueError says what was found, what is allowed and how to mend it."""
    x, y = _cloud("x", x), _cloud("y", y)
    if x.ndim != y.ndim or (x.ndim == 3 and x.shape[0] != y.shape[0]):
        raise ValueError(
            f"sinkhorn: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; both must be single clouds (n, d), (m, d) "
            "or batches of equal length (batch, n, d), (batch, m, d): use y.expand(len(x), -1, -1)."
        )
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"sinkhorn: the points of x have {x.shape[-1]} coordinates and those of y {y.shape[-1]}; they must agree."
        )
    if x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"sinkhorn: x is {x.dtype} on {x.device} and y {y.dtype} on {y.device}; use y.to(x) (half precision "
            "is read as fp32)."
        )
    given, single = (x, y), x.ndim == 2
    x, y = (x[None], y[None]) if single else (x, y)
    a, b = _weights("a", a, x, single), _weights("b", b, y, single)
    x, y = x.detach().contiguous(), y.detach().contiguous()
    moments, costs, offsets, arrays = _moments(x, y, a, b)
    if not all(map(math.isfinite, costs)):  # any infinite or undefined entry ends up here
        _refuse_infinite("x", given[0])
        _refuse_infinite("y", given[1])
        raise ValueError(f"sinkhorn: squared distances overflow {x.dtype}; rescale, or use .double().")
    centre = None
    if any(square > c for square, c in zip(offsets, costs)):
        centre = moments[3][:, None]  # the mean of y: far from the origin the products would cancel
        x, y = x - centre, y - centre
        moments, costs, _, arrays = _moments(x, y, a, b)
    half_x, half_y, mean_x, mean_y = moments
    numbers = [_epsilon(epsilon, epsilon_rel, costs, x.dtype, single), costs]
    eps, mean_cost = torch.tensor(numbers, dtype=x.dtype, device=x.device).unbind()
    return Problem(x, y, a, b, eps, mean_cost, centre, mean_x, mean_y, half_x, half_y, single, arrays)


def _moments(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple:
    """Half squared norms and means; per problem, as numbers, the mean cost and |mean_y|^2; `Problem.arrays`.

    In O((n + m) d), by E |x - y|^2 / 2 = E |x|^2 / 2 + E |y|^2 / 2 - mean_x . mean_y.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and (fused := _fused_moments()):
        clouds = (x.numpy(), y.numpy(), a.numpy(), b.numpy())
        *moments, cost, offset = fused(*clouds)
        costs = [max(c, 0.0) if c == c else c for c in cost.tolist()]
        return tuple(map(torch.from_numpy, moments)), costs, offset.tolist(), (*clouds, *moments)
    half_x, half_y = (0.5 * torch.linalg.vector_norm(t, dim=-1).square() for t in (x, y))
    mean_x, mean_y = (torch.bmm(w[:, None, :], t)[:, 0] for w, t in ((a, x), (b, y)))
    cost = (a * half_x).sum(1) + (b * half_y).sum(1) - (mean_x * mean_y).sum(1)
    moments = half_x, half_y, mean_x, mean_y
    return moments, cost.clamp_min(0.0).tolist(), mean_y.square().sum(-1).tolist(), None


@lru_cache(maxsize=1)
def _fused_moments() -> Callable | None:
    """The fused path's kernel for the moments, if it is there."""
    if not has_numba():
        return None
    from .sinkhorn_numba_ends import moments  # compiles at first use

    return moments


@lru_cache(maxsize=1)
def has_numba() -> bool:
    """Whether the extra `fast` is installed."""
    return importlib.util.find_spec("numba") is not None
