"""Loads: a checkpoint into a model and what trains it; where anything does not fit, nothing is changed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright.checkpoint.folder import read_index
from shardwright.checkpoint.pieces import Bounds, agree, dtype_name, piece_of
from shardwright.checkpoint.save import checksum
from shardwright.checkpoint.state import STATEFUL, decoded, model_tensors, parameters_of
from shardwright.errors import WorldError
from shardwright.parameters.placements import _alike


class Loaded(NamedTuple):
    """What a checkpoint says beside what was loaded: its step, and the user's extra data."""

    step: int
    extra: dict[str, Any]


def load(
    folder: str | os.PathLike[str], *, model: nn.Module, optimizer: Any = None, scheduler: Any = None, scaler: Any = None,
    loader: Any = None,
) -> Loaded:  # fmt: skip
    """Reads a checkpoint, the newest of a folder or the given one; every rank makes this call.

    Args:
        folder: what :func:`save` wrote to, or one checkpoint in it.
        model: of the same parameters, in any plan and on any number of ranks; global shapes are compared.
        optimizer: of the same kind and groups.
        scheduler, scaler, loader: what has a ``load_state_dict(...)``.

    Returns:
        The step and the extra data that were given to :func:`save`.

    Raises:
        WorldError: names, shapes or dtypes differ, or files are damaged; all is listed, and nothing was changed.

    >>> import tempfile
    >>> from shardwright.checkpoint.save import save
    >>> model, folder = nn.Linear(4, 2), tempfile.mkdtemp()
    >>> _ = save(folder, model=model, step=7, extra={"epoch": 1})
    >>> load(folder, model=model)
    Loaded(step=7, extra={'epoch': 1})
    """
    problems: list[str] = []
    what = f"sw.load({os.fspath(folder)!r})"
    path = Path(folder)
    index: dict[str, Any] = {"tensors": {}, "values": {}}
    try:
        path, index = read_index(path)
    except (WorldError, OSError) as error:
        problems.append(str(error))
    agree(problems, what)
    reader = _Reader(path, index["tensors"], problems)
    parts = dict(zip(STATEFUL, (scheduler, scaler, loader), strict=True))
    plan = _Plan(model, optimizer, {k: v for k, v in parts.items() if v is not None}, index, reader)
    try:
        plan.read()
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OSError) as error:
        problems.append(f"{path} is damaged ({type(error).__name__}: {error}): load another step")
    agree(problems, what)
    plan.carry_out()
    return Loaded(index["values"]["step"], index["values"]["extra"])


class _Reader:
    """Reads slices of a checkpoint's tensors, and notes what is wrong with them."""

    def __init__(self, path: Path, tensors: dict[str, Any], problems: list[str]):
        self.path, self.tensors, self.problems = path, tensors, problems

    def read(self, name: str, bounds: Bounds, dtype: torch.dtype) -> Tensor:
        """Returns one slice of a tensor, which may be made of parts of several stored ones."""
        made = torch.zeros([b - a for a, b in bounds], dtype=dtype)
        missing = made.numel()
        for entry in self.tensors[name]["slices"]:
            stored = [(int(a), int(b)) for a, b in entry["bounds"]]
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, stored, strict=True)]
            if any(a >= b for a, b in common):
                continue
            value = self._stored(name, entry, [b - a for a, b in stored], dtype)
            if value is None:
                return made
            to = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, bounds))
            part = value[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, stored))]
            made[to] = part
            missing -= part.numel()
        if missing:
            self.problems.append(f"{name}: its stored slices do not cover {list(bounds)} exactly once: load another step")
        return made

    def _stored(self, name: str, entry: dict[str, Any], shape: list[int], dtype: torch.dtype) -> Tensor | None:
        file = entry["file"]
        path = self.path / str(file)
        if not re.fullmatch(r"rank-\d+\.safetensors", str(file)) or path.is_symlink() or not path.is_file():
            self.problems.append(f"{name}: {file!r} is no file of this checkpoint: load another step")
            return None
        try:
            with safe_open(path, framework="pt") as opened:
                described = opened.get_slice(name)
                if list(described.get_shape()) != shape:
                    self.problems.append(
                        f"{name}: {file} holds {described.get_shape()}, its index says {shape}: load another step"
                    )
                    return None
                value: Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            self.problems.append(f"{file} is damaged ({error}): load another step")
            return None
        if value.dtype != dtype or checksum(value) != entry["crc32"]:
            self.problems.append(f"{name}: what {file} holds has another dtype or checksum than its index: load another step")
            return None
        return value


