"""The learned functions: velocities ``net(x, t, y=None)``, plans ``net(x, z)``; importing this registers them all."""

from gengrad.networks.mlp import MLP
from gengrad.networks.plan import Plan
from gengrad.networks.unet import UNet

__all__ = ["MLP", "Plan", "UNet"]
