"""Images: grids, the same seeds over the training, at each NFE, phase by phase and on their way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .style import INK, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


def image_grid(images: Tensor, columns: int | None = None, scale: int | None = None, gap: int = 1) -> Image:
    """Images (n, 1 or 3, h, w) in [-1, 1] as one picture; ``columns`` near the square root of n by default.

    Every pixel becomes a square of side ``scale`` (default: such that the picture is about 512 wide, never smoothed).
    Raises ``ValueError`` for another shape.
    """
    from PIL import Image

    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"image_grid draws images (n, 1 or 3, h, w); got shape {tuple(images.shape)}")
    n, c, h, w = images.shape
    columns = columns or max(1, round(n**0.5))
    rows = -(-n // columns)
    scale = scale or max(1, 512 // (columns * (w + gap)))
    pixels = (images.detach().cpu().float() * 127.5 + 128).nan_to_num(128).clamp(0, 255).byte()
    canvas = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 255, dtype=torch.uint8)
    for k, image in enumerate(pixels):
        top, left = gap + (k // columns) * (h + gap), gap + (k % columns) * (w + gap)
        canvas[:, top : top + h, left : left + w] = image
    array = canvas[0].numpy() if c == 1 else canvas.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def side_by_side(grids: Mapping[str, Tensor], columns: int = 6) -> Figure:
    """Grids of images (n, c, h, w) beside one another, each under its name."""
    side = columns * 0.42 + 0.1
    figure, panels = new_figure(len(grids), side * len(grids), side + 0.3)
    for axes, (name, images) in zip(panels, grids.items()):
        axes.imshow(_pixels(images, columns))
        axes.set_title(name, fontsize=10, color=INK)
        axes.set_axis_off()
    return figure


def strips(rows: Mapping[str, Tensor]) -> Figure:
    """A row of images (n, c, h, w) for each name, one under the other: the same seeds in the same columns."""
    n = max(len(images) for images in rows.values())
    return _stacked({name: _pixels(images, len(images)) for name, images in rows.items()}, n)


def over_time(grids: Mapping[str, Image], columns: int, most: int = 12) -> Figure:
    """The first row of each of at most ``most`` square grids of the same seeds (``image_grid``), by their names."""
    names = list(grids)
    chosen = np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int))
    rows = {names[k]: np.asarray(_first_row(grids[names[k]], columns).convert("RGB")) for k in chosen}
    return _stacked(rows, columns)


def _first_row(grid: Image, rows: int) -> Image:
    return grid.crop((0, 0, grid.width, grid.height // rows))


def _stacked(rows: Mapping[str, np.ndarray], n: int) -> Figure:
    """Pictures of ``n`` images in a row under one another, each with its name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.45 * n + 1.3, 0.46 * len(rows)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, pixels) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items()):
        axes.imshow(pixels)
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
