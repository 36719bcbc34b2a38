"""The rest of the fused path: the symmetric self problem on one triangle, a solve's preparation, and its results."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .numba_math import F, exp32, exp_any, inner, jit, largest, log32


@jit
def self_kernel(dot, x, xt, half, inv_eps, kernel):
    """exp(-|x_i - x_j|^2 / (2 eps)) in the upper triangle, by differences where the products are not stored."""
    n = half.shape[0]
    for i in range(n):
        row, other, hi = (
            kernel[i, i:],
            half[i:],
            half[i],
        )  # slices: loops from zero are the ones that vectorise
        if dot.shape[0] > 0:
            products = dot[i, i:]
            for j in range(row.shape[0]):
                row[j] = (products[j] - hi - other[j]) * inv_eps
        else:
            for k in range(xt.shape[0]):
                xi, xk, scale = xt[k, i], xt[k, i:], F(-0.5) * inv_eps
                for j in range(row.shape[0]):
                    gap = (xi - xk[j]) * (xi - xk[j]) * scale
                    row[j] = gap if k == 0 else row[j] + gap
        row[0] = F(0.0)
        for j in range(row.shape[0]):
            row[j] = exp32(-largest(-row[j], F(0.0)))


@inner
def symmetric_times(kernel, u, out):
    """out = K u, K symmetric and stored in its upper triangle."""
    n = u.shape[0]
    out[:] = F(0.0)
    for i in range(n):
        row, other, below = kernel[i, i + 1 :], u[i + 1 :], out[i + 1 :]
        ui, total = u[i], kernel[i, i] * u[i]
        for j in range(row.shape[0]):
            total += row[j] * other[j]
        for j in range(row.shape[0]):
            below[j] += row[j] * ui
        out[i] += total


@jit
def solve_self(kernel, u, a, spread, goal, residual_goal, max_iter):
    """u <- u (a / (u K u))^(2/3) in place; see `sinkhorn_core.solve_self`.

    Returns K u, the iterations, the error, the plan's total mass, and the mean diagonal of its normalised rows.
    """
    n = a.shape[0]
    ku, r = np.empty(n, F), np.empty(n, F)
    k = 0
    while True:
        k += 1
        symmetric_times(kernel, u, ku)
        size, total = F(0.0), F(0.0)
        for i in range(n):
            mass = u[i] * ku[i]
            total += mass
            ratio = log32(largest(a[i], F(1e-37))) - log32(largest(mass, F(1e-37)))
            r[i] = ratio if a[i] > F(0.0) else F(0.0)
            size += a[i] * r[i] * r[i]
        size = F(math.sqrt(size))
        if k >= max_iter or (size * spread <= goal and size <= residual_goal):
            diagonal = F(0.0)
            for i in range(n):
                diagonal += a[i] * u[i] / ku[i]
            return ku, k, size * spread, total, diagonal
        for i in range(n):
            u[i] *= exp_any(r[i] * F(2.0 / 3.0))


@jit
def log_ratio(u, a, eps):
    """h = eps log(u / a), and <a, h>."""
    h, inner = np.empty(u.shape[0], F), 0.0
    for i in range(u.shape[0]):
        h[i] = eps * (log32(largest(u[i], F(1e-37))) - log32(largest(a[i], F(1e-37))))
        inner += a[i] * h[i]
    return h, inner


@jit
def symmetric_averages(kernel, u, ku, xt, out):
    """out (n, p) = sum_j K_ij u_j x_j / (K u)_i for xt (p, n), from the upper triangle."""
    n, p = u.shape[0], xt.shape[0]
    w, column = np.empty(n, F), np.empty(n, F)
    for q in range(p):
        for j in range(n):
            w[j] = u[j] * xt[q, j]
        symmetric_times(kernel, w, column)
        for i in range(n):
            out[i, q] = column[i] / ku[i]


@jit
def symmetric_plan(kernel, u, ku, out):
    """out_ij = K_ij u_j / (K u)_i, in full from the upper triangle, in tiles that stay in cache."""
    n, tile = u.shape[0], 32
    for i0 in range(0, n, tile):
        for j0 in range(i0, n, tile):
            for i in range(i0, min(i0 + tile, n)):
                scale = F(1.0) / ku[i]
                for j in range(max(i, j0), min(j0 + tile, n)):
                    out[i, j] = kernel[i, j] * u[j] * scale
            for j in range(j0, min(j0 + tile, n)):
                scale = F(1.0) / ku[j]
                for i in range(i0, min(i0 + tile, j)):
                    out[j, i] = kernel[i, j] * u[i] * scale


@inner
def top_variance(x, points, rounds):
    """See `sinkhorn_core.top_variance`."""
    n, d = x.shape
    step = max(1, n // points)
    count = (n + step - 1) // step
    mean, v, w = np.zeros(d, F), np.empty(d, F), np.empty(d, F)
    for i in range(0, n, step):
        for k in range(d):
            mean[k] += x[i, k] / F(count)
    for k in range(d):
        v[k] = x[0, k] - mean[k]
    variance = F(0.0)
    for _ in range(rounds + 1):
        norm, variance, shift = F(0.0), F(0.0), F(0.0)
        for k in range(d):
            norm += v[k] * v[k]
        norm = F(1.0) / F(math.sqrt(norm + F(1e-37)))
        for k in range(d):
            v[k] *= norm
            w[k] = F(0.0)
            shift += v[k] * mean[k]
        for i in range(0, n, step):
            t = F(0.0)
            for k in range(d):
                t += x[i, k] * v[k]
            t -= shift
            variance += t * t / F(count)
            for k in range(d):
                w[k] += t * x[i, k]
        v, w = w, v
    return variance


@njit(
    fastmath={"reassoc", "contract", "arcp", "nsz"}, nogil=True, cache=True
)  # here inf and NaN must get through
def moments(x, y, a, b):
    """See `sinkhorn_problem._moments`."""
    d, second, inner = x.shape[1], 0.0, 0.0
    half_x, half_y = np.empty(x.shape[0], F), np.empty(y.shape[0], F)
    mean_x, mean_y = np.zeros(d, F), np.zeros(d, F)
    for points, w, half, mean in ((x, a, half_x, mean_x), (y, b, half_y, mean_y)):
        for i in range(points.shape[0]):
            square, wi = F(0.0), w[i]
            for k in range(d):
                square += points[i, k] * points[i, k]
                mean[k] += wi * points[i, k]
            half[i] = F(0.5) * square
            second += wi * half[i]
    for k in range(d):
        inner += mean_x[k] * mean_y[k]
    return half_x, half_y, mean_x, mean_y, second - inner


@jit
def prepare(x, y, half_x, half_y, mean_x, mean_y, a, b, eps):
    """What a start needs: log b, mean variances, and `slowest_rate`."""
    n, m, d = x.shape[0], y.shape[0], x.shape[1]
    log_b = np.empty(m, F)
    second_x, second_y = 0.0, 0.0
    for i in range(n):
        second_x += 2 * a[i] * half_x[i]
    for j in range(m):
        second_y += 2 * b[j] * half_y[j]
        log_b[j] = F(math.log(b[j])) if b[j] > 0 else F(-1e4)
    for k in range(d):
        second_x -= mean_x[k] * mean_x[k]
        second_y -= mean_y[k] * mean_y[k]
    slow = eps / (2 * math.sqrt(max(top_variance(x, 64, 3) * top_variance(y, 64, 3), 1e-37)))
    rate = 1 / (math.sqrt(1 + slow * slow) + slow) ** 2
    return log_b, max(second_x / d, 1e-37), max(second_y / d, 1e-37), rate


@jit
def gaussian_start(y, half_y, mean_x, mean_y, var_x, var_y, eps):
    """See `sinkhorn_core.gaussian_start`."""
    q = var_x * var_y / (math.sqrt(var_x * var_y + eps * eps / 4) + eps / 2)
    slope = F(min(max(var_x / max(q, 1e-37) - eps / var_y, 0.0), 1e6))
    tilt = mean_x - slope * mean_y
    psi = np.empty(half_y.shape[0], F)
    for j in range(half_y.shape[0]):
        inner = F(0.0)
        for k in range(tilt.shape[0]):
            inner += y[j, k] * tilt[k]
        psi[j] = -inner - slope * half_y[j]
    return psi


@jit
def normalise(kernel, v):
    """K_ij <- K_ij v_j / sum_j K_ij v_j, in place."""
    n, m = kernel.shape
    for i in range(n):
        total = F(0.0)
        for j in range(m):
            w = kernel[i, j] * v[j]
            kernel[i, j] = w
            total += w
        scale = F(1.0) / total
        for j in range(m):
            kernel[i, j] *= scale


@jit
def row_means(kernel, v, s):
    """The row averages of s under the kernel with columns scaled by v."""
    n, m = kernel.shape
    mean = np.empty(n, F)
    for i in range(n):
        total, other = F(0.0), F(0.0)
        for j in range(m):
            w = kernel[i, j] * v[j]
            total += w
            other += w * s[j]
        mean[i] = other / total
    return mean


@jit
def finish(x, target, base, own, velocity, centre, a, b, s, log_b, log_row, mean_s, half_x, half_y, eps):
    """Fill in the velocity; its rms, the potentials in their gauge, the value and the effective neighbours.

    See `sinkhorn_solve.finish`. `target` and, if it is the solved self map (`own`), `base`, which the velocity
    subtracts, leave in the caller's coordinates.
    """
    n, m, d = x.shape[0], s.shape[0], x.shape[1]
    f, g = np.empty(n, F), np.empty(m, F)
    speed, neighbours, sum_f, sum_g = 0.0, 0.0, 0.0, 0.0
    for i in range(n):
        square, inner = F(0.0), F(0.0)
        for k in range(d):
            w = target[i, k] - base[i, k]
            velocity[i, k] = w
            square += w * w
            inner += x[i, k] * target[i, k]
        if centre.shape[0] > 0:
            for k in range(d):
                target[i, k] += centre[k]
                if own:
                    base[i, k] += centre[k]
        speed += a[i] * square
        neighbours += a[i] * math.exp(max(log_row[i] - inner / eps - mean_s[i], 0.0))
        f[i] = half_x[i] - eps * log_row[i]
        sum_f += a[i] * f[i]
    for j in range(m):
        g[j] = eps * (s[j] - log_b[j]) + half_y[j]
        sum_g += b[j] * g[j]
    gauge = F((sum_f - sum_g) / 2)
    for i in range(n):
        f[i] -= gauge
    for j in range(m):
        g[j] += gauge
    return f, g, math.sqrt(speed), sum_f + sum_g, neighbours
