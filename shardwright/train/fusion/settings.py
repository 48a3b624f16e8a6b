"""Communication fusion: which parameters' gradients are reduced, or which are gathered, in one collective.

A message takes a start-up time whatever its size, so few large ones are faster than many small ones, up to the point where
nothing is left to compute while they travel. Without settings, gradients are summed in buckets of 16 MB and split
parameters gathered in buckets of 4 MB; see :mod:`shardwright.partition.overlap` for when buckets start.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import nn

from shardwright.errors import ArgumentTypeError, ShardwrightError
from shardwright.ir.buckets import Buckets, MoveBuckets

MODES = {"allreduce": ("auto", "size", "index"), "allgather": ("auto", "size"), "reducescatter": ("auto", "size")}
AUTO = 64  # MB

# The attribute of a parameter, or of a module for all of its parameters, that says which bucket it is in.
BUCKET = "comm_fusion"


class FusionKeyError(ShardwrightError, KeyError):
    """A key of a fusion configuration that is unknown or missing: both a ``KeyError`` and a :class:`ShardwrightError`."""

    def __str__(self) -> str:
        return str(self.args[0])


def read_fusion(config: Any) -> MoveBuckets:
    """Reads a configuration; see :meth:`shardwright.AutoParallel.comm_fusion`.

    Raises:
        ShardwrightError: a size or an index that makes no sense; ``ArgumentTypeError`` where a type is wrong, and
            :class:`FusionKeyError` where a key is unknown or missing.

    >>> read_fusion({"allreduce": {"mode": "size", "config": 32}}).sums.bytes >> 20
    32
    """
    if not isinstance(config, dict):
        raise ArgumentTypeError(f"comm_fusion({config!r}): give a dict, such as {{'allreduce': {{'mode': 'auto'}}}}")
    unknown = [key for key in config if key not in ("openstate", *MODES)]
    if unknown:
        raise FusionKeyError(f"comm_fusion has the key {unknown[0]!r}: use openstate, {', '.join(MODES)}")
    is_on = config.get("openstate", True)
    if not isinstance(is_on, bool):
        raise ArgumentTypeError(f"comm_fusion: openstate is {is_on!r}; give True or False")
    found = {kind: _read_kind(kind, config[kind]) for kind in MODES if kind in config}
    if not is_on:
        return MoveBuckets(sums=Buckets(), gathers=Buckets())
    default = MoveBuckets()
    # a gathered parameter's gradient comes back in the bucket in which the parameter was gathered
    gathers = [found[kind] for kind in ("allgather", "reducescatter") if kind in found]
    return MoveBuckets(
        sums=found.get("allreduce", default.sums),
        gathers=min(gathers, key=lambda buckets: buckets.bytes) if gathers else default.gathers,
    )


def _read_kind(kind: str, given: Any) -> Buckets:
    if not isinstance(given, dict):
        raise ArgumentTypeError(f"comm_fusion: {kind} is {given!r}; give a dict, {{'mode': 'size', 'config': 32}}")
    if "mode" not in given:
        raise FusionKeyError(f"comm_fusion: {kind} has no 'mode'; give one of {', '.join(map(repr, MODES[kind]))}")
    mode = given["mode"]
    if mode not in MODES[kind]:
        raise FusionKeyError(f"comm_fusion: {kind} has the mode {mode!r}; give one of {', '.join(map(repr, MODES[kind]))}")
    if mode == "auto":
        return Buckets(AUTO << 20)
    if "config" not in given:
        what = "a list of places" if mode == "index" else "a number of MB"
        raise FusionKeyError(f"comm_fusion: {kind} has no 'config'; mode {mode!r} needs {what}")
    value = given["config"]
    return _read_size(kind, value) if mode == "size" else _read_places(kind, value)


def _read_size(kind: str, value: Any) -> Buckets:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentTypeError(f"comm_fusion: {kind}'s config is {value!r}; mode 'size' needs a whole number of MB")
    if value < 0:
        raise ShardwrightError(f"comm_fusion: {kind}'s config is {value} MB; give 0 (every tensor alone) or more")
    return Buckets(value << 20)


def _read_places(kind: str, value: Any) -> Buckets:
    if not isinstance(value, list) or any(not isinstance(i, int) or isinstance(i, bool) for i in value):
        raise ArgumentTypeError(f"comm_fusion: {kind}'s config is {value!r}; mode 'index' needs a list of places, [20, 35]")
    if not value or value[0] <= 0 or any(b <= a for a, b in pairwise(value)):
        raise ShardwrightError(f"comm_fusion: {kind}'s config is {value}; give places above 0, each once, in rising order")
    return Buckets(0, tuple(value))


def set_comm_fusion(module: nn.Module, bucket: int, recurse: bool = True) -> nn.Module:
    """Puts a module's parameters into a bucket that shares its collectives with no other.

    Args:
        module: its parameters get the attribute ``comm_fusion``, which may also be set on a parameter by hand.
        bucket: any number; parameters with the same number share collectives. 0: each is alone.
        recurse: whether parameters of submodules are included.

    Returns:
        The module.

    Raises:
        ShardwrightError: a number below 0; ``ArgumentTypeError`` where it is none.

    >>> layer = set_comm_fusion(nn.Linear(2, 2), 3)
    >>> layer.weight.comm_fusion
    3
    """
    _check_bucket(bucket, "set_comm_fusion")
    for parameter in module.parameters(recurse):
        setattr(parameter, BUCKET, bucket)
    return module


def _check_bucket(bucket: Any, where: str) -> None:
    if not isinstance(bucket, int) or isinstance(bucket, bool):
        raise ArgumentTypeError(f"{where}: the bucket is {bucket!r}; give a whole number")
    if bucket < 0:
        raise ShardwrightError(f"{where}: the bucket is {bucket}; give a number above 0, or 0 for a collective a parameter")


def buckets_of(inputs: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Returns the bucket of every input of a graph whose parameter has one.

    Args:
        inputs: of the graph.
        parameters: the module's, by qualified name.
    """
    found = {}
    for given in inputs:
        number = getattr(parameters.get(str(given.target)), BUCKET, None) if given.kind == "parameter" else None
        if number is not None:
            _check_bucket(number, f"parameter {given.target!r}")
            found[given.value] = number
    return found
