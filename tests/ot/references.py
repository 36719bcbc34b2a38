"""An independent solver to test against: damped Newton on the semi-dual, dense, log-domain, float64, in NumPy.

It shares no code with gengrad.ot, and solves max_g <b, g> - eps <a, log sum_j b_j e^{(g_j - c_ij) / eps}>.
"""

import importlib.util

import numpy as np
import torch
from scipy.special import logsumexp

BACKENDS = ["torch", *(["numba"] if importlib.util.find_spec("numba") else [])]


def plan(x, y, eps, a=None, b=None, tol=1e-12):
    """The optimal plan (n, m) with its potentials f, g, to a marginal error below `tol`."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    n, m = len(x), len(y)
    a = np.full(n, 1 / n) if a is None else np.asarray(a, float)
    b = np.full(m, 1 / m) if b is None else np.asarray(b, float)
    cost = ((x[:, None] - y[None]) ** 2).sum(-1) / 2
    g = np.zeros(m)

    def state(g, e):
        f = -e * logsumexp((g - cost) / e, b=b, axis=1)
        p = a[:, None] * b * np.exp((f[:, None] + g - cost) / e)
        return f, p, b @ g + a @ f

    for e in [*(eps * 3.0 ** np.arange(8, 0, -1)), eps]:
        for _ in range(500):
            f, p, value = state(g, e)
            gradient = b - p.sum(0)
            if np.abs(gradient).sum() < (tol if e == eps else 1e-3):
                break
            hessian = (np.diag(p.sum(0)) - p.T @ (p / a[:, None])) / e
            step = np.linalg.solve(hessian + 1e-13 * np.eye(m) / e + np.outer(b, b), gradient)
            t = 1.0
            while state(g + t * step, e)[2] < value + 1e-4 * t * (gradient @ step) - 1e-14 and t > 1e-9:
                t /= 2
            g = g + t * step
    assert np.abs(gradient).sum() < 1e-9, "the test's own reference failed"
    shift = (a @ f - b @ g) / 2
    return p, f - shift, g + shift


def velocity(x, y, eps, a=None, b=None):
    """T_xy - T_xx."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    p, q = plan(x, y, eps, a, b)[0], plan(x, x, eps, a, a)[0]
    return (p @ y) / p.sum(1, keepdims=True) - (q @ x) / q.sum(1, keepdims=True)


def value(x, y, eps, a=None, b=None):
    """OT_eps by its primal definition <P, c> + eps KL(P | a x b)."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    p = plan(x, y, eps, a, b)[0]
    a = np.full(len(x), 1 / len(x)) if a is None else np.asarray(a, float)
    b = np.full(len(y), 1 / len(y)) if b is None else np.asarray(b, float)
    cost = ((x[:, None] - y[None]) ** 2).sum(-1) / 2
    ratio = np.where(p > 0, p / np.maximum(np.outer(a, b), 1e-300), 1.0)
    return (p * cost).sum() + eps * (p * np.log(ratio)).sum()


def clouds(n=60, m=50, d=2, seed=0, dtype=torch.float64, shift=1.0):
    """Two overlapping, differently shaped clouds."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    y = 0.7 * torch.randn(m, d, generator=g, dtype=torch.float64)
    y[: m // 2, 0] += 2.0
    return x.to(dtype), (y + shift).to(dtype)


def relative(v, exact):
    """Relative L2 error of a velocity."""
    v, exact = torch.as_tensor(v).double(), torch.as_tensor(exact).double()
    return float((v - exact).norm() / exact.norm())
