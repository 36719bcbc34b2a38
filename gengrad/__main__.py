"""``python -m gengrad ...`` is ``gengrad ...``; launchers such as torchrun need it."""

from gengrad.cli import run

run()
