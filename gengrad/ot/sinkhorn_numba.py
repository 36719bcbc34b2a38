"""The iterations of `sinkhorn_core`, fused by numba for one fp32 problem on one CPU thread (extra `fast`).

Same algorithm, same letters, same constants; what changes is the memory traffic. An annealing sweep makes each row of
the kernel in cache, uses it and forgets it; a sweep in the exp domain reads the stored kernel once instead of twice;
the self problem touches one triangle only; in few dimensions the products x.y are never stored. The exponential is a
polynomial, so that the compiler vectorises the row loops: relative error 2e-7.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .sinkhorn_core import (
    CHECK_EVERY,
    LIMIT,
    MAX_LOG_SCALING,
    PATIENCE,
    REACH,
    SAFETY,
    SMALLEST,
    STAGE_RATIO,
    WINDOW,
)

DIRECT = 4  # up to so many dimensions the products x.y are made on the fly
F = np.float32
_jit = njit(fastmath=True, nogil=True, cache=True, error_model="numpy")  # the callers keep inf and NaN out
_LOWEST, _LOG2E = F(SMALLEST), F(1.4426950408889634)


@intrinsic
def _bits_to_float(context, bits):
    """Reinterpret an int32 as a float32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@intrinsic
def _float_to_bits(context, value):
    """Reinterpret a float32 as an int32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


@intrinsic
def largest(context, p, q):
    """The larger of two float32, in the form whose reduction the compiler vectorises (the builtin max is 10 times slower)."""

    def generate(context, builder, signature, args):
        single = ir.FloatType()
        kind = ir.FunctionType(single, [single, single])
        return builder.call(
            builder.module.declare_intrinsic("llvm.maxnum", [single], kind), args, fastmath=["fast"]
        )

    return types.float32(types.float32, types.float32), generate


@_jit
def exp32(x):
    """e^x for x <= 0, not below e^SMALLEST: 2^k times a degree-5 polynomial in the rest."""
    t = largest(x, _LOWEST) * _LOG2E
    k = np.int32(t - F(0.5))  # truncation towards zero: the nearest integer, as t <= 0
    r = t - F(k)
    p = F(1.32765e-3)
    p = p * r + F(9.67554e-3)
    p = p * r + F(5.550713e-2)
    p = p * r + F(2.402212e-1)
    p = p * r + F(6.9314697e-1)
    p = p * r + F(1.0)
    return p * _bits_to_float(np.int32((k + np.int32(127)) << np.int32(23)))


@_jit
def exp_any(x):
    """e^x for |x| <= 60."""
    return exp32(x - F(60.0) if x > F(0.0) else x) * (F(1.1420074e26) if x > F(0.0) else F(1.0))


@_jit
def log32(x):
    """log x of a positive normal float32: exponent, and 2 artanh of the mantissa; absolute error 2e-7 (1 + |log x|)."""
    bits = _float_to_bits(x)
    k = np.int32((bits - np.int32(0x3F3504F3)) >> np.int32(23))  # mantissa in [sqrt(1/2), sqrt(2))
    m = _bits_to_float(np.int32(bits - np.int32(k << np.int32(23))))
    q = (m - F(1.0)) / (m + F(1.0))
    s = q * q
    p = F(0.2222222)
    p = p * s + F(0.2857143)
    p = p * s + F(0.4)
    p = p * s + F(0.6666667)
    p = p * s + F(2.0)
    return q * p + F(k) * F(0.6931472)


@_jit
def fill_row(row, i, dot, x, yt, s, inv_eps):
    """row_j = x_i . y_j / eps + s_j; returns the largest."""
    m = s.shape[0]
    if dot.shape[0] > 0:
        for j in range(m):
            row[j] = dot[i, j] * inv_eps + s[j]
    else:
        f = x[i, 0] * inv_eps
        for j in range(m):
            row[j] = yt[0, j] * f + s[j]
        for k in range(1, x.shape[1]):
            f = x[i, k] * inv_eps
            for j in range(m):
                row[j] += yt[k, j] * f
    top = row[0]
    for j in range(m):
        top = largest(top, row[j])
    return top


@_jit
def exp_sweep(dot, x, yt, s, inv_eps, a, kernel, c, log_row):
    """Column masses c and log_row at s, by exponentials; rows summing to one are stored in `kernel` if it has room."""
    n, m = a.shape[0], s.shape[0]
    store = kernel.shape[0] == n
    c[:] = F(0.0)
    for i in range(n):
        row = kernel[i] if store else kernel[0]
        top = fill_row(row, i, dot, x, yt, s, inv_eps)
        total = F(0.0)
        for j in range(m):
            e = exp32(row[j] - top)
            row[j] = e
            total += e
        log_row[i] = top + F(math.log(total))
        w = a[i] / total
        if store:
            scale = F(1.0) / total
            for j in range(m):
                c[j] += w * row[j]
                row[j] *= scale
        else:
            for j in range(m):
                c[j] += w * row[j]


@_jit
def scaled_sweep(kernel, v, a, base, c, log_row):
    """The same at a scaling v of the stored kernel's columns, in one reading of the kernel."""
    n, m = kernel.shape
    c[:] = F(0.0)
    for i in range(n):
        t = F(0.0)
        for j in range(m):
            t += kernel[i, j] * v[j]
        w = a[i] / t
        for j in range(m):
            c[j] += kernel[i, j] * w
        log_row[i] = t
    for i in range(n):
        log_row[i] = base[i] + log32(log_row[i])
    for j in range(m):
        c[j] *= v[j]


