"""Curves: the loss over the steps, a score over the network evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .style import CURVES, INK, MARKERS, PALE_INK, curve_panel, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {"w2": "W₂ to the target", "sw2_squared": "SW₂² to the target", "energy_distance": "energy distance"}


def loss_curve(rows: Sequence[Mapping], key: str = "loss", smooth: int = 25, overlay: bool = False) -> Figure:
    """The loss over the steps, from the rows of ``metrics.jsonl``; a colour for each stage, later stages further right.

    ``overlay``: all from the first step on, for comparison.
    Thin: as logged; strong: the running median of ``smooth`` rows, or of an eighth of a stage's where these are fewer:
    over nearly all of a short stage it would be a flat line. Logarithmic where all values are above zero.
    Raises ``ValueError`` where no row has a finite ``key`` and a ``step``.
    """
    stages: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(key) is not None and row.get("step") is not None and np.isfinite(float(row[key])):
            stages.setdefault(str(row.get("stage", "")), []).append((float(row["step"]), float(row[key])))
    if not stages:
        raise ValueError(f"no row has a finite {key!r} and a 'step': there is no curve to draw")
    figure, (axes,) = new_figure(1, 6.4, 3.4)
    offset = 0.0
    for colour, (stage, pairs) in zip(CURVES * len(stages), stages.items()):
        step, value = np.array(pairs).T
        axes.plot(step + offset, value, color=colour, alpha=0.25, linewidth=0.8)
        width = min(smooth, max(1, len(value) // 8))
        axes.plot(step + offset, running_median(value, width), color=colour, linewidth=1.8, label=stage)
        offset += 0 if overlay else step[-1]
    curve_panel(axes, "step", key)
    if all(value > 0 for pairs in stages.values() for _, value in pairs):
        axes.set_yscale("log")
        _plain_log(axes)
    if len(stages) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _plain_log(axes: Axes) -> None:
    """Numbers a reader can read on a logarithmic axis: 0.2, 0.5, 1, 2, ..."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def running_median(values: np.ndarray, width: int) -> np.ndarray:
    """Median of the ``width`` values around each one, fewer at the ends."""
    half = width // 2
    return np.array([np.median(values[max(0, k - half) : k + half + 1]) for k in range(len(values))])


def quality_against_nfe(table: Mapping[str, Sequence[Mapping]] | Sequence[Mapping], metric: str = "w2") -> Figure:
    """A score over the number of network evaluations, its floor dashed.

    ``table``: results of ``evaluate_transport`` for one flow, or name -> results for several curves. Bars are one
    standard deviation over draws. Raises ``ValueError`` for results without ``nfe``.
    """
    curves = table if isinstance(table, Mapping) else {"": table}
    figure, (axes,) = new_figure(1, 5.6, 3.6)
    ticks: set[int] = set()
    floors = []
    for k, (name, results) in enumerate(curves.items()):
        results = sorted((r for r in results if r.get("nfe")), key=lambda r: r["nfe"])
        if not results:
            raise ValueError(f"the curve {name!r} has no result with an nfe")
        nfe, scores = [r["nfe"] for r in results], [r[metric] for r in results]
        look = {"color": CURVES[k % len(CURVES)], "marker": MARKERS[k % len(MARKERS)], "markersize": 5}
        bars = [s.get("std") or 0.0 for s in scores]
        axes.errorbar(nfe, [s["mean"] for s in scores], bars, label=name, linewidth=1.8, capsize=2, **look)
        ticks.update(nfe)
        floors += [s["floor"]["mean"] for s in scores if "floor" in s]
    if floors:
        label = "floor: data against data"
        axes.axhline(float(np.mean(floors)), color=PALE_INK, linestyle="--", linewidth=1.2, label=label)
    axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), [str(t) for t in sorted(ticks)])
    axes.minorticks_off()
    if all(r[metric]["mean"] >= 0 for results in curves.values() for r in results):
        axes.set_ylim(bottom=0)
    curve_panel(axes, "network evaluations per sample", LABELS.get(metric, metric))
    named = [pair for pair in zip(*axes.get_legend_handles_labels()) if pair[1]]
    if named:
        named.sort(key=lambda pair: pair[1].startswith("floor:"))  # curves first
        axes.legend(*zip(*named), frameon=False, fontsize=9, labelcolor=INK)
    return figure
