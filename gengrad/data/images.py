"""Image data: MNIST, Fashion-MNIST and CIFAR-10 through torchvision, and arrays of a file, all kept as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gengrad.data.arrays import image_bytes, read_array
from gengrad.data.base import FiniteData
from gengrad.data.digits import stratified_split
from gengrad.data.draws import generator_for
from gengrad.registry import DATASETS, Settings

if TYPE_CHECKING:
    from torch.utils.data import Dataset

Classes = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class ImageSettings(Settings):
    """What all image data take. ``classes``: only these, keeping their numbers; ``flip``: mirror images as well."""

    classes: Classes | None = None
    flip: bool = False


class PixelData(FiniteData):
    """Images as bytes (n, c, h, w), as floats in [-1, 1] only where they are picked: v / 127.5 - 1.

    With ``flip`` the mirror image of number i is number n + i: an epoch holds every image both ways round.
    """

    pixels: Tensor
    held_out_pixels: Tensor
    held_out_labels: Tensor | None = None
    labelled_by: ClassVar[str] = ""  # how one gives them labels, where they have none

    @property
    def event_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.pixels.shape[1:])

    @property
    def points(self) -> Tensor:  # type: ignore[override]
        """All training images as floats, without mirror images; made anew at each call."""
        return as_floats(self.pixels)

    @property
    def held_out(self) -> Tensor:  # type: ignore[override]
        return as_floats(self.held_out_pixels)

    def __len__(self) -> int:
        return len(self.pixels) * (2 if self.config.flip else 1)

    def pick(self, numbers: Tensor) -> Tensor:
        found, mirrored = self.pixels[numbers % len(self.pixels)], numbers >= len(self.pixels)
        if mirrored.any():
            found[mirrored] = found[mirrored].flip(-1)
        return as_floats(found)

    def pick_labels(self, numbers: Tensor) -> Tensor:
        return self.labels[numbers % len(self.labels)]

    def keep(self, train: tuple[Tensor, Tensor | None], held_out: tuple[Tensor, Tensor | None]) -> None:
        """Takes (pixels, labels) of both parts, only the classes asked for; raises ``ValueError`` for unknown ones."""
        classes = self.config.classes
        self.pixels, self.labels = of_classes(*train, classes, self.name)
        self.held_out_pixels, self.held_out_labels = of_classes(*held_out, classes, self.name, known=train[1])


def as_floats(pixels: Tensor) -> Tensor:
    """Bytes 0 .. 255 as floats in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def as_bytes(images: Tensor) -> Tensor:
    """Floats in [-1, 1] as bytes: x * 127.5 + 128, clipped, cut off. The inverse of ``as_floats`` on its values."""
    return (images.float() * 127.5 + 128).clamp(0, 255).byte()