@_jit
def averages(kernel, v, zt, out):
    """out (n, p) = row averages of z, given as zt (p, m), under the stored kernel with columns scaled by v."""
    n, m = kernel.shape
    p = zt.shape[0]
    vz = np.empty((p, m), F)
    for q in range(p):
        for j in range(m):
            vz[q, j] = v[j] * zt[q, j]
    for i in range(n):
        t = F(0.0)
        for j in range(m):
            t += kernel[i, j] * v[j]
        for q in range(p):
            total = F(0.0)
            for j in range(m):
                total += kernel[i, j] * vz[q, j]
            out[i, q] = total / t


@_jit
def residual(b, c, r):
    """r = log(b / c), bounded; returns its rms under b, and the marginal error."""
    size, marginal = F(0.0), F(0.0)
    for j in range(b.shape[0]):
        marginal += abs(c[j] - b[j])
        ratio = log32(largest(b[j], F(1e-37))) - log32(largest(c[j], F(1e-30)))
        ratio = -largest(-largest(ratio, F(-LIMIT)), F(-LIMIT))
        r[j] = ratio if b[j] > F(0.0) else F(0.0)
        size += b[j] * r[j] * r[j]
    return math.sqrt(size), marginal


@_jit
def solve_small(gram, rhs, k):
    """Solve the symmetric positive definite k x k system in place by Cholesky; gram and rhs are destroyed."""
    for i in range(k):
        for j in range(i + 1):
            total = gram[i, j]
            for l in range(j):
                total -= gram[i, l] * gram[j, l]
            gram[i, j] = math.sqrt(max(total, 1e-300)) if i == j else total / gram[j, j]
    for i in range(k):
        for l in range(i):
            rhs[i] -= gram[i, l] * rhs[l]
        rhs[i] /= gram[i, i]
    for i in range(k - 1, -1, -1):
        for l in range(i + 1, k):
            rhs[i] -= gram[l, i] * rhs[l]
        rhs[i] /= gram[i, i]


