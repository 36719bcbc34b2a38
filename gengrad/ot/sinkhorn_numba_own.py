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


@jit
def bound_sums(dot, half, root):
    """The sums of `sinkhorn_core.skip_bound` from the products z z' (upper triangle), |z|^2 / 2 and sqrt(a)."""
    n = half.shape[0]
    mass, square, rows = 0.0, 0.0, np.zeros(n, F)
    for i in range(n):
        row, below, other, weights = dot[i, i + 1 :], rows[i + 1 :], half[i + 1 :], root[i + 1 :]
        hi, wi, near_mass, near_row = half[i], root[i], F(0.0), F(0.0)
        for j in range(row.shape[0]):
            gap = largest(hi + other[j] - row[j], F(0.0))
            far = largest(gap, F(0.5))
            near = F(math.sqrt(F(2.0) * far)) * exp32(-far)  # t exp(-t^2 / 2), at its largest below t = 1
            near_mass += weights[j] * exp32(-gap)
            near_row += weights[j] * near
            below[j] += wi * near
        rows[i] += near_row
        mass += 2.0 * wi * near_mass
    for i in range(n):
        square += rows[i] * rows[i]  # (sqrt(a_i) rows_i)^2 / a_i
    return mass, square


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
def solve_self(kernel, u, a, spread, rate, goal, residual_goal, max_iter):
    """u <- u (a / (u K u))^theta in place, at a total mass of one; see `sinkhorn_core.solve_self`.

    Returns K u, the iterations, the error, and the mean diagonal of the plan's normalised rows.
    """
    n = a.shape[0]
    ku, r, before = np.empty(n, F), np.empty(n, F), np.zeros(n, F)
    k, theta = 0, 1.0
    while True:
        k += 1
        symmetric_times(kernel, u, ku)
        total = F(0.0)
        for i in range(n):
            total += u[i] * ku[i]
        one, log_total = F(1.0) / F(math.sqrt(total)), log32(total)
        size, inner, square = F(0.0), F(0.0), F(0.0)
        for i in range(n):
            ratio = log32(largest(a[i], F(1e-37))) - log32(largest(u[i] * ku[i], F(1e-37))) + log_total
            r[i] = ratio if a[i] > F(0.0) else F(0.0)
            size += a[i] * r[i] * r[i]
            inner += a[i] * r[i] * before[i]
            square += a[i] * before[i] * before[i]
            u[i] *= one
            ku[i] *= one
        size = F(math.sqrt(size))
        if k >= max_iter or (size * spread <= goal and size <= residual_goal):
            diagonal = F(0.0)
            for i in range(n):
                diagonal += a[i] * u[i] / ku[i]
            return ku, k, size * spread, diagonal
        if k > 1:
            seen = (1.0 - inner / max(square, 1e-37)) / theta - 1.0
            rate = max(rate, min(seen, 1.0))
        theta = 2.0 / (2.0 + rate)
        for i in range(n):
            before[i] = r[i]
            u[i] *= exp_any(largest(-largest(-F(theta) * r[i], F(-60.0)), F(-60.0)))


@jit
def log_ratio(u, a, eps, h):
    """Fills in h = eps log(u / a); returns <a, h>."""
    inner = 0.0
    for i in range(u.shape[0]):
        h[i] = eps * (log32(largest(u[i], F(1e-37))) - log32(largest(a[i], F(1e-37))))
        inner += a[i] * h[i]
    return inner


@jit
def symmetric_averages(kernel, u, ku, xt, out):
    """out (n, p) = sum_j K_ij u_j x_j / (K u)_i for xt (p, n), in one reading of the upper triangle."""
    n, p = u.shape[0], xt.shape[0]
    w, columns = np.empty((p, n), F), np.zeros((p, n), F)
    for q in range(p):
        for j in range(n):
            w[q, j] = u[j] * xt[q, j]
    for i in range(n):
        row = kernel[i, i + 1 :]
        for q in range(p):
            other, below, wi = w[q, i + 1 :], columns[q, i + 1 :], w[q, i]
            total = kernel[i, i] * wi
            for j in range(row.shape[0]):
                total += row[j] * other[j]
                below[j] += row[j] * wi
            columns[q, i] += total
    for i in range(n):
        for q in range(p):
            out[i, q] = columns[q, i] / ku[i]


@jit
def symmetric_plan(kernel, u, ku, out):
    """out_ij = K_ij u_j / (K u)_i, in full from the upper triangle.

    In tiles, through a small buffer: reading a column of a matrix whose rows are a power of two apart would hit the
    same few lines of the cache again and again.
    """
    n, tile = u.shape[0], 32
    held = np.empty((tile, tile), F)
    for i0 in range(0, n, tile):
        rows = min(i0 + tile, n)
        for j0 in range(i0, n, tile):
            width = min(j0 + tile, n) - j0
            for i in range(i0, rows):
                first, ui, scale = i - i0 if i0 == j0 else 0, u[i], F(1.0) / ku[i]
                row, above, keep, uj = kernel[i, j0:], out[i, j0:], held[i - i0], u[j0:]
                for j in range(first, width):
                    keep[j] = row[j] * ui
                    above[j] = row[j] * uj[j] * scale
            for j in range(width):
                last, below, scale = j if i0 == j0 else rows - i0, out[j0 + j, i0:], F(1.0) / ku[j0 + j]
                for i in range(last):
                    below[i] = held[i, j] * scale


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
def normalise(kernel, v, s):
    """K_ij <- K_ij v_j / sum_j K_ij v_j, in place; returns the row averages of s under it."""
    n, m = kernel.shape
    mean = np.empty(n, F)
    for i in range(n):
        total, other = F(0.0), F(0.0)
        for j in range(m):
            w = kernel[i, j] * v[j]
            kernel[i, j] = w
            total += w
            other += w * s[j]
        scale = F(1.0) / total
        for j in range(m):
            kernel[i, j] *= scale
        mean[i] = other * scale
    return mean


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
