"""What all figures share: colours, panels, and how they are written."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from gengrad.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from PIL.Image import Image

SOURCE, HALFWAY, SAMPLES, TARGET = "#F0A030", "#BE4B82", "#0B5FA5", "#B4B9C0"
INK, PALE_INK = "#2B2F36", "#5C6670"
CURVES = ("#0B5FA5", "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#2B2F36")
MARKERS = ("o", "s", "^", "D", "v", "P")
DPI = 160


def save(picture: Figure | Image, path: str | Path) -> None:
    """Writes a figure or an image as PNG, atomically."""

    def write(file: IO[bytes]) -> None:
        if hasattr(picture, "savefig"):
            picture.savefig(file, format="png", dpi=DPI)
        else:
            picture.save(file, format="PNG")

    write_atomically(path, write)


def svg(figure: Figure) -> bytes:
    """The figure as SVG: the same bytes for the same figure, letters as outlines, nothing fetched from elsewhere."""
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "gengrad", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return file.getvalue()


def write_gif(frames: Sequence[Image], file: str | Path, seconds: float, hold: float) -> Path:
    """Writes the frames as an endless GIF of ``seconds``, the last one staying for ``hold`` more; returns its path."""
    shown = [frame.convert("RGB").quantize(32, dither=0) for frame in frames]
    pause = max(20, round(1000 * seconds / len(shown)))
    pauses = [4 * pause if len(shown) > 2 else pause] + [pause] * (len(shown) - 2) + [round(1000 * hold)]
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    shown[0].save(file, save_all=True, append_images=shown[1:], duration=pauses[: len(shown)], loop=0, disposal=1)
    return file


def new_figure(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``columns`` panels side by side, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def flow_colours() -> Colormap:
    """Flow time in [0, 1] -> colour."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("flow", [SOURCE, HALFWAY, SAMPLES])


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """One line of names under the panels."""
    legend = figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        handletextpad=0.2,
        columnspacing=1.4,
    )
    for handle in legend.legend_handles:
        if hasattr(handle, "set_sizes"):
            handle.set(sizes=[30], alpha=1)


def curve_panel(axes: Axes, xlabel: str, ylabel: str) -> None:
    """A panel for curves: two axes, a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9AA0A8")
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#E6E8EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, fontsize=10, color=INK)
    axes.set_ylabel(ylabel, fontsize=10, color=INK)
