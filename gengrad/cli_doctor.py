"""``gengrad doctor``: what is installed and what the machine offers."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace

import gengrad

PACKAGES = (
    "torch torchvision accelerate torchmetrics torch_fidelity numpy scipy sklearn ot rdkit numba pytorch_optimizer"
)


def doctor(given: Namespace) -> int:
    """``gengrad doctor``: versions and devices, for a bug report."""
    import torch

    print(f"gengrad {gengrad.__version__}, Python {sys.version.split()[0]}, {sys.platform}")
    for name in PACKAGES.split():
        try:
            print(f"  {name:17s} {getattr(importlib.import_module(name), '__version__', 'installed')}")
        except ImportError as error:
            print(f"  {name:17s} missing ({error})")
    cuda = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none"
    print(f"  CUDA devices {cuda}\n  CPU threads  {torch.get_num_threads()}")
    return 0