@_jit
def anderson_step(s, r, c, ds, dr, count, reach):
    """s <- s + r - (dS + dR) gamma, gamma minimising |sqrt(c) (r - dR gamma)| (see `sinkhorn_core.Anderson`)."""
    m = s.shape[0]
    k = min(count, ds.shape[0])
    gram, rhs, w = np.zeros((k, k)), np.zeros(k), np.empty(m, F)
    trace = 0.0
    for p in range(k):
        for j in range(m):
            w[j] = c[j] * dr[p, j]
        for q in range(p, k):
            total = F(0.0)
            for j in range(m):
                total += w[j] * dr[q, j]
            gram[p, q] = gram[q, p] = total
        total = F(0.0)
        for j in range(m):
            total += w[j] * r[j]
        rhs[p] = total
        trace += gram[p, p]
    for p in range(k):
        gram[p, p] += 1e-6 * max(trace, 1e-30)
    solve_small(gram, rhs, k)
    w[:] = F(0.0)
    for p in range(k):
        g = F(rhs[p])
        for j in range(m):
            w[j] += g * (ds[p, j] + dr[p, j])
    longest = F(1e-37)
    for j in range(m):
        longest = largest(longest, F(abs(w[j])))
    scale = F(min(reach / longest, 1.0))
    for j in range(m):
        s[j] += r[j] - scale * w[j]


@_jit
def rms_gap(u, v, a):
    """Root of the weighted mean square of the rows of u - v."""
    total = 0.0
    for i in range(u.shape[0]):
        square = F(0.0)
        for q in range(u.shape[1]):
            square += (u[i, q] - v[i, q]) ** 2
        total += a[i] * square
    return math.sqrt(total)


@_jit
def moment_gap(zt, c, b):
    """|sum_j (c_j - b_j) z_j|: the mean error of the barycentric map, through the probes."""
    square = 0.0
    for q in range(zt.shape[0]):
        total = F(0.0)
        for j in range(b.shape[0]):
            total += (c[j] - b[j]) * zt[q, j]
        square += total * total
    return math.sqrt(square)


@_jit
def anneal(dot, x, yt, psi, log_b, eps, a, b, stages):
    """One Sinkhorn iteration at each of eps 4^stages, ..., eps 4, from psi; returns s at eps."""
    m = b.shape[0]
    row = np.empty((1, m), F)
    c, r, s, log_row = np.empty(m, F), np.empty(m, F), np.empty(m, F), np.empty(a.shape[0], F)
    for k in range(stages, 0, -1):
        e = F(eps * STAGE_RATIO**k)
        for j in range(m):
            s[j] = psi[j] / e + log_b[j]
        exp_sweep(dot, x, yt, s, F(1.0) / e, a, row, c, log_row)
        residual(b, c, r)
        for j in range(m):
            psi[j] += e * r[j]
    for j in range(m):
        s[j] = psi[j] / F(eps) + log_b[j]
    return s


