"""What the machine has. A leaf: it imports nothing of gengrad."""

from __future__ import annotations

import os


def cpus() -> int:
    """CPUs that this process may use; where the system does not tell (macOS, Windows), those that there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
