"""Takes nested states apart into tensors and JSON, and puts them together: data alone, nothing that runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


def take_apart(value: Any, name: str, tensors: dict[str, Tensor], problems: list[str]) -> Any:
    """Returns a state as JSON, with the names of its tensors in their place.

    Args:
        value: the state.
        name: what it is called, from which tensors have their names.
        tensors: gets the tensors.
        problems: gets what is no data.

    >>> found = {}
    >>> take_apart({"step": torch.tensor(3.0), "betas": (0.9, 0.99)}, "optimizer", found, [])
    {'step': {'$tensor': 'optimizer.step'}, 'betas': {'$tuple': [0.9, 0.99]}}
    >>> list(found)
    ['optimizer.step']
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        items = [(key, take_apart(inner, f"{name}.{key}", tensors, problems)) for key, inner in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        if any(not isinstance(key, (str, int)) for key, _ in items):
            problems.append(f"{name} has keys that are neither strings nor numbers; save what can be written as JSON")
        return {_ITEMS: [[key, inner] for key, inner in items]}
    if isinstance(value, (list, tuple)):
        found = [take_apart(inner, f"{name}.{at}", tensors, problems) for at, inner in enumerate(value)]
        return {_TUPLE: found} if isinstance(value, tuple) else found
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # numbers of NumPy
        return value.item()
    problems.append(
        f"{name} is a {type(value).__name__}, which is neither a number, a text nor a tensor; leave it out, or save its parts"
    )
    return None


def put_together(state: Any, tensor: Callable[[str], Any]) -> Any:
    """Returns the state that JSON is of.

    Args:
        state: the JSON.
        tensor: returns the tensor of a name.
    """
    if isinstance(state, list):
        return [put_together(inner, tensor) for inner in state]
    if not isinstance(state, Mapping):
        return state
    if set(state) == {_TENSOR}:
        return tensor(state[_TENSOR])
    if set(state) == {_TUPLE}:
        return tuple(put_together(inner, tensor) for inner in state[_TUPLE])
    if set(state) == {_ITEMS}:
        return {key: put_together(inner, tensor) for key, inner in state[_ITEMS]}
    return {key: put_together(inner, tensor) for key, inner in state.items()}


def random_state() -> dict[str, Any]:
    """Returns the state of torch's generators, and of Python's."""
    found = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def check_random_state(state: Mapping[str, Any]) -> None:
    """Raises an error if a state is none of :func:`random_state`.

    Args:
        state: the state.
    """
    torch.Generator().set_state(state["torch"])
    random.Random().setstate(state["python"])


def set_random_state(state: Mapping[str, Any]) -> None:
    """Sets the generators to a state of :func:`random_state`.

    Args:
        state: the state.
    """
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
