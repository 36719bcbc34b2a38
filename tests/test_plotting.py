"""Pictures: they show what they were given, touch no global state, and write files that open again."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gengrad import plotting
from gengrad.data import generator_for


def normal(*shape):
    return torch.randn(*shape, generator=generator_for(0, "test"))


def drawn(figure) -> np.ndarray:
    """The pixels of a figure; drawing is where matplotlib finds most mistakes."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


POINTS = normal(6, 50, 2) + torch.linspace(0, 5, 6)[:, None, None]
IMAGES = normal(4, 9, 1, 8, 8).clamp(-1, 1)
SUMMARY = {"mean": 0.5, "std": 0.1, "floor": {"mean": 0.4, "std": 0.1}}
X = normal(60).tolist()
PICTURES = {
    "histogram": lambda: plotting.property_histogram(X, [x / 2 for x in X], "a", ([-1, 1], [0, 1]), (None, 0.5)),
    "histogram of one side": lambda: plotting.property_histogram([], [1.0, 2.0, math.nan], "rings"),
    "histogram of one value": lambda: plotting.property_histogram([0.5], [0.5, 0.5], "a"),
    "curves": lambda: plotting.curves([0, 1, 2], {"a": [1, math.nan, 3], "b": [0, 0, 0]}, "x", "y"),
    "gain": lambda: plotting.gain_against_distance(X, X[::-1], "x", "y"),
    "prediction": lambda: plotting.predicted_against_true(X, {"a": X, "b": X[::-1]}, "x", "y"),
    "scatter": lambda: plotting.scatter(POINTS[-1], target=normal(50, 2), source=POINTS[0], title="a"),
    "scatter of samples alone": lambda: plotting.scatter(POINTS[-1]),
    "scatter in 64 dimensions": lambda: plotting.scatter(normal(30, 64), target=normal(40, 64)),
    "scatter of images": lambda: plotting.scatter(normal(30, 1, 8, 8), target=normal(40, 1, 8, 8)),
    "scatter on a line": lambda: plotting.scatter(normal(30, 1)),
    "scatter of one point": lambda: plotting.scatter(normal(1, 2)),
    "scatter of diverged samples": lambda: plotting.scatter(torch.full((5, 2), float("nan"))),
    "trajectory": lambda: plotting.trajectory_figure(POINTS, target=normal(50, 2)),
    "trajectory without a step": lambda: plotting.trajectory_figure(POINTS[:1]),
    "snapshots": lambda: plotting.snapshots(POINTS, target=normal(50, 2)),
    "snapshots of images": lambda: plotting.snapshots(IMAGES, times=(0, 1)),
    "grids over time": lambda: plotting.over_time({f"{k}": plotting.image_grid(IMAGES[0], 3) for k in range(20)}, 3),
    "loss": lambda: plotting.loss_curve([{"step": k, "loss": 1 / (k + 1), "stage": "a"} for k in range(50)]),
    "loss below zero": lambda: plotting.loss_curve([{"step": k, "loss": -k} for k in range(5)]),
    "quality without a floor": lambda: plotting.quality_against_nfe([{"nfe": 1, "a": {"mean": -1.0}}], metric="a"),
    "quality": lambda: plotting.quality_against_nfe([{"nfe": k, "w2": SUMMARY} for k in (1, 5)]),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.filterwarnings("error")
def test_every_picture_draws_ink_without_a_warning(name):
    pixels = drawn(PICTURES[name]())
    assert (pixels[..., :3] < 240).any() and pixels[..., 3].min() == 255


def test_particles_are_drawn_to_one_scale_in_a_square_window():
    axes = plotting.scatter(normal(100, 2) * torch.tensor([5.0, 1.0])).axes[0]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert axes.get_aspect() == 1 and right - left == pytest.approx(high - low)


def test_snapshots_show_the_states_nearest_to_their_times():
    figure = plotting.snapshots(POINTS, times=(0, 0.4, 1))
    shown = [axes.collections[-1].get_offsets().data for axes in figure.axes]
    assert [axes.get_title() for axes in figure.axes] == ["t = 0", "t = 0.4", "t = 1"]
    for points, step in zip(shown, (0, 2, 5)):
        assert np.allclose(points, POINTS[step].numpy())


def test_many_dimensions_are_seen_along_the_targets_widest_axes():
    target = normal(500, 5) * torch.tensor([1.0, 9.0, 1.0, 1.0, 5.0])
    seen = plotting.Plane(target)(target)
    # the two widest standard deviations, within the sampling error 9 / sqrt(1000) of five times over
    assert seen.std(axis=0) == pytest.approx([9, 5], abs=1.4)
    assert plotting.Plane(target).caption and not plotting.Plane(target[:, :2]).caption


def test_an_image_grid_holds_every_pixel_at_its_place():
    images = torch.linspace(-1, 1, 6 * 16).reshape(6, 1, 4, 4)
    grid = np.asarray(plotting.image_grid(images, columns=3, scale=2))
    assert grid.shape == (2 * (2 * 5 + 1), 2 * (3 * 5 + 1))
    for k in range(6):
        top, left = 2 * (1 + 5 * (k // 3)), 2 * (1 + 5 * (k % 3))
        expected = (images[k, 0].numpy() * 127.5 + 128).clip(0, 255).astype(np.uint8)
        assert np.array_equal(grid[top : top + 8 : 2, left : left + 8 : 2], expected)


def test_over_time_each_grid_shows_its_first_row():
    grids = {str(k): plotting.image_grid(IMAGES[k], columns=3, scale=2) for k in range(4)}
    panels = plotting.over_time(grids, columns=3).axes
    assert [axes.get_ylabel() for axes in panels] == ["0", "1", "2", "3"]
    for axes, images in zip(panels, IMAGES):
        shown, row = axes.images[0].get_array(), np.asarray(plotting.image_grid(images[:3], columns=3, scale=2))
        assert np.array_equal(shown[: 2 * 9, :, 0], row[: 2 * 9])
    many = plotting.over_time({str(k): grids["0"] for k in range(40)}, columns=3, most=5).axes
    assert [axes.get_ylabel() for axes in many] == ["0", "10", "20", "29", "39"]


def test_colour_images_keep_their_channels_in_order():
    red = torch.stack([torch.ones(2, 2), -torch.ones(2, 2), -torch.ones(2, 2)])[None]
    assert plotting.image_grid(red, scale=1).getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 8, 8), (0, 1, 8, 8)])
