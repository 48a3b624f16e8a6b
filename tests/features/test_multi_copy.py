"""Multi-copy: the numbers are those of the single device, and while one copy communicates the other computes."""

from __future__ import annotations

import copy
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardwright as sw
from harness import compare, main, on_ranks, rank_counts, same_steps, simulated
from shardwright.ir.instructions import Call, Move, StartMoves
from shardwright.world.current import current_world

AXIS = "interleaved_parallel"


def batches(count, rows, dim=8, classes=5):
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(rows, 4, dim, generator=generator, dtype=torch.float64),
            torch.randint(0, classes, (rows, 4), generator=generator),
        )
        for _ in range(count)
    ]


class Block(nn.Module):
    """Pre-norm attention and feed-forward, over (batch, sequence, dim)."""

    def __init__(self, dim=8, heads=2, drop=0.0):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        b, s, d = x.shape
        y = self.ln1(x)
        q, k, v = (f(y).view(b, s, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.proj(y.transpose(1, 2).reshape(b, s, d)))
        return x + self.drop(self.down(F.gelu(self.up(self.ln2(x)))))


class Net(nn.Module):
    """Two blocks, a head and a mean loss."""

    def __init__(self, dim=8, classes=5, drop=0.0, heads=12):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim * 3, heads, drop) for _ in range(2))
        self.enter, self.head = nn.Linear(dim, dim * 3), nn.Linear(dim * 3, classes)

    def forward(self, x, target):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), target.flatten())


def tensor_parallel(net, size):
    """Megatron's split of every block, over all ranks."""
    layout = sw.Layout((size,), ("tp",))
    plan = {f"{name}.weight": layout("tp", "None") for name in ("q", "k", "v", "up")}
    plan |= {f"{name}.bias": layout("tp") for name in ("q", "k", "v", "up")}
    plan |= {f"{name}.weight": layout("None", "tp") for name in ("proj", "down")}
    for block in net.blocks:
        sw.shard(block, (layout("None", "None", "None"),), parameter_plan=plan)
    return layout


def in_tensor_parallel(model):
    tensor_parallel(model.network, current_world().size)
    return sw.AutoParallel(model)


def apart(one, other):
    return abs(float(one.detach()) - float(other.detach()))


def double(module):
    return module.double()


# -- the numbers --------------------------------------------------------------------------------------------------------


def tensor_parallel_blocks():
    net = double(sw.MicroBatchInterleaved(Net(), 2))
    parallel = same_steps(net, batches(3, 8), in_tensor_parallel)
    assert any(isinstance(i, StartMoves) for i in parallel.program.instructions)


def against_the_whole_batch():
    """Equal parts: the mean of the means is the mean."""
    whole = double(Net())
    same_steps(sw.MicroBatchInterleaved(copy.deepcopy(whole), 2), batches(2, 6), in_tensor_parallel, plain=whole)


def three_copies_data_parallel():
    same_steps(double(sw.MicroBatchInterleaved(Net(), 3)), batches(2, 15), sw.AutoParallel)


def dropout_masks_are_those_of_the_single_device():
    net = double(sw.MicroBatchInterleaved(Net(drop=0.3), 2))
    parallel = same_steps(net, batches(2, 4), in_tensor_parallel)
    if current_world().size > 1:
        assert any(isinstance(i, StartMoves) for i in parallel.program.instructions)
    net = double(sw.MicroBatchInterleaved(Net(drop=0.3), 2))
    same_steps(net, batches(2, 8), sw.AutoParallel)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 5)

    def forward(self, x, target):
        return F.cross_entropy(self.two(torch.relu(self.norm(self.one(x[:, 0])))), target[:, 0])


def batch_norm_statistics_are_those_of_a_copy():
    net = double(sw.MicroBatchInterleaved(Normed(), 2))
    single = copy.deepcopy(net)
    same_steps(net, batches(3, 12), sw.AutoParallel)
    evaluated = copy.deepcopy(single).eval()
    evaluated.network.norm.running_mean.fill_(0.3)
    same_steps(evaluated, batches(2, 12), sw.AutoParallel)
    batch = batches(1, 12)[0]
    assert apart(single.network(*batch), single(*batch)) > 1e-6, "here copies are not the whole batch"


