"""The learned functions: velocities ``net(x, t, y=None)``, plans ``net(x, z)``, convex potentials, operators."""

from gengrad.networks.icnn import ICNN
from gengrad.networks.log_sum_exp import LogSumExp
from gengrad.networks.mlp import MLP
from gengrad.networks.plan import Plan
from gengrad.networks.set_operator import SetOperator
from gengrad.networks.unet import UNet
from gengrad.registry import import_all

import_all(__name__, __path__)  # what has a file is registered, also where no name of it is public

__all__ = ["ICNN", "MLP", "LogSumExp", "Plan", "SetOperator", "UNet"]