def test_a_grid_of_what_are_no_images_is_refused(shape):
    with pytest.raises(ValueError, match="image_grid draws images"):
        plotting.image_grid(torch.zeros(shape))


@pytest.mark.parametrize(("path", "frames"), [(POINTS, 41), (IMAGES, 4)])
def test_a_gif_moves_through_the_path_and_rests_at_the_end(tmp_path, path, frames):
    file = plotting.trajectory_gif(path, tmp_path / "new" / "flow.gif", hold=1.5)
    with Image.open(file) as gif:
        assert gif.n_frames == frames
        first = np.asarray(gif.convert("RGB")).astype(int)
        gif.seek(frames - 1)
        last, pause = np.asarray(gif.convert("RGB")).astype(int), gif.info["duration"]
    assert pause == 1500 and np.abs(first - last).max() > 100
    assert file.stat().st_size < 500_000


def test_a_path_without_a_step_makes_a_gif_of_one_frame(tmp_path):
    with Image.open(plotting.trajectory_gif(POINTS[:1], tmp_path / "one.gif")) as gif:
        assert gif.n_frames == 1


def test_a_loss_curve_sets_stages_one_after_the_other_and_skips_what_is_not_finite():
    rows = [{"step": k, "stage": stage, "loss": 1.0} for stage in ("a", "b") for k in (10, 20)]
    rows += [{"step": 30, "stage": "b", "loss": float("nan")}, {"step": 30, "stage": "b", "w2": 1.0}]
    lines = [line for line in plotting.loss_curve(rows).axes[0].lines if line.get_label() in ("a", "b")]
    assert [list(line.get_xdata()) for line in lines] == [[10, 20], [30, 40]]


def test_a_curve_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no row"):
        plotting.loss_curve([{"step": 1}])
    with pytest.raises(ValueError, match="'nsgf'"):
        plotting.quality_against_nfe({"nsgf": []})


def test_the_floor_is_a_dashed_line_at_its_mean_and_the_axis_names_every_nfe():
    results = [{"nfe": k, "w2": SUMMARY} for k in (1, 5, 50)]
    axes = plotting.quality_against_nfe({"a": results, "b": results}).axes[0]
    floor = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert list(floor.get_ydata()) == pytest.approx([0.4, 0.4])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "5", "50"]
    assert axes.get_xscale() == "log"


def test_the_running_median_ignores_a_spike():
    values = np.ones(21)
    values[10] = 1e6
    assert (plotting.running_median(values, 5) == 1).all()


def test_matplotlib_is_imported_only_where_it_draws_and_pyplot_nowhere():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in Path(plotting.__file__).parent.glob("*.py")]
    at_import = {node.module for tree in trees for node in tree.body if isinstance(node, ast.ImportFrom)}
    anywhere = {node.module for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in at_import if name.startswith(("matplotlib", "PIL"))}
    assert "matplotlib.figure" in anywhere and not {name for name in anywhere if "pyplot" in name}


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plotting.property_histogram([math.nan], [], "a"),
        lambda: plotting.curves([0], {"a": [math.nan]}, "x", "y"),
        lambda: plotting.gain_against_distance([math.nan], [1.0], "x", "y"),
    ],
)
def test_nothing_finite_is_no_picture_and_says_so(draw):
    with pytest.raises(ValueError, match=r"nothing to draw|no curve to draw"):
        draw()


def test_a_count_has_a_bin_for_each_number_and_a_far_outlier_does_not_flatten_the_rest():
    from gengrad.plotting.populations import bin_edges

    assert bin_edges(np.array([1.0, 3.0, 2.0])).tolist() == [0.5, 1.5, 2.5, 3.5]
    values = np.append(np.linspace(0, 1, 100), 1e6)
    assert bin_edges(values)[-1] < 10


def test_the_same_figure_is_the_same_svg_without_an_address_to_fetch():
    texts = [plotting.svg(plotting.curves([0, 1], {"a": [0, 1]}, "x", "y")) for _ in range(2)]
    assert texts[0] == texts[1] and b"<svg" in texts[0] and b'href="http' not in texts[0]


def test_the_loss_of_a_short_stage_is_no_flat_line():
    rows = [{"stage": "nsgf", "step": 50 * k, "loss": 1 / k} for k in range(1, 13)]
    strong = plotting.loss_curve(rows).axes[0].lines[1].get_ydata()
    assert strong[0] > 2 * strong[-1]
