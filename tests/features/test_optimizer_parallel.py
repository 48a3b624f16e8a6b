"""Optimizer parallel: exact, and what is split where, in both worlds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import shardwright as sw
from harness import main, on_ranks, rank_counts, same_steps, simulated
from networks import Layers, Net, Pictures, ids_batches, image_batches, layer_batches
from shardwright.parameters.placements import layout_of
from shardwright.train.optimizer_parallel.stored import replica_axes
from shardwright.world.current import current_world

LEVELS = ("level1", "level2", "level3")


def every_level():
    for level in LEVELS:
        same_steps(Net(), ids_batches(3), lambda m, at=level: sw.AutoParallel(m).hsdp(threshold=0, optimizer_level=at))


def sizes_that_nothing_divides():
    same_steps(Net(13, 17), ids_batches(2, batch=7), lambda m: sw.AutoParallel(m).hsdp(threshold=0))
    same_steps(Pictures(), image_batches(2), lambda m: sw.AutoParallel(m).hsdp(threshold=0))


def other_optimizers():
    for make in (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, 1e-2),
    ):
        same_steps(Layers(2), layer_batches(3), lambda m: sw.AutoParallel(m).hsdp(threshold=0), make)


def with_tensor_parallel():
    size = current_world().size
    layout = sw.Layout((size // 2, 2), ("dp", "tp")) if size % 2 == 0 else sw.Layout((size,), ("dp",))
    tp = "tp" if size % 2 == 0 else "None"

    def prepare(model):
        own = {"weight": layout(tp, "None"), "bias": layout(tp)}
        plan = {"up": {"in_strategy": (layout("dp", "None", "None"),), "parameter_plan": own}}
        return sw.AutoParallel(model).shard(plan).hsdp(threshold=0)

    same_steps(Net(), ids_batches(2), prepare)


def blocks_of_two():
    if current_world().size % 2:
        return
    net = same_steps(Layers(2), layer_batches(2, batch=16), lambda m: sw.AutoParallel(m).hsdp(2, 0))
    mesh = net.plan.mesh
    weight = net.plan.input_layouts[next(i.value for i in net.latest.graph.inputs if i.target == "layers.0.weight")]
    assert [mesh.count([a]) for a in weight.bound[0]] == [2]
    assert mesh.groups(weight.bound[0])[0] == [0, 1]


def local_pieces():
    """On real ranks the pieces, gradients and states that a rank holds are 1/R of the whole."""
    world = current_world()
    model = Layers(2, width=24)
    net = sw.AutoParallel(model).hsdp(threshold=0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    net(*layer_batches(1, width=24)[0]).backward()
    optimizer.step()
    if world.is_simulated:
        return
    for parameter in net.parameters():
        assert layout_of(parameter).split_axes
        state = optimizer.state[parameter]
        for tensor in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]):
            assert tensor.to_local().numel() * world.size == math.prod(tensor.shape)


PROGRAMS = (every_level, sizes_that_nothing_divides, other_optimizers, with_tensor_parallel, blocks_of_two, local_pieces)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("devices", rank_counts(3, 8, more=(4,)))
def test_simulated(program, devices):
    simulated(program, devices)


@pytest.mark.parametrize("ranks", rank_counts(3, more=(2, 4)))
def test_on_real_ranks(ranks):
    on_ranks(__file__, ranks, PROGRAMS)


# -- what is split and what moves ------------------------------------------------------------------------------------------


class Three(nn.Module):
    """Layers whose parameters are above and below 64 KB."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(784, 512), nn.Linear(512, 512), nn.Linear(512, 10)

    def forward(self, x):
        return self.third(torch.relu(self.second(torch.relu(self.first(x))))).square().mean()


