"""python sample.py RUN --n 64 --nfe 5 --out samples.npy: draws samples from a trained run."""

import sys

from gengrad.cli import run

if __name__ == "__main__":
    run(["sample", *sys.argv[1:]])
