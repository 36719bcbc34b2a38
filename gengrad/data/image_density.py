"""A picture as a density on the plane: where it is dark there is mass. A smiley is drawn here, any other is read."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gengrad.data.base import Distribution
from gengrad.registry import DATASETS, Settings

MOST_PIXELS = 64_000_000
SIDE = 192  # pixels of the smiley


def smiley(side: int = SIDE) -> np.ndarray:
    """Darkness (side, side) in [0, 1]: a round outline, two eyes and a mouth, drawn from their formulas."""
    line = (np.arange(side) + 0.5) / side * 2.2 - 1.1
    x, y = np.meshgrid(line, -line)
    outline = np.abs(np.hypot(x, y) - 0.95) < 0.06
    eyes = (np.abs(x) - 0.35) ** 2 / 0.1**2 + (y - 0.3) ** 2 / 0.16**2 < 1
    mouth = (np.abs(np.hypot(x, y + 0.05) - 0.55) < 0.06) & (y < -0.2)
    return (outline | eyes | mouth).astype(np.float64)


def read_darkness(path: str) -> np.ndarray:
    """1 - grey level (h, w) of an image file in [0, 1]; what is transparent lies on white.

    Raises ``FileNotFoundError``, or ``ValueError`` for a file that is no image, or one of too many pixels.
    """
    from PIL import Image, UnidentifiedImageError

    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no image file at {path!r} (looked in {Path.cwd()})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is ours
            with Image.open(file) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise _Refused(
                        f"{path!r} has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}; "
                        "make it smaller"
                    )
                if image.mode.startswith("I"):  # 16 bits a pixel: scaled, not clipped
                    return 1 - np.asarray(image, dtype=np.float64).clip(0, 65535) / 65535
                over = image.convert("RGBA")
                white = Image.new("RGBA", over.size, "white")
                return 1 - np.asarray(Image.alpha_composite(white, over).convert("L"), dtype=np.float64) / 255
    except _Refused:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path!r} is not a readable image, or it is cut short ({error})") from None


class _Refused(ValueError):
    """A message that is complete already."""


@DATASETS.register("image_density")
class ImageDensity(Distribution):
    """p(x) proportional to the darkness of the pixel that x lies in: a pixel by its darkness, then uniform within it.

    The picture fills [-1, 1] in its longer direction and is upright. Without a ``path`` it is a smiley; ``invert``
    puts the mass where a picture is light. Raises ``ValueError`` for a picture without dark pixels, or with one alone.
    """

    event_shape = (2,)

    class Config(Settings):
        path: str | None = None
        invert: bool = False
        # darkness below this share of the darkest is taken for paper
        threshold: float = Field(0.05, ge=0, lt=1)

    def prepare(self) -> None:
        c = self.config
        darkness = smiley() if c.path is None else read_darkness(c.path)
        darkness = 1 - darkness if c.invert else darkness
        weights = np.where(darkness > c.threshold * darkness.max(), darkness, 0.0)
        if np.count_nonzero(weights) < 2:
            colour = ("black", "dark", "true") if c.invert else ("white", "light", "false")
            raise ValueError(
                f"{c.path!r} is all {colour[0]}: there is no mass in it. Take another picture, or if its lines are "
                f"{colour[1]} set invert to {'false' if c.invert else 'true'}"
            )
        self.height, self.width = weights.shape
        self._cumulated = torch.from_numpy(weights.ravel().cumsum() / weights.sum())

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(n, 3, generator=generator, dtype=torch.float64)
        pixel = torch.searchsorted(self._cumulated, u[:, 0].contiguous(), right=True)
        pixel = pixel.clamp_max(len(self._cumulated) - 1)
        column, row = pixel % self.width + u[:, 1], pixel // self.width + u[:, 2]
        half = max(self.width, self.height) / 2
        return torch.stack([(column - self.width / 2) / half, (self.height / 2 - row) / half], dim=1).float()
