"""Which moves share a collective and which start early; the values are those of the plain program either way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.ir.buckets import Buckets, MoveBuckets
from shardwright.ir.instructions import Call, FusedMoves, Move, Ref, StartMoves
from shardwright.partition.overlap import schedule
from shardwright.redistribute.steps import redistribution


class Net(nn.Module):
    """Two large weights, small biases, and a parameter that only one of two outputs needs."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(160, 160), nn.Linear(160, 160)
        self.scale = nn.Parameter(torch.ones(160))
        self.unused = nn.Parameter(torch.ones(160))

    def forward(self, x):
        hidden = self.two(torch.relu(self.one(x))) * self.scale
        return hidden.square().mean(), (hidden * self.unused).mean()


def compiled(**options):
    torch.manual_seed(0)
    net = Net().double()
    parallel = sw.AutoParallel(net)
    return net, parallel, torch.randn(16, 160, dtype=torch.float64)


@pytest.fixture(autouse=True)
def four_ranks():
    sw.init(devices=4)


def test_gradients_travel_together_and_early():
    net, parallel, x = compiled()
    parallel.settings.schedule = MoveBuckets(sums=Buckets(160 * 160 * 8 + 1))
    with sw.record_communication() as log:
        parallel(x)[0].backward()
    program = parallel.program
    (of_outputs,) = [i for i in program.instructions if isinstance(i, FusedMoves)]
    assert of_outputs.outputs == program.outputs, "the two outputs are summed together"
    starts = [i for i in program.instructions if isinstance(i, StartMoves)]
    targets = {i.name: str(i.target) for i in program.inputs}
    assert [[targets[m.source] for m in start.moves] for start in starts] == [
        ["one.weight", "one.bias"],
        ["two.weight", "two.bias", "scale", "unused"],
    ], "filled from the last one read"
    for start in starts:
        begun = program.instructions.index(start)
        outputs = {move.output for move in start.moves}
        ended = [n for n, i in enumerate(program.instructions) if isinstance(i, Move) and i.output in outputs]
        assert len(ended) == len(outputs)
        assert begun < min(ended)
        assert all(program.instructions[n].started for n in ended)
    reduces = [e for e in log.events if e.phase == "backward" and e.kind == "all_reduce"]
    assert len({e.launch for e in reduces}) == 2
    assert {e.shape for e in reduces} == {(160,), (160, 160)}
    assert "start(" in str(program)
    assert "move_together(" in str(program)


def test_what_no_output_needs_gets_no_gradient():
    net, parallel, x = compiled()
    single = copy.deepcopy(net)
    parallel(x)[0].backward()
    single(x)[0].backward()
    assert net.unused.grad is None
    for a, b in zip(net.parameters(), single.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


ONE, ALL = Buckets(0), Buckets(1 << 40)
CHOSEN = (
    MoveBuckets(small=0, large=0, sums=ONE, gathers=ONE),
    MoveBuckets(1 << 30, 1 << 30, sums=ALL),
    MoveBuckets(100, 3000, sums=Buckets(2000)),
    MoveBuckets(sums=Buckets(0, (1, 3))),
)


@pytest.mark.parametrize("chosen", CHOSEN)
def test_values_do_not_depend_on_the_schedule(chosen):
    net, parallel, x = compiled()
    parallel.settings.schedule = chosen
    assert sw.verify(parallel, x)


@pytest.mark.parametrize("places, sizes", [((2, 4), [2, 2, 2]), ((1,), [1, 5]), ((9,), [6])])
def test_a_bucket_has_an_end(places, sizes):
    _, parallel, x = compiled()
    parallel.settings.schedule = MoveBuckets(large=0, sums=Buckets(0, places))
    parallel(x)
    starts = [i for i in parallel.program.instructions if isinstance(i, StartMoves)]
    assert [len(start.moves) for start in starts] == [size for size in sizes if size > 1]


def test_one_gather_at_a_time_is_started_early():
    """Gathers of stored slices: the next may travel while one is used, but not all of them from the beginning."""
    layout = sw.Layout((4,), ("dp",))
    plan = redistribution(layout("dp", "None"), layout("None", "None"), (64, 64), ("dp",))
    instructions: list = []
    for n in range(4):
        instructions.append(Move(f"stored{n}", f"whole{n}", plan, torch.float32, f"linear{n}", "", (0, 0, 0, 0), True))
        args = (Ref(f"x{n}"), Ref(f"whole{n}"))
        instructions.append(Call(torch.nn.functional.linear, args, {}, (f"x{n + 1}",), False, f"linear{n}", (0, 1, 2, 3)))
    found = schedule(instructions, MoveBuckets(small=0, large=0))
    order = [f"start {i.moves[0].output}" if isinstance(i, StartMoves) else i.outputs[0] for i in found]
    assert order == [
        *("whole0", "start whole1", "x1", "whole1", "start whole2", "x2", "whole2", "start whole3", "x3", "whole3", "x4")
    ]
