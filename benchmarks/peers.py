"""What others would run: DDP, FSDP2, DTensor tensor parallelism and a hand-written Megatron step, for the same models.

Each function takes a model written for one device and returns what is called for a loss; it may change the model in place.
:class:`PeerCalls` counts the collectives that such a program makes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from handwritten import HandFeedforward, HandGPT, HandMLP
from models import GPT, MLP
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Parallel = tuple[nn.Module, Callable[..., Any]]


def ddp(net: nn.Module) -> Parallel:
    """DistributedDataParallel with its default buckets (1 MB first, then 25 MB), gradients in the buckets' memory."""
    from torch.nn.parallel import DistributedDataParallel

    parallel = DistributedDataParallel(net, gradient_as_bucket_view=True)
    return net, parallel


def fsdp2(net: nn.Module, reshard: bool) -> Parallel:
    """``fully_shard`` of every block, or of every layer of an MLP, and of what is left at the root.

    Args:
        reshard: whether whole parameters are let go after the forward and gathered again in the backward.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in net.blocks if isinstance(net, GPT) else net.layers if isinstance(net, MLP) else net.children():
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard)
    # the root's are the last in the forward and the first in the backward: by default FSDP2 keeps them
    fully_shard(net, mesh=mesh, reshard_after_forward=None if reshard else False)
    return net, net


def dtensor(net: nn.Module) -> Parallel:
    """``parallelize_module`` with Megatron's split, by columns and by rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if isinstance(net, GPT):
        for block in net.blocks:
            columns = dict.fromkeys(("attention.q", "attention.k", "attention.v", "up"), ColwiseParallel())
            parallelize_module(block, mesh, {**columns, "attention.proj": RowwiseParallel(), "down": RowwiseParallel()})
    else:
        names = ("layers.0", "layers.1") if isinstance(net, MLP) else ("up", "down")
        parallelize_module(net, mesh, {names[0]: ColwiseParallel(), names[1]: RowwiseParallel()})
    return net, net


def hand_written(net: nn.Module) -> Parallel:
    """The Megatron step of ``handwritten.py``."""
    make = HandMLP if isinstance(net, MLP) else HandGPT if isinstance(net, GPT) else HandFeedforward
    made = make(net)
    return made, made


# -- counting --------------------------------------------------------------------------------------------------------------

_IN_PLACE, _FUNCTIONAL = torch.ops.c10d, torch.ops._c10d_functional

# Operator -> kind and where the tensors are whose bytes count: those of one rank, before a reduction, after a gather.
_KINDS: dict[Any, tuple[str, int | None]] = {
    _IN_PLACE.allreduce_: ("all_reduce", 0),
    _IN_PLACE._allgather_base_: ("all_gather", 0),
    _IN_PLACE.allgather_: ("all_gather", 0),
    _IN_PLACE.allgather_into_tensor_coalesced_: ("all_gather", 0),
    _IN_PLACE._reduce_scatter_base_: ("reduce_scatter", 1),
    _IN_PLACE.reduce_scatter_: ("reduce_scatter", 1),
    _IN_PLACE.reduce_scatter_tensor_coalesced_: ("reduce_scatter", 1),
    _IN_PLACE.broadcast_: ("broadcast", 0),
    _IN_PLACE.alltoall_base_: ("all_to_all", 1),
    _FUNCTIONAL.all_reduce: ("all_reduce", 0),
    _FUNCTIONAL.all_reduce_: ("all_reduce", 0),
    _FUNCTIONAL.all_gather_into_tensor: ("all_gather", None),
    _FUNCTIONAL.reduce_scatter_tensor: ("reduce_scatter", 0),
    _FUNCTIONAL.all_to_all_single: ("all_to_all", 0),
}


class PeerCalls(TorchDispatchMode):
    """Collectives over all ranks that run within the block, as ``sw.record_communication`` counts them.

    ``counts`` has them by kind; ``bytes`` are those that a rank sends by the bandwidth-optimal algorithm of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls collectives itself; those are counted
        result = func(*args, **(kwargs or {}))
        kind, place = _KINDS.get(getattr(func, "overloadpacket", None), ("", 0))
        if kind:
            self.counts[kind] += 1
            self.bytes += _sent(kind, _nbytes(result if place is None else args[place]), dist.get_world_size())
        return result


def _nbytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(map(_nbytes, tensors))


def _sent(kind: str, whole: int, ranks: int) -> int:
    """Bytes that a rank sends, of a collective whose whole tensor has so many.

    >>> _sent("all_reduce", 100, 4), _sent("all_gather", 100, 4)
    (150, 75)
    """
    if kind == "broadcast":
        return whole
    return (2 if kind == "all_reduce" else 1) * (ranks - 1) * whole // ranks
