"""State: names for the tensors and plain values of a model and of what trains it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shardwright.parameters.delayed.recorder import is_delayed
from shardwright.parameters.handles import current

STATEFUL = ("scheduler", "scaler", "loader")


def model_tensors(model: nn.Module, problems: list[str]) -> dict[str, Tensor]:
    """Returns the parameters, tied ones once, and persistent buffers of a model by name."""
    kept = {name: current(p) for name, p in model.named_parameters()}
    skipped = {
        f"{at}.{key}" if at else key for at, module in model.named_modules() for key in module._non_persistent_buffers_set
    }
    kept.update((name, b) for name, b in model.named_buffers() if name not in skipped)
    for name, tensor in kept.items():
        if is_delayed(tensor):
            problems.append(f"{name} has no value yet: call the net on a batch first")
    return {f"model/{name}": tensor for name, tensor in kept.items()}


def parameters_of(optimizer: Any, model: nn.Module, problems: list[str]) -> dict[str, list[Any]]:
    """Returns, by the model's names, the parameters that an optimizer holds."""
    names = {id(current(p)): name for name, p in model.named_parameters()}
    held: dict[str, list[Any]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for place, p in enumerate(group["params"]):
            name = names.get(id(current(p)))
            if name is None:
                problems.append(
                    f"optimizer: parameter {place} of group {number} is not the model's: give the model that has it"
                )
            else:
                held[name] = [p, number]
    return held


def is_plain(value: Any) -> bool:
    """Tells whether JSON gives a value back as it was.

    >>> is_plain({"a": [1, None]}), is_plain({1: 2}), is_plain((1,))
    (True, False, False)
    """
    if isinstance(value, dict):
        return all(type(k) is str and is_plain(v) for k, v in value.items())
    return all(map(is_plain, value)) if type(value) is list else value is None or type(value) in (bool, int, float, str)


def encoded(value: Any) -> Any:
    """Returns plain data of numbers, lists and tuples, from which :func:`decoded` makes the value; itself if it is plain."""
    if type(value) is tuple:
        return {"tuple": [encoded(v) for v in value]}
    return [encoded(v) for v in value] if type(value) is list else value


def decoded(value: Any) -> Any:
    """Undoes :func:`encoded`.

    >>> import json
    >>> decoded(json.loads(json.dumps(encoded((0.9, 0.999)))))
    (0.9, 0.999)
    """
    if isinstance(value, dict) and set(value) == {"tuple"}:
        return tuple(decoded(v) for v in value["tuple"])
    return [decoded(v) for v in value] if isinstance(value, list) else value


def random_state() -> Tensor:
    """Returns the state of torch's generator of the CPU, bytes [n]."""
    return torch.get_rng_state()