def of_classes(
    images: Tensor, labels: Tensor | None, classes: list[int] | None, name: str, known: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The images of some classes; ``ValueError`` for data without labels and for classes that none of them has."""
    if classes is None:
        return images, labels
    if labels is None:
        raise ValueError(f"data set {name!r} has no labels to choose classes {classes} by; leave classes out")
    there = sorted((labels if known is None else known).unique().tolist())
    missing = [c for c in classes if c not in there]
    if missing:
        raise ValueError(f"data set {name!r} has no images of the classes {missing}; it has {there}")
    rows = torch.isin(labels, torch.tensor(classes))
    return images[rows], labels[rows]


def split(images: Tensor, labels: Tensor | None, share: float, seed: int) -> tuple[tuple, tuple]:
    """((images, labels) to train on, (images, labels) held out), a ``share`` of each class where there are labels."""
    count = max(1, round(share * len(images))) if share else 0
    if labels is None:
        order = torch.randperm(len(images), generator=generator_for(seed, "image split"))
        train, held_out = order[count:].sort().values, order[:count].sort().values
    else:
        train, held_out = stratified_split(labels, count, seed)
    return tuple((images[rows], None if labels is None else labels[rows]) for rows in (train, held_out))


# ------------------------------------------------------------------ torchvision


class Torchvision(PixelData):
    """A data set that torchvision reads; its official test set is held out."""

    published: ClassVar[str]  # torchvision's class
    files: ClassVar[tuple[str, ...]]  # what has to lie under root
    source: ClassVar[str]

    class Config(ImageSettings):
        root: str = "data"  # folder to read from, and to download to
        download: bool = True  # where the files are missing
        limit: int | None = Field(None, ge=2)  # only so many images of each part, for trials

    def prepare(self) -> None:
        self.keep(self._read(True), self._read(False))

    def _read(self, train: bool) -> tuple[Tensor, Tensor]:
        import torchvision.datasets

        cls, c = getattr(torchvision.datasets, self.published), self.config
        try:
            read = cls(c.root, train=train, download=False)
        except (RuntimeError, OSError, ValueError, EOFError) as first:
            read = self._downloaded(cls, train, first)
        pixels = torch.as_tensor(np.asarray(read.data))
        pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        return pixels[: c.limit], torch.as_tensor(read.targets).long()[: c.limit]

    def _downloaded(self, cls: type, train: bool, found: Exception) -> Dataset:
        """The data set after a download; ``FileNotFoundError`` saying which files to put where when that fails."""
        reason = f"download is false ({found})"
        if self.config.download:
            try:
                return cls(self.config.root, train=train, download=True)
            except (RuntimeError, OSError, ValueError, EOFError) as error:
                reason = f"the download failed ({error})"
        places = "\n".join(f"    {Path(self.config.root) / name}" for name in self.files)
        raise FileNotFoundError(
            f"{self.name}: not complete under {self.config.root!r}, and {reason}. On a machine with internet access "
            f"get {self.source} and put there:\n{places}"
        ) from None


def _mnist_files(folder: str) -> tuple[str, ...]:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple(f"{folder}/raw/{name}-ubyte  (unpacked)" for name in names)


@DATASETS.register("mnist")
class MNIST(Torchvision):
    """Handwritten digits, 60,000 + 10,000 images (1, 28, 28) (LeCun, Cortes, Burges 1998)."""

    published, files, source = "MNIST", _mnist_files("MNIST"), "MNIST's four idx files"


@DATASETS.register("fashion_mnist")
class FashionMNIST(Torchvision):
    """Clothes in ten classes, 60,000 + 10,000 images (1, 28, 28) (Xiao, Rasul, Vollgraf 2017)."""

    published, files, source = "FashionMNIST", _mnist_files("FashionMNIST"), "Fashion-MNIST's four idx files"


@DATASETS.register("cifar10")
class CIFAR10(Torchvision):
    """Objects and animals in ten classes, 50,000 + 10,000 images (3, 32, 32) (Krizhevsky 2009)."""

    published, source = "CIFAR10", "cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked,"
    files = tuple(f"cifar-10-batches-py/{n}" for n in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"))


# ------------------------------------------------------------------ arrays


@DATASETS.register("image_array")
class ImageArray(PixelData):
    """uint8 images of an .npy or .npz, cut into training and held-out images; labels from another array of the .npz.

    Images are (n, h, w), (n, h, w, c) or (n, c, h, w), as for ``array``. Raises ``ValueError`` naming the file.
    """

    class Config(ImageSettings):
        path: str
        key: str | None = None  # the array of images, where an .npz holds several
        labels: str | None = None  # the array of labels in the .npz
        layout: Literal["nhwc", "nchw"] | None = None
        held_out: float = Field(0.1, ge=0, lt=1)
        split_seed: int = 0

    labelled_by = "name the array of labels as data.labels"

    def prepare(self) -> None:
        c = self.config
        images, labels = read_array(c.path, c.key), None
        try:
            pixels = image_bytes(images, c.layout)
            if len(pixels) < 2:
                raise ValueError(f"holds {len(pixels)} images; at least 2 are needed, one to train on, one to hold out")
            if c.labels is not None:
                labels = as_labels(read_array(c.path, c.labels), len(pixels))
            self.keep(*split(pixels, labels, c.held_out, c.split_seed))
        except ValueError as error:
            raise ValueError(str(error) if c.path in str(error) else f"{c.path!r}: {error}") from None


def as_labels(array: np.ndarray, n: int) -> Tensor:
    """Whole numbers from 0, one for each of n images, as int64; ``ValueError`` for anything else."""
    if array.shape not in ((n,), (n, 1)) or array.dtype.kind not in "iu":
        raise ValueError(
            f"labels of shape {array.shape} and type {array.dtype} for {n} images; they must be whole numbers, ({n},)"
        )
    labels = torch.from_numpy(array.reshape(n).astype(np.int64))
    if int(labels.min()) < 0:
        raise ValueError(f"labels count from 0; the smallest is {int(labels.min())}")
    return labels
