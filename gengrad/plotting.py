"""Pictures of flows and scores. Every function returns its figure or writes its file; nothing is shown.

Orange is where mass starts, blue what the flow made of it, magenta what is on its way, grey the target: colours that
colour-blind readers tell apart; curves differ by marker too. Figures are drawn without pyplot, so that no global state
is touched and no screen needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gengrad.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

SOURCE, HALFWAY, SAMPLES, TARGET = "#F0A030", "#BE4B82", "#0B5FA5", "#B4B9C0"
INK, PALE_INK = "#2B2F36", "#5C6670"
CURVES = ("#0B5FA5", "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#2B2F36")
MARKERS = ("o", "s", "^", "D", "v", "P")
DPI = 160
LABELS = {"w2": "W₂ to the target", "sw2_squared": "SW₂² to the target", "energy_distance": "energy distance"}
POINTS = 4000  # at most so many dots a cloud: more only turn into a blot


def save(picture: Figure | Image, path: str | Path) -> None:
    """Writes a figure or an image as PNG, atomically."""

    def write(file) -> None:
        if hasattr(picture, "savefig"):
            picture.savefig(file, format="png", dpi=DPI)
        else:
            picture.save(file, format="PNG")

    write_atomically(path, write)


# ------------------------------------------------------------------ panels


def _figure(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``columns`` panels side by side, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _bare(axes: Axes, limits: tuple[float, float, float, float]) -> None:
    """A panel for particles: one scale on both axes, no ticks, a thin frame."""
    axes.set(xlim=limits[:2], ylim=limits[2:], xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set(color="#D5D8DC", linewidth=0.8)


def _flow_colours():
    """Flow time in [0, 1] -> colour."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("flow", [SOURCE, HALFWAY, SAMPLES])


def _dots(axes: Axes, x: np.ndarray, colour, size: float, alpha: float, **more) -> None:
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


# ------------------------------------------------------------------ particles


def scatter(
    samples: Tensor, target: Tensor | None = None, source: Tensor | None = None, title: str = ""
) -> Figure:
    """Samples (n, d) in blue over the target in grey and the source in light orange."""
    plane = Plane(samples if target is None else target)
    figure, (axes,) = _figure(1, 4.6, 4.8)
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
        _legend(figure, axes, len(shown))
    return figure


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
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


def trajectory_figure(path: Tensor, target: Tensor | None = None, lines: int = 400, title: str = "") -> Figure:
    """Particles on their way: ``path`` (steps + 1, n, d), source first; the ways of the first ``lines`` of them."""
    from matplotlib.collections import LineCollection

    plane = Plane(path[-1] if target is None else target)
    ways = np.stack([plane(x) for x in path])
    figure, (axes,) = _figure(1, 4.6, 4.8)
    if target is not None:
        _dots(axes, plane(target), TARGET, 5, 0.45, label="target")
    colours = _flow_colours()
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
    _legend(figure, axes, 3)
    return figure


def snapshots(path: Tensor, times: Sequence[float] = (0, 0.25, 0.5, 0.75, 1), target: Tensor | None = None) -> Figure:
    """A row of panels over flow time: the states of ``path`` (steps + 1, n, *event; equal steps) nearest to ``times``.

    Points turn from the source's orange to the samples' blue; images (c, h, w) are shown as grids.
    """
    steps = len(path) - 1
    chosen = [path[round(float(t) * steps)] for t in times]
    figure, panels = _figure(len(chosen), 2.3 * len(chosen), 2.65)
    if path.dim() == 5:
        for axes, x in zip(panels, chosen):
            axes.imshow(image_grid(x[:36], columns=6, scale=4).convert("RGB"))
            axes.set_axis_off()
    else:
        plane = Plane(path[-1] if target is None else target)
        clouds = [plane(x) for x in chosen]
        behind = None if target is None else plane(target)
        colours = _flow_colours()
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


def write_gif(frames: Sequence[Image], file: str | Path, seconds: float, hold: float) -> Path:
    """Writes the frames as an endless GIF of ``seconds``, the last one staying for ``hold`` more; returns its path."""
    shown = [frame.convert("RGB").quantize(32, dither=0) for frame in frames]
    pause = max(20, round(1000 * seconds / len(shown)))
    pauses = [4 * pause if len(shown) > 2 else pause] + [pause] * (len(shown) - 2) + [round(1000 * hold)]
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    shown[0].save(file, save_all=True, append_images=shown[1:], duration=pauses[: len(shown)], loop=0, disposal=1)
    return file


def _moving_dots(path: Tensor, target: Tensor | None, per_step: int) -> list[Image]:
    """The frames of particles (steps + 1, n, d), ``per_step`` of them between two steps."""
    from PIL import Image

    plane = Plane(path[-1] if target is None else target)
    ways = np.stack([plane(x[:1500]) for x in path])
    behind = None if target is None else plane(target[:1500])
    limits = _limits(behind, *ways)
    steps, frames, colours = len(ways) - 1, [], _flow_colours()
    for position in np.linspace(0, steps, steps * per_step + 1):
        k = min(int(position), max(steps - 1, 0))
        w = position - k
        figure, (axes,) = _figure(1, 2.4, 2.4)
        if behind is not None:
            _dots(axes, behind, TARGET, 3, 0.35)
        colour = colours(position / max(steps, 1))
        _dots(axes, (1 - w) * ways[k] + w * ways[min(k + 1, steps)], colour, 3.5, 0.75)
        _bare(axes, limits)
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()))
    return frames


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


# ------------------------------------------------------------------ curves


def _open(axes: Axes, xlabel: str, ylabel: str) -> None:
    """A panel for curves: two axes, a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9AA0A8")
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#E6E8EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, fontsize=10, color=INK)
    axes.set_ylabel(ylabel, fontsize=10, color=INK)


def loss_curve(rows: Sequence[Mapping], key: str = "loss", smooth: int = 25, overlay: bool = False) -> Figure:
    """The loss over the steps, from the rows of ``metrics.jsonl``; a colour for each stage, later stages further right.

    ``overlay``: all from the first step on, for comparison.
    Thin: as logged; strong: the running median of ``smooth`` rows. Logarithmic where all values are above zero.
    Raises ``ValueError`` where no row has a finite ``key`` and a ``step``.
    """
    stages: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(key) is not None and row.get("step") is not None and np.isfinite(float(row[key])):
            stages.setdefault(str(row.get("stage", "")), []).append((float(row["step"]), float(row[key])))
    if not stages:
        raise ValueError(f"no row has a finite {key!r} and a 'step': there is no curve to draw")
    figure, (axes,) = _figure(1, 6.4, 3.4)
    offset = 0.0
    for colour, (stage, pairs) in zip(CURVES * len(stages), stages.items()):
        step, value = np.array(pairs).T
        axes.plot(step + offset, value, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(step + offset, running_median(value, smooth), color=colour, linewidth=1.8, label=stage)
        offset += 0 if overlay else step[-1]
    _open(axes, "step", key)
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
    figure, (axes,) = _figure(1, 5.6, 3.6)
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
    _open(axes, "network evaluations per sample", LABELS.get(metric, metric))
    named = [pair for pair in zip(*axes.get_legend_handles_labels()) if pair[1]]
    if named:
        named.sort(key=lambda pair: pair[1].startswith("floor:"))  # curves first
        axes.legend(*zip(*named), frameon=False, fontsize=9, labelcolor=INK)
    return figure
