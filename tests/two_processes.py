"""Trains the given config under torchrun and checks that there really were as many processes as asked for."""

import os
import sys

from gengrad.cli import main

if __name__ == "__main__":
    code = main(["train", *sys.argv[1:]])
    import torch.distributed as group

    assert group.is_initialized() and group.get_world_size() == int(os.environ["WORLD_SIZE"]) == 2
    group.destroy_process_group()
    sys.exit(code)
