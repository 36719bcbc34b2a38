"""Data from a file of the user's: points or images in .npy and .npz, points in .csv."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from gengrad.data.base import LARGEST, FiniteData
from gengrad.data.draws import generator_for
from gengrad.registry import DATASETS, Settings

SUFFIXES = (".npy", ".npz", ".csv")
CHANNELS = (1, 3)


def read_array(path: str, key: str | None = None) -> np.ndarray:
    """The array in a file, unchecked; never unpickles.

    ``key`` names the array of an .npz with several. Raises ``FileNotFoundError``, or ``ValueError`` where
    the file is no array file, holds Python objects, or the key is missing.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no array file at {path!r} (looked in {Path.cwd()})")
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path!r} ends in {suffix!r}; array data are read from {', '.join(SUFFIXES)}")
    if key is not None and suffix != ".npz":
        raise ValueError(f"{path!r}: key {key!r} chooses an array of an .npz; leave it out for {suffix} files")
    if suffix == ".csv":
        return _read_csv(file)
    try:
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            with loaded:
                loaded = loaded[_choose(path, loaded.files, key)]
    except _Refused:
        raise
    except (EOFError, OSError, MemoryError, zipfile.BadZipFile, ValueError) as error:
        if "Object arrays" in str(error):
            mend = "save plain numbers, e.g. np.save(path, np.stack(points).astype('float32'))"
            raise ValueError(f"{path!r} holds Python objects, which are never loaded; {mend}") from None
        reason = "no array header" if "pickle" in str(error) else error
        raise ValueError(f"{path!r} is not a readable {suffix} file, or it is cut short ({reason})") from None
    if not isinstance(loaded, np.ndarray):
        raise ValueError(f"{path!r} holds a file that is no array")
    return loaded


class _Refused(ValueError):
    """A message that is complete already."""


def _choose(path: str, keys: list[str], key: str | None) -> str:
    """The array to take from an .npz: ``key``, or the only one."""
    if key is None and len(keys) == 1:
        return keys[0]
    if key in keys:
        return key
    has = f"{path!r} holds the arrays {', '.join(map(repr, keys)) or '(none)'}"
    raise _Refused(f"{has}; name one as key" if key is None else f"{has}, but no {key!r}")


def _read_csv(file: Path) -> np.ndarray:
    """Rows of numbers after an optional header; ``ValueError`` with the line of the first bad row."""
    rows: list[list[float]] = []
    width = None
    with open(file, newline="", encoding="utf-8-sig") as lines:
        reader = csv.reader(lines)

        def place() -> str:
            return f"'{file}' line {reader.line_num}"

        try:
            for record in reader:
                if not any(field.strip() for field in record):
                    continue
                try:
                    row = [float(field) for field in record]
                except ValueError:
                    if width is None:  # the first line that is not empty: a header
                        width = len(record)
                        continue
                    raise ValueError(
                        f"{place()}: not a row of numbers: {record[:8]}; text must be encoded and gaps filled, "
                        "columns separated by commas"
                    ) from None
                width = width if width is not None else len(row)
                if len(row) != width:
                    raise ValueError(f"{place()}: {len(row)} columns where {width} are expected")
                rows.append(row)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"'{file}' is not a table of comma-separated numbers ({error})") from None
    return np.array(rows, dtype=np.float64).reshape(len(rows), width or 0)


def image_layout(shape: tuple[int, ...]) -> str:
    """Layout by the axis of size 1 or 3; ``ValueError`` where both outer axes or neither could be it."""
    last, first = shape[-1] in CHANNELS, shape[1] in CHANNELS
    if last != first:
        return "nhwc" if last else "nchw"
    found = "both the last and the second axis could be" if last else "neither the last nor the second is"
    mend = "set layout to nhwc or nchw" if last else "convert to 1 (grey) or 3 (RGB) channels"
    raise ValueError(f"images of shape {shape}: {found} the 1 or 3 channels; {mend}")


def image_bytes(array: np.ndarray, layout: str | None) -> Tensor:
    """uint8 images (n, h, w), (n, h, w, c) or (n, c, h, w) as (n, c, h, w)."""
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or 0 in array.shape:
        raise ValueError(
            f"images need the type uint8 (0 .. 255), this array has {array.dtype} of shape {array.shape}; "
            "convert it first, e.g. ((x - x.min()) / (x.max() - x.min()) * 255).round().astype('uint8')"
        )
    if array.ndim == 3:
        array = array[:, None]
    else:
        chosen = layout or image_layout(array.shape)
        array = np.moveaxis(array, -1, 1) if chosen == "nhwc" else array
        if array.shape[1] not in CHANNELS:
            raise ValueError(f"layout {chosen} gives {array.shape[1]} channels; allowed are 1 and 3")
    return torch.from_numpy(np.ascontiguousarray(array))


