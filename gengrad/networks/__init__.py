"""The learned functions: velocity networks ``net(x, t, y=None) -> like x``; importing this registers them all."""

from gengrad.networks.mlp import MLP
from gengrad.networks.unet import UNet

__all__ = ["MLP", "UNet"]
