"""The linear assignment problem from a guess of its dual potential, compiled (Jonker and Volgenant 1987)."""

from __future__ import annotations

import numpy as np
from numba import njit

jit = njit(nogil=True, cache=True)
inner = njit(nogil=True, cache=True, forceinline=True)
PASSES = 2  # rounds of augmenting row reduction before the shortest paths


@inner
def two_least(row, v):
    """The two least of row - v and where: (least, second, its column, the second's column)."""
    least, second, j1, j2 = np.inf, np.inf, -1, -1
    for j in range(row.shape[0]):
        h = row[j] - v[j]
        if h < second:
            if h < least:
                second, j2, least, j1 = least, j1, h, j
            else:
                second, j2 = h, j
    return least, second, j1, j2


@inner
def reduce_rows(cost, v, row_of, free, count):
    """Augmenting row reduction: each free row takes its cheapest column, at the price that makes it indifferent.

    The row that had the column becomes free; returns how many rows still are. (Section 3 of the paper.)
    """
    position, kept, budget = 0, 0, 4 * count + 64  # a bound on the rows' taking columns from each other in turn
    while position < count:
        i = free[position]
        position += 1
        least, second, j, other = two_least(cost[i], v)
        displaced = row_of[j]
        if least < second:
            v[j] -= second - least
        elif displaced >= 0:
            j = other
            displaced = row_of[j]
        row_of[j] = i
        if displaced >= 0:
            budget -= 1
            if least < second and budget > 0:
                position -= 1
                free[position] = displaced
            else:
                free[kept] = displaced
                kept += 1
    return kept


@inner
def shortest_path(cost, v, row_of, start, d, came, done):
    """Dijkstra over reduced costs from the free row ``start``; returns the free column reached, duals updated."""
    n = v.shape[0]
    for j in range(n):
        d[j] = cost[start, j] - v[j]
        came[j] = start
        done[j] = False
    while True:
        least, column = np.inf, -1
        for j in range(n):
            if not done[j] and d[j] < least:
                least, column = d[j], j
        if row_of[column] < 0:
            break
        done[column] = True
        i = row_of[column]
        shift = cost[i, column] - v[column] - least
        for j in range(n):
            if not done[j]:
                through = cost[i, j] - v[j] - shift
                if through < d[j]:
                    d[j] = through
                    came[j] = i
    for j in range(n):
        if done[j]:
            v[j] += d[j] - least
    return column


@jit
def assign(cost, v):
    """The column of each row, int64 (n,), that minimises the total of ``cost`` (n, n), float64; v (n,) is spent.

    ``v``: any guess of the dual potential of the columns. It decides how many rows get their cheapest column at once,
    not the result: with u_i = min_j cost_ij - v_j every v is dual feasible, and the pairs stay tight.
    """
    n = v.shape[0]
    row_of, free, count = np.full(n, -1), np.empty(n, np.int64), 0
    for i in range(n):
        _, _, j, _ = two_least(cost[i], v)
        if row_of[j] < 0:
            row_of[j] = i
        else:
            free[count] = i
            count += 1
    for _ in range(PASSES):
        count = reduce_rows(cost, v, row_of, free, count)
    column_of = np.full(n, -1)
    for j in range(n):
        if row_of[j] >= 0:
            column_of[row_of[j]] = j
    d, came, done = np.empty(n), np.empty(n, np.int64), np.empty(n, np.bool_)
    for k in range(count):
        j = shortest_path(cost, v, row_of, free[k], d, came, done)
        while True:
            i = came[j]
            row_of[j] = i
            j, column_of[i] = column_of[i], j
            if i == free[k]:
                break
    return column_of
