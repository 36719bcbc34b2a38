"""A population of molecules as tensors: what every metric looks at, found once."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gengrad.molecules.workers import Workers


@dataclass(frozen=True)
class Described:
    """A batch of m SMILES of which n can be read.

    ``valid`` (m,) bool; of the valid ones the canonical ``smiles``, ``molecules`` and ``scaffolds`` (n,) int64 hashes,
    ``fragments`` (any number,) hashes of their BRICS fragments, ``fingerprints`` (n, 2048) uint8 (Morgan, radius 2) and
    ``properties`` {scorer: (n,) float64}, NaN where one has no value.
    """

    valid: Tensor
    smiles: list[str]
    molecules: Tensor
    scaffolds: Tensor
    fragments: Tensor
    fingerprints: Tensor
    properties: dict[str, Tensor]


USUAL = ("qed", "sa", "logp", "weight")


def describers(properties: Sequence[str] = USUAL, processes: int = 1, timeout: float = 10.0) -> Workers:
    """The processes of ``describe``; ``with describers() as workers`` keeps them for many batches."""
    return Workers("describe", {"properties": list(properties)}, processes, timeout)


def describe(
    smiles: Sequence[str],
    properties: Sequence[str] = USUAL,
    processes: int = 1,
    timeout: float = 10.0,
    workers: Workers | None = None,
) -> Described:
    """Parses every SMILES once, in worker processes: one that takes more than ``timeout`` seconds is not valid.

    Valid is one that RDKit reads and that has a heavy atom (an empty one has none). ``workers``: those of
    ``describers`` with the same properties.
    """
    answers = (workers or describers(properties, processes, timeout)).map(list(smiles))
    found = [answer.value for answer in answers if answer.problem is None]
    values = [[math.nan if v is None else v for v in one["values"]] for one in found]
    columns = torch.tensor(values, dtype=torch.float64).reshape(len(values), len(properties)).T
    packed = np.frombuffer(b"".join(base64.b64decode(one["bits"]) for one in found), dtype=np.uint8)
    bits = np.unpackbits(packed, bitorder="little").reshape(len(found), 2048)

    def hashes(texts) -> Tensor:
        return torch.tensor([hashed(text) for text in texts], dtype=torch.long)

    return Described(
        torch.tensor([answer.problem is None for answer in answers], dtype=torch.bool),
        [one["smiles"] for one in found],
        hashes(one["smiles"] for one in found),
        hashes(one["scaffold"] for one in found),
        hashes(fragment for one in found for fragment in one["fragments"]),
        torch.from_numpy(bits),
        dict(zip(properties, columns)),
    )


def hashed(text: str) -> int:
    """63 bits of BLAKE2 of a string; two of a million different ones meet with probability 5e-8."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
