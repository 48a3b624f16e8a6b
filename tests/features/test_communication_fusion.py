"""Communication fusion: the same numbers in fewer collectives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import shardwright as sw
from harness import main, on_ranks, rank_counts, same_steps, simulated
from networks import Layers, Net, ids_batches, layer_batches

CONFIGS = (
    {"openstate": False},
    {"allreduce": {"mode": "auto"}},
    {"allreduce": {"mode": "size", "config": 0}, "allgather": {"mode": "auto"}},
    {"allreduce": {"mode": "index", "config": [2, 5]}, "reducescatter": {"mode": "size", "config": 1}},
)


def every_configuration():
    for config in CONFIGS:
        same_steps(Net(), ids_batches(2), lambda m, c=config: sw.AutoParallel(m).comm_fusion(c))
        same_steps(Net(), ids_batches(2), lambda m, c=config: sw.AutoParallel(m).comm_fusion(c).hsdp(threshold=0))


def numbered_parameters():
    model = Layers(4)
    for number, layer in enumerate(model.layers):
        sw.set_comm_fusion(layer, number)
    same_steps(model, layer_batches(2), sw.AutoParallel)


def results_that_play_no_part():
    """A bucket whose members do not all get a gradient."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Layers(2), Layers(2)

        def forward(self, x):
            return self.a(x), self.b(x)

    model = Two()
    net = sw.AutoParallel(model).comm_fusion({"allreduce": {"mode": "auto"}})
    (x,) = layer_batches(1)[0]
    net(x)[0].backward()
    assert all(p.grad is None for p in model.b.parameters())
    expected = torch.autograd.grad(_plain(model)(x)[0], list(_plain.copy.a.parameters()))
    for parameter, gradient in zip(model.a.parameters(), expected):
        torch.testing.assert_close(sw.full_value(parameter.grad), gradient)


def _plain(model):
    """A copy on one device."""
    copy = type(model)()
    for a, b in zip(copy.parameters(), model.parameters()):
        a.data = sw.full_value(b).clone()
    _plain.copy = copy
    return copy


PROGRAMS = (every_configuration, numbered_parameters, results_that_play_no_part)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("devices", rank_counts(3, more=(2,)))
def test_simulated(program, devices):
    simulated(program, devices)


@pytest.mark.parametrize("ranks", rank_counts(3, more=(2,)))
def test_on_real_ranks(ranks):
    on_ranks(__file__, ranks, PROGRAMS)


# -- how many ---------------------------------------------------------------------------------------------------------------


def reductions(net):
    """The tensors of each reduction of parameters' gradients, in order."""
    net(*layer_batches(1)[0]).backward()
    with sw.record_communication() as log:
        net(*layer_batches(1)[0]).backward()
    found: dict[int, list[str]] = {}
    for event in log.events:
        if event.phase == "backward" and event.shape:
            found.setdefault(event.launch, []).append(event.edge)
    return list(found.values())


def test_each_alone(four):
    found = reductions(sw.AutoParallel(Layers(4)).comm_fusion({"openstate": False}))
    assert len(found) == 8
    assert all(len(tensors) == 1 for tensors in found)


def test_all_in_one(four):
    assert [len(tensors) for tensors in reductions(sw.AutoParallel(Layers(4)))] == [8]


@pytest.mark.parametrize("kilobytes", [1, 2, 3, 5, 8, 64])
def test_no_more_than_the_bytes_ask_for(four, kilobytes):
    from dataclasses import replace

    from shardwright.ir.buckets import Buckets, MoveBuckets

    net = sw.AutoParallel(Layers(4))
    net.settings.schedule = replace(MoveBuckets(), sums=Buckets(kilobytes << 10))
    total = sum(p.numel() * 8 for p in net.parameters())
    found = reductions(net)
    assert len(found) <= math.ceil(total / (kilobytes << 10)) + 1
    assert sum(map(len, found)) == 8


def test_indices_say_where_buckets_begin(four):
    found = reductions(sw.AutoParallel(Layers(4)).comm_fusion({"allreduce": {"mode": "index", "config": [2, 5]}}))
    assert [len(tensors) for tensors in found] == [3, 3, 2]  # the last layers' gradients are complete first


def test_numbers_say_who_shares(four):
    model = Layers(4)
    for number, layer in enumerate(model.layers):
        sw.set_comm_fusion(layer, number)
    found = reductions(sw.AutoParallel(model))
    assert [len(tensors) for tensors in found] == [2, 2, 2, 1, 1]  # number 0: each alone
    assert all("layers_3" in tensor for tensor in found[0])


def test_the_first_to_be_complete_go_first(four):
    found = reductions(sw.AutoParallel(Layers(4)).comm_fusion({"openstate": False}))
    places = [int(tensors[0].rpartition("linear")[2].strip("_") or 0) for tensors in found]
    assert places == sorted(places, reverse=True)


@pytest.mark.parametrize(
    "config, error",
    [
        ([], TypeError),
        (None, TypeError),
        ({"broadcast": {"mode": "auto"}}, KeyError),
        ({"allreduce": {}}, KeyError),
        ({"allreduce": {"mode": "best"}}, KeyError),
        ({"allreduce": {"mode": "size"}}, KeyError),
        ({"allreduce": {"mode": "size", "config": -1}}, ValueError),
        ({"allreduce": {"mode": "size", "config": 1.5}}, TypeError),
        ({"allreduce": {"mode": "index", "config": []}}, ValueError),
        ({"allreduce": {"mode": "index", "config": [3, 2]}}, ValueError),
        ({"allreduce": {"mode": "index", "config": [2, 2]}}, ValueError),
        ({"allreduce": {"mode": "index", "config": ["2"]}}, TypeError),
        ({"allgather": {"mode": "index", "config": [2]}}, KeyError),
        ({"openstate": 1}, TypeError),
        ({"allreduce": True}, TypeError),
    ],
)
def test_errors(config, error):
    with pytest.raises(error, match="comm_fusion"):
        sw.AutoParallel(Layers(1)).comm_fusion(config)


@pytest.mark.parametrize("bucket, error", [(-1, ValueError), ("a", TypeError), (True, TypeError)])
def test_bucket_errors(bucket, error):
    with pytest.raises(error):
        sw.set_comm_fusion(Layers(1), bucket)


if __name__ == "__main__":
    main(PROGRAMS)


def test_memory_and_price_follow_the_settings():
    """Buckets cost the copy that travels, and each collective less saves a launch."""
    sw.init(devices=4)

    def plan(config):
        torch.manual_seed(0)
        net = sw.AutoParallel(nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(8)]), "data_parallel")
        return net.comm_fusion(config).compile(torch.randn(16, 512)).plan

    sums = {"one": {"allreduce": {"mode": "auto"}}, "two": {"allreduce": {"mode": "index", "config": [4]}}}
    one, two, eight = plan(sums["one"]), plan(sums["two"]), plan({"openstate": False})
    weights = 8 * 512 * 512 * 4
    assert one.price.seconds < two.price.seconds < eight.price.seconds
    assert one.memory.peak - two.memory.peak > weights / 4
    assert two.memory.peak > eight.memory.peak
