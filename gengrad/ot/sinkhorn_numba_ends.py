"""Before and after the iterations of the fused path: moments and starts, maps and numbers."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .numba_math import F, inner, jit


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


FINITE = {"reassoc", "contract", "arcp", "nsz"}  # fast arithmetic that lets inf and NaN through


@njit(fastmath=FINITE, nogil=True, cache=True, forceinline=True)
def _cloud_moments(points, w, half, mean):
    """Half the squared norms, the mean, and the mean of the former; two plain loops, which the compiler vectorises."""
    second = 0.0
    mean[:] = F(0.0)
    for i in range(points.shape[0]):
        square = F(0.0)
        for k in range(points.shape[1]):
            square += points[i, k] * points[i, k]
        half[i] = F(0.5) * square
        second += w[i] * half[i]
    for i in range(points.shape[0]):
        wi = w[i]
        for k in range(points.shape[1]):
            mean[k] += wi * points[i, k]
    return second


@njit(fastmath=FINITE, nogil=True, cache=True)
def moments(x, y, a, b):
    """See `sinkhorn_problem._moments`; batches (B, n, d), (B, m, d)."""
    half_x, half_y = np.empty(a.shape, F), np.empty(b.shape, F)
    mean_x, mean_y = np.empty((x.shape[0], x.shape[2]), F), np.empty((x.shape[0], x.shape[2]), F)
    cost, offset = np.empty(x.shape[0]), np.empty(x.shape[0])
    for p in range(x.shape[0]):
        second = _cloud_moments(x[p], a[p], half_x[p], mean_x[p]) + _cloud_moments(y[p], b[p], half_y[p], mean_y[p])
        inner, square = 0.0, 0.0
        for k in range(x.shape[2]):
            inner += mean_x[p, k] * mean_y[p, k]
            square += mean_y[p, k] * mean_y[p, k]
        cost[p], offset[p] = second - inner, square
    return half_x, half_y, mean_x, mean_y, cost, offset


@jit
def prepare(x, y, half_x, half_y, mean_x, mean_y, a, b, eps):
    """What a start needs: log b, mean variances, `slowest_rate`, and the largest variance of x."""
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
    top_x, top_y = top_variance(x, 64, 3), top_variance(y, 64, 3)
    slow = eps / (2 * math.sqrt(max(top_x * top_y, 1e-37)))
    rate = 1 / (math.sqrt(1 + slow * slow) + slow) ** 2
    return log_b, max(second_x / d, 1e-37), max(second_y / d, 1e-37), rate, max(top_x, 0.0)


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
def through(points, directions):
    """(n, p) = points (n, d) along the directions (p, d)."""
    out = np.empty((points.shape[0], directions.shape[0]), F)
    for i in range(points.shape[0]):
        row = points[i]
        for q in range(directions.shape[0]):
            along, total = directions[q], F(0.0)
            for k in range(row.shape[0]):
                total += row[k] * along[k]
            out[i, q] = total
    return out


@inner
def row_sums(row, v, s):
    """sum_j K_j v_j and sum_j K_j v_j s_j."""
    total, other = F(0.0), F(0.0)
    for j in range(row.shape[0]):
        w = row[j] * v[j]
        total += w
        other += w * s[j]
    return total, other


@jit
def normalise(kernel, v, s):
    """K_ij <- K_ij v_j / sum_j K_ij v_j, in place; returns the row averages of s under it."""
    mean = np.empty(kernel.shape[0], F)
    for i in range(kernel.shape[0]):
        row = kernel[i]
        total, other = row_sums(row, v, s)
        scale = F(1.0) / total
        for j in range(row.shape[0]):
            row[j] *= v[j] * scale
        mean[i] = other * scale
    return mean


@jit
def row_means(kernel, v, s):
    """The row averages of s under the kernel with columns scaled by v."""
    mean = np.empty(kernel.shape[0], F)
    for i in range(kernel.shape[0]):
        total, other = row_sums(kernel[i], v, s)
        mean[i] = other / total
    return mean


@jit
def finish(x, target, base, own, velocity, centre, a, b, s, log_b, log_row, mean_s, half_x, half_y, eps, f, g):
    """Fill in the velocity and the potentials f, g in their gauge; the velocity's rms, the value, effective neighbours.

    See `sinkhorn_solve.finish`. `target` and, if it is the solved self map (`own`), `base`, which the velocity
    subtracts, leave in the caller's coordinates.
    """
    n, m, d = x.shape[0], s.shape[0], x.shape[1]
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
    return math.sqrt(speed), sum_f + sum_g, neighbours
