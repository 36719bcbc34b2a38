"""A small UNet: the velocity network of images from 8x8 upwards."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, field_validator
from torch import Tensor, nn

from gengrad.registry import NETWORKS, Configured, Settings


def time_embedding(t: Tensor, size: int) -> Tensor:
    """Sines and cosines of t (batch,) at ``size / 2`` frequencies from 1 to 1000 radians, shape (batch, size)."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000), size // 2, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def groups(channels: int) -> nn.GroupNorm:
    """Group norm with the largest number of groups up to 8 that divides the channels."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip; time and class enter as a scale and a shift after the second norm."""

    def __init__(self, before: int, after: int, time_size: int, dropout: float = 0.0):
        super().__init__()
        self.norm_in, self.conv_in = groups(before), nn.Conv2d(before, after, 3, padding=1)
        self.modulation = nn.Linear(time_size, 2 * after)
        self.norm_out, self.conv_out = groups(after), nn.Conv2d(after, after, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        nn.init.zeros_(self.conv_out.weight)  # the block starts as its skip: deep stacks train from the first step
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor, embedded_time: Tensor) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = rearrange(self.modulation(embedded_time), "b (two c) -> two b c 1 1", two=2)
        h = self.norm_out(h) * (1 + scale) + shift
        return self.skip(x) + self.conv_out(self.dropout(F.silu(h)))


