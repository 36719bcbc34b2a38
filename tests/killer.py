"""Runs a training command again and again, killing it at random moments, until it finishes by itself.

    python tests/killer.py CONFIG SEED MOST_KILLS LONGEST_SECONDS

Everything is imported once; each attempt is a fork, which starts at once. Prints one JSON line of what happened.
"""

import json
import os
import random
import signal
import sys
import time

import gengrad.config
import gengrad.run  # noqa: F401 - imported here so that the forks need not
from gengrad.cli import main


def attempt(config: str, patience: float | None) -> int | None:
    """Exit code of one attempt, or None when it was killed after ``patience`` seconds."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the fork ends with os._exit
            code = main(["train", config])
        finally:
            os._exit(code)
    ends = None if patience is None else time.monotonic() + patience
    while ends is None or time.monotonic() < ends:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def run(config: str, seed: int, most: int, longest: float) -> dict:
    moments, kills = random.Random(seed), 0
    while kills < most:
        code = attempt(config, moments.uniform(0.05, longest))
        if code is not None:
            return {"kills": kills, "code": code}
        kills += 1
    return {"kills": kills, "code": attempt(config, None)}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))
