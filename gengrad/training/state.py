"""State by name: nested dicts of tensors and plain values; that of networks and generators."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)
MARK = "$tensor"  # {"$tensor": name} stands in the JSON tree for a tensor; a state's own keys get a second $


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or fitted; the message says what, where and what to do."""


def split(state: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """``state`` as a JSON tree and its tensors by path (``/networks/velocity/weight``), copied to the CPU.

    Raises ``CheckpointError`` naming the entry that has no exact form in JSON or safetensors. Tied tensors
    are stored once each.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"a state is a dict of names, not a {type(state).__name__}")
    tensors: dict[str, Tensor] = {}
    try:
        return _split(state, "", tensors), tensors
    except RecursionError as error:
        raise CheckpointError("the state is nested too deeply, or contains itself") from error


def _split(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[where] = _plain(value, where)
        return {MARK: where}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not _encodable(key):
                raise CheckpointError(f"state entry {where or '/'} has the key {key!r}: keys are strings (UTF-8)")
        names = {key: key.replace("~", "~0").replace("/", "~1") for key in value}  # two keys never make one path
        return {
            f"${key}" if key.startswith("$") else key: _split(item, f"{where}/{names[key]}", tensors)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_split(item, f"{where}/{i}", tensors) for i, item in enumerate(value)]
    finite = isinstance(value, float) and value - value == 0
    if value is None or finite or type(value) in (bool, int, str):
        return value
    kind = repr(value) if isinstance(value, float) else f"a {type(value).__name__}"
    raise CheckpointError(
        f"state entry {where} is {kind}: allowed are tensors, finite numbers, strings, bools, None, "
        "lists and dicts with string keys. Convert it (a tuple with list(), a NaN to None or to a tensor)."
    )


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _plain(tensor: Tensor, where: str) -> Tensor:
    """The tensor's values alone: on the CPU, contiguous, in memory of their own, as safetensors asks."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"state entry {where} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}: "
            f"allowed are dense tensors of {listed((str(d) for d in DTYPES), most=len(DTYPES))}."
        )
    plain = tensor.detach().resolve_neg().to("cpu").contiguous()
    return plain.clone() if plain.data_ptr() == tensor.data_ptr() else plain


def join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``split``; raises ``CheckpointError`` for a tensor missing, or named twice or never."""
    left = dict(tensors)
    try:
        state = _join(tree, left)
    except KeyError as error:
        raise CheckpointError(f"tensor {error} is named in the state but not stored, or named twice") from error
    except RecursionError as error:
        raise CheckpointError("the state is nested too deeply") from error
    if left:
        raise CheckpointError(f"tensors stored but not named in the state: {listed(left)}")
    return state


def _join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if MARK in tree:
            return tensors.pop(tree[MARK])
        return {k[1:] if k.startswith("$") else k: _join(v, tensors) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_join(item, tensors) for item in tree]
    return tree


def listed(names: Iterable[str], most: int = 8) -> str:
    """The names in order for a message, cut after ``most``."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def differences(expected: Iterable[str], found: Iterable[str]) -> list[str]:
    """What is missing from ``found`` and what it has too much, as texts for ``refuse``."""
    expected, found = set(expected), set(found)
    parts = [("missing", expected - found), ("unknown", found - expected)]
    return [f"{kind}: {listed(names)}" for kind, names in parts if names]


def refuse(what: str, problems: list[str]) -> None:
    """Raise ``CheckpointError`` when there are ``problems``, telling all of them."""
    if problems:
        raise CheckpointError(
            f"the saved {what} does not fit: {'; '.join(problems)}. It was saved by another configuration: "
            "restore that one, or start a new run. Nothing was loaded."
        )


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """A network's parameters and buffers by name, without the prefixes that DDP and ``torch.compile`` add."""
    return dict(unwrapped(module).state_dict())


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside ``DistributedDataParallel`` and ``torch.compile``."""
    while isinstance(module, nn.parallel.DistributedDataParallel) or hasattr(module, "_orig_mod"):
        module = module._orig_mod if hasattr(module, "_orig_mod") else module.module
    return module


def load_module_state(module: nn.Module, state: Mapping[str, Tensor], what: str = "network") -> None:
    """Load a network by name; raises ``CheckpointError`` listing all that is missing, unknown or amiss."""
    module = unwrapped(module)
    own = module.state_dict()
    problems = differences(own, state)
    for name in sorted(own.keys() & state.keys()):
        old, new = own[name], state[name]
        if not isinstance(new, Tensor) or (new.shape, new.dtype) != (old.shape, old.dtype):
            problems.append(f"{name} is {kind_of(new)}, the network has {kind_of(old)}")
    refuse(what, problems)
    module.load_state_dict(dict(state), strict=True)


def kind_of(value: Any) -> str:
    """A value's type and shape for a message."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def generator_state(generator: torch.Generator) -> dict[str, Any]:
    """A generator's state, with the kind of device it runs on."""
    return {"device": generator.device.type, "state": generator.get_state()}


def load_generator_state(generator: torch.Generator, state: Mapping[str, Any]) -> None:
    """Put a generator back; raises ``CheckpointError`` for another device's or no generator's state."""
    if state.get("device") != generator.device.type:
        raise CheckpointError(
            f"the generator's state is of device {state.get('device')!r}, the generator runs on "
            f"{generator.device.type!r}: resume on the kind of device that the run started on."
        )
    try:
        generator.set_state(state["state"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"the saved state is no generator's: {error}") from error


def random_state() -> dict[str, Any]:
    """This process's global generators: torch on the CPU and its CUDA device, and Python's ``random``."""
    version, words, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss], "cuda": None}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_random_state(state: Mapping[str, Any]) -> None:
    """Put this process's global generators back; raises ``CheckpointError`` for an unusable entry."""
    refuse("random state", differences({"torch", "python", "cuda"}, state))
    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the saved random state cannot be used: {error}") from error
