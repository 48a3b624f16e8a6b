"""Reads the variables that torchrun sets."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shardwright.errors import WorldError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def read_environment(variables: Mapping[str, str]) -> tuple[int, int, int, int]:
    """Reads a launcher's variables: rank, number of ranks, rank on this host, number of ranks on it.

    Without ``LOCAL_RANK`` ranks are taken to go round the devices of each host.

    Raises:
        WorldError: variables are missing or are no ranks.

    >>> job = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    >>> read_environment({**job, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    (3, 4, 1, 2)
    """
    missing = [name for name in _VARIABLES if not variables.get(name)]
    if missing:
        raise WorldError(
            f"no job to join: the environment lacks {', '.join(missing)}. Start the script with 'torchrun "
            "--nproc-per-node 2 script.py', or simulate ranks in this process with sw.init(devices=2)"
        )
    number: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = variables.get(name)
        if text:
            try:
                number[name] = int(text)
            except ValueError:
                raise WorldError(f"the environment variable {name} is {text!r}: it must be a whole number") from None
    rank, size = number["RANK"], number["WORLD_SIZE"]
    if not 0 <= rank < size:
        raise WorldError(f"RANK is {rank} and WORLD_SIZE {size}: ranks must go from 0 to WORLD_SIZE - 1")
    local_rank = number.get("LOCAL_RANK", rank % max(1, torch.cuda.device_count()))
    return rank, size, local_rank, number.get("LOCAL_WORLD_SIZE", local_rank + 1)