class _Plan:
    """What a load does, once everything has been read."""

    def __init__(self, model: nn.Module, optimizer: Any, parts: dict[str, Any], index: dict[str, Any], reader: _Reader):
        self.model, self.optimizer, self.parts, self.reader = model, optimizer, parts, reader
        self.tensors, self.values = index["tensors"], index["values"]
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.states: dict[Any, dict[str, Any]] = {}
        self.groups: list[dict[str, Any]] = []

    def read(self) -> None:
        """Reads and checks all, and changes nothing."""
        problems = self.reader.problems
        step, extra = self.values["step"], self.values["extra"]
        if type(step) is not int or not isinstance(extra, dict):
            problems.append("its index has no step and extra: load another step")
        own = model_tensors(self.model, problems)
        problems += [f"{n[6:]} is in the model and not stored" for n in own if n not in self.tensors]
        problems += [f"{n[6:]} is stored and not in the model" for n in self.tensors if n[:6] == "model/" and n not in own]
        for name, tensor in own.items():
            if name in self.tensors and self._fits(name, tensor):
                piece = piece_of(name, tensor)
                if piece is not None:
                    self.copies.append((piece.local, self.reader.read(name, piece.bounds, tensor.dtype)))
        for name in self.parts:
            if name not in self.values:
                problems.append(f"{name} is not stored: load without {name}=")
        if self.optimizer is not None:
            if "optimizer" in self.values:
                self._read_optimizer(self.values["optimizer"])
            else:
                problems.append("optimizer is not stored: load without optimizer=")
        state = torch.get_rng_state()
        if "random/cpu" in self.tensors and self._fits("random/cpu", state):
            self.random = self.reader.read("random/cpu", ((0, len(state)),), state.dtype)

    def _fits(self, name: str, tensor: Tensor) -> bool:
        stored = self.tensors[name]
        there, here = (stored["dtype"], stored["shape"]), (dtype_name(tensor.dtype), list(tensor.shape))
        if there != here:
            self.reader.problems.append(
                f"{name}: stored as {there[0]} {there[1]}, here {here[0]} {here[1]}: give a model alike"
            )
        return there == here

    def _read_optimizer(self, stored: dict[str, Any]) -> None:
        problems = self.reader.problems
        held = parameters_of(self.optimizer, self.model, problems)
        members = {name: number for name, (_, number) in held.items()}
        if members != stored["members"] or len(stored["groups"]) != len(self.optimizer.param_groups):
            differ = sorted(n for n in {*members, *stored["members"]} if members.get(n) != stored["members"].get(n))
            problems.append(
                f"optimizer: its groups hold other parameters than stored ({', '.join(differ[:5])}): make them alike"
            )
            return
        self.groups = [{key: decoded(value) for key, value in group.items()} for group in stored["groups"]]
        for number, group in enumerate(self.groups):
            group.update(self._of(f"groups/{number}/", None))
        for name, (parameter, _) in held.items():
            state = {key: decoded(value) for key, value in stored["states"][name].items()}
            self.states[parameter] = {**state, **self._of(f"optimizer/{name}/", parameter)}

    def _of(self, prefix: str, parameter: Any) -> dict[str, Any]:
        """Returns the stored tensors of a prefix, those of a distributed parameter's shape distributed like it."""
        made: dict[str, Any] = {}
        for name in [n for n in self.tensors if n.startswith(prefix) and "/" not in n[len(prefix) :]]:
            shape, dtype = self.tensors[name]["shape"], getattr(torch, self.tensors[name]["dtype"])
            if isinstance(parameter, DTensor) and shape == list(parameter.shape):
                piece = piece_of(name, parameter)
                if piece is not None:
                    local = self.reader.read(name, piece.bounds, dtype).to(piece.local.device)
                    made[name[len(prefix) :]] = _alike(parameter, local)
                continue
            if isinstance(parameter, DTensor) and shape:
                self.reader.problems.append(
                    f"{name} {shape} is not of its parameter's shape {list(parameter.shape)}, which is distributed: "
                    "load before the first call of the net"
                )
                continue
            made[name[len(prefix) :]] = self.reader.read(name, tuple((0, n) for n in shape), dtype)
        return made

    def carry_out(self) -> None:
        """Changes the model and what trains it."""
        with torch.no_grad():
            for local, value in self.copies:
                local.copy_(value)
        for group, stored in zip(self.optimizer.param_groups if self.optimizer is not None else [], self.groups):
            group.update(stored)
        for parameter, state in self.states.items():
            if state or parameter in self.optimizer.state:
                self.optimizer.state[parameter] = state
        for name, part in self.parts.items():
            part.load_state_dict({key: decoded(value) for key, value in self.values[name].items()})
        torch.set_rng_state(self.random)