class Tied(nn.Module):
    """A table that is read as the head too, transposed; a frozen weight; logits and a count beside the loss."""

    def __init__(self):
        super().__init__()
        self.table, self.scale = nn.Embedding(7, 12), nn.Parameter(torch.rand(12))
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, ids, *, weight, name="tied"):
        self.steps += 1
        x = torch.relu(self.frozen(self.table(ids)) * self.scale * weight)
        logits = x @ self.table.weight.t()
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
        return {"loss": loss, "seen": [logits, (logits.argmax(-1) == ids).sum()], "name": name}


def nested_results_and_tied_weights():
    net = double(sw.MicroBatchInterleaved(Tied(), 2))
    single, parallel = copy.deepcopy(net), sw.AutoParallel(net)
    ids, weight = torch.randint(0, 7, (8, 3)), torch.rand(12, dtype=torch.float64)
    expected, got = single(ids, weight=weight), parallel(ids, weight=weight)
    assert got["name"] == "tied"
    assert got["seen"][0].shape == (8, 3, 7)
    assert int(got["seen"][1]) == int(expected["seen"][1])
    assert torch.allclose(got["seen"][0], expected["seen"][0], atol=1e-12)
    for result in (expected, got):
        (result["loss"] + result["seen"][0].square().mean()).backward()
    compare(single, net, "tied")
    assert float(net.network.steps) == 2
    assert sw.full_value(net.network.table.weight.grad).shape == (7, 12)


def sums():
    net = double(sw.MicroBatchInterleaved(Net(), 2, reduction="sum"))
    whole = copy.deepcopy(net.network)
    x, target = batches(1, 4)[0]
    assert apart(in_tensor_parallel(net)(x, target), 2 * whole(x, target)) < 1e-12