@pytest.fixture
def eight(monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    sw.init(devices=8)


def stored(net, name):
    value = next(i for i in net.latest.graph.inputs if i.target == name)
    return net.plan.input_layouts[value.value].local_shape(value.meta.shape, 0)


def test_small_parameters_stay_whole(eight):
    net = sw.AutoParallel(Three()).hsdp()
    net.compile(torch.randn(32, 784))
    assert stored(net, "first.weight") == (64, 784)
    assert stored(net, "second.weight") == (64, 512)
    assert stored(net, "third.weight") == (10, 512)  # 20 KB
    assert stored(net, "first.bias") == (512,)  # 2 KB


@pytest.mark.parametrize("threshold, split", [(1024, True), (1025, False)])
def test_the_threshold_itself_is_split(eight, threshold, split):
    net = sw.AutoParallel(Three()).hsdp(threshold=threshold)
    net.compile(torch.randn(32, 784))
    assert stored(net, "second.weight") == ((64, 512) if split else (512, 512))  # 1,024 KB


def test_a_parameter_that_asks_not_to_be_split_is_not(eight):
    model = Three()
    model.first.weight.parallel_optimizer = False
    net = sw.AutoParallel(model).hsdp()
    net.compile(torch.randn(32, 784))
    assert stored(net, "first.weight") == (512, 784)
    assert stored(net, "second.weight") == (64, 512)


def moved(net, x):
    with sw.record_communication() as log:
        net(x).backward()
    return sum(e.bytes for e in log.events if len(e.shape) == 2), log


def test_bytes_are_those_of_the_closed_forms(eight):
    """Level 1 and 2 move as much as data parallelism, level 3 half as much again."""
    torch.manual_seed(0)
    x = torch.randn(32, 16, dtype=torch.float64)
    whole, _ = moved(sw.AutoParallel(Layers(4)), x)
    assert whole == 4 * 2 * 7 * 16 * 16 * 8 // 8
    for level, share in (("level1", 1.0), ("level2", 1.0), ("level3", 1.5)):
        bytes_, log = moved(sw.AutoParallel(Layers(4)).hsdp(threshold=1, optimizer_level=level), x)
        assert bytes_ == whole * share, level
        kinds = {e.kind for e in log.events if len(e.shape) == 2}
        assert kinds == {"all_gather", "reduce_scatter"}


def test_blocks_add_an_all_reduce_across_them(eight):
    x = torch.randn(32, 16, dtype=torch.float64)
    net = sw.AutoParallel(Layers(1)).hsdp(4, 1)
    _, log = moved(net, x)
    kinds = [(e.kind, len(e.groups[0])) for e in log.events if e.shape == (16, 16)]
    assert sorted(kinds) == [("all_gather", 4), ("all_reduce", 2), ("reduce_scatter", 4)]
    assert (0, 1, 2, 3) in next(e.groups for e in log.events if e.kind == "all_gather")


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"shard_size": 0}, ValueError, "shard_size=0"),
        ({"shard_size": -2}, ValueError, "shard_size=-2"),
        ({"shard_size": 2.0}, TypeError, "shard_size=2.0"),
        ({"shard_size": True}, TypeError, "whole number"),
        ({"threshold": -1}, ValueError, "threshold=-1"),
        ({"threshold": "64"}, TypeError, "threshold='64'"),
        ({"optimizer_level": "level4"}, ValueError, "level4"),
        ({"optimizer_level": 1}, ValueError, "level"),
    ],
)
def test_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        sw.AutoParallel(Three()).hsdp(**arguments)


def test_more_ranks_a_parameter_than_there_are(eight):
    with pytest.raises(ValueError, match="there are 8 ranks"):
        sw.AutoParallel(Three()).hsdp(shard_size=16)(torch.randn(8, 784))


def test_one_rank_a_parameter_is_ignored_with_a_warning(eight, caplog):
    net = sw.AutoParallel(Three()).hsdp(shard_size=1)
    assert "ignored" in caplog.text
    net.compile(torch.randn(32, 784))
    assert stored(net, "first.weight") == (64, 784)


def test_an_axis_that_is_split_unevenly_cannot_be_cut(eight):
    with pytest.raises(ValueError, match=r"cut the axis.*unevenly"):
        sw.AutoParallel(Layers(1)).hsdp(4, 0)(torch.randn(10, 16, dtype=torch.float64))


def test_replica_axes():
    layout = sw.Layout((2, 1, 3), ("a", "b", "c"))
    assert replica_axes(layout("None", "c")) == ("a",)


if __name__ == "__main__":
    main(PROGRAMS)