@_jit
def solve_pair(dot, x, yt, s, inv_eps, a, b, zt, base, tol, floor, max_iter, plain, fast, kernel, log_row):
    """See `sinkhorn_core.solve_pair`; s and log_row are overwritten with the solution, `kernel` with its rows.

    On return `kernel` holds the rows at the absorbed state, and v the scaling of its columns to reach s.
    """
    n, m = a.shape[0], b.shape[0]
    c, r, v, absorbed, top = np.empty(m, F), np.empty(m, F), np.ones(m, F), s.copy(), np.empty(n, F)
    s_old, r_old, s_best, r_best = np.empty(m, F), np.empty(m, F), np.empty(m, F), np.empty(m, F)
    ds, dr = np.empty((WINDOW, m), F), np.empty((WINDOW, m), F)
    shot, shown = np.empty((n, zt.shape[0]), F), np.empty((n, zt.shape[0]), F)
    count, since, sweeps, have_best, have_shown, fresh = -1, 0, 0, False, False, False
    reach = REACH
    best, size_shown, error, speed, least_error, least_size, idle = 0.0, 0.0, 1e30, 0.0, 1e30, 1e30, 0
    while True:
        far = F(0.0)
        for j in range(m):
            far = largest(far, F(abs(s[j] - absorbed[j])))
        if not fresh or far > F(MAX_LOG_SCALING):
            absorbed[:] = s
            v[:] = F(1.0)
            exp_sweep(dot, x, yt, s, inv_eps, a, kernel, c, log_row)
            top[:] = log_row
            fresh = True
        else:
            for j in range(m):
                v[j] = exp_any(s[j] - absorbed[j])
            scaled_sweep(kernel, v, a, top, c, log_row)
        sweeps += 1
        size, marginal = residual(b, c, r)
        value = 0.0
        for j in range(m):
            value += b[j] * s[j]
        for i in range(n):
            value -= a[i] * log_row[i]
        if have_best:
            reach = min(2 * reach, REACH)
        if have_best and value < best - 1e-5 * (1.0 + abs(best)):
            for j in range(m):
                s[j] = s_best[j] + r_best[j]
            have_best, count, reach = False, -1, reach / 8
            continue
        if sweeps <= 3 or since >= CHECK_EVERY or sweeps >= max_iter:
            averages(kernel, v, zt, shot)
            speed = rms_gap(shot, base, a)
            if have_shown:
                least = max(plain, 0.25) if since < 2 else max(fast**since, 0.5)
                q = min(max(size / max(size_shown, 1e-30), least), 0.999)
                error = max(SAFETY * rms_gap(shot, shown, a) * q / (1.0 - q), 4 * moment_gap(zt, c, b))
                if error <= max(tol * speed, floor) and marginal <= max(2 * tol, 1e-3):
                    break
                idle = 0 if error < 0.9 * least_error or size < 0.9 * least_size else idle + 1
                least_error, least_size = min(error, least_error), min(size, least_size)
            if sweeps >= max_iter or idle > PATIENCE:
                break
            shown[:] = shot
            size_shown, have_shown, since = size, True, 0
        since += 1
        best, have_best = value, True
        s_best[:] = s
        r_best[:] = r
        if count >= 0:
            slot = count % WINDOW
            for j in range(m):
                ds[slot, j] = s[j] - s_old[j]
                dr[slot, j] = r[j] - r_old[j]
        count += 1
        s_old[:] = s
        r_old[:] = r
        anderson_step(s, r, c, ds, dr, count, reach)
    return v, sweeps, marginal, error, shot


@_jit
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


@_jit
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


@_jit
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


@_jit
def log_ratio(u, a, eps):
    """h = eps log(u / a), and <a, h>."""
    h, inner = np.empty(u.shape[0], F), 0.0
    for i in range(u.shape[0]):
        h[i] = eps * (log32(largest(u[i], F(1e-37))) - log32(largest(a[i], F(1e-37))))
        inner += a[i] * h[i]
    return h, inner


@_jit
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


@_jit
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


@_jit
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


@_jit
def prepare(x, y, half_x, half_y, mean_x, mean_y, a, b, eps):
    """What a start needs: log b, mean variances, and `accelerated_rate`."""
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
    plain = 1 / (math.sqrt(1 + slow * slow) + slow) ** 2
    root = math.sqrt(1 - plain)
    return log_b, max(second_x / d, 1e-37), max(second_y / d, 1e-37), plain, (1 - root) / (1 + root)


@_jit
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


@_jit
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


@_jit
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


@_jit
def finish(x, target, base, own, centre, a, b, s, log_b, log_row, mean_s, half_x, half_y, eps):
    """Velocity, its rms, the potentials in their gauge, the value and the effective neighbours.

    See `sinkhorn_solve.finish`. `target` and, if it is the solved self map (`own`), `base`, which the velocity
    subtracts, leave in the caller's coordinates.
    """
    n, m, d = x.shape[0], s.shape[0], x.shape[1]
    velocity, f, g = np.empty((n, d), F), np.empty(n, F), np.empty(m, F)
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
    return velocity, f, g, math.sqrt(speed), sum_f + sum_g, neighbours
