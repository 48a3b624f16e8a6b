"""Gives all ranks one random state, so that they draw the same masks."""

from __future__ import annotations

import torch
import torch.distributed as dist


def agree_on_random_state(device: torch.device) -> None:
    """Gives every rank the state of rank 0's default generator, that of ``device`` included.

    Random operators draw the single device's numbers on every rank, so all generators must be in the same state. It takes one
    broadcast of about 5 KB per call, of programs that draw only.
    """
    on_gpu = device.type == "cuda"
    state = torch.get_rng_state()
    shared = state.to(device) if on_gpu else state
    dist.broadcast(shared, 0)
    if dist.get_rank():
        torch.set_rng_state(shared.cpu())
    if on_gpu:
        own = torch.cuda.get_rng_state(device).to(device)
        dist.broadcast(own, 0)
        if dist.get_rank():
            torch.cuda.set_rng_state(own.cpu(), device)
