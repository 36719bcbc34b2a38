"""A folder of image files: every file is looked at once, and what is odd about it is handled and said, or refused."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gengrad.data.images import ImageSettings, PixelData, split
from gengrad.registry import DATASETS

if TYPE_CHECKING:
    import PIL.Image

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
Byte = Annotated[int, Field(ge=0, le=255)]


class Unreadable(ValueError):
    """One file that is no image to train on, and why."""


@DATASETS.register("image_folder")
class ImageFolder(PixelData):
    """The images in a folder and the folders in it; a class for each of these, in alphabetical order.

    16-bit images are scaled, transparent ones laid on ``background``, of animations the first frame is taken; grey
    images become colour ones where others are. With ``size`` every image is resized so that its shorter side has that
    length, and its middle cut out; without it all must have one size. Files that cannot be read, larger than
    ``max_pixels`` or smaller than ``size`` are refused by name, or left out with ``bad: skip``; either is said.
    """

    class Config(ImageSettings):
        path: str
        size: int | None = Field(None, ge=4, le=2048)
        channels: Literal[1, 3] | None = None  # none: 1 if all images are grey, else 3
        background: list[Byte] = Field([255, 255, 255], min_length=3, max_length=3)
        bad: Literal["refuse", "skip"] = "refuse"
        max_pixels: int = Field(50_000_000, ge=16)
        held_out: float = Field(0.1, ge=0, lt=1)
        split_seed: int = 0

    labelled_by = "put the images of each class into a folder of its own"

    def prepare(self) -> None:
        c, folder = self.config, Path(self.config.path).expanduser()
        files = image_files(folder)
        read, bad, oddities = [], [], Counter()
        for file in files:
            try:
                read.append((file, *read_image(file, c, oddities)))
            except (Unreadable, OSError) as error:
                bad.append(f"{file.relative_to(folder)}: {error}")
        self._judge(bad, len(files))
        grey = c.channels == 1 or (c.channels is None and all(is_grey for _, _, is_grey in read))
        images = [to_channels(pixels, 1 if grey else 3) for _, pixels, _ in read]
        one_size(images, [file for file, _, _ in read], folder)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        if len(pixels) < 2:
            raise ValueError(f"{c.path!r} holds 1 image; at least 2 are needed, one to train on, one to hold out")
        self.keep(*split(pixels, self._labels([file for file, _, _ in read], folder), c.held_out, c.split_seed))
        self.notes = tuple(f"{count:,} of {len(read):,} images {what}" for what, count in oddities.items())
        if bad:
            self.notes += (f"{len(bad):,} of {len(files):,} files left out: {'; '.join(bad[:3])}",)

    def _judge(self, bad: list[str], total: int) -> None:
        if bad and (self.config.bad == "refuse" or len(bad) == total):
            listed = "\n".join(f"    {line}" for line in bad[:10])
            more = f"\n    and {len(bad) - 10} more" if len(bad) > 10 else ""
            mend = "" if len(bad) == total else " Mend or remove them, or set data.bad=skip to leave them out."
            raise ValueError(
                f"{self.config.path!r}: {len(bad)} of {total} images cannot be trained on.{mend}\n{listed}{more}"
            )

    def _labels(self, files: list[Path], folder: Path) -> Tensor | None:
        """The class of each file: the number of its folder; None where all lie in ``folder`` itself."""
        names = [file.relative_to(folder).parts[0] if file.parent != folder else "" for file in files]
        known = sorted(set(names))
        if known == [""]:
            return None
        if "" in known:
            loose = next(file for file, name in zip(files, names) if not name)
            raise ValueError(
                f"{self.config.path!r}: some images lie in folders, which are their classes, and others, such as "
                f"{loose.name}, in none; move them into one"
            )
        return torch.tensor([known.index(name) for name in names])


def image_files(folder: Path) -> list[Path]:
    """All image files in a folder and below, sorted; errors where there is no folder or no image in it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of images at {str(folder)!r} (looked in {Path.cwd()})")
    all_files = sorted(
        Path(where) / name for where, _, names in os.walk(folder) for name in names if not name.startswith(".")
    )
    files = [file for file in all_files if file.suffix.lower() in ENDINGS]
    if not files:
        kinds = ", ".join(sorted({file.suffix or file.name for file in all_files})[:5])
        found = f"{len(all_files)} other files ({kinds})" if all_files else "nothing"
        raise ValueError(f"{str(folder)!r} holds no images, but {found}; image files end in {', '.join(ENDINGS)}")
    return files


