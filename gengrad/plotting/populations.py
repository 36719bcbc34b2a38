"""Populations of molecules before and after: distributions of properties, how a search went, gain against distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .style import CURVES, INK, MARKERS, PALE_INK, SAMPLES, SOURCE, curve_panel, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.3, 2.7  # inches: two or three side by side on a page, one on a phone
BINS = 24  # at most


def property_histogram(
    before: Sequence[float],
    after: Sequence[float],
    label: str,
    wished: tuple[Sequence[float], Sequence[float]] | None = None,
    bounds: tuple[float | None, float | None] = (None, None),
) -> Figure:
    """Shares of a property before (orange) and after (blue); either may be empty, NaN is left out.

    ``wished``: (x, desirability in [0, 1]), drawn as a thin line over the whole height; ``bounds`` of a filter, dashed.
    Raises ``ValueError`` when neither has a finite value.
    """
    sides = [np.asarray(part, dtype=float) for part in (before, after)]
    sides = [part[np.isfinite(part)] for part in sides]
    both = np.concatenate(sides)
    if not both.size:
        raise ValueError(f"{label}: no finite value before or after, nothing to draw")
    figure, (axes,) = new_figure(1, WIDTH, HEIGHT)
    edges = bin_edges(both)
    for part, colour, name in zip(sides, (SOURCE, SAMPLES), ("before", "after")):
        if part.size:
            share = np.histogram(part, edges)[0] / part.size
            axes.stairs(share, edges, fill=True, color=colour, alpha=0.35)
            axes.stairs(share, edges, color=colour, linewidth=1.6, label=name)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    _whole_ticks(axes, both)
    if wished is not None:
        over = axes.twinx()
        over.plot(*wished, color=INK, linewidth=1.1)
        over.set_ylim(0, 1.04)
        over.axis("off")
    for bound in bounds:
        if bound is not None and edges[0] <= bound <= edges[-1]:
            axes.axvline(bound, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    curve_panel(axes, label, "share")
    return figure


def bin_edges(values: np.ndarray) -> np.ndarray:
    """Edges over the range of the values: one bin for each number of a count of few, else equal ones, 24 of many.

    The outermost 1 % at either side of a long tail (beyond 8 interquartile ranges) share the last bins.
    """
    low, high = values.min(), values.max()
    if np.all(values == np.round(values)) and high - low < 2 * BINS:
        return np.arange(low, high + 2) - 0.5
    q1, q3 = np.quantile(values, [0.25, 0.75])
    reach = 8 * (q3 - q1)
    if reach > 0:
        low, high = max(low, q1 - reach), min(high, q3 + reach)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, min(BINS, max(8, int(1.4 * len(values) ** 0.5))) + 1)


def curves(x: Sequence[float], series: Mapping[str, Sequence[float]], xlabel: str, ylabel: str) -> Figure:
    """Named curves over one axis; a marker at each point where there are few. NaN leaves a gap.

    Raises ``ValueError`` when nothing is finite.
    """
    x = np.asarray(x, dtype=float)
    shown = {name: np.asarray(values, dtype=float) for name, values in series.items()}
    if not any(np.isfinite(values).any() for values in shown.values()):
        raise ValueError(f"{ylabel}: no finite value, there is no curve to draw")
    figure, (axes,) = new_figure(1, WIDTH, HEIGHT)
    for k, (name, values) in enumerate(shown.items()):
        marker = MARKERS[k % len(MARKERS)] if len(x) <= 25 else None
        axes.plot(x, values, color=CURVES[k % len(CURVES)], marker=marker, markersize=4, linewidth=1.8, label=name)
    curve_panel(axes, xlabel, ylabel)
    _whole_ticks(axes, x)
    if len(shown) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def gain_against_distance(distance: Sequence[float], gain: Sequence[float], xlabel: str, ylabel: str) -> Figure:
    """Dots (distance, gain), one for each molecule, and the median of the gain in eight bins of equal counts.

    Raises ``ValueError`` when no pair is finite.
    """
    x, y = _finite(distance, gain)
    figure, (axes,) = new_figure(1, WIDTH, HEIGHT)
    axes.axhline(0, color=PALE_INK, linewidth=0.9)
    size, alpha = (30, 0.8) if len(x) <= 50 else (12, 0.4)
    axes.scatter(x, y, s=size, color=SAMPLES, alpha=alpha, linewidths=0)
    if len(x) >= 24:
        parts = np.array_split(np.argsort(x, kind="stable"), 8)
        middle = [(np.median(x[part]), np.median(y[part])) for part in parts]
        axes.plot(*zip(*middle), color=INK, linewidth=1.8, marker="o", markersize=4, label="median")
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    curve_panel(axes, xlabel, ylabel)
    return figure


def predicted_against_true(
    true: Sequence[float], predicted: Mapping[str, Sequence[float]], xlabel: str, ylabel: str
) -> Figure:
    """Dots (true, predicted), a colour for each predictor, and the diagonal on which both agree.

    Raises ``ValueError`` when no pair is finite.
    """
    figure, (axes,) = new_figure(1, WIDTH, HEIGHT)
    pairs = {name: _finite(true, values) for name, values in predicted.items()}
    both = np.concatenate([np.concatenate(pair) for pair in pairs.values()])
    axes.plot([both.min(), both.max()], [both.min(), both.max()], color=PALE_INK, linewidth=1, linestyle="--")
    for k, (name, (x, y)) in enumerate(pairs.items()):
        size, alpha = (30, 0.9) if len(x) <= 50 else (10, 0.4)
        look = {"color": CURVES[k % len(CURVES)], "marker": MARKERS[k % len(MARKERS)], "linewidths": 0}
        axes.scatter(x, y, s=size, alpha=alpha, label=name, **look)
    curve_panel(axes, xlabel, ylabel)
    if len(pairs) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _whole_ticks(axes: Axes, x: np.ndarray) -> None:
    """Only whole numbers on the axis of counts and steps."""
    from matplotlib.ticker import MaxNLocator

    if np.all(x == np.round(x)):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _finite(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    kept = np.isfinite(x) & np.isfinite(y)
    if not kept.any():
        raise ValueError("no pair of finite numbers: nothing to draw")
    return x[kept], y[kept]
