"""Trains the given config under torchrun and checks that there really were as many processes as asked for."""

import os
import sys

from gengrad.cli import leave, main

if __name__ == "__main__":
    import accelerate

    worlds, prepare = [], accelerate.Accelerator.prepare

    def noting(self, *things):
        worlds.append(self.num_processes)
        return prepare(self, *things)

    accelerate.Accelerator.prepare = noting
    code = main(["train", *sys.argv[1:]])
    assert code != 0 or set(worlds) == {int(os.environ["WORLD_SIZE"])} == {2}, worlds
    leave(code)