def read_image(file: Path, c: ImageFolder.Config, oddities: Counter) -> tuple[np.ndarray, bool]:
    """(bytes (h, w, 3), whether it is grey); counts in ``oddities`` what was done. ``Unreadable`` says why not."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if file.stat().st_size == 0:
        raise Unreadable("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            opened = Image.open(file)
    except Image.DecompressionBombError as error:
        raise Unreadable(f"too large ({error})") from None
    except UnidentifiedImageError:
        raise Unreadable("no image, or damaged at its start") from None
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        raise Unreadable(f"damaged ({error})") from None
    with opened as image:
        width, height = image.size
        if width * height > c.max_pixels:  # known from the header: nothing was unpacked yet
            raise Unreadable(f"{width}x{height} is more than max_pixels={c.max_pixels:,}")
        try:
            animated = getattr(image, "n_frames", 1) > 1
            image.seek(0)
            image.load()
            upright = ImageOps.exif_transpose(image)
        except Exception as error:
            raise Unreadable(f"damaged or cut short ({error})") from None
        if animated:
            oddities["are animations: the first frame was taken"] += 1
        pixels, grey = to_bytes(upright, c, oddities)
    return resized(pixels, c, oddities), grey


def to_bytes(image: PIL.Image.Image, c: ImageFolder.Config, oddities: Counter) -> tuple[np.ndarray, bool]:
    """An image of any mode as bytes (h, w, 3), and whether it is grey."""
    from PIL import Image

    if image.mode == "F":
        raise Unreadable("floating-point pixels, whose scale is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Unreadable("32-bit pixels beyond 0 .. 65535; save it with 8 or 16 bits")
        oddities["have 16 bits: scaled to 8"] += 1
        return np.repeat(np.round(values / 257).astype(np.uint8)[..., None], 3, axis=2), True
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        oddities[f"are transparent: laid on the background {tuple(c.background)}"] += 1
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*c.background, 255)), image)
        return np.asarray(image.convert("RGB")), False
    return np.asarray(image.convert("RGB")), image.mode in ("L", "1")


def resized(pixels: np.ndarray, c: ImageFolder.Config, oddities: Counter) -> np.ndarray:
    """The middle square of side ``size`` of the image, its shorter side shrunk to ``size``; as it is without a size."""
    from PIL import Image

    if c.size is None:
        return pixels
    height, width = pixels.shape[:2]
    if min(height, width) < c.size:
        raise Unreadable(f"{width}x{height} is smaller than size={c.size}")
    if (height, width) == (c.size, c.size):
        return pixels
    oddities[f"were resized or cropped to {c.size}x{c.size}"] += 1
    scale = c.size / min(height, width)
    new = max(c.size, round(width * scale)), max(c.size, round(height * scale))
    image = Image.fromarray(pixels).resize(new, Image.Resampling.LANCZOS)
    left, top = (new[0] - c.size) // 2, (new[1] - c.size) // 2
    return np.asarray(image.crop((left, top, left + c.size, top + c.size)))


def to_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """(h, w, 3) as it is, or as the luminance (h, w, 1)."""
    if channels == 3:
        return pixels
    if (pixels == pixels[..., :1]).all():
        return pixels[..., :1]
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def one_size(images: list[np.ndarray], files: list[Path], folder: Path) -> None:
    """Raises ``ValueError`` naming an image of each of the commonest sizes where there are several."""
    sizes = Counter(image.shape[:2] for image in images)
    if len(sizes) > 1:
        examples = {image.shape[:2]: file.relative_to(folder) for image, file in reversed(list(zip(images, files)))}
        listed = ", ".join(f"{w}x{h} ({count} images, e.g. {examples[h, w]})" for (h, w), count in sizes.most_common(4))
        raise ValueError(f"{str(folder)!r} holds images of {len(sizes)} sizes: {listed}; set data.size to make it one")
