"""``python -m gengrad ...`` is ``gengrad ...``; launchers such as torchrun need it."""

import sys

from gengrad.cli import main

sys.exit(main())
