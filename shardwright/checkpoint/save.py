"""Saves: a checkpoint in a folder, of which ranks write each slice once."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shardwright.checkpoint.folder import VERSION, begin, finish, sync
from shardwright.checkpoint.pieces import agree, dtype_name, gathered, piece_of, rank
from shardwright.checkpoint.state import STATEFUL, encoded, is_plain, model_tensors, parameters_of, random_state
from shardwright.errors import WorldError


def save(
    folder: str | os.PathLike[str], *, model: nn.Module, optimizer: Any = None, scheduler: Any = None, scaler: Any = None,
    loader: Any = None, step: int = 0, extra: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Writes a checkpoint to ``folder/step-<step>``; every rank makes this call.

    The folder is on a disk that all ranks share. A save that is cut off leaves earlier checkpoints as they were.

    Args:
        folder: where the checkpoints of a run are.
        model: an ``AutoParallel`` or a plain module; its parameters are of their global shapes, ranks write local pieces.
        optimizer: one of ``torch.optim`` over the model's parameters.
        scheduler, scaler, loader: what has a ``state_dict()`` of plain data.
        step: number of the checkpoint; one of the same number is replaced.
        extra: plain data of the user's: what JSON gives back as it was.

    Returns:
        The folder of the checkpoint.

    Raises:
        WorldError: something cannot be kept; all that cannot is listed, and nothing was changed.

    >>> import tempfile
    >>> save(tempfile.mkdtemp(), model=nn.Linear(4, 2), step=7).name
    'step-7'
    """
    problems: list[str] = []
    if type(step) is not int or step < 0:
        problems.append(f"step={step!r}: give an int of at least 0")
    for key, value in (extra or {}).items():
        if type(key) is not str or not is_plain(value):
            problems.append(
                f"extra[{key!r}] is a {type(value).__name__} that JSON does not give back: give numbers, texts, lists"
            )
    tensors = model_tensors(model, problems)
    values: dict[str, Any] = {"step": step, "extra": extra or {}}
    if optimizer is not None:
        values["optimizer"] = _optimizer_state(optimizer, model, tensors, problems)
    for name, part in zip(STATEFUL, (scheduler, scaler, loader), strict=True):
        if part is not None:
            values[name] = _plain_state(name, part, problems)
    tensors["random/cpu"] = random_state()
    pieces = {}
    for name, tensor in tensors.items():
        try:
            pieces[name] = piece_of(name, tensor)
        except WorldError as error:
            problems.append(str(error))
    agree(problems, f"sw.save({os.fspath(folder)!r})")
    written = {name: piece for name, piece in pieces.items() if piece is not None and piece.is_written}
    slices = {name: (piece.bounds, piece.local) for name, piece in written.items()}
    return _write(Path(folder), step, slices, tensors, values)


def _optimizer_state(optimizer: Any, model: nn.Module, tensors: dict[str, Tensor], problems: list[str]) -> dict[str, Any]:
    """Adds the tensors of an optimizer's state to ``tensors``, and returns its plain values."""
    held = parameters_of(optimizer, model, problems)
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        kept = {key: value for key, value in group.items() if key != "params"}
        for key, value in list(kept.items()):
            if isinstance(value, Tensor):
                tensors[f"groups/{number}/{key}"] = kept.pop(key)
            elif not is_plain(plain := encoded(value)):
                problems.append(f"optimizer: {key} of group {number} is a {type(value).__name__}: give a number")
            else:
                kept[key] = plain
        groups.append(kept)
    states: dict[str, dict[str, Any]] = {}
    for name, (parameter, _) in held.items():
        state = optimizer.state.get(parameter, {})
        states[name] = {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
            elif is_plain(encoded(value)):
                states[name][key] = encoded(value)
            else:
                problems.append(f"optimizer: {key} of {name} is a {type(value).__name__}: only tensors and numbers are kept")
    members = {name: number for name, (_, number) in held.items()}
    return {"groups": groups, "members": members, "states": states}


def _plain_state(name: str, part: Any, problems: list[str]) -> Any:
    state = part.state_dict() if hasattr(part, "state_dict") else None
    if state is None:
        problems.append(f"{name}: {type(part).__name__} has no state_dict(): leave it out, and keep its position in extra")
        return None
    kept = {key: encoded(value) for key, value in state.items()}
    for key, value in kept.items():
        if not is_plain(value):
            problems.append(f"{name}: {key} of its state is a {type(state[key]).__name__}: only plain data is kept")
    return kept


def _write(
    folder: Path, step: int, slices: dict[str, tuple[Any, Tensor]], tensors: dict[str, Tensor], values: dict[str, Any]
) -> Path:
    """Writes this rank's file, and on rank 0 the index."""
    partial = None
    problems: list[str] = []
    if rank() == 0:
        try:
            partial = begin(folder, step)
        except OSError as error:
            problems.append(f"the folder cannot be written: {error}")
    agree(problems, f"sw.save({str(folder)!r})")
    partial = folder / f".partial-step-{step}"
    file = f"rank-{rank()}.safetensors"
    entries = {}
    try:
        if slices:
            local = {name: tensor.cpu().contiguous().clone() for name, (_, tensor) in slices.items()}
            save_file(local, partial / file)
            sync(partial / file)
            entries = {
                name: {"file": file, "bounds": slices[name][0], "crc32": checksum(tensor)} for name, tensor in local.items()
            }
    except OSError as error:
        problems.append(f"rank {rank()} cannot write {file}: {error}")
    every = gathered((entries, {name: (list(t.shape), dtype_name(t.dtype)) for name, t in tensors.items()}))
    agree(problems, f"sw.save({str(folder)!r})")
    if rank() == 0:
        index: dict[str, Any] = {"version": VERSION, "tensors": {}, "values": values}
        for _, described in every:
            for name, (shape, dtype) in described.items():
                index["tensors"].setdefault(name, {"shape": shape, "dtype": dtype, "slices": []})
        for entries, _ in every:
            for name, entry in entries.items():
                index["tensors"][name]["slices"].append(entry)
        try:
            finish(partial, index)
        except OSError as error:
            problems.append(f"rank 0 cannot write the index: {error}")
    agree(problems, f"sw.save({str(folder)!r})")
    return folder / f"step-{step}"


def checksum(tensor: Tensor) -> int:
    """Returns the CRC-32 of a contiguous tensor's bytes."""
    if not tensor.numel():
        return 0
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)
