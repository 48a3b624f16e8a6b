"""Lets the ranks of a job share what they know, and fail together; alone, a process is a job of one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from shardwright.errors import CheckpointError, WorldError, listed


def rank_and_size() -> tuple[int, int]:
    """Returns this process's rank and the number of ranks of its job."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def from_all_ranks(value: Any) -> list[Any]:
    """Returns what every rank has, on every rank.

    Args:
        value: what this one has.

    Raises:
        WorldError: a rank has ended, or does not come.
    """
    rank, size = rank_and_size()
    if size == 1:
        return [value]
    found: list[Any] = [None] * size
    try:
        dist.all_gather_object(found, value)
    except RuntimeError as error:  # of gloo or NCCL, in words of their own
        raise WorldError(
            f"rank {rank} saves or loads a checkpoint, and another rank has ended or does not come: every rank calls sw.save "
            f"and sw.load; the output of the others says more ({str(error).splitlines()[0]})"
        ) from error
    return found


def agree(call: str, **given: Any) -> None:
    """Raises one error on all ranks if they give a call different arguments: they would wait for each other in vain.

    Args:
        call: its name.
        given: its arguments, of which what they print as is compared.

    Raises:
        CheckpointError: some differ.
    """
    told = from_all_ranks({name: repr(value) for name, value in given.items()})
    problems = [
        f"rank {rank} calls {call}({name}={own[name]}) and rank 0 {call}({name}={told[0][name]}); give the same on every rank"
        for rank, own in enumerate(told)
        for name in own
        if own[name] != told[0][name]
    ]
    if problems:
        raise CheckpointError(listed(f"{call} cannot begin", problems, "nothing was changed"), tuple(problems))


def in_words(part: Any) -> Any:
    """Returns what of a part must be the same on all ranks: whether it is given, and the names of several."""
    return sorted(map(str, part)) if isinstance(part, Mapping) else None if part is None else "..."


def fail_together(what: str, problems: Sequence[str]) -> None:
    """Raises one error on all ranks if any has a problem.

    Args:
        what: cannot be done.
        problems: of this rank.

    Raises:
        CheckpointError: some rank has a problem; those of all are listed once.
    """
    lines = list(dict.fromkeys(line for own in from_all_ranks(list(problems)) for line in own))
    if lines:
        raise CheckpointError(listed(what, lines, "nothing was changed"), tuple(lines))
