"""Pictures of densities on their way, beside the truth, and of energies along a flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .style import (
    INK,
    PALE_INK,
    SAMPLES,
    SOURCE,
    TARGET,
    curve_panel,
    flow_colours,
    legend_below,
    new_figure,
    write_gif,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

State = tuple[Tensor, Tensor]  # points (n, d) and log rho (n,) at them
Law = Callable[[int], object] | None  # step -> what has log_density(x) and sample(n, generator), or None


def energy_figure(rows: Sequence[dict]) -> Figure:
    """The energy over flow time, beside that of the exact implicit steps and of the continuous flow where known."""
    shown = (("residual", "relative optimality residual"), ("share", "distance to exact steps / way"))
    beside = next(((key, label) for key, label in shown if any(row.get(key) for row in rows)), None)
    figure, panels = new_figure(2 if beside else 1, 9.0 if beside else 4.5, 3.4)
    left = panels[0]
    for key, label, look in (
        ("energy_exact", "continuous flow", {"color": TARGET, "linewidth": 5}),
        ("energy_implicit", "exact implicit steps", {"color": SOURCE, "linestyle": "--", "linewidth": 2}),
        ("energy", "learned", {"color": SAMPLES, "marker": "o", "markersize": 3.5, "linewidth": 1}),
    ):
        if all(key in row for row in rows):
            left.plot(*_with_jumps(rows, key), label=label, **look)
    if all("energy_at_rest" in row for row in rows):
        left.axhline(rows[-1]["energy_at_rest"], color=TARGET, linewidth=3, label="at rest", zorder=0)
    curve_panel(left, "flow time", "energy")
    left.legend(frameon=False, fontsize=9, labelcolor=INK)
    if beside:
        known = [row for row in rows if row.get(beside[0])]
        panels[1].plot([r["time"] for r in known], [r[beside[0]] for r in known], color=SAMPLES, marker="o", ms=3.5)
        if beside[0] == "share":
            panels[1].set_ylim(0, 1.05 * np.nanmax([row["share"] for row in known]))
        else:
            panels[1].set_yscale("log")
            low, high = panels[1].get_ylim()
            if high < 10 * low:  # a spread of a few per cent is no shape to look at
                middle = (low * high) ** 0.5
                panels[1].set_ylim(middle / 10, middle * 10)
        curve_panel(panels[1], "flow time", beside[1])
    return figure


def _with_jumps(rows: Sequence[dict], key: str) -> tuple[list[float], list[float]]:
    """Times and energies from the start on. Where an observation came in between two steps the line is broken; the
    learned one goes on from the energy right after it."""
    times, values, last = [0.0], [rows[0]["energy_before"]], rows[0]["energy_before"]
    spread = max(row["energy"] for row in rows) - min(row["energy"] for row in rows)
    for k, row in enumerate(rows):
        if abs(row["energy_before"] - last) > 1e-3 * spread and k:
            times += [math.nan, rows[k - 1]["time"]]
            values += [math.nan, row["energy_before"] if key == "energy" else math.nan]
        times.append(row["time"])
        values.append(row[key])
        last = row["energy"]
    return times, values


def density_figure(states: Sequence[State], law: Law, times: Sequence[float], chosen: Sequence[int]) -> Figure:
    """The density at the ``chosen`` steps beside the true one: curves on the line, colours and contours in the plane.

    From d = 3 on it is a histogram of the first principal coordinate, beside draws of the law.
    """
    figure, panels = new_figure(len(chosen), 2.9 * len(chosen), 3.3)
    limits, top = _window([states[k][0] for k in chosen]), _top(states, chosen)
    for axes, k in zip(panels, chosen):
        truth = law(k) if law is not None else None
        _panel(axes, states[k], truth, limits, top, k / max(len(states) - 1, 1))
        axes.set_title(f"t = {times[k]:.3g}", fontsize=11, color=INK)
    if states[0][0].shape[1] != 2 or law is not None:
        legend_below(figure, panels[-1], 2)
    return figure


def density_gif(states: Sequence[State], law: Law, times: Sequence[float], file: str | Path) -> Path:
    """An animated GIF of the density, one frame a step."""
    from PIL import Image

    limits, top = _window([x for x, _ in states]), _top(states, range(len(states)))
    frames = []
    for k, state in enumerate(states):
        figure, (axes,) = new_figure(1, 2.6, 2.7)
        _panel(axes, state, law(k) if law is not None else None, limits, top, k / max(len(states) - 1, 1))
        axes.set_title(f"t = {times[k]:.3g}", fontsize=9, color=INK)
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()))
    return write_gif(frames, file, seconds=3.0, hold=1.5)


def _window(clouds: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner (d,) of a box around the clouds, a few outliers aside."""
    points = torch.cat([x[:2000] for x in clouds]).double()
    low, high = (np.quantile(points.numpy(), q, axis=0) for q in (0.001, 0.999))
    margin = 0.08 * (high - low) + 1e-6
    return low - margin, high + margin


