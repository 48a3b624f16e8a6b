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
from torch.profiler import ProfilerActivity, profile

import shardwright as sw
from harness import main, on_ranks, rank_counts, same_steps, simulated
from shardwright.ir.graph import Graph
from shardwright.ir.layout import Layout
from shardwright.ir.plan import Plan
from shardwright.plan.modes.semi_auto import plan_semi_auto
from shardwright.plan.request import PlanRequest


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


class Convolutions(nn.Module):
    """Batch norm, whose buffers change, and a layer that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.again = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = x + self.again(x)
        return F.cross_entropy(self.head(x.mean((2, 3))), target)


def convolutions_and_buffers() -> None:
    model = Convolutions().double()
    other = copy.deepcopy(model)
    batch = torch.randn(8, 3, 6, 6, dtype=torch.float64), torch.randint(0, 4, (8,))
    loss, gradients = step(sw.AutoParallel(model), model, batch)
    net = sw.AutoParallel(other).recompute(["first", "again", "head"])
    loss_again, gradients_again = step(net, other, batch)
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    for (name, a), (_, b) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert len(net.program.kept) >= 4  # the output of every call


def sliced_activations() -> None:
    """What leaves a block is kept in slices, and gathered once each."""
    whole = sw.Layout((ranks(),), ("tp",))("None", "None", "None")
    between = {"blocks.?": {"in_strategy": (whole,), "out_strategy": (whole,)}}

    def prepare(model: nn.Module) -> Any:
        return sw.AutoParallel(model).shard({**columns_and_rows(model, ranks()), **between})

    bit_equal(prepare, lambda net: net.recompute("blocks.*", recompute_slice_activation=True), Stack(dim=24).double())
    model = Stack(dim=24).double()
    net = prepare(model).recompute("blocks.*", recompute_slice_activation=True)
    (batch,) = batches(1)
    step(net, model, batch)
    with sw.record_communication() as log:
        step(net, model, batch)
    gathers = [e for e in log.events if e.phase == "recompute" and e.edge.endswith("kept in pieces")]
    between_blocks = len(model.blocks) - 1  # the last output is needed whole only where its slices lie in it
    assert len(gathers) in ((0,) if ranks() == 1 else (between_blocks, between_blocks + 1))
    assert len({e.edge for e in gathers}) == len(gathers)


def half_precision() -> None:
    """Under autocast, within the model and around it."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = Stack()

        def forward(self, *batch: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.stack(*batch)

    bit_equal(sw.AutoParallel, lambda net: net.recompute("stack.blocks.*"), Half())
    with torch.autocast("cpu", torch.bfloat16):
        bit_equal(sw.AutoParallel, lambda net: net.recompute("blocks.*"), Stack())


def several_backwards() -> None:
    """The same graph twice, a part of it, and two forwards before their backwards."""
    model = Stack().double()
    net = sw.AutoParallel(model).shard(columns_and_rows(model, ranks())).recompute("blocks.*")
    first, second = batches(2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(5)
    loss = net(*first)
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    part = torch.autograd.grad(loss, parameters[-3:], retain_graph=True)
    twice = torch.autograd.grad(loss, parameters)
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(sw.full_value(a), sw.full_value(b))
    for a, b in zip(once[-3:], part, strict=True):
        assert torch.equal(sw.full_value(a), sw.full_value(b))
    torch.manual_seed(5)
    losses = [net(*first), net(*second)]
    found = [torch.autograd.grad(each, parameters) for each in losses]
    for a, b in zip(once, found[0], strict=True):
        assert torch.equal(sw.full_value(a), sw.full_value(b))


PROGRAMS = (
    blocks_of_data_parallel,
    blocks_of_tensor_parallel,
    parameters_in_pieces,
    trains_as_the_single_device,
    uneven_batch,
    gathers_again,
    operators,
    convolutions_and_buffers,
    sliced_activations,
    half_precision,
    several_backwards,
)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("devices", rank_counts(4, more=(1, 2)))
def test_simulated(program, devices):
    simulated(program, devices)


@pytest.mark.parametrize("ranks", rank_counts(2, more=(3, 4)))
def test_on_real_ranks(ranks):
    on_ranks(__file__, ranks, PROGRAMS)


# -- in one process ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def world(request, monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    torch.manual_seed(0)


def held(forward: Callable[[], Any]) -> int:
    """Bytes that are allocated in the forward pass and are there after it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = forward()
    total = sum(event.self_cpu_memory_usage for event in seen.key_averages())
    assert result is not None
    return total


@pytest.mark.parametrize("devices", [1, 2])
def test_what_is_held_drops_to_what_blocks_take_and_give(devices):
    sw.init(devices=devices)
    model = Stack(layers=4, dim=64, heads=4)
    (batch,) = batches(1, batch=8, length=32)
    found = []
    for net in (sw.AutoParallel(model), sw.AutoParallel(model).recompute("blocks.?")):
        net.compile(*batch)
        found.append(held(lambda net=net: net(*batch)))
    boundary = 8 * 32 * 64 * 4
    around = 4 * 8 * 32 * 32 * 4 + 3 * boundary  # embedding, head and loss
    assert found[1] < 4 * boundary + around < found[0] / 4


def test_an_operators_result_is_not_held():
    sw.init(devices=2)

    class Net(nn.Module):
        def __init__(self, mode: bool):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(16, 512)), nn.Parameter(torch.randn(512, 16))
            self.first, self.act = sw.ops.MatMul().recompute(mode), sw.ops.GeLU().recompute(mode)

        def forward(self, x: Tensor) -> Tensor:
            return (self.act(self.first(x, self.up)) @ self.down).square().mean()

    x = torch.randn(64, 16)
    found = []
    for mode in (False, True):
        net = sw.AutoParallel(Net(mode))
        net.compile(x)
        found.append(held(lambda net=net: net(x)))
    assert found[0] - found[1] == 2 * 64 * 512 * 4  # what goes into gelu, and what comes out


def test_an_operator_that_is_told_otherwise_is_kept_within_its_module():
    sw.init(devices=2)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.soft = sw.ops.Softmax().recompute(False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.soft(x.exp()).sin() * 2).cos()

    model = sw.recompute(nn.Sequential(Net()))
    net = sw.AutoParallel(model)
    net.compile(torch.randn(4, 4, requires_grad=True))
    lines = [line for line in str(net.program).splitlines() if "computed again" in line and "aten." in line]
    again = {line.split("aten.")[1].split("(")[0] for line in lines}
    assert again == {"exp", "sin", "mul", "cos"}


def test_collectives_are_not_done_twice_where_their_results_are_kept():
    sw.init(devices=4)
    model = Stack()
    (batch,) = batches(1)
    counts = {}
    for switch in (None, True, False):
        net = sw.AutoParallel(model).shard(columns_and_rows(model, 4))
        if switch is not None:
            net.recompute("blocks.*", mp_comm_recompute=switch)
        with sw.record_communication() as log:
            step(net, model, batch)
        counts[switch] = [sum(e.phase == phase for e in log.events) for phase in ("forward", "recompute", "backward")]
    assert counts[None][1] == 0
    assert counts[False] == counts[None]
    assert counts[True][1] > 0
    assert counts[True][::2] == counts[None][::2]


def test_nothing_without_gradients():
    sw.init(devices=2)
    model = Stack().eval()
    net = sw.AutoParallel(model).shard(columns_and_rows(model, 2)).recompute("blocks.*")
    (batch,) = batches(1)
    with torch.no_grad(), sw.record_communication() as log:
        assert not net(*batch).requires_grad
    assert not [e for e in log.events if e.phase == "recompute"]
    torch.testing.assert_close(net(*batch), model(*batch))


def test_a_change_in_place_before_the_backward_is_noticed():
    sw.init(devices=2)
    model = Stack()
    net = sw.AutoParallel(model).recompute("blocks.*")
    (batch,) = batches(1)
    loss = net(*batch)
    with torch.no_grad():
        model.blocks[1].up.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_functions_and_train_steps():
    sw.init(devices=2)
    model, (batch,) = Stack().double(), batches(1)
    plain = copy.deepcopy(model)
    net = sw.AutoParallel(lambda *b: model(*b)).recompute("blocks.*")
    torch.manual_seed(1)
    net(*batch).backward()
    assert net.program.kept
    torch.manual_seed(1)
    plain(*batch).backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.allclose(a.grad, b.grad, atol=1e-12)

    def train(ids: Tensor, target: Tensor) -> Tensor:
        loss = model(ids, target)
        loss.backward()
        return loss.detach()

    trained = sw.AutoParallel(train).recompute("blocks.*")
    trained(*batch)
    assert trained.program.kept


def test_automatic():
    sw.init(devices=2)
    model, (batch,) = Stack(layers=4, dim=32), batches(1, batch=8, length=32)
    free = sw.AutoParallel(model)
    free.compile(*batch)
    whole = sw.AutoParallel(model).recompute("blocks.?")
    whole.compile(*batch)
    most, least = free.plan.memory.peak, whole.plan.memory.peak
    assert least < 0.8 * most
    seen = []
    for limit in (most, 0.5 * (most + least), least):
        net = sw.AutoParallel(model).search(memory=limit).recompute("auto")
        net.compile(*batch)
        assert net.plan.memory.peak <= limit
        seen.append(str(net.program).count("computed again"))
    assert seen[0] == 0 < seen[1] < seen[2]
    with pytest.raises(sw.errors.MemoryLimitError, match="no choice of modules fits") as caught:
        sw.AutoParallel(model).recompute("auto", memory=0.3 * least).compile(*batch)
    assert caught.value.least > 0.3 * least
    fastest = sw.AutoParallel(model, "auto").compile(*batch).plan
    searched = sw.AutoParallel(model, "auto").recompute("auto", memory=0.6 * fastest.memory.peak).compile(*batch)
    assert searched.plan.memory.peak <= 0.6 * fastest.memory.peak
    step(searched, model, batch)


def test_bad_arguments():
    net = sw.AutoParallel(Stack())
    (batch,) = batches(1)
    refused: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: sw.ops.MatMul().recompute(1), TypeError, "MatMul.recompute\\(1\\): give True or False"),
        (lambda: sw.ops.MatMul().add_prim_attr("recompute", "yes"), TypeError, "give True or False"),
        (lambda: net.recompute("blocks.*", mp_comm_recompute=1), TypeError, "mp_comm_recompute=1; give True or False"),
        (lambda: net.recompute("blocks.*", use_reentrant=True), ValueError, "use_reentrant is no setting of it; use mp_"),
        (lambda: net.recompute(3), TypeError, "3; give a name pattern"),
        (lambda: net.recompute([3]), TypeError, "3 is a int"),
        (lambda: net.recompute([]), ValueError, "names no module"),
        (lambda: net.recompute("blocks.*", memory="8GB"), ValueError, "decides what 'auto' computes again"),
        (lambda: net.recompute(["auto", "blocks.*"]), ValueError, "'auto' decides for all modules"),
        (lambda: net.recompute("auto", memory="lots"), ValueError, "not a size"),
        (lambda: sw.recompute(torch.relu), TypeError, "give a module; for one operator"),
        (lambda: sw.recompute(nn.Linear(2, 2), early_stop=False), ValueError, "early_stop is no setting"),
        (lambda: sw.recompute(nn.Linear(2, 2), recompute_slice_activation=None), TypeError, "give True or False"),
        (lambda: sw.AutoParallel(Stack()).recompute("layers.*")(*batch), ValueError, "'layers.\\*' at test_recompute"),
        (lambda: sw.AutoParallel(Stack()).recompute(nn.ReLU())(*batch), ValueError, "ReLU at test_recompute"),
        (lambda: sw.AutoParallel(Stack()).recompute("auto")(*batch), ValueError, "has no memory to fit"),
    ]
    for call, kind, message in refused:
        with pytest.raises(kind, match=message) as caught:
            call()
        assert isinstance(caught.value, sw.errors.ShardwrightError)


if __name__ == "__main__":
    main(PROGRAMS)
