"""The iterations of `sinkhorn_core`, fused by numba for one fp32 problem on one CPU thread (extra `fast`).

Same algorithm, same letters, same constants; what changes is the memory traffic. An annealing sweep makes each row of
the kernel in cache, uses it and forgets it; a sweep in the exp domain reads the stored kernel once instead of twice;
in few dimensions the products x.y are never stored. The exponential is a polynomial, so that the compiler vectorises
the row loops. `sinkhorn_numba_self` has the self problem, `sinkhorn_numba_ends` what happens before and after.
"""

from __future__ import annotations

import math

import numpy as np

from .numba_math import F, exp32, exp_any, inner, jit, largest, log32
from .sinkhorn_core import CHECK_EVERY, PATIENCE, PROBATION, REACH, SAFETY, STAGE_RATIO, WINDOW
from .sinkhorn_kernels import MAX_LOG_SCALING
from .sinkhorn_numba_progress import anderson_step, least_left, moment_gap, residual, rms_gap, watched_rate

DRAFT, LEAST_DRAFT = 256, 64  # rows that the last annealing sweep looks at, and that every one does, at least
DIRECT = 4  # up to so many dimensions the products x.y are made on the fly


@inner
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


@inner
def exp_sweep(dot, x, yt, s, inv_eps, a, kernel, c, log_row, every):
    """Column masses c and log_row at s, by exponentials; rows summing to one are stored in `kernel` if it has room.

    Of `every` rows one is looked at, where a draft of c will do.
    """
    n, m = a.shape[0], s.shape[0]
    store = kernel.shape[0] == n
    c[:] = F(0.0)
    for i in range(0, n, every):
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


@inner
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


@inner
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


@jit
def anneal(dot, x, yt, psi, log_b, eps, a, b, stages):
    """One Sinkhorn iteration at each of eps 4^stages, ..., eps 4, from psi; returns s at eps.

    These drafts look at some of the rows only, DRAFT of them; beyond DIRECT dimensions at each stage before the last
    half as many, as eps blurs more there. (In the plane that costs iterations later: whole clusters are settled then.)
    """
    n, m = a.shape[0], b.shape[0]
    row = np.empty((1, m), F)
    c, r, s, log_row = np.empty(m, F), np.empty(m, F), np.empty(m, F), np.empty(n, F)
    for k in range(stages, 0, -1):
        halvings = k - 1 if dot.shape[0] > 0 else 0
        e, every = F(eps * STAGE_RATIO**k), max(1, n // max(DRAFT >> halvings, LEAST_DRAFT))
        seen = F(0.0)
        for i in range(0, n, every):
            seen += a[i]
        share = F(1.0) / largest(seen, F(1e-37))
        for j in range(m):
            s[j] = psi[j] / e + log_b[j]
        exp_sweep(dot, x, yt, s, F(1.0) / e, a, row, c, log_row, every)
        for j in range(m):
            c[j] *= share
        residual(b, c, r)
        for j in range(m):
            psi[j] += e * r[j]
    for j in range(m):
        s[j] = psi[j] / F(eps) + log_b[j]
    return s


@jit
def solve_pair(dot, x, yt, s, inv_eps, a, b, zt, base, tol, floor, max_iter, rate, kernel, log_row):
    """See `sinkhorn_core.solve_pair`; s and log_row are overwritten with the solution, `kernel` with its rows.

    On return `kernel` holds the rows at the absorbed state, and v the scaling of its columns to reach s.
    """
    n, m = a.shape[0], b.shape[0]
    c, r, v, absorbed, top = np.empty(m, F), np.empty(m, F), np.ones(m, F), s.copy(), np.empty(n, F)
    s_old, r_old, s_best, r_best = np.empty(m, F), np.empty(m, F), np.empty(m, F), np.empty(m, F)
    ds, dr = np.empty((WINDOW, m), F), np.empty((WINDOW, m), F)
    shot, shown = np.empty((n, zt.shape[0]), F), np.empty((n, zt.shape[0]), F)
    count, since, sweeps, have_best, have_shown, fresh = -1, 0, 0, False, False, False
    reach, depth, seen_at = REACH, 0, 0
    best, size_shown, error, speed, least_error, least_size, idle = 0.0, 0.0, 1e30, 0.0, 1e30, 1e30, 0
    while True:
        far = F(0.0)
        for j in range(m):
            far = largest(far, F(abs(s[j] - absorbed[j])))
        if not fresh or far > F(MAX_LOG_SCALING):
            absorbed[:] = s
            v[:] = F(1.0)
            exp_sweep(dot, x, yt, s, inv_eps, a, kernel, c, log_row, 1)
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
            have_best, count, reach, depth = False, -1, reach / 8, 0
            continue
        if have_best:
            rate = watched_rate(rate, s, s_best, r, r_best, c)
        depth += 1
        blind = rate > 0.8 and 3 < sweeps < PROBATION - CHECK_EVERY  # no estimate would be trusted yet
        if sweeps <= 3 or (since >= CHECK_EVERY and not blind) or sweeps >= max_iter:
            averages(kernel, v, zt, shot)
            speed = rms_gap(shot, base, a)
            if have_shown:
                q = min(max(size / max(size_shown, 1e-30), least_left(rate, seen_at, depth, sweeps)), 0.9999)
                error = max(SAFETY * rms_gap(shot, shown, a) * q / (1.0 - q), 4 * moment_gap(zt, c, b))
                if error <= max(tol * speed, floor) and marginal <= max(2 * tol, 1e-3):
                    break
                idle = 0 if error < 0.9 * least_error or size < 0.9 * least_size else idle + 1
                least_error, least_size = min(error, least_error), min(size, least_size)
            if sweeps >= max_iter or idle > PATIENCE:
                break
            shown[:] = shot
            size_shown, have_shown, since, seen_at = size, True, 0, depth
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
    return v, sweeps, marginal, error, shot, rate
