"""Recompute: the same loss and gradients to the bit, less memory kept for the backward, and collectives as asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardwright as sw
from harness import main, on_ranks, same_steps, simulated
from shardwright.capture.graph import Graph
from shardwright.layout import Layout
from shardwright.plan.plan import Plan
from shardwright.plan.semi_auto import PlanRequest, plan_semi_auto


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, drop: float):
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout(drop)
        self.query, self.key, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = torch.softmax(q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5, -1)
        return self.proj((self.drop(scores) @ v).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, drop: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, drop)
        self.up, self.down, self.drop = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class Stack(nn.Module):
    """A language model with tied weights; its result is the loss."""

    def __init__(self, layers: int = 3, dim: int = 16, heads: int = 4, drop: float = 0.1, vocabulary: int = 32):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, drop) for _ in range(layers))
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.blocks[0].up.bias.requires_grad_(False)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), target.flatten())


def batches(count: int = 2, batch: int = 8, length: int = 6) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(7)
    ids = [torch.randint(0, 32, (batch, length + 1), generator=made) for _ in range(count)]
    return [(i[:, :-1].contiguous(), i[:, 1:].contiguous()) for i in ids]


def columns_and_rows(net: nn.Module, ranks: int) -> dict[str, Any]:
    """Megatron's split of every block over all ranks."""
    layout = sw.Layout((ranks,), ("tp",))
    plan: dict[str, Any] = {}
    for name, _ in net.named_parameters():
        module, _, kind = name.rpartition(".")
        if module.endswith(("query", "key", "value", "up")):
            plan[name] = layout("tp", "None") if kind == "weight" else layout("tp")
        elif module.endswith(("proj", "down")) and kind == "weight":
            plan[name] = layout("None", "tp")
    return plan


def in_pieces(net: nn.Module) -> Any:
    """Work split by the batch, and every parameter stored in pieces: what optimizer parallelism does."""

    def plan(graph: Graph, request: PlanRequest) -> Plan:
        made = plan_semi_auto(graph, request)
        axes = made.mesh.axes
        layouts = {
            i.value: Layout.of(made.mesh, [axes, *[()] * (len(i.meta.shape) - 1)])
            for i in graph.inputs
            if i.kind == "parameter"
        }
        return replace(made, input_layouts={**made.input_layouts, **layouts})

    made = sw.AutoParallel(net)
    made.settings.planner = plan
    return made


def ranks() -> int:
    from shardwright.world.current import current_world

    return current_world().size


def step(net: Any, module: nn.Module, batch: Any) -> tuple[Tensor, list[Tensor | None]]:
    torch.manual_seed(3)
    loss = net(*batch)
    loss.backward()
    found = [None if p.grad is None else sw.full_value(p.grad).clone() for p in module.parameters()]
    module.zero_grad()
    return loss.detach(), found


def bit_equal(prepare: Callable[[nn.Module], Any], again: Callable[[Any], Any], model: nn.Module | None = None) -> None:
    """Loss and gradients with and without recomputation have the same bits."""
    model = Stack().double() if model is None else model
    plain, other = model, copy.deepcopy(model)
    (batch,) = batches(1)
    loss, gradients = step(prepare(plain), plain, batch)
    loss_again, gradients_again = step(again(prepare(other)), other, batch)
    assert torch.equal(loss, loss_again)
    for (name, _), a, b in zip(plain.named_parameters(), gradients, gradients_again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b), name


# -- programs -------------------------------------------------------------------------------------------------------------


def blocks_of_data_parallel() -> None:
    bit_equal(sw.AutoParallel, lambda net: net.recompute("blocks.*"))


def blocks_of_tensor_parallel() -> None:
    for switch in (True, False):
        bit_equal(
            lambda m: sw.AutoParallel(m).shard(columns_and_rows(m, ranks())),
            lambda net, switch=switch: net.recompute("blocks.*", mp_comm_recompute=switch),
        )


def parameters_in_pieces() -> None:
    for switch in (True, False):
        bit_equal(
            in_pieces,
            lambda net, switch=switch: net.recompute("blocks.*", parallel_optimizer_comm_recompute=switch),
        )


def trains_as_the_single_device() -> None:
    same_steps(
        Stack(drop=0.0).double(), batches(3),
        lambda m: sw.AutoParallel(m).shard(columns_and_rows(m, ranks())).recompute("blocks.*"),
    )  # fmt: skip


def uneven_batch() -> None:
    same_steps(Stack().double(), batches(2, batch=7, length=5), lambda m: sw.AutoParallel(m).recompute("blocks.*"))


def gathers_again() -> None:
    """What optimizer parallel level 3 asks for: every parameter is gathered once in each direction."""
    model = Stack(layers=2, dim=96).double()
    plain, other = model, copy.deepcopy(model)
    (batch,) = batches(1)
    nets = [sw.AutoParallel(m).hsdp(threshold=0, optimizer_level=f"level{n}") for m, n in ((plain, 1), (other, 3))]
    results = [step(net, m, batch) for net, m in zip(nets, (plain, other), strict=True)]
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    with sw.record_communication() as log:
        step(nets[1], other, batch)
    gathers = [e for e in log.events if e.kind == "all_gather" and e.phase == "recompute"]
    names = [e.edge.split(" ->")[0] for e in gathers]
    assert names or ranks() == 1
    assert len(names) == len(set(names)), names
    forward = {e.edge.split(" ->")[0] for e in log.events if e.kind == "all_gather" and e.phase == "forward"}
    assert set(names) <= forward


def operators() -> None:
    class Net(nn.Module):
        def __init__(self, mode: bool):
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(16, 4))
            self.matmul, self.act = sw.ops.MatMul().recompute(mode), sw.ops.GeLU()
            self.drop = sw.ops.Dropout(p=0.3).recompute(mode)
            self.last = sw.ops.MatMul().shard(((1, ranks()), (ranks(), 1))).recompute(mode)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (self.last(self.drop(self.act(self.matmul(x, self.w1))), self.w2) - y).square().mean()

    torch.manual_seed(1)
    plain = Net(False).double()
    again = Net(True).double()
    again.load_state_dict(plain.state_dict())
    batch = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    a, b = step(sw.AutoParallel(plain), plain, batch), step(sw.AutoParallel(again), again, batch)
    assert torch.equal(a[0], b[0])
    assert all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


PROGRAMS = (
    blocks_of_data_parallel,
    blocks_of_tensor_parallel,
    parameters_in_pieces,
    trains_as_the_single_device,
    uneven_batch,
    gathers_again,
    operators,
)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_simulated(program, devices):
    simulated(program, devices)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_on_real_ranks(ranks):
    on_ranks(__file__, ranks, PROGRAMS)


if __name__ == "__main__":
    main(PROGRAMS)
