"""Saves models, optimizers and what else training needs, each slice once, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from shardwright.checkpoint.files import checksums, sync, write_file
from shardwright.checkpoint.folder import drop_others, folder_of, prepare, publish, unfinished
from shardwright.checkpoint.index import DTYPES, NAME, Index, StoredSlice, StoredTensor, read_slice
from shardwright.checkpoint.ranks import agree, fail_together, from_all_ranks, in_words, rank_and_size
from shardwright.checkpoint.states import random_state, take_apart
from shardwright.checkpoint.tensors import (
    Bounds,
    Held,
    held,
    key_of,
    named_tensors,
    names_of_parameters,
    on_cpu,
    parts_of,
    stored_slice,
    writers,
)
from shardwright.errors import ArgumentTypeError, CheckpointError

_PATIENCE = 600.0  # seconds in which the first rank waits for what others write
_under_way: dict[Path, SaveHandle] = {}


class SaveHandle:
    """A save that may still be under way.

    Args:
        path: the folder of the step.
    """

    def __init__(self, path: Path):
        self.path = path
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Any) -> None:
        """Starts the work in a thread, which a process waits for before it ends."""

        def run() -> None:
            if sys.platform == "linux":  # where it is of this thread alone: steps go first
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            try:
                work()
            except BaseException as error:  # raised by wait
                self._error = error

        self._thread = threading.Thread(target=run, name="shardwright save")
        self._thread.start()

    @property
    def is_under_way(self) -> bool:
        """True until this rank's part is written; on rank 0 until the checkpoint is whole."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> Path:
        """Waits until the checkpoint is whole.

        Returns:
            The folder of the step.

        Raises:
            CheckpointError: it could not be saved.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise CheckpointError(f"{self.path} was not saved: {error}") from error
        return self.path


def save(
    folder: str | os.PathLike[str], *, model: Any = None, optimizer: Any = None, scheduler: Any = None, scaler: Any = None,
    loader: Any = None, step: int = 0, extra: Mapping[str, Any] | None = None, random: bool = True,
    keep_last: int | None = None, keep_best: int | None = None, metric: float | None = None, asynchronous: bool = False,
) -> SaveHandle:  # fmt: skip
    """Saves what training needs to go on to ``folder/step-<step>``; every rank of a job makes this call.

    Each slice of a tensor is written once, by a rank that holds it. The folder has its name only once it is whole.

    Args:
        folder: of all steps; ranks share it.
        model: a module or net, or a dict of them.
        optimizer: a ``torch.optim`` optimizer, or a dict of them.
        scheduler, scaler, loader: anything with a ``state_dict``.
        step: the step, which names the folder.
        extra: what else is to come back: what JSON can hold.
        random: whether the state of random generators is saved too.
        keep_last: how many of the newest steps stay; ``None``: all.
        keep_best: how many of those with the largest ``metric`` stay besides.
        metric: the number that tells how good this one is.
        asynchronous: whether the call returns as soon as values are copied; ``wait()`` tells when they are saved.

    Returns:
        A handle, whose ``wait()`` returns the folder of the step.

    Raises:
        CheckpointError: something that is no data, or has no values yet; nothing is written.
        TypeError: no module, no optimizer, no int.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(save(folder, model=nn.Linear(2, 2), step=3).wait().name)
    step-3
    """
    place = Path(folder).absolute()
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "loader": loader}
    agree(
        "save", folder=str(place), step=step, asynchronous=asynchronous, keep_last=keep_last, keep_best=keep_best,
        metric=metric, **{name: in_words(own) for name, own in parts.items()},
    )  # fmt: skip
    _check(step, extra, keep_last, keep_best, metric)  # alike on all ranks by now
    late: list[str] = []
    try:
        if place in _under_way:
            _under_way.pop(place).wait()
    except CheckpointError as error:  # on this rank, and the others are told
        late.append(str(error))
    tensors, index, problems = _collect(
        parts_of(model, "model", nn.Module), parts_of(optimizer, "optimizer", Optimizer),
        {name: parts[name] for name in ("scheduler", "scaler", "loader")},
        Index(step, extra=dict(extra or {}), metric=metric), random,
    )  # fmt: skip
    have = {name: held(tensor, name, problems) for name, tensor in tensors.items()}
    problems += [f"{name}: {own.dtype} cannot be saved; convert it" for name, own in have.items() if own.dtype not in DTYPES]
    fail_together("the checkpoint cannot be saved", [*late, *problems])
    chosen, rank = writers(everywhere := from_all_ranks(have)), rank_and_size()[0]
    own = {key_of(name, bounds): (name, bounds) for name, each in chosen.items()
           for bounds, writer in each.items() if writer == rank}  # fmt: skip
    values = {key: on_cpu(tensors[name]) for key, (name, _) in own.items()}
    if asynchronous:
        values = {key: value.clone() for key, value in values.items()}
    errors: list[str] = []
    try:
        if rank == 0:
            prepare(place, step)
    except OSError as error:
        errors.append(str(error))
    fail_together(f"{place} cannot be written to", errors)  # behind it the folder is there
    shapes = {name: each for ranks in everywhere for name, each in ranks.items()}
    handle = SaveHandle(folder_of(place, step))

    def write() -> None:
        _write_own(unfinished(place, step), rank, own, values)
        if rank == 0:
            _finish(place, index, shapes, len(everywhere), keep_last, keep_best)

    if asynchronous:
        _under_way[place] = handle
        handle.start(write)
        return handle
    try:
        write()
    except (OSError, CheckpointError) as error:
        errors.append(str(error))
    fail_together(f"{handle.path} was not saved", errors)
    return handle


def _check(step: Any, extra: Any, keep_last: Any, keep_best: Any, metric: Any) -> None:
    """Refuses a step, extra data, numbers of steps to keep and a metric that are none.

    Args:
        step, extra, keep_last, keep_best, metric: see :func:`save`.

    Raises:
        ArgumentTypeError: one of them is.
    """
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ArgumentTypeError(f"save(step={step!r}): give the number of the step, an int of 0 or more")
    if extra is not None and not isinstance(extra, Mapping):
        raise ArgumentTypeError(f"save(extra={extra!r}): give a dict, such as extra={{'epoch': 3}}")
    for name, count in (("keep_last", keep_last), ("keep_best", keep_best)):
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ArgumentTypeError(f"save({name}={count!r}): give a number of steps, an int above 0")
    if keep_best is not None and metric is None:
        raise ArgumentTypeError(f"save(keep_best={keep_best}) without a metric: give a number, such as metric=-float(loss)")
    if metric is not None and (not isinstance(metric, (int, float)) or isinstance(metric, bool) or math.isnan(metric)):
        raise ArgumentTypeError(f"save(metric={metric!r}): give a number, such as metric=-float(loss)")


def _collect(
    models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer], others: Mapping[str, Any], index: Index, random: bool
) -> tuple[dict[str, Tensor], Index, list[str]]:
    """Collects the tensors and the states of everything; returns them with what is no data.

    Args:
        models, optimizers: by name.
        others: what has a ``state_dict``, by name.
        index: gets the states.
        random: whether to save the state of generators.
    """
    problems: list[str] = []
    tensors, aliases, beside = named_tensors(models)
    index.aliases.update(aliases)
    for name, value in beside.items():
        index.states[name] = take_apart(value, name, tensors, problems)
    for prefix, own in optimizers.items():
        names = names_of_parameters(own, models)
        state, flat = own.state_dict(), [name for group in names for name in group]
        groups = [{**group, "params": names[at]} for at, group in enumerate(state["param_groups"])]
        by_name = {flat[number]: each for number, each in state["state"].items()}
        index.states[prefix] = take_apart({"groups": groups, "state": by_name}, prefix, tensors, problems)
    for name, value in others.items():
        if value is not None and not hasattr(value, "state_dict"):
            problems.append(f"{name} is a {type(value).__name__}, which has no state_dict(); leave it out")
        elif value is not None:
            index.states[name] = take_apart(value.state_dict(), name, tensors, problems)
    if random:
        index.states["random"] = take_apart(random_state(), "random", tensors, problems)
    before = len(tensors)
    extra = take_apart(dict(index.extra), "extra", tensors, problems) or {}
    index.extra.clear()
    index.extra.update(extra)
    if len(tensors) != before:
        problems.append("extra has tensors; save them in a module's buffers, or as lists of numbers")
    return tensors, index, problems


def _write_own(place: Path, rank: int, own: Mapping[str, tuple[str, Bounds]], values: Mapping[str, Tensor]) -> None:
    """Writes the slices of this rank, and then what they are.

    Args:
        place: the folder.
        rank: this rank.
        own: name and bounds of each slice, by key.
        values: the slices.
    """
    file = f"rank-{rank}.safetensors"
    try:
        if values:
            write_file(place / file, values)
        lines = [(name, asdict(stored_slice(file, key, bounds, checksums(values[key])))) for key, (name, bounds) in own.items()]
        _write_text(place / f"rank-{rank}.json", json.dumps(lines))
    except BaseException as error:
        (place / f"rank-{rank}.failed").write_text(str(error))
        raise


def _write_text(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text, "utf-8")
    sync(part)
    part.rename(path)


def _finish(
    folder: Path, index: Index, shapes: Mapping[str, Held], size: int, keep_last: int | None, keep_best: int | None
) -> None:
    """Waits for all ranks' slices, writes the index, and gives the step its name.

    Args:
        folder: of the checkpoints.
        index: without tensors.
        shapes: of all tensors.
        size: number of ranks.
        keep_last, keep_best: see :func:`save`.

    Raises:
        CheckpointError: a rank failed, or has not written in time.
    """
    place, ends = unfinished(folder, index.step), time.monotonic() + _PATIENCE
    slices: dict[str, list[StoredSlice]] = {name: [] for name in shapes}
    for rank in range(size):
        while not (place / f"rank-{rank}.json").exists():
            failed = next(place.glob("*.failed"), None)
            if failed is not None or time.monotonic() > ends:
                why = (
                    failed.read_text() if failed is not None else f"rank {rank} has written nothing for {_PATIENCE:.0f} seconds"
                )
                raise CheckpointError(why)
            time.sleep(0.005)
        for name, value in json.loads((place / f"rank-{rank}.json").read_text("utf-8")):
            slices[name].append(read_slice(value))
        (place / f"rank-{rank}.json").unlink()
    index.tensors.update((name, StoredTensor(own.shape, own.dtype, tuple(slices[name]))) for name, own in shapes.items())
    _write_text(place / NAME, index.to_json())
    publish(folder, index.step)
    drop_others(folder, keep_last, keep_best)
