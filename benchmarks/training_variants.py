"""The programs that ``training.py`` races: one model, one batch and one optimizer under every strategy, ours and others'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from memory_truth import images, sequence_parallel, tokens
from models import GPT, MLP
from peers import Parallel, PeerCalls, ddp, dtensor, fsdp2, hand_written
from step_time import ours as tensor_parallel
from torch import Tensor, nn

import shardwright as sw
from shardwright.world.execute.log import CommunicationLog

Inputs = tuple[Tensor, ...]

# Model and the whole batch. The wide one has 38 MB of weights and 32 rows: data parallelism is bound by communication.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "gpt": (GPT, lambda: tokens(256)),
    "wide mlp": (lambda: MLP((1024, 3072, 2048, 10)), lambda: images(32, 1024)),
    "tiny gpt": (lambda: GPT(vocab=64, d=32, layers=2, heads=4, length=16), lambda: tokens(64, 4, 16)),
    "tiny mlp": (lambda: MLP((24, 48, 32, 10)), lambda: images(8, 24)),
}
BUCKET = 4  # MB, of the variants that say how much may share a collective


def _sequence_parallel(net: nn.Module, inputs: Inputs, ranks: int) -> Parallel:
    """Megatron's split; between its pairs of products, blocks and norms are on pieces of the sequence."""
    layout = sw.Layout((ranks,), ("tp",))
    blocks = {"blocks.?": {"in_strategy": (layout("None", "tp", "None"),)}}
    return net, sw.AutoParallel(net).shard({**sequence_parallel(net, layout), **blocks})


def _data_parallel(settings: Callable[[sw.AutoParallel], sw.AutoParallel]) -> Callable[[nn.Module, Inputs, int], Parallel]:
    return lambda net, inputs, ranks: (net, settings(sw.AutoParallel(net, "data_parallel")))


def _sized(*kinds: str) -> dict[str, Any]:
    return {kind: {"mode": "size", "config": BUCKET} for kind in kinds}


def _hsdp(level: str, *fused: str) -> Callable[[nn.Module, Inputs, int], Parallel]:
    def settings(net: sw.AutoParallel) -> sw.AutoParallel:
        return net.hsdp(optimizer_level=level, threshold=threshold(net.module))

    return _data_parallel(lambda net: settings(net).comm_fusion(_sized(*fused)) if fused else settings(net))


def threshold(net: nn.Module) -> int:
    """KB from which optimizer parallelism splits a parameter: the default, but every one of a tiny model."""
    return 64 if sum(p.numel() for p in net.parameters()) > 1 << 20 else 0


OURS: dict[str, Callable[[nn.Module, Inputs, int], Parallel]] = {
    "data parallel": _data_parallel(lambda net: net),
    "data parallel, fused": _data_parallel(lambda net: net.comm_fusion(_sized("allreduce"))),
    "hsdp level1": _hsdp("level1"),
    "hsdp level3": _hsdp("level3"),
    "hsdp level1, fused": _hsdp("level1", "allgather", "reducescatter"),
    "tensor parallel": tensor_parallel,
    "sequence parallel": _sequence_parallel,
    "auto": lambda net, inputs, ranks: (net, sw.AutoParallel(net, "auto")),
}
PEERS: dict[str, Callable[[nn.Module, Inputs, int], Parallel]] = {
    "DDP": lambda net, inputs, ranks: ddp(net),
    "FSDP2": lambda net, inputs, ranks: fsdp2(net, reshard=True),
    "FSDP2, kept": lambda net, inputs, ranks: fsdp2(net, reshard=False),
    "DTensor": lambda net, inputs, ranks: dtensor(net),
    "hand-written": lambda net, inputs, ranks: hand_written(net),
}
SINGLE = "single device"
# Where each rank is handed its rows of the batch, and its loss is their mean.
_OWN_ROWS = ("DDP", "FSDP2", "FSDP2, kept")


def variants(case: str) -> list[str]:
    """Names of all that train the model of a case."""
    return [name for name in (*OURS, *PEERS) if "gpt" in case or name != "sequence parallel"]


def batch(case: str, dtype: torch.dtype = torch.float32) -> Inputs:
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in CASES[case][1]())


def prepared(name: str, case: str, ranks: int, dtype: torch.dtype = torch.float32) -> Parallel:
    """A module whose parameters are to be trained, and what is called for a loss; the same weights every time."""
    torch.manual_seed(1)
    net = CASES[case][0]().to(dtype)
    if name == SINGLE:
        return net, net
    return {**OURS, **PEERS}[name](net, batch(case, dtype), ranks)


def own_inputs(name: str, case: str, ranks: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """What a rank hands in."""
    whole = batch(case, dtype)
    return tuple(t.chunk(ranks)[dist.get_rank()].clone() for t in whole) if name in _OWN_ROWS else whole


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW, the fastest for all. Torch wants parameters of one kind in a list: DTensors, or plain tensors."""
    from torch.distributed.tensor import DTensor

    parameters = list(net.parameters())
    lists = [[p for p in parameters if isinstance(p, DTensor) is wanted] for wanted in (True, False)]
    return torch.optim.AdamW([{"params": each} for each in lists if each], 1e-4, fused=True)


class Trained:
    """A model under one strategy, ready to take turns; ``times`` are those of this rank."""

    def __init__(self, name: str, case: str, ranks: int, dtype: torch.dtype = torch.float32):
        self.name, self.ranks = name, ranks
        self.module, self.call = prepared(name, case, ranks, dtype)
        self.inputs = own_inputs(name, case, ranks, dtype)
        if isinstance(self.call, sw.AutoParallel):
            self.call.compile(*self.inputs)  # replaces the parameters; FSDP2 does it after the first forward
        self.optimizer = adamw(self.module)
        self.losses: list[float] = []
        self.collectives: dict[str, Any] = {}  # of one step
        self.times: list[float] = []
        self.foreign: list[float] = []

    def step(self) -> None:
        """Forward, backward and AdamW; the loss is read."""
        loss = self.call(*self.inputs)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))

    def whole_losses(self) -> list[float]:
        """Losses of the whole batch; every rank asks."""
        found = torch.tensor(self.losses, dtype=torch.float64)
        if self.name in _OWN_ROWS:
            dist.all_reduce(found)
            found /= self.ranks
        return found.tolist()

    def counted_step(self) -> None:
        """Takes a step; notes its collectives by kind, the bytes that a rank sends, and for ours what brings parameters."""
        if self.name in PEERS:
            with PeerCalls() as calls:
                self.step()
            self.collectives = {"counts": dict(calls.counts), "bytes": calls.bytes}
            return
        with sw.record_communication() as log:
            self.step()
        counts = {kind: log.count(kind) for kind in dict.fromkeys(event.kind for event in log.events)}
        self.collectives = {"counts": counts, "bytes": log.bytes(), "of_parameters": _of_parameters(log)}


def _of_parameters(log: CommunicationLog) -> dict[str, tuple[int, int]]:
    """By kind, how many collectives bring parameters or gradients, and how many bytes these have."""
    found: dict[str, tuple[set[int], int]] = {}
    for event in log.events:
        if event.edge.split(" ->")[0].endswith(("_weight", "_bias")):
            launches, size = found.get(event.kind, (set(), 0))
            found[event.kind] = launches | {event.launch}, size + event.dtype.itemsize * torch.Size(event.shape).numel()
    return {kind: (len(launches), size) for kind, (launches, size) in found.items()}
