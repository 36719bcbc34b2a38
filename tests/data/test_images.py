"""Image data of torchvision and of arrays: bytes in, floats in [-1, 1] out, classes, mirror images, what is missing."""

import numpy as np
import pytest
import torch

from gengrad.cli import main
from gengrad.data import MNIST, FashionMNIST, ImageArray, Stream
from gengrad.data.images import as_bytes, as_floats

RANDOM = np.random.default_rng(0)


def write_idx(file, array):
    """An array of bytes in the idx format of MNIST."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    file.write_bytes(head + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory):
    """A folder that looks like MNIST and like Fashion-MNIST, with 120 + 40 images."""
    root = tmp_path_factory.mktemp("mnist")
    for name in ("MNIST", "FashionMNIST"):
        folder = root / name / "raw"
        folder.mkdir(parents=True)
        for part, n in (("train", 120), ("t10k", 40)):
            write_idx(folder / f"{part}-images-idx3-ubyte", RANDOM.integers(0, 256, (n, 28, 28)))
            write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    return root


@pytest.fixture
def arrays(tmp_path):
    """An .npz with 60 colour images and their labels 0, 1, 2."""
    file = tmp_path / "images.npz"
    images = RANDOM.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(file, images=images, labels=np.arange(60) % 3, odd=np.arange(7), words=np.array(["a"] * 60))
    return file


def test_every_byte_comes_back_from_its_float():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_bytes(as_floats(every)), every)
    assert as_floats(every).min() == -1 and as_floats(every).max() == 1
    assert as_bytes(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


@pytest.mark.parametrize("cls", [MNIST, FashionMNIST])
def test_torchvisions_files_are_read_with_their_test_set_held_out(cls, mnist_root):
    data = cls(root=str(mnist_root), download=False)
    assert data.event_shape == (1, 28, 28) and len(data) == 120 and len(data.held_out) == 40
    assert data.labels.tolist() == [k % 10 for k in range(120)]


def test_only_the_classes_asked_for_are_kept_with_their_numbers(mnist_root):
    data = MNIST(root=str(mnist_root), classes=[5, 7])
    assert set(data.labels.tolist()) == {5, 7} and set(data.held_out_labels.tolist()) == {5, 7} and len(data) == 24
    with pytest.raises(ValueError, match=r"no images of the classes \[12\]"):
        MNIST(root=str(mnist_root), classes=[5, 12])


def test_an_epoch_with_flips_holds_each_image_both_ways_round(mnist_root):
    plain, both = MNIST(root=str(mnist_root)), MNIST(root=str(mnist_root), flip=True)
    assert len(both) == 240
    stream = Stream(both, 0, "test")
    seen, labels = stream.take(0, 240), stream.labels(0, 240)
    expected = torch.cat([plain.points, plain.points.flip(-1)])
    order = stream._order.take(0, 240)
    assert torch.equal(seen, expected[order]) and torch.equal(labels, plain.labels.repeat(2)[order])


def test_where_files_are_missing_the_message_says_which_go_where(tmp_path, small, capsys):
    command = ["data.name=mnist", f"data.root={tmp_path}", "data.download=false", "network.name=unet"]
    assert main(["train", str(small("run")), *command]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path}/MNIST/raw/train-images-idx3-ubyte" in told and "internet" in told and "Traceback" not in told


def test_arrays_come_with_their_labels_split_by_class(arrays):
    data = ImageArray(path=str(arrays), key="images", labels="labels", held_out=0.2)
    assert data.event_shape == (3, 8, 8) and len(data) == 48
    assert torch.bincount(data.held_out_labels).tolist() == [4, 4, 4]
    stored = np.load(arrays)
    truth = {image.tobytes(): label for image, label in zip(stored["images"], stored["labels"])}
    for image, label in zip(data.pixels, data.labels):
        assert truth[image.permute(1, 2, 0).contiguous().numpy().tobytes()] == label


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "name one as key"),
        ({"key": "images", "labels": "none"}, "no 'none'"),
        ({"key": "images", "labels": "odd"}, r"labels of shape \(7,\)"),
        ({"key": "images", "labels": "words"}, "whole numbers"),
        ({"key": "labels"}, "uint8"),
        ({"key": "images", "classes": [0]}, "no labels to choose"),
        ({"key": "images", "labels": "labels", "classes": [9]}, r"no images of the classes \[9\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, settings, says):
    with pytest.raises(ValueError, match=says):
        ImageArray(path=str(arrays), **settings)