def a_batch_that_ranks_hand_in():
    """Each rank hands in its own slice; the copies are those of the whole batch."""
    world = current_world()
    net = double(sw.MicroBatchInterleaved(Net(), 2))
    single = copy.deepcopy(net)
    parallel = sw.AutoParallel(net).dataset_strategy("data_parallel")
    x, target = batches(1, 12)[0]
    own = slice(None) if world.is_simulated else slice(12 // world.size * world.rank, 12 // world.size * (world.rank + 1))
    loss = parallel(x[own], target[own])
    expected = single(x, target)
    loss.backward()
    expected.backward()
    compare(single, net, "own slices")
    assert apart(loss, expected) < 1e-12


def train_step():
    net = double(sw.MicroBatchInterleaved(Net(), 2))
    single = copy.deepcopy(net)
    tensor_parallel(net.network, current_world().size)

    def stepper(model):
        def step(x, target):
            loss, gradients = sw.value_and_grad(model, None, list(model.parameters()))(x, target)
            return loss, gradients

        return step

    x, target = batches(1, 4)[0]
    expected, wanted = stepper(single)(x, target)
    loss, gradients = sw.AutoParallel(stepper(net))(x, target)
    assert apart(loss, expected) < 1e-12
    for a, b in zip(wanted, gradients, strict=True):
        assert torch.allclose(a, sw.full_value(b), atol=1e-12)


def with_optimizer_parallel_and_accumulation():
    """Parameters stored in pieces; two micro-batches of two copies each."""
    net = double(sw.MicroBatchInterleaved(Net(), 2))
    same_steps(net, batches(2, 8), lambda model: in_tensor_parallel(model).hsdp(threshold=0))
    net = double(sw.MicroBatchInterleaved(Net(), 2))
    same_steps(net, batches(1, 8), lambda model: sw.AutoParallel(model).hsdp(threshold=0, optimizer_level="level3"))
    both = double(sw.GradAccumulation(sw.MicroBatchInterleaved(Net(), 2), 2))
    tensor_parallel(both.network.network, current_world().size)
    parallel = same_steps(both, batches(2, 8), sw.AutoParallel)
    assert set(parallel.program.copies.values()) == {0, 1}


def with_recompute():
    """Blocks computed again in the backward pass, their dropout and the copies' collectives with them."""
    net = double(sw.MicroBatchInterleaved(Net(drop=0.2), 2))
    same_steps(net, batches(2, 8), lambda model: in_tensor_parallel(model).recompute("*blocks.*"))
    torch.manual_seed(5)
    net = double(sw.MicroBatchInterleaved(Net(), 2))
    same_steps(net, batches(2, 8), lambda model: in_tensor_parallel(model).hsdp(threshold=0).recompute("*blocks.0"))


# -- the order ----------------------------------------------------------------------------------------------------------


def copies_take_turns():
    """While a tensor of one copy travels, the other's operators run, forward and backward."""
    net = double(sw.MicroBatchInterleaved(Net(), 2))
    parallel = in_tensor_parallel(net)
    x, target = batches(1, 4)[0]
    parallel(x, target).backward()
    with sw.record_communication() as log:
        parallel(x, target).backward()
    owner = parallel.program.copies
    for phase in ("forward", "backward"):
        overlapped = Counter()
        for event in log.events:
            other = {m.copy for m in log.meanwhile(event) if m.kind == "call"} - {owner.get(event.cause), None}
            if event.phase == phase and event.kind == "all_reduce" and event.cause in owner and other:
                assert all(m.phase == phase for m in log.meanwhile(event))
                overlapped[owner[event.cause]] += 1
        assert overlapped[0] >= 3, (phase, overlapped)
        assert overlapped[1] >= 3, (phase, overlapped)


def gradients_are_reduced_once():
    """Data parallel: each parameter's gradient travels once a step, not once a copy."""
    plain, net = double(Tied()), double(sw.MicroBatchInterleaved(Tied(), 2))
    ids, weight = torch.randint(0, 7, (8, 3)), torch.rand(12, dtype=torch.float64)
    counts = []
    for model in (plain, net):
        parallel = sw.AutoParallel(model)
        with sw.record_communication() as log:
            parallel(ids, weight=weight)["loss"].backward()
        shapes = Counter(e.shape for e in log.events if e.phase == "backward" and e.kind == "all_reduce")
        counts.append({shape: shapes[shape] for shape in ((7, 12), (12,))})
    assert counts[0] == counts[1]
    assert counts[0][12,] == (1 if current_world().size > 1 else 0)


# -- the virtual axis ---------------------------------------------------------------------------------------------------


def axis_layout(size):
    """A Layout with the virtual axis over all ranks: data and model parallel where the ranks allow both."""
    data = 2 if size % 2 == 0 and size > 2 else 1
    return sw.Layout((data, size // data, 2), ("dp", "mp", AXIS))


class Chain(nn.Module):
    """Two products with what is between them, a residual around; a loss after them."""

    def __init__(self, interleaved, drop=0.0):
        super().__init__()
        size = current_world().size
        layout = axis_layout(size)
        rows = ("dp", AXIS) if interleaved else "dp"
        self.one, self.two = nn.Parameter(torch.randn(24, 24)), nn.Parameter(torch.randn(24, 24))
        self.norm, self.head, self.drop = nn.LayerNorm(24), nn.Linear(24, 5), nn.Dropout(drop)
        self.matmul1 = sw.ops.MatMul().shard((layout(rows, "None"), layout("None", "mp")))
        self.matmul2 = sw.ops.MatMul().shard((layout(rows, "mp"), layout("mp", "None")))
        self.relu = sw.ops.ReLU().shard((layout(rows, "None"),))

    def forward(self, x, target):
        x = self.relu(x.flatten(0, 1) @ torch.eye(8, 24, dtype=x.dtype))
        y = torch.nn.functional.gelu(self.matmul1(self.norm(x), self.one))
        y = self.drop(y.view(-1, 4, 24).transpose(1, 2)).transpose(1, 2).reshape(-1, 24)
        x = x + self.matmul2(y, self.two)
        x = self.relu(x)
        return F.cross_entropy(self.head(x), target.flatten())


def chain(interleaved, drop=0.0):
    torch.manual_seed(0)
    return double(Chain(interleaved, drop))


def the_axis_changes_no_number():
    for drop in (0.0, 0.25):
        plain, net = chain(False, drop), chain(True, drop)
        parallel = same_steps(net, batches(3, 8), sw.AutoParallel, plain=plain)
        assert set(parallel.program.copies.values()) == {0, 1}
        assert sum(n.op.name == "aten.gelu" for n in parallel.plan.graph.nodes) == 2


def the_axis_makes_copies_take_turns():
    counts = []
    for interleaved in (False, True):
        parallel = sw.AutoParallel(chain(interleaved))
        x, target = batches(1, 8)[0]
        with sw.record_communication() as log:
            parallel(x, target).backward()
        sums = [e for e in log.events if e.kind == "all_reduce" and e.cause.startswith("matmul") and e.phase == "forward"]
        counts.append((len(sums), sum(e.bytes for e in sums)))
    assert counts[1] == (2 * counts[0][0], counts[0][1]), "two of half the size"
    first = sums[0]
    assert {m.copy for m in log.meanwhile(first) if m.kind == "call"} == {1}
    weights = [e for e in log.events if e.phase == "backward" and e.shape == (24, 24)]
    assert len(weights) <= 2, "the gradient of a weight travels once"


def pinned_regions():
    """Between two pins of a value all that can runs in copies."""
    layout = axis_layout(current_world().size)
    pin = layout(("dp", AXIS), "None", "None")

    class Pinned(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x, target):
            x = sw.reshard(self.net.enter(x), pin)
            for block in self.net.blocks:
                x = block(x)
            x = sw.reshard(x, pin)
            return F.cross_entropy(self.net.head(x).flatten(0, 1), target.flatten())

    parallel = same_steps(double(Pinned()), batches(2, 8), sw.AutoParallel)
    copied = Counter(n.op.name for n in parallel.plan.graph.nodes if n.copy is not None)
    assert copied["aten.scaled_dot_product_attention"] == 4
    assert copied["aten.linear"] == 24


PROGRAMS = (
    tensor_parallel_blocks, against_the_whole_batch, three_copies_data_parallel,
    dropout_masks_are_those_of_the_single_device, batch_norm_statistics_are_those_of_a_copy,
    nested_results_and_tied_weights, sums, a_batch_that_ranks_hand_in, train_step,
    with_optimizer_parallel_and_accumulation, with_recompute, copies_take_turns, gradients_are_reduced_once,
    the_axis_changes_no_number, the_axis_makes_copies_take_turns, pinned_regions,
)  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("devices", rank_counts(4, more=(2, 3)))
def test_simulated(program, devices):
    simulated(program, devices)


@pytest.mark.long
@pytest.mark.parametrize("ranks", rank_counts(2, more=(3, 4)))
def test_on_real_ranks(ranks):
    on_ranks(__file__, ranks, PROGRAMS, timeout=500)


# -- plain PyTorch ------------------------------------------------------------------------------------------------------


def test_outside_of_auto_parallel_it_is_plain_pytorch():
    net = sw.MicroBatchInterleaved(nn.Linear(4, 2), 3)
    x = torch.randn(6, 4)
    torch.testing.assert_close(net(x), net.network(x))
    assert [name for name, _ in net.named_parameters()] == ["network.weight", "network.bias"]
    assert "interleave_num=3" in repr(net)


def test_every_copy_gets_what_has_no_batch():
    seen = []

    class Spy(nn.Module):
        def forward(self, x, mask, scale, name):
            seen.append((x.shape, mask.shape, scale, name))
            return x

    sw.MicroBatchInterleaved(Spy(), 2)(torch.ones(6, 2), torch.ones(3), 2.5, "a")
    assert seen == [((3, 2), (3,), 2.5, "a")] * 2


class Returns(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result, self.calls = result, 0

    def forward(self, x):
        self.calls += 1
        return self.result(x, self.calls)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sw.MicroBatchInterleaved(nn.Linear(2, 2), 2.0), TypeError, "2.0"),
        (lambda: sw.MicroBatchInterleaved(nn.Linear(2, 2), True), TypeError, "True"),
        (lambda: sw.MicroBatchInterleaved(nn.Linear(2, 2), 0), ValueError, "interleave_num=0"),
        (lambda: sw.MicroBatchInterleaved(nn.Linear(2, 2), -1), ValueError, "interleave_num=-1"),
        (lambda: sw.MicroBatchInterleaved(torch.relu, 2), TypeError, "nn.Module"),
        (lambda: sw.MicroBatchInterleaved(nn.Linear(2, 2), 2, "max"), ValueError, "'mean' or 'sum'"),
        (lambda: sw.MicroBatchInterleaved(nn.Linear(2, 2), 2)(torch.ones(5, 2)), ValueError, "dim 0 .* size 5, .* 2 copies"),
        (lambda: sw.MicroBatchInterleaved(nn.Linear(2, 2), 2)(torch.tensor(1.0)), ValueError, "no input is a tensor"),
        (lambda: sw.MicroBatchInterleaved(Returns(lambda x, n: n))(torch.ones(4)), ValueError, "1 for one copy and 2"),
        (lambda: sw.MicroBatchInterleaved(Returns(lambda x, n: [x] * n))(torch.ones(4)), ValueError, "other structures"),
        (lambda: sw.MicroBatchInterleaved(Returns(lambda x, n: x[:1]))(torch.ones(4)), ValueError, r"\[1\] for 2 samples"),
        (lambda: sw.MicroBatchInterleaved(Returns(lambda x, n: x.any()))(torch.ones(4)), ValueError, "boolean"),
    ],
)  # fmt: skip
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_batch_that_does_not_divide_is_refused_before_anything_runs():
    def program():
        net = sw.MicroBatchInterleaved(Net(), 2)
        before = [p.clone() for p in net.parameters()]
        with pytest.raises(sw.errors.ShardwrightError, match="dim 0 of the inputs has size 5, which 2 copies"):
            sw.AutoParallel(net.double())(*batches(1, 5)[0])
        assert all(torch.equal(a, b.float()) for a, b in zip(before, net.parameters(), strict=True))

    simulated(program, 2)


# -- the order of instructions ------------------------------------------------------------------------------------------


def test_every_instruction_is_there_once_and_after_what_it_reads():
    def program():
        net = sw.MicroBatchInterleaved(Net(drop=0.2), 3).double()
        parallel = in_tensor_parallel(net)
        parallel(*batches(1, 6)[0])
        made = {i.name for i in parallel.program.inputs}
        started, ended = set(), set()
        for instruction in parallel.program.instructions:
            assert set(parallel.program.refs_of(instruction)) <= made, instruction
            assert not made & set(instruction.outputs)
            made.update(instruction.outputs)
            if isinstance(instruction, StartMoves):
                started.update(move.output for move in instruction.moves)
            elif isinstance(instruction, Move) and instruction.started:
                assert instruction.output in started
                ended.add(instruction.output)
        assert started == ended
        calls = Counter(i.cause for i in parallel.program.instructions if isinstance(i, Call))
        assert all(calls[node.name] for node in parallel.plan.graph.nodes)

    simulated(program, 4)


@pytest.mark.parametrize("mode", ["auto", "recursive_programming", "data_parallel"])
def test_modes_that_plan_by_themselves(mode):
    def program():
        net = sw.MicroBatchInterleaved(Net(), 2).double()
        assert sw.verify(sw.AutoParallel(net, mode), *batches(1, 8)[0])

    simulated(program, 4)


@pytest.mark.parametrize("mode", ["sharding_propagation", "auto", "data_parallel"])
def test_the_axis_in_modes_that_plan_by_themselves(mode):
    def program():
        parallel = sw.AutoParallel(chain(True), mode)
        assert sw.verify(parallel, *batches(1, 8)[0])
        assert set(parallel.program.copies.values()) == (set() if mode == "data_parallel" else {0, 1})

    simulated(program, 4)


def test_the_example(monkeypatch, capsys):
    monkeypatch.setattr("shardwright.world.current._current", [])
    for name in ("RANK", "SHARDWRIGHT_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "multi_copy.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert "6 of 6 collectives travelled while the other copy computed" in text
    assert "matches single device: loss " in text


def test_large_tensors_that_would_start_early_take_turns_too():
    """A schedule of its own starts large ones early; which copy runs meanwhile is decided here."""

    def program():
        torch.manual_seed(0)
        net = sw.MicroBatchInterleaved(Net(dim=16), 2)
        parallel = in_tensor_parallel(net)
        parallel(torch.randn(64, 16, 16), torch.randint(5, (64, 16)))
        starts = [i.moves[0] for i in parallel.program.instructions if isinstance(i, StartMoves) and len(i.moves) == 1]
        assert sum(move.copy is not None for move in starts) >= 12
        assert Counter(move.output for move in starts).most_common(1)[0][1] == 1
        assert sw.verify(parallel, torch.randn(64, 16, 16), torch.randint(5, (64, 16)))

    simulated(program, 4)


def test_without_copies_a_program_is_as_it_was():
    def program():
        parallel = sw.AutoParallel(Net().double())
        with sw.record_communication() as log:
            parallel(*batches(1, 6)[0])
        assert not parallel.program.copies
        assert not any(m.kind == "call" for m in log.timeline)
        assert all(log.timeline[e.started].kind == "start" for e in log.events)

    simulated(program, 4)


# -- Layouts with the virtual axis ----------------------------------------------------------------------------------------


def test_a_device_holds_all_copies():
    layout = sw.Layout((2, 4, 2), ("dp", "mp", AXIS))
    x = layout(("dp", AXIS), "mp")
    assert layout.mesh.size == 8
    assert x.copies == 2
    assert x.local_shape((16, 8), 5) == (8, 2)
    assert x.slices((16, 8)) == layout("dp", "mp").slices((16, 8))
    assert x != layout("dp", "mp")
    assert sw.Layout.parse(str(x)) == x
    assert sw.Layout.parse(str(layout(AXIS, "None"))).copies == 2
    assert str(layout("dp", "mp")) == "dp,mp @ dp=2,mp=4"
    ranks = sw.Layout((2, 2), ("dp", AXIS), [1, 0])("dp>interleaved_parallel")
    assert ranks.local_shape((6,), 1) == (3,)
    assert sw.Layout.parse(str(ranks)) == ranks
    data = x.to_dict()
    assert data["device_matrix"] == (2, 4, 2)
    assert data["tensor_map"] == ((2, 0), 1)
    assert data["alias_name"] == ("dp", "mp", AXIS)
    assert data["interleaved_parallel"] is True
    assert data["rank_list"] == list(range(8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sw.Layout((2, 2), (AXIS, "dp")), "has to be the last alias"),
        (lambda: sw.Layout((2, 2), ("dp", AXIS), [0, 1, 2, 3]), "rank_list has 4 ranks, the device matrix 2"),
        (lambda: sw.Layout((2, 2), ("dp", AXIS))(f"{AXIS}>dp"), "write it last"),
        (lambda: sw.Layout((2, 2), ("dp", AXIS))(AXIS, AXIS), "used for dim 0 and again"),
        (lambda: sw.Layout((2,), ("dp",))(AXIS), "not an alias of this layout"),
        (lambda: sw.AutoParallel(nn.Linear(2, 2)).dataset_strategy((sw.Layout((2, 2), ("dp", AXIS))(("dp", AXIS), "None"),)),
         "not what it is handed"),
    ],
)  # fmt: skip
def test_layouts_that_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def refused(build, message, rows=8):
    def program():
        weight = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))
        layout = sw.Layout((2, 2, 2), ("dp", "mp", AXIS))
        with pytest.raises(sw.errors.ShardwrightError, match=message):
            sw.AutoParallel(build(layout, weight))(torch.randn(rows, 8, dtype=torch.float64))

    simulated(program, 4)


