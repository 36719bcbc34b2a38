"""Particles: clouds, the ways they take, and films of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .images import image_grid
from .style import (
    INK,
    PALE_INK,
    SAMPLES,
    SOURCE,
    TARGET,
    flow_colours,
    legend_below,
    new_figure,
    write_gif,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

POINTS = 4000  # at most so many dots a cloud: more only turn into a blot


def _bare(axes: Axes, limits: tuple[float, float, float, float]) -> None:
    """A panel for particles: one scale on both axes, no ticks, a thin frame."""
    axes.set(xlim=limits[:2], ylim=limits[2:], xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set(color="#D5D8DC", linewidth=0.8)


def _dots(axes: Axes, x: np.ndarray, colour: str | tuple, size: float, alpha: float, **more) -> None:
    x = x[:POINTS]
    axes.scatter(x[:, 0], x[:, 1], s=size, color=colour, alpha=alpha, linewidths=0, **more)


class Plane:
    """The plane that particles are drawn on: their own for d = 2, else the first two principal axes of ``basis``.

    ``basis`` (n, *event) is the target where there is one. One-dimensional points get a second coordinate of zero.
    """

    def __init__(self, basis: Tensor):
        flat = basis.detach().cpu().double().flatten(1)
        self.mean, self.axes = torch.zeros(flat.shape[1], dtype=torch.float64), None
        if flat.shape[1] > 2:
            self.mean = flat.mean(0)
            self.axes = torch.linalg.svd(flat - self.mean, full_matrices=False).Vh[:2].T

    def __call__(self, x: Tensor) -> np.ndarray:
        """x (n, *event) -> (n, 2)."""
        flat = x.detach().cpu().double().flatten(1)
        if self.axes is not None:
            flat = (flat - self.mean) @ self.axes
        if flat.shape[1] == 1:
            flat = torch.cat([flat, torch.zeros_like(flat)], dim=1)
        return flat.numpy()

    @property
    def caption(self) -> str:
        return "" if self.axes is None else "first two principal axes"


def _limits(*clouds: np.ndarray | None) -> tuple[float, float, float, float]:
    """A square window around the clouds, a few outliers aside."""
    points = np.concatenate([c for c in clouds if c is not None and len(c)])
    points = points[np.isfinite(points).all(axis=1)]
    if not len(points):
        return -1.0, 1.0, -1.0, 1.0
    low, high = np.quantile(points, [0.0003, 0.9997], axis=0)
    centre, half = (low + high) / 2, max(float((high - low).max()) / 2, 1e-6) * 1.05
    return centre[0] - half, centre[0] + half, centre[1] - half, centre[1] + half


def scatter(samples: Tensor, target: Tensor | None = None, source: Tensor | None = None, title: str = "") -> Figure:
    """Samples (n, d) in blue over the target in grey and the source in light orange."""
    plane = Plane(samples if target is None else target)
    figure, (axes,) = new_figure(1, 4.6, 4.8)
    shown = {}
    for name, x, look in (
        ("target", target, (TARGET, 5, 0.55)),
        ("source", source, (SOURCE, 5, 0.45)),
        ("samples", samples, (SAMPLES, 6, 0.65)),
    ):
        if x is not None:
            shown[name] = plane(x)
            _dots(axes, shown[name], *look, label=name)
    _bare(axes, _limits(*shown.values()))
    axes.set_xlabel(plane.caption, fontsize=9, color=PALE_INK)
    if title:
        axes.set_title(title, fontsize=12, color=INK)
    if len(shown) > 1:
        legend_below(figure, axes, len(shown))
    return figure


def trajectory_figure(path: Tensor, target: Tensor | None = None, lines: int = 400, title: str = "") -> Figure:
    """Particles on their way: ``path`` (steps + 1, n, d), source first; the ways of the first ``lines`` of them."""
    from matplotlib.collections import LineCollection

    plane = Plane(path[-1] if target is None else target)
    ways = np.stack([plane(x) for x in path])
    figure, (axes,) = new_figure(1, 4.6, 4.8)
    if target is not None:
        _dots(axes, plane(target), TARGET, 5, 0.45, label="target")
    colours = flow_colours()
    for k in range(steps := len(ways) - 1):
        pieces = ways[k : k + 2, :lines].transpose(1, 0, 2)
        colour = colours((k + 0.5) / steps)
        axes.add_collection(LineCollection(pieces, colors=[colour], linewidths=0.6, alpha=0.45))
    _dots(axes, ways[0], SOURCE, 6, 0.8, label="source", zorder=3)
    _dots(axes, ways[-1], SAMPLES, 6, 0.85, label="samples", zorder=4)
    _bare(axes, _limits(*ways))
    axes.set_xlabel(plane.caption, fontsize=9, color=PALE_INK)
    if title:
        axes.set_title(title, fontsize=12, color=INK)
    legend_below(figure, axes, 3)
    return figure


def snapshots(path: Tensor, times: Sequence[float] = (0, 0.25, 0.5, 0.75, 1), target: Tensor | None = None) -> Figure:
    """A row of panels over flow time: the states of ``path`` (steps + 1, n, *event; equal steps) nearest to ``times``.

    Points turn from the source's orange to the samples' blue; images (c, h, w) are shown as grids.
    """
    steps = len(path) - 1
    chosen = [path[round(float(t) * steps)] for t in times]
    figure, panels = new_figure(len(chosen), 2.3 * len(chosen), 2.65)
    if path.dim() == 5:
        for axes, x in zip(panels, chosen):
            axes.imshow(image_grid(x[:36], columns=6, scale=4).convert("RGB"))
            axes.set_axis_off()
    else:
        plane = Plane(path[-1] if target is None else target)
        clouds = [plane(x) for x in chosen]
        behind = None if target is None else plane(target)
        colours = flow_colours()
        limits = _limits(behind, *clouds)
        for axes, x, t in zip(panels, clouds, times):
            if behind is not None:
                _dots(axes, behind, TARGET, 2.5, 0.3)
            _dots(axes, x, colours(float(t)), 3, 0.7)
            _bare(axes, limits)
    for axes, t in zip(panels, times):
        axes.set_title(f"t = {float(t):g}", fontsize=11, color=INK)
    return figure


def trajectory_gif(
    path: Tensor, file: str | Path, target: Tensor | None = None, seconds: float = 2.5, hold: float = 1.5
) -> Path:
    """Writes an animated GIF of ``path`` (steps + 1, n, *event): particles moving, or a grid of images changing.

    The last frame stays for ``hold`` seconds. Few steps are joined by straight interpolation, which is how Euler's
    method moves the particles; images are shown at the steps only. Returns the file's path.
    """
    steps = len(path) - 1
    if path.dim() == 5:
        frames = [image_grid(x[:64], columns=8, scale=max(1, 320 // (8 * x.shape[-1]))) for x in path]
    else:
        frames = _moving_dots(path, target, per_step=max(1, 40 // max(steps, 1)))
    return write_gif(frames, file, seconds, hold)


def _moving_dots(path: Tensor, target: Tensor | None, per_step: int) -> list[Image]:
    """The frames of particles (steps + 1, n, d), ``per_step`` of them between two steps."""
    from PIL import Image

    plane = Plane(path[-1] if target is None else target)
    ways = np.stack([plane(x[:1500]) for x in path])
    behind = None if target is None else plane(target[:1500])
    limits = _limits(behind, *ways)
    steps, frames, colours = len(ways) - 1, [], flow_colours()
    for position in np.linspace(0, steps, steps * per_step + 1):
        k = min(int(position), max(steps - 1, 0))
        w = position - k
        figure, (axes,) = new_figure(1, 2.4, 2.4)
        if behind is not None:
            _dots(axes, behind, TARGET, 3, 0.35)
        colour = colours(position / max(steps, 1))
        _dots(axes, (1 - w) * ways[k] + w * ways[min(k + 1, steps)], colour, 3.5, 0.75)
        _bare(axes, limits)
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()))
    return frames
