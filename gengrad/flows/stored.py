"""The two files of a stored thing, ``flow.safetensors`` and ``flow.json`` of a flow: no kill loses both.

What else is weights with a description (an autoencoder, a surrogate) is stored likewise, under its own ``kind``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

import gengrad
from gengrad.files import sha256_of, write_atomically, write_json

FORMAT = 1  # of flow.json and its like; raised when an older gengrad could not read a newer file rightly
WAITING = ".next"  # ending of weights whose description is being written


def files_of(directory: Path, kind: str) -> tuple[Path, Path]:
    """(weights, description)."""
    return directory / f"{kind}.safetensors", directory / f"{kind}.json"


def write_stored(directory: Path, description: dict, tensors: dict[str, Tensor], kind: str = "flow") -> None:
    """Writes both files; the description is sealed and holds the SHA-256 of the weights.

    A kill at any moment leaves either the old or the new flow readable: the new weights wait under another name until
    the description that names their hash is on the disk. Raises ``ValueError`` for weights that are not finite.
    """
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        raise ValueError(f"the {kind}'s weights are not finite in {', '.join(broken[:3])}; it is not saved")
    directory.mkdir(parents=True, exist_ok=True)
    weights, file = files_of(directory, kind)
    waiting = weights.with_name(weights.name + WAITING)
    _finish_rename(weights, file, waiting)
    write_atomically(waiting, tensors_to_bytes(tensors))
    description = {"format": FORMAT, "gengrad": gengrad.__version__, **description, "sha256": sha256_of(waiting)}
    write_json(file, {**description, "seal": _seal(description)})
    os.replace(waiting, weights)


def read_stored(directory: Path, kind: str = "flow") -> tuple[dict, dict[str, Tensor]]:
    """The description and the weights; raises ``FileNotFoundError`` or ``ValueError`` with what is wrong."""
    if not directory.is_dir():
        made = "the folder that train.py wrote (its out=...)" if kind == "flow" else f"the folder of a trained {kind}"
        raise FileNotFoundError(f"no {'run ' if kind == 'flow' else ''}folder {str(directory)!r}; give {made}")
    weights, file = files_of(directory, kind)
    if not file.is_file():
        what = "run folder of gengrad" if kind == "flow" else f"folder of a trained {kind}"
        raise FileNotFoundError(
            f"{str(directory)!r} holds no {file.name}: it is no {what}, or its training has not "
            "reached the first checkpoint yet"
        )
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        version, digest, seal = description["format"], description["sha256"], description.pop("seal")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); train again or restore the file") from None
    if version != FORMAT:
        raise ValueError(f"{file} has format {version}; this gengrad {gengrad.__version__} reads {FORMAT}")
    if seal != _seal(description):
        raise ValueError(f"{file} is damaged or was edited; train again or restore the file")
    try:
        return description, load_tensors(_weights(weights, file, digest))
    except SafetensorError as error:
        raise ValueError(f"{directory} does not hold a {kind} that this version can build: {error}") from None


def _seal(description: dict) -> str:
    """SHA-256 of a description, so that an altered solver or time is seen like an altered weight."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _finish_rename(weights: Path, file: Path, waiting: Path) -> None:
    """Completes a save that was killed before its last rename, or the weights of the present description would go."""
    if waiting.exists() and file.exists():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            described = json.loads(file.read_text(encoding="utf-8"))["sha256"]
            if sha256_of(waiting) == described:
                os.replace(waiting, weights)


def _weights(weights: Path, file: Path, digest: str) -> bytes:
    """The weights with the described hash, also when the save that wrote them was killed at its last rename."""
    for path in (weights, weights.with_name(weights.name + WAITING)):
        if path.is_file() and sha256_of(path) == digest:
            return path.read_bytes()
    raise ValueError(
        f"{weights} is missing, truncated or altered: its SHA-256 is not the one in {file.name}. "
        "Resume the training to its next checkpoint to write it again, or restore both files together"
    )