class SelfAttention(nn.Module):
    """Multi-head attention over the pixels of a feature map, added to it."""

    def __init__(self, channels: int, head_size: int = 32):
        super().__init__()
        self.heads = next(h for h in range(max(1, channels // head_size), 0, -1) if channels % h == 0)
        self.norm = groups(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        pattern = "b (three heads c) h w -> three b heads (h w) c"
        q, k, v = rearrange(self.qkv(self.norm(x)), pattern, three=3, heads=self.heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(h, "b heads (h w) c -> b (heads c) h w", h=height, w=width))


class Attentive(nn.Module):
    """A residual block with attention after it."""

    def __init__(self, block: ResidualBlock, attention: SelfAttention):
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x: Tensor, embedded_time: Tensor) -> Tensor:
        return self.attention(self.block(x, embedded_time))


@NETWORKS.register("unet")
class UNet(nn.Module, Configured):
    """``net(x, t, y)`` on images (batch, c, h, w): one level per entry of ``multipliers``, each half the size before.

    Attention acts at the coarsest level, and where maps are ``attention_at`` pixels high. With ``classes`` K it takes
    labels y (batch,) in 0 .. K, K or no y for no class. ``patch`` p folds squares of p x p pixels into channels before
    the stem and unfolds them after the head: all maps have 1 / p^2 of the pixels, and a step costs about as much less.
    ``channels_last`` changes how weights and activations lie in memory, not what comes out. Raises ``ValueError`` when
    the image cannot be cut into patches and halved that often.
    """

    class Config(Settings):
        channels: int = Field(32, ge=4, multiple_of=2)  # even: the time embedding has a sine and a cosine each
        multipliers: list[int] = Field([1, 2], min_length=1)
        blocks: int = Field(1, ge=1)
        patch: int = Field(1, ge=1)  # pixels along the side of a square that the network sees as one
        attention: bool = True
        attention_at: list[int] = []  # heights of feature maps with attention besides, e.g. [16]
        dropout: float = Field(0.0, ge=0, lt=1)
        classes: int | None = Field(None, ge=1)
        channels_last: bool = False

        @field_validator("multipliers")
        @classmethod
        def positive(cls, value: list[int]) -> list[int]:
            if min(value) < 1:
                raise ValueError("every multiplier is at least 1")
            return value

    def __init__(self, config: Settings | None = None, *, event_shape: tuple[int, ...], **settings):
        nn.Module.__init__(self)
        Configured.__init__(self, config, **settings)
        self.event_shape = tuple(event_shape)
        c = self.config
        self._check(event_shape, len(c.multipliers), c.patch)
        colours = event_shape[0] * c.patch**2
        widths = [c.channels * m for m in c.multipliers]
        time_size = 4 * c.channels
        self.time = nn.Sequential(
            nn.Linear(c.channels, time_size), nn.SiLU(), nn.Linear(time_size, time_size), nn.SiLU()
        )
        self.classes = c.classes
        self.label = nn.Embedding(c.classes + 1, time_size) if c.classes else None  # the last row: no class
        self.stem = nn.Conv2d(colours, widths[0], 3, padding=1)

        def block(before: int, after: int, level: int) -> nn.Module:
            residual = ResidualBlock(before, after, time_size, c.dropout)
            looks = event_shape[1] // (c.patch * 2**level) in c.attention_at
            return Attentive(residual, SelfAttention(after)) if looks else residual

        self.down, self.shrink, skips = nn.ModuleList(), nn.ModuleList(), [widths[0]]
        width = widths[0]
        for level, after in enumerate(widths):
            for _ in range(c.blocks):
                self.down.append(block(width, after, level))
                width = after
                skips.append(width)
            if level < len(widths) - 1:
                self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)

        self.middle_in = ResidualBlock(width, width, time_size, c.dropout)
        self.middle_attention = SelfAttention(width) if c.attention else nn.Identity()
        self.middle_out = ResidualBlock(width, width, time_size, c.dropout)

        self.up, self.enlarge = nn.ModuleList(), nn.ModuleList()
        for level, after in reversed(list(enumerate(widths))):
            for _ in range(c.blocks + 1):
                self.up.append(block(width + skips.pop(), after, level))
                width = after
            if level > 0:
                self.enlarge.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm, self.head = groups(width), nn.Conv2d(width, colours, 3, padding=1)
        nn.init.zeros_(self.head.weight)  # velocity 0 at the start: the first steps learn the mean, not noise
        nn.init.zeros_(self.head.bias)
        if c.channels_last:
            self.to(memory_format=torch.channels_last)

    @staticmethod
    def _check(event_shape: tuple[int, ...], levels: int, patch: int) -> None:
        factor = patch * 2 ** (levels - 1)
        if len(event_shape) != 3:
            raise ValueError(
                f"network 'unet' works on images (c, h, w); the data have events of shape {event_shape}. "
                "Use network.name=mlp for points."
            )
        if event_shape[1] % factor or event_shape[2] % factor:
            cuts = f" cuts images into patches of {patch}x{patch} and" if patch > 1 else ""
            lower = "Lower network.patch, shorten" if patch > 1 else "Shorten"
            raise ValueError(
                f"network 'unet' with {levels} levels{cuts} halves {'them' if cuts else 'images'} {levels - 1} times, "
                f"so both sides must be multiples of {factor}; the data are {event_shape[1]}x{event_shape[2]}. "
                f"{lower} network.multipliers or resize the images."
            )

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        c = self.config
        x = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=c.patch, q=c.patch)
        if c.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        e = self.time(time_embedding(t.expand(len(x)), c.channels).to(x.dtype))
        if self.label is not None:
            e = e + self.label(torch.full_like(t, self.classes, dtype=torch.long).expand(len(x)) if y is None else y)
        elif y is not None:
            raise ValueError("this unet takes no class labels; leave y out, or set network.classes")
        h = self.stem(x)
        kept, down, shrink = [h], iter(self.down), iter(self.shrink)
        for level in range(len(c.multipliers)):
            for _ in range(c.blocks):
                h = next(down)(h, e)
                kept.append(h)
            if level < len(c.multipliers) - 1:
                h = next(shrink)(h)
                kept.append(h)
        h = self.middle_out(self.middle_attention(self.middle_in(h, e)), e)
        up, enlarge = iter(self.up), iter(self.enlarge)
        for level in reversed(range(len(c.multipliers))):
            for _ in range(c.blocks + 1):
                h = next(up)(torch.cat([h, kept.pop()], dim=1), e)
            if level > 0:
                h = next(enlarge)(F.interpolate(h, scale_factor=2, mode="nearest"))
        h = self.head(F.silu(self.norm(h)))
        return rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=c.patch, q=c.patch)
