"""What a run draws into its ``pictures`` folder, while it trains and when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from gengrad import plotting
from gengrad.config import RunConfig
from gengrad.data.base import Distribution
from gengrad.data.draws import generator_for
from gengrad.evaluation import proxy
from gengrad.flows.flow import Flow
from gengrad.training.tracking import Tracker, read_metrics

if TYPE_CHECKING:
    import PIL.Image

COLUMNS = 8  # of a grid of 64 images


def preview(flow: Flow, target: Distribution, config: RunConfig, step: int | None = None) -> Path:
    """A picture of samples, beside the target's for points; returns the file in the run's ``pictures`` folder."""
    folder = _folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("samples.png" if step is None else f"samples_{step:07d}.png")
    nfe = config.evaluate.nfe[0]
    title = f"{config.method['name']}, {nfe} network evaluations"
    samples = flow.sample(COLUMNS**2 if target.is_image else 2000, nfe=nfe, seed=0)
    if target.is_image:
        plotting.save(plotting.image_grid(samples, columns=COLUMNS), file)
    else:
        plotting.save(plotting.scatter(samples, target=_truth(target), title=title), file)
    return file


def glimpse(flow: Flow, target: Distribution, config: RunConfig, step: int, tracker: Tracker) -> None:
    """Pictures in the middle of the training, which a picture that fails must not end."""
    folder = _folder(config)
    try:
        preview(flow, target, config, step)
        if not target.is_image:
            return
        _image_pictures(flow, config)
        plotting.save(plotting.over_time(_so_far(folder, step), COLUMNS), folder / "over_time.png")
        if getattr(target, "held_out_labels", None) is not None:
            rows = proxy.note(Path(config.general.out), flow, target, config.evaluate.nfe[0], step)
            plotting.save(plotting.loss_curve(rows, proxy.NAME, smooth=1), folder / "proxy.png")  # few and exact
    except (OSError, RuntimeError, ValueError) as error:
        tracker.say(f"no picture at step {step:,}: {error}")


def last_pictures(flow: Flow, target: Distribution, config: RunConfig) -> Path:
    """Samples of the finished flow, its loss, and samples on their way; returns the file of the samples."""
    picture, out, folder = preview(flow, target, config), Path(config.general.out), _folder(config)
    rows = read_metrics(out) if (out / "metrics.jsonl").exists() else []  # nothing was learned
    if any("loss" in row for row in rows):
        plotting.save(plotting.loss_curve(rows), folder / "loss.png")
    if target.is_image:
        _image_pictures(flow, config)
        return picture
    truth, path = _truth(target), flow.trajectory(2000, nfe=config.evaluate.nfe[-1], seed=0)
    plotting.save(plotting.snapshots(path, target=truth), folder / "on_the_way.png")
    plotting.save(plotting.trajectory_figure(path[:, :500], target=truth), folder / "paths.png")
    return picture


def _image_pictures(flow: Flow, config: RunConfig) -> None:
    """A few samples on their way, and what each phase of the flow leaves."""
    folder, nfe = _folder(config), config.evaluate.nfe[0]
    path, phases = flow.trajectory(36, nfe=nfe, seed=0), [phase for phase in flow.phases(nfe) if phase[1]]
    plotting.save(plotting.on_the_way(path, phases), folder / "on_the_way.png")
    if len(phases) > 1:
        ends = [sum(count for _, count in phases[: k + 1]) for k in range(len(phases))]
        grids = {f"{name}, {count} steps": path[end] for (name, count), end in zip(phases, ends)}
        plotting.save(plotting.side_by_side(grids), folder / "phases.png")


def _so_far(folder: Path, step: int) -> dict[str, PIL.Image.Image]:
    """The grids that were drawn up to ``step``, by their steps; later ones are of a run that was killed."""
    from PIL import Image

    files = {int(file.stem.removeprefix("samples_")): file for file in folder.glob("samples_*.png")}
    return {f"step {k:,}": Image.open(files[k]) for k in sorted(files) if k <= step}


def _folder(config: RunConfig) -> Path:
    return Path(config.general.out) / "pictures"


def _truth(target: Distribution) -> Tensor | None:
    """Points of the target to draw beside the samples, in the samples' units, where it has any."""
    return None if not target.has_samples else target.restore(target.sample(2000, generator_for(0, "preview")))
