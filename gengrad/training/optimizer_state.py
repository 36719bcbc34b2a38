"""An optimiser's state by parameter name: PyTorch's own, by position, can fit the wrong network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gengrad.training.state import CheckpointError, differences, kind_of, refuse

Named = Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]]

PER_ELEMENT = frozenset(  # entries that have their parameter's shape, in PyTorch's optimisers
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg"}
    | {"acc_delta", "sum", "prev", "ax"}
)


def optimizer_state_by_name(optimizer: torch.optim.Optimizer, named_parameters: Named) -> dict[str, Any]:
    """The groups' settings and every parameter's state under the parameter's name.

    Raises ``CheckpointError`` for a parameter without a name. Tuples are stored as lists.
    """
    names = _names(optimizer, named_parameters)
    groups = [
        {"parameters": [names[p] for p in group["params"]], "settings": _settings(group)}
        for group in optimizer.param_groups
    ]
    parameters = {}
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        state = _listed_tuples(dict(optimizer.state.get(p, {})))
        strides = {entry: _strides(value) for entry, value in state.items()}
        parameters[names[p]] = {"shape": list(p.shape), "entries": sorted(state), "state": state, "strides": strides}
    return {"optimizer": _class_name(optimizer), "groups": groups, "parameters": parameters}


def load_optimizer_state_by_name(
    optimizer: torch.optim.Optimizer, named_parameters: Named, state: Mapping[str, Any]
) -> None:
    """Load what ``optimizer_state_by_name`` gave, whatever the order of parameters and groups now.

    Raises ``CheckpointError`` listing every missing, unknown or misshapen entry; then nothing was loaded.
    """
    refuse("optimiser state", differences({"optimizer", "groups", "parameters"}, state))
    names = _names(optimizer, named_parameters)
    problems = []
    if state["optimizer"] != _class_name(optimizer):
        problems.append(f"it is of {state['optimizer']}, the optimiser is {_class_name(optimizer)}")
    own = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    problems += [f"parameters {text}" for text in differences(own, state["parameters"])]
    problems += _misfits(own, state["parameters"])
    settings = _matched_settings(optimizer, names, state["groups"], problems)
    refuse("optimiser state", problems)
    _load(optimizer, names, settings, state["parameters"])


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__  # Accelerate wraps it


def _names(optimizer: torch.optim.Optimizer, named_parameters: Named) -> dict[nn.Parameter, str]:
    pairs = named_parameters.items() if isinstance(named_parameters, Mapping) else named_parameters
    names: dict[nn.Parameter, str] = {}
    taken: dict[str, nn.Parameter] = {}
    for name, parameter in pairs:
        if taken.setdefault(name, parameter) is not parameter:
            raise CheckpointError(f"two parameters are named {name!r}: put the network's name before each")
        names.setdefault(parameter, name)  # a tied parameter keeps its first name
    unnamed = [tuple(p.shape) for g in optimizer.param_groups for p in g["params"] if p not in names]
    if unnamed:
        shapes = ", ".join(map(str, unnamed[:8]))
        raise CheckpointError(f"the optimiser holds {len(unnamed)} parameters without a name, of shapes {shapes}")
    return names


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return _listed_tuples({k: v for k, v in group.items() if k not in ("params", "param_names")})


def _listed_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed_tuples(item) for key, item in value.items()}
    return [_listed_tuples(item) for item in value] if isinstance(value, (list, tuple)) else value


def _strides(value: Any) -> Any:
    """The memory order of tensors that are not stored row by row: products with them round otherwise."""
    if isinstance(value, list):
        return [_strides(item) for item in value]
    return list(value.stride()) if isinstance(value, Tensor) and not value.is_contiguous() else None


def _copied(value: Any, strides: Any) -> Any:
    """The saved value, in memory of its own: the optimiser works in place, and what was read stays as it was."""
    if isinstance(value, list):
        return [_copied(item, order) for item, order in zip(value, strides or [None] * len(value))]
    if not isinstance(value, Tensor):
        return value
    return value.clone() if not strides else value.new_empty_strided(value.shape, strides).copy_(value)


def _misfits(own: Mapping[str, nn.Parameter], saved: Mapping[str, Any]) -> list[str]:
    """Parameters of another shape, and entries that are missing, unknown or of a wrong shape."""
    problems = []
    for name in sorted(own.keys() & saved.keys()):
        record, shape = saved[name], list(own[name].shape)
        if record["shape"] != shape:
            problems.append(f"{name} has shape {record['shape']}, the network's has {shape}")
        problems += [f"{name} entries {text}" for text in differences(record["entries"], record["state"])]
        problems += [
            f"{name} {entry} is {kind_of(value)}, its parameter has shape {tuple(shape)}"
            for entry, value in record["state"].items()
            if entry in PER_ELEMENT and isinstance(value, Tensor) and list(value.shape) != shape
        ]
    return problems


def _matched_settings(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], saved: list, problems: list[str]
) -> list[dict[str, Any]]:
    """The saved settings of each of the optimiser's groups, which are matched by the names they hold."""
    by_names = {frozenset(group["parameters"]): group["settings"] for group in saved}
    matched = []
    for number, group in enumerate(optimizer.param_groups):
        settings = by_names.get(frozenset(names[p] for p in group["params"]))
        if settings is None:
            problems.append(f"no saved group holds the same parameters as group {number}")
            continue
        # a schedule may have added settings (initial_lr) that a new optimiser does not have yet
        lacking = _settings(group).keys() - settings.keys() - {"initial_lr"}
        problems += [f"group {number} lacks {key}" for key in sorted(lacking)]
        matched.append({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in settings.items()})
    return matched


def _load(optimizer: torch.optim.Optimizer, names: Mapping, settings: list[dict], saved: Mapping) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    position = {p: i for i, p in enumerate(parameters)}
    groups = [
        {**chosen, "params": [position[p] for p in group["params"]]}
        for chosen, group in zip(settings, optimizer.param_groups)
    ]
    state = {}
    for p, i in position.items():
        record = saved[names[p]]
        strides = record.get("strides", {})
        if record["state"]:
            state[i] = {entry: _copied(value, strides.get(entry)) for entry, value in record["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for p, i in position.items():
        for entry, value in state.get(i, {}).items():
            loaded = optimizer.state[p][entry]
            # load_state_dict casts to the parameter's dtype, which rounds float32 averages
            if isinstance(value, Tensor) and loaded.dtype != value.dtype:
                optimizer.state[p][entry] = value.to(loaded.device)