def as_images(array: np.ndarray, layout: str | None) -> Tensor:
    """uint8 images as float (n, c, h, w) in [-1, 1]: v / 127.5 - 1."""
    return image_bytes(array, layout).float() / 127.5 - 1


def as_points(array: np.ndarray) -> Tensor:
    """Real numbers (n, d) as float32; ``ValueError`` for other types, NaN, infinity, and beyond 1e15."""
    if array.dtype.kind not in "fiu":
        raise ValueError(f"points need real numbers, this array has the type {array.dtype}")
    with np.errstate(over="ignore"):
        points = np.ascontiguousarray(array, dtype=np.float32)
    bad = ~np.isfinite(points).all(axis=1)
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(
            f"{int(bad.sum())} of {len(points)} points are not finite in float32 (NaN, infinite, "
            f"beyond 3e38); the first is row {first}: {array[first][:8]}"
        )
    size = np.abs(points).max(axis=1)
    if (size > LARGEST).any():
        first = int((size > LARGEST).argmax())
        raise ValueError(
            f"{int((size > LARGEST).sum())} of {len(points)} points lie beyond {LARGEST:g}, where squared distances "
            f"leave float32; the first is row {first}: {array[first][:8]}. Take another unit, e.g. divide by "
            f"{size.max():.0e}"
        )
    return torch.from_numpy(points)


@DATASETS.register("array")
class Array(FiniteData):
    """Points (n, d) or images from a file, cut at random into training and held-out data.

    Two axes are points. uint8 with three axes are grey images (n, h, w); with four axes they are images
    whose channel axis is the one of size 1 or 3: the last (n, h, w, c) or the second (n, c, h, w);
    ``layout`` decides where both are.

    ``normalise`` maps points to (x - m) / s, with the training points' mean m and *one* scale s (their root
    mean square distance from m per coordinate): distances all shrink alike, so the optimal transport stays
    the same. A flow trained on them samples in the units of the file. Data without variance keep s = 1.

    Raises ``FileNotFoundError`` or ``ValueError`` with what was found, what is allowed and how to mend it.
    """

    class Config(Settings):
        path: str
        # name of the array in an .npz that holds several
        key: str | None = None
        layout: Literal["nhwc", "nchw"] | None = None
        held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1
        split_seed: int = 0
        normalise: bool = False

        @field_validator("path")
        @classmethod
        def _known_suffix(cls, path: str) -> str:
            if Path(path).suffix.lower() not in SUFFIXES:
                raise ValueError(f"{path!r}: array data are read from {', '.join(SUFFIXES)} files")
            return path

    def prepare(self) -> None:
        c = self.config
        try:
            data = self._convert(read_array(c.path, c.key))
        except ValueError as error:
            text = str(error)
            raise ValueError(text if c.path in text else f"{c.path!r}: {text}") from None
        count = max(1, round(c.held_out * len(data))) if c.held_out else 0
        if len(data) - count < 1:
            raise ValueError(f"{c.path!r}: {len(data)} points with held_out {c.held_out} leave none to train on")
        order = torch.randperm(len(data), generator=generator_for(c.split_seed, "array split"))
        # sorted, so that neighbours in the file stay neighbours in memory
        self.points, self.held_out = data[order[count:].sort().values], data[order[:count].sort().values]
        if c.normalise:
            self._normalise()

    def _convert(self, array: np.ndarray) -> Tensor:
        if array.ndim not in (2, 3, 4):
            mend = "; for numbers on a line, use x[:, None]" if array.ndim == 1 else ""
            raise ValueError(
                f"an array of shape {array.shape} is neither points (n, d) nor images (n, h, w), "
                f"(n, h, w, c) or (n, c, h, w){mend}"
            )
        if 0 in array.shape:
            raise ValueError(f"the array is empty: shape {array.shape}")
        if len(array) < 2:
            raise ValueError("the array has a single point; at least 2 are needed, one to train on, one to hold out")
        if array.ndim == 2 and self.config.layout is not None:
            raise ValueError(f"layout is for images, this array of shape {array.shape} has points; leave it out")
        if array.ndim > 2 and self.config.normalise:
            raise ValueError("normalise is for points; images are scaled to [-1, 1] already; leave it out")
        return as_points(array) if array.ndim == 2 else as_images(array, self.config.layout)

    def _normalise(self) -> None:
        points = self.points.double()
        mean = points.mean(0)
        scale = (points - mean).square().mean().sqrt().item()
        scale = scale if scale > 0 else 1.0
        self.units = mean.float(), scale
        self.points = ((points - mean) / scale).float()
        self.held_out = ((self.held_out.double() - mean) / scale).float()