def _top(states: Sequence[State], chosen: Sequence[int]) -> float | None:
    """The largest density shown on the line, so that all panels share one scale; None elsewhere."""
    if states[0][0].shape[1] != 1:
        return None
    peaks = [float(states[k][1].exp().quantile(0.99)) for k in chosen]
    # not the largest where it stands out: a start that is nearly a point would flatten all the rest
    return 1.15 * min(max(peaks), 2 * float(np.quantile(peaks, 0.8)))


def _panel(axes: Axes, state: State, truth: Any, limits: Sequence, top: float | None, share: float) -> None:
    x, log_rho = state
    colour = flow_colours()(share)
    if x.shape[1] == 1:
        order = x[:, 0].argsort()
        if truth is not None:
            grid = torch.linspace(float(limits[0][0]), float(limits[1][0]), 600, dtype=torch.float64)
            axes.fill_between(grid, truth.log_density(grid[:, None]).exp(), color=TARGET, lw=0, label="truth")
        axes.plot(x[order, 0], log_rho[order].exp(), color=colour, linewidth=1.8, label="learned")
        axes.set(xlim=(limits[0][0], limits[1][0]), ylim=(0, top))
        curve_panel(axes, "", "")
    elif x.shape[1] == 2:
        _plane(axes, x, log_rho, truth, limits)
    else:
        _marginal(axes, x, truth, colour)


def _plane(axes: Axes, x: Tensor, log_rho: Tensor, truth: Any, limits: Sequence) -> None:
    """Density as colour on the triangles of the particles; contours of the truth over it."""
    density = log_rho.exp().numpy()
    axes.tripcolor(x[:, 0].numpy(), x[:, 1].numpy(), density, shading="gouraud", cmap="Blues", vmin=0,
                   vmax=float(np.quantile(density, 0.995)))  # fmt: skip
    if truth is not None:
        look = {"colors": [PALE_INK], "linewidths": 0.8}
        axes.plot([], [], color=PALE_INK, linewidth=0.8, label="truth, or target")
        lines = [np.linspace(limits[0][i], limits[1][i], 120) for i in range(2)]
        grid = torch.from_numpy(np.stack(np.meshgrid(*lines), axis=-1).reshape(-1, 2))
        if hasattr(truth, "log_density"):
            values = truth.log_density(grid).exp().reshape(120, 120).numpy()
            levels = values.max() * np.array([0.05, 0.25, 0.5, 0.75])
        else:  # mass at rest on a ring
            values = (grid - x.mean(0)).norm(dim=1).reshape(120, 120).numpy()
            levels = [truth.radius]
        if values.max() > 0:
            axes.contour(lines[0], lines[1], values, levels=levels, **look)
    axes.set(xlim=(limits[0][0], limits[1][0]), ylim=(limits[0][1], limits[1][1]), xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set(color="#D5D8DC", linewidth=0.8)


def _marginal(axes: Axes, x: Tensor, truth: Any, colour: tuple) -> None:
    centred = x - x.mean(0)
    axis = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -1]
    if truth is not None:
        y = truth.sample(20_000, torch.Generator().manual_seed(0)).double()
        axes.hist((y @ axis).numpy(), bins=60, density=True, color=TARGET, label="truth")
    axes.hist((x @ axis).numpy(), bins=60, density=True, histtype="step", color=colour, linewidth=1.6, label="learned")
    curve_panel(axes, "first principal coordinate", "")
    axes.set_yticks([])
