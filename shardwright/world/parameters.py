"""Distributed parameters (to be replaced as a whole by its author)."""
from typing import Any


def current(parameter: Any) -> Any:
    return parameter


def distribute_parameters(root: Any, layouts: Any, device: Any) -> Any:
    raise NotImplementedError


def enter(parameters: Any) -> Any:
    raise NotImplementedError
