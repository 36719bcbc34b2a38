"""Pictures of image flows: the same seeds over the training, at each NFE, phase by phase and on their way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from gengrad.plotting import INK, _figure, image_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def side_by_side(grids: Mapping[str, Tensor], columns: int = 6) -> Figure:
    """Grids of images (n, c, h, w) beside one another, each under its name."""
    side = columns * 0.42 + 0.1
    figure, panels = _figure(len(grids), side * len(grids), side + 0.3)
    for axes, (name, images) in zip(panels, grids.items()):
        axes.imshow(_pixels(images, columns))
        axes.set_title(name, fontsize=10, color=INK)
        axes.set_axis_off()
    return figure


def strips(rows: Mapping[str, Tensor]) -> Figure:
    """A row of images (n, c, h, w) for each name, one under the other: the same seeds in the same columns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = max(len(images) for images in rows.values())
    figure = Figure(figsize=(0.45 * n + 1.3, 0.46 * len(rows)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, images) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items()):
        axes.imshow(_pixels(images, len(images)))
        axes.set_ylabel(name, fontsize=9, color=INK, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def on_the_way(path: Tensor, phases: list[tuple[str, int]], samples: int = 8, most: int = 8) -> Figure:
    """The states of ``path`` (steps + 1, n, c, h, w), one row each, at most ``most`` of them, by phase and step."""
    names = ["source"]
    for name, count in phases or [("step", len(path) - 1)]:
        names += [f"{name} {k + 1}" for k in range(count)]
    chosen = np.unique(np.linspace(0, len(path) - 1, min(most, len(path))).round().astype(int))
    return strips({names[k]: path[k, :samples] for k in chosen})


def _pixels(images: Tensor, columns: int) -> np.ndarray:
    return np.asarray(image_grid(images, columns=columns, scale=4).convert("RGB"))
