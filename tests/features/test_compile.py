"""Compiled segments: the numbers of the single device, the schedule's overlap, and nothing compiled twice."""

from __future__ import annotations

import copy
import logging
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import GPT, tensor_parallel_gpt_plan
from test_random_graphs import RandomNet
from torch import nn

import shardwright as sw
from harness import compare, main, on_ranks, same_steps, simulated
from shardwright.errors import ShardwrightError
from shardwright.ir.instructions import Call, FusedMoves, Move, StartMoves
from shardwright.train.compile import compiler as compile_pass
from shardwright.train.compile.segments import Segment, segments_of

FAST = "aot_eager"
FASTEST = "eager"  # traces, and compiles nothing


def tokens(batch=6, length=6, vocab=32, seed=0):
    ids = torch.randint(0, vocab, (batch, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def gpt(layers=2, d=16, vocab=32):
    return GPT(vocab=vocab, d=d, layers=layers, heads=2, length=16).double()


def tensor_parallel(model, size, **options):
    """Megatron's split over all ranks."""
    layout = sw.Layout((size,), ("tp",))
    plan = {name: layout(*axes) for name, axes in tensor_parallel_gpt_plan().items()}
    for block in model.blocks:
        sw.shard(block, (layout("None", "None", "None"),), parameter_plan=plan)
    return sw.AutoParallel(model, **options).dataset_strategy((layout("None", "None"),) * 2)


class Heads(nn.Module):
    """Two losses of one trunk, dropout, and a parameter that only a detached value needs."""

    def __init__(self, d=12):
        super().__init__()
        self.trunk, self.norm = nn.Linear(d, d), nn.LayerNorm(d)
        self.first, self.second, self.watched = nn.Linear(d, 3), nn.Linear(d, 5), nn.Parameter(torch.ones(d))

    def forward(self, x):
        x = F.dropout(F.gelu(self.norm(self.trunk(x))), 0.3, self.training)
        seen = torch.tanh(x * self.watched).sin().detach().mean()
        return self.first(x).tanh().square().mean(), self.second(x).sigmoid().square().mean(), seen


class Convolutions(nn.Module):
    """Batch norm with running statistics, tied and frozen weights, dropout of features."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU())
        self.frozen, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x, target):
        x = F.dropout2d(self.first(x) * 2, 0.2, self.training).mean((2, 3))
        x = F.silu(self.frozen(x)) + F.silu(self.head(x))
        return F.cross_entropy(x @ self.head.weight.t(), target)


@pytest.fixture(autouse=True)
def _everything_compiles(request, caplog):
    """Unless a test is about it, no segment stays as it is."""
    yield
    if "cannot_be_traced" not in request.node.name:
        assert "stays as it is" not in caplog.text


# -- programs, in both worlds ----------------------------------------------------------------------------------------------


def data_parallel_gpt():
    model = gpt()
    net = same_steps(model, [tokens(), tokens(seed=1)], lambda m: sw.AutoParallel(m, "data_parallel", compile=FAST))
    assert segment_calls(net), net.latest.runs


def tensor_parallel_gpt():
    size = world_size()
    same_steps(gpt(d=4 * size), [tokens()], lambda m: tensor_parallel(m, size, compile=FAST))


def dropout_and_two_losses():
    model = Heads().double()
    plain = copy.deepcopy(model)
    net = sw.AutoParallel(model, compile=FAST)
    x = torch.randn(7, 12, dtype=torch.float64)
    for which in (0, 1):  # the other head gets no gradient at all
        for module, call in ((plain, plain), (model, net)):
            module.zero_grad()
            torch.manual_seed(3)
            call(x)[which].backward()
        compare(plain, model, f"loss {which}")
        assert (model.first if which else model.second).weight.grad is None
        assert model.watched.grad is None


def convolutions():
    x, target = torch.randn(7, 2, 5, 5, dtype=torch.float64), torch.randint(0, 4, (7,))
    model = Convolutions().double()
    plain = copy.deepcopy(model)
    net = same_steps(model, [(x, target)] * 2, lambda m: sw.AutoParallel(m, compile=FAST), plain=plain)
    model.eval()
    plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x, target), plain(x, target), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net(x[:4], target[:4]), plain(x[:4], target[:4]), rtol=1e-9, atol=1e-9)  # another shape


def mixed_precision():
    model, inputs = gpt().float(), tokens()
    losses = []
    for options in ({}, {"compile": FAST}):
        net = sw.AutoParallel(copy.deepcopy(model), **options)
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(*inputs)
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(p.grad is not None for p in net.parameters())
    assert abs(losses[0] - losses[1]) < 2e-2, losses


def stored_in_pieces_and_computed_again():
    def prepare(model):
        net = sw.AutoParallel(model, "data_parallel", compile=FAST).hsdp(threshold=0, optimizer_level="level3")
        return net.recompute("*blocks.0")

    net = same_steps(gpt(d=12), [tokens()] * 2, prepare)
    assert segment_calls(net)


def accumulated():
    model = gpt(layers=1)
    plain = copy.deepcopy(model)
    same_steps(sw.GradAccumulation(model, 2), [tokens()], lambda m: sw.AutoParallel(m, compile=FAST), plain=plain)


def inductor():
    model = Heads().double()
    net = sw.AutoParallel(model, compile=True)
    plain, x = copy.deepcopy(model), torch.randn(7, 12, dtype=torch.float64)
    for step in range(2):
        for module, call in ((plain, plain), (model, net)):
            module.zero_grad()
            torch.manual_seed(step)
            sum(call(x)[:2]).backward()
        compare(plain, model)


def world_size():
    from shardwright.world.current import current_world

    return current_world().size


PROGRAMS = (data_parallel_gpt, tensor_parallel_gpt, dropout_and_two_losses, convolutions, mixed_precision, inductor)
PROGRAMS += (stored_in_pieces_and_computed_again, accumulated)


ON_RANKS = (tensor_parallel_gpt, dropout_and_two_losses, convolutions, stored_in_pieces_and_computed_again, inductor)


@pytest.mark.parametrize("program", PROGRAMS)
def test_simulated(program):
    simulated(program, 2)


@pytest.mark.long
def test_on_real_ranks():
    on_ranks(__file__, 3, ON_RANKS)


# -- what is compiled --------------------------------------------------------------------------------------------------------


def segment_calls(net):
    return [i for i in net.latest.runs.instructions if isinstance(i, Call) and hasattr(i.function, "fresh")]


@pytest.fixture
def _two_devices(monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    sw.init(devices=2)


@pytest.mark.usefixtures("_two_devices")
@pytest.mark.parametrize("parallel", ["data", "tensor"])
def test_equal_layers_are_compiled_once(parallel):
    counts = []
    for layers in (4, 6):
        model = gpt(layers)
        net = tensor_parallel(model, 2, compile=FASTEST) if parallel == "tensor" else sw.AutoParallel(model, compile=FASTEST)
        net(*tokens()).backward()
        counts.append((len(net.settings.compiler.functions.known), len(segment_calls(net))))
    assert counts[0][0] == counts[1][0] < 10
    assert counts[0][1] < counts[1][1]


@pytest.mark.usefixtures("_two_devices")
def test_new_shapes_are_planned_and_compiled_anew(caplog):
    model = gpt()
    net = sw.AutoParallel(model, compile=FASTEST)
    for batch in (6, 4):
        ids, target = tokens(batch)
        torch.testing.assert_close(net(ids, target), model(ids, target))


@pytest.mark.usefixtures("_two_devices")
def test_what_cannot_be_traced_stays_as_it_is(caplog, monkeypatch):
    def fails(function, **options):
        def call(*tensors):
            from torch._dynamo import exc

            raise exc.Unsupported("no such thing")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    model = gpt()
    with caplog.at_level(logging.WARNING):
        loss = sw.AutoParallel(model, compile=FAST)(*tokens())
    torch.testing.assert_close(loss, model(*tokens()))
    assert "stays as it is" in caplog.text
    assert "no such thing" in caplog.text


@pytest.mark.usefixtures("_two_devices")
@pytest.mark.parametrize("seed", range(3))
def test_random_graphs(seed):
    rng = random.Random(seed)
    sw.init(devices=rng.choice([2, 3, 4]))
    torch.manual_seed(seed)
    net = RandomNet(rng, world_size(), 7, 5, 6, depth=6)
    x = torch.randn(7, 5, 6, dtype=torch.float64, requires_grad=True)
    report = sw.verify(sw.AutoParallel(net, compile=FAST), x)
    assert report.ok, report


# -- what the order keeps ------------------------------------------------------------------------------------------------------


def flat(items):
    return [i for item in items for i in (item.calls if isinstance(item, Segment) else (item,))]


def positions(instructions):
    return {name: at for at, i in enumerate(instructions) for name in i.outputs}


def travels(move):
    return any(step.kind != "slice" for step in move.redistribution.forward)


def keeps_the_schedule(program, items):
    """Asserts that an order computes the same and overlaps at least as much."""
    old, new = list(program.instructions), flat(items)
    assert sorted(map(id, old)) == sorted(map(id, new))
    made = {i.name for i in program.inputs}
    for instruction in new:
        assert made.issuperset(program.refs_of(instruction)), instruction
        made.update(instruction.outputs)
    sent = [[id(i) for i in order if isinstance(i, StartMoves) or any(map(travels, moves_of(i)))] for order in (old, new)]
    assert sent[0] == sent[1]
    for start in (i for i in old if isinstance(i, StartMoves)):
        before, now = calls_before(old, start), calls_before(new, start)
        assert now <= before, f"{start.moves[0].output} sets out later"
        outputs = {move.output for move in start.moves}
        for end in (i for i in old if isinstance(i, Move) and i.output in outputs and travels(i)):
            assert calls_before(new, end) >= calls_before(old, end), f"{end.output} is waited for earlier"


def moves_of(instruction):
    return instruction.moves if isinstance(instruction, FusedMoves) else (instruction,) if isinstance(instruction, Move) else ()


def calls_before(order, instruction):
    at = next(n for n, i in enumerate(order) if i is instruction)
    return {id(i) for i in order[:at] if isinstance(i, Call)}


def stored_split(model, size, **options):
    """Data parallel, every matrix stored in pieces: gathered before its use, which is worth starting early."""
    layout = sw.Layout((size,), ("dp",))
    matrices = {name: layout("dp", "None") for name, p in model.named_parameters() if p.ndim == 2}
    return sw.AutoParallel(model, "data_parallel", **options).shard(matrices)


@pytest.mark.usefixtures("_two_devices")
@pytest.mark.parametrize("by_rank_groups", [False, True])
@pytest.mark.parametrize("make", [lambda m: sw.AutoParallel(m, "data_parallel"), lambda m: tensor_parallel(m, 2),
                                  lambda m: stored_split(m, 2)])  # fmt: skip
def test_the_order_keeps_the_schedule(make, by_rank_groups):
    with torch.device("meta"):
        model = gpt(layers=6, d=128)
    ids, target = tokens(8, 16)
    compiled = make(model).compile(ids, target).latest
    for bucket in (1 << 16, 1 << 20, 25 << 20):
        items = segments_of(compiled.program, compiled.graph, by_rank_groups, bucket)
        keeps_the_schedule(compiled.program, items)
        assert any(isinstance(i, Segment) for i in items)


def test_the_example(monkeypatch, capsys):
    monkeypatch.setattr("shardwright.world.current._current", [])
    monkeypatch.setattr(sys, "argv", ["compile", "--backend", FAST, "--devices", "3", "--steps", "2"])
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "compile.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert "segment_to_" in text
    assert float(text.rsplit(None, 1)[1]) < 1e-9


# -- refusals ------------------------------------------------------------------------------------------------------------------


def test_errors():
    model = nn.Linear(4, 4)
    with pytest.raises(ShardwrightError, match="compile='gcc' is no backend of torch.compile; give True or one of"):
        sw.AutoParallel(model, compile="gcc")
    with pytest.raises(TypeError, match="compile=3: give True, False or the name"):
        sw.AutoParallel(model, compile=3)
    with pytest.raises(ShardwrightError, match="'stand_alone': such a target runs as it is"):
        sw.AutoParallel(model, "stand_alone", compile=True)
    with pytest.raises(ShardwrightError, match="'hybrid_parallel': such a target runs as it is"):
        sw.AutoParallel(model, "hybrid_parallel", compile=True)


@pytest.mark.usefixtures("_two_devices")
def test_a_missing_compiler_is_named_before_anything_runs(monkeypatch):
    def none():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(compile_pass, "cpp_compiler", none)
    with pytest.raises(ShardwrightError, match="needs a C.. compiler.*install g.."):
        sw.AutoParallel(nn.Linear(4, 4), compile=True)(torch.ones(2, 4))


if __name__ == "__main__":
    main(ON_RANKS)
