"""Array files: what is read, in which layout, and the message for each kind of file that is not data."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from gengrad.data import Array
from gengrad.data.arrays import image_layout

RANDOM = np.random.default_rng(0)


@pytest.fixture
def saved(tmp_path):
    """array -> path of an .npy that holds it."""

    def save(array, name="data.npy"):
        np.save(tmp_path / name, array)
        return str(tmp_path / name)

    return save


def all_points(data: Array) -> np.ndarray:
    both = torch.cat([data.points, data.held_out]).flatten(1).numpy()
    return both[np.lexsort(both.T)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8", ">f8"])
def test_points_of_any_real_type_are_split_without_loss(saved, dtype):
    points = RANDOM.integers(0, 100, size=(40, 3)).astype(dtype)
    data = Array(path=saved(points), held_out=0.25)
    assert len(data) == 30 and len(data.held_out) == 10 and data.event_shape == (3,)
    assert np.array_equal(all_points(data), points[np.lexsort(points.T)].astype("float32"))


def test_the_split_is_a_function_of_its_seed(saved):
    path = saved(RANDOM.normal(size=(40, 3)))
    first, again, other = Array(path=path), Array(path=path), Array(path=path, split_seed=1)
    assert torch.equal(first.held_out, again.held_out) and not torch.equal(first.held_out, other.held_out)


@pytest.mark.parametrize(
    ("shape", "layout", "event"),
    [
        ((5, 6, 8), None, (1, 6, 8)),
        ((5, 6, 8, 3), None, (3, 6, 8)),
        ((5, 6, 8, 1), None, (1, 6, 8)),
        ((5, 3, 6, 8), None, (3, 6, 8)),
        ((5, 1, 6, 8), None, (1, 6, 8)),
        ((5, 3, 8, 3), "nhwc", (3, 3, 8)),
        ((5, 3, 8, 3), "nchw", (3, 8, 3)),
    ],
)
def test_images_come_out_channels_first_between_minus_one_and_one(saved, shape, layout, event):
    pixels = RANDOM.integers(0, 256, size=shape, dtype=np.uint8)
    data = Array(path=saved(pixels), layout=layout, held_out=0.0)
    assert data.event_shape == event and data.is_image
    last = layout == "nhwc" or (layout is None and len(shape) == 4 and shape[-1] in (1, 3))
    expected = np.moveaxis(pixels, -1, 1) if last else pixels.reshape(5, *event)
    assert np.allclose(data.points.numpy(), expected / 127.5 - 1, atol=1e-6)  # float32 rounding


def test_black_and_white_are_the_ends_of_the_range(saved):
    data = Array(path=saved(np.array([[[0, 255]], [[255, 0]]], dtype=np.uint8)), held_out=0.0)
    assert data.points.min() == -1 and data.points.max() == 1


def test_normalising_keeps_directions_and_can_be_undone(saved):
    points = RANDOM.normal(size=(200, 2)) * [3.0, 0.1] + [10.0, -5.0]
    plain, data = Array(path=saved(points)), Array(path=saved(points), normalise=True)
    assert torch.allclose(data.points.mean(0), torch.zeros(2), atol=1e-5)  # float32 rounding
    assert data.points.square().mean().item() == pytest.approx(1, rel=1e-5)
    # one scale for all coordinates: the ratio of their spreads stays
    ratio = plain.points.std(0)[0] / plain.points.std(0)[1]
    assert (data.points.std(0)[0] / data.points.std(0)[1]).item() == pytest.approx(ratio.item(), rel=1e-4)
    assert torch.allclose(data.restore(data.held_out), plain.held_out, atol=1e-5)


def test_constant_points_are_allowed_and_stay_finite_when_normalised(saved):
    data = Array(path=saved(np.full((10, 2), 7.0)), normalise=True)
    assert (data.points == 0).all() and torch.equal(data.restore(data.points), torch.full((9, 2), 7.0))


def test_an_npz_is_read_by_its_only_array_or_by_key(tmp_path):
    points, pixels = RANDOM.normal(size=(10, 2)), np.zeros((10, 4, 4), np.uint8)
    np.savez(tmp_path / "one.npz", points=points)
    np.savez_compressed(tmp_path / "two.npz", points=points, images=pixels)
    assert Array(path=str(tmp_path / "one.npz")).event_shape == (2,)
    assert Array(path=str(tmp_path / "two.npz"), key="images").event_shape == (1, 4, 4)


@pytest.mark.parametrize(
    "text", ["x,y\n1,2\n3,4.5\n-1e3,6\n", "1,2\n3,4.5\n-1e3,6", "\ufeffx,y\r\n1,2\r\n\r\n3,4.5\r\n-1e3, 6\r\n"]
)
def test_a_csv_is_read_with_and_without_header(tmp_path, text):
    (tmp_path / "points.csv").write_text(text, encoding="utf-8", newline="")
    data = Array(path=str(tmp_path / "points.csv"))
    assert np.array_equal(all_points(data), np.array([[1, 2], [3, 4.5], [-1e3, 6]], np.float32))


def written(folder, name: str, content) -> str:
    """The path of a file with an array, several arrays (dict) or plain bytes in it."""
    file = folder / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(file, **content)
    elif content is not None:
        np.save(file, content, allow_pickle=True)
    return str(file)


NAN = np.array([[1.0, 2.0], [np.nan, 3.0], [3.0, np.inf]])
OBJECTS = np.array([{}, [1]], dtype=object)
BAD = {
    "missing": ("a.npy", None, {}, "no array file"),
    "empty file": ("a.npy", b"", {}, "not a readable .npy"),
    "text": ("a.npy", b"hello there", {}, "no array header"),
    "pickle": ("a.npy", pickle.dumps([1, 2]), {}, "no array header"),
    "zip that is none": ("a.npz", b"PK\x03\x04 and then nothing", {}, "not a readable .npz"),
    "objects": ("a.npy", OBJECTS, {}, "never loaded"),
    "objects in npz": ("a.npz", {"a": OBJECTS}, {}, "never loaded"),
    "no key": ("a.npz", {"a": NAN, "b": NAN}, {}, "'a', 'b'; name one as key"),
    "wrong key": ("a.npz", {"a": NAN}, {"key": "x"}, "'a', but no 'x'"),
    "no arrays": ("a.npz", {}, {}, "(none)"),
    "key for npy": ("a.npy", np.zeros((3, 2)), {"key": "x"}, "leave it out"),
    "not finite": ("a.npy", NAN, {}, "2 of 3 points are not finite"),
    "first bad row": ("a.npy", NAN, {}, "the first is row 1: [nan  3.]"),
    "beyond float32": ("a.npy", np.array([[1e300, 0.0], [0.0, 0.0]]), {}, "1 of 2 points"),
    "no points": ("a.npy", np.zeros((0, 2)), {}, "empty: shape (0, 2)"),
    "no coordinates": ("a.npy", np.zeros((5, 0)), {}, "empty"),
    "one point": ("a.npy", np.zeros((1, 2)), {}, "single point"),
    "a line": ("a.npy", np.zeros(5), {}, "x[:, None]"),
    "a number": ("a.npy", np.array(5.0), {}, "neither points"),
    "five axes": ("a.npy", np.zeros((2, 2, 2, 2, 2)), {}, "neither points"),
    "words": ("a.npy", np.array([["a", "b"]] * 3), {}, "real numbers"),
    "complex": ("a.npy", np.zeros((3, 2), complex), {}, "complex128"),
    "float images": ("a.npy", np.zeros((3, 4, 4)), {}, "uint8"),
    "layout open": ("a.npy", np.zeros((5, 3, 8, 3), np.uint8), {}, "set layout"),
    "four channels": ("a.npy", np.zeros((5, 8, 8, 4), np.uint8), {}, "1 (grey) or 3 (RGB)"),
    "wrong layout": ("a.npy", np.zeros((5, 8, 8, 3), np.uint8), {"layout": "nchw"}, "gives 8 channels"),
    "layout of points": ("a.npy", np.zeros((5, 2)), {"layout": "nchw"}, "leave it out"),
    "normalised images": ("a.npy", np.zeros((5, 8, 8), np.uint8), {"normalise": True}, "leave it out"),
    "nothing to train on": ("a.npy", np.zeros((2, 2)), {"held_out": 0.9}, "leave none to train on"),
    "ragged csv": ("a.csv", b"1,2\n3\n", {}, "line 2: 1 columns where 2"),
    "hole in csv": ("a.csv", b"x,y\n1,2\n3,\n", {}, "line 3: not a row of numbers"),
    "binary csv": ("a.csv", b"\xff\xfe1,2\n", {}, "not a table"),
    "header only": ("a.csv", b"x,y\n", {}, "empty"),
    "nan in csv": ("a.csv", b"1,2\nnan,2\n", {}, "row 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_no_data_is_refused_with_its_path_and_the_reason(tmp_path, case):
    name, content, settings, words = BAD[case]
    path = written(tmp_path, name, content)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        Array(path=path, **settings)
    assert words in str(caught.value) and path in str(caught.value)


@pytest.mark.parametrize("settings", [{"path": "a.txt"}, {"path": "a.npy", "held_out": 1.0}, {"layout": "nhwc"}])
def test_settings_are_refused_before_any_file_is_opened(settings):
    with pytest.raises(ValidationError):
        Array(**settings)


def test_a_truncated_file_is_never_read_as_data(saved, tmp_path):
    whole, cut = Path(saved(RANDOM.normal(size=(30, 2)))).read_bytes(), tmp_path / "cut.npy"
    for length in range(0, len(whole), 40):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.npy"):
            Array(path=str(cut))


def test_a_pickle_is_never_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    np.save(tmp_path / "trap.npy", np.array([Trap(), Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="never loaded"):
        Array(path=str(tmp_path / "trap.npy"))
    assert not (tmp_path / "sprung").exists()


def test_the_channel_axis_is_the_one_of_size_one_or_three():
    assert image_layout((9, 32, 32, 3)) == "nhwc" and image_layout((9, 3, 32, 32)) == "nchw"