def product(x, weight, *layouts, op=None):
    return (op or sw.ops.MatMul)().shard(layouts)(x, weight)


def test_the_axis_is_refused_where_it_cannot_be():
    batch = ("dp", AXIS)

    def products(*entries):
        return lambda la, w: lambda x: product(x, w, *(la(*e) for e in entries)).relu().sum()

    refused(products(("dp", AXIS), (AXIS, "None")), "dim 1 of input 0.*write it in dim 0")
    refused(products(("dp", "None"), (AXIS, "None")), "dim 0 of input 1, which is summed")
    refused(products((batch, "None"), ("None", "mp")), "size 6, which 2 slices of 2", 6)
    refused(lambda la, w: lambda x: product(x, w, la(AXIS, "None"), la("None", "None")), "the only axis of its Layouts")

    def two_sizes(la, w):
        other = sw.Layout((2, 2, 4), ("dp", "mp", AXIS))
        first = sw.ops.ReLU().shard((la(batch, "None"),))
        second = sw.ops.ReLU().shard((other(batch, "None"),))
        return lambda x: second(first(x @ w)).sum()

    refused(two_sizes, "has size 2 at .* and 4 at")

    def norm(la, w):
        drop = sw.ops.Dropout(p=0.5).shard((la(batch, "None"),))
        return lambda x: drop(x @ w).sum()

    refused(norm, "cannot run in copies: it draws random numbers")

    def parameters(la, w):
        layer = nn.Linear(8, 8).double()
        sw.shard(layer, (la("dp", "None"),), parameter_plan={"weight": la(AXIS, "None")})
        return layer

    refused(parameters, "parameter 'weight'.*cuts a batch")

    def twice(la, w):
        class Inner(nn.Module):
            def __init__(self):
                super().__init__()
                self.w, self.matmul = w, sw.ops.MatMul().shard((la(batch, "None"), la("None", "mp")))

            def forward(self, x):
                return self.matmul(x, self.w).square().mean()

        return sw.MicroBatchInterleaved(Inner(), 2)

    refused(twice, "use one of the two", 16)


def test_a_plan_without_devices_knows_copies():
    layout = sw.Layout((2, 4, 2), ("dp", "mp", AXIS))
    batch = layout(("dp", AXIS), "None")
    relu = sw.ops.ReLU().shard((batch,))
    weight = nn.Parameter(torch.empty(8, 8, device="meta"))
    plan = sw.plan_for(8, lambda x: relu(relu(x) @ weight).sum(), torch.empty(16, 8, device="meta"), mode="semi_auto")
    assert sum(node.copy is not None and node.op.name == "aten.matmul" for node in plan.graph.nodes) == 2


if __name__ == "__main__":
    main(PROGRAMS)
