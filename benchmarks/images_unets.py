"""UNets of gengrad and of its peers with the same number of parameters, and the speed of their training steps."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import nn

from gengrad.networks import UNet


class Peer(nn.Module):
    """Another package's UNet, called like ours."""

    def __init__(self, network: nn.Module, call):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.call(self.network, x, t)


def peers(channels: int, size: int) -> dict:
    """UNets of the same number of parameters, with maps and attention of the same sizes; None where not installed.

    All have 32, 64 and 64 channels, one residual block a level (two on the way up) with time as a scale and a shift,
    and one attention, in the middle.
    """
    ours = {"event_shape": (channels, size, size), "channels": 32, "multipliers": [1, 2, 2]}
    found: dict = {"gengrad": UNet(**ours), "gengrad, channels_last": UNet(**ours, channels_last=True)}
    try:
        from torchcfm.models.unet import UNetModel

        settings = {"channel_mult": [1, 2, 2], "attention_resolutions": "1", "use_scale_shift_norm": True}
        network = UNetModel(dim=(channels, size, size), num_channels=32, num_res_blocks=1, **settings)
        found["torchcfm"] = Peer(network, lambda unet, x, t: unet(t, x))
    except ImportError:
        found["torchcfm"] = None
    try:
        from diffusers import UNet2DModel

        blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
        settings = {"block_out_channels": (32, 64, 64), "layers_per_block": 1, "norm_num_groups": 8, **blocks}
        settings["resnet_time_scale_shift"] = "scale_shift"
        network = UNet2DModel(sample_size=size, in_channels=channels, out_channels=channels, **settings)
        found["diffusers"] = Peer(network, lambda unet, x, t: unet(x, t).sample)
    except ImportError:
        found["diffusers"] = None
    for name in ("torchcfm", "diffusers"):
        if found[name] is not None:  # the same layout for them, for comparison at their best
            last = copy.deepcopy(found[name]).to(memory_format=torch.channels_last)
            found[f"{name}, channels_last"] = ChannelsLast(last)
    return found


class ChannelsLast(nn.Module):
    """A network that is handed its images in channels_last layout."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.network(x.contiguous(memory_format=torch.channels_last), t)


def images_per_second(networks: dict, shape: tuple, bf16: bool, steps: int, batch: int = 64) -> dict[str, float]:
    """Median over steps of forward, backward and Adam, the networks in turn so that all meet the same machine."""
    optimizers = {name: torch.optim.Adam(list(n.parameters())) for name, n in networks.items()}
    x, t = torch.randn(batch, *shape), torch.rand(batch)
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for step in range(steps + 1):
        for name, network in networks.items():
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = (network(x, t) - x).square().mean()
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if step:  # the first one sets up
                seconds[name].append(time.perf_counter() - started)
    return {name: batch / statistics.median(s) for name, s in seconds.items()}
