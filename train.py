"""python train.py CONFIG [key=value ...]: trains a run, or goes on with it where its folder holds a checkpoint."""

import sys

from gengrad.cli import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
