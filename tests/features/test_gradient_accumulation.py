"""Gradient accumulation: one step of several parts is one step of the whole batch."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

import shardwright as sw
from harness import main, on_ranks, rank_counts, same_steps, simulated
from networks import Layers, Net, Pictures, ids_batches, image_batches, layer_batches
from shardwright.world.current import current_world


class Named(nn.Module):
    """A network under the name that it has in an accumulation, so that parameters compare by name."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *args):
        return self.network(*args)


def a_step_is_a_step_of_the_whole_batch():
    for parts in (1, 3, 4):
        network = Net()
        plain = Named(copy.deepcopy(network))
        same_steps(sw.GradAccumulation(network, parts), ids_batches(3), sw.AutoParallel, plain=plain)


def sums():
    network = Layers(2)
    plain = Named(copy.deepcopy(network))

    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = plain.network

        def forward(self, x):
            return 3 * self.network(x)

    same_steps(sw.GradAccumulation(network, 3, reduction="sum"), layer_batches(2), sw.AutoParallel, plain=Thrice())


def statistics_follow_the_parts():
    """Batch norm sees one part at a time, as the loop on one device does."""
    same_steps(sw.GradAccumulation(Pictures(), 2), image_batches(2), sw.AutoParallel)


def with_optimizer_parallel():
    for level in ("level1", "level2", "level3"):
        make = lambda m, at=level: sw.AutoParallel(m).hsdp(threshold=0, optimizer_level=at)  # noqa: E731
        same_steps(sw.GradAccumulation(Net(), 2), ids_batches(2), make)


def with_tensor_parallel():
    size = current_world().size
    layout = sw.Layout((size,), ("tp",))
    plan = {
        "*up": {
            "in_strategy": (layout("None", "None", "None"),),
            "parameter_plan": {"weight": layout("tp", "None"), "bias": layout("tp")},
        }
    }
    same_steps(sw.GradAccumulation(Net(), 2), ids_batches(2), lambda m: sw.AutoParallel(m).shard(plan))


def evaluation():
    model = sw.GradAccumulation(Pictures(), 2).eval()
    plain = copy.deepcopy(model)
    batch = image_batches(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(sw.AutoParallel(model)(*batch), plain(*batch))


def results_beside_the_loss():
    class WithLogits(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 6).double()

        def forward(self, x):
            logits = self.layer(x)
            return logits.square().mean(), logits

    model = sw.GradAccumulation(WithLogits(), 3)
    plain = copy.deepcopy(model)
    batch = layer_batches(1)[0]
    loss, logits = sw.AutoParallel(model)(*batch)
    expected, expected_logits = plain(*batch)
    torch.testing.assert_close((loss, logits), (expected, expected_logits), check_stride=False)
    assert not logits.requires_grad
    assert not expected_logits.requires_grad
    loss.backward()
    expected.backward()
    torch.testing.assert_close(sw.full_value(model.network.layer.weight.grad), plain.network.layer.weight.grad)


PROGRAMS = (
    a_step_is_a_step_of_the_whole_batch, sums, statistics_follow_the_parts, with_optimizer_parallel, with_tensor_parallel,
    evaluation, results_beside_the_loss,
)  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("devices", rank_counts(3, more=(2,)))
def test_simulated(program, devices):
    simulated(program, devices)


@pytest.mark.parametrize("ranks", rank_counts(3, more=(2,)))
def test_on_real_ranks(ranks):
    on_ranks(__file__, ranks, PROGRAMS)


# -- collectives -------------------------------------------------------------------------------------------------------------


def counted(net):
    with sw.record_communication() as log:
        net(*layer_batches(1)[0]).backward()
    kinds = ("all_gather", "all_reduce", "reduce_scatter")
    return {kind: sum(e.kind == kind and bool(e.shape) for e in log.events) for kind in kinds}


def test_gradients_are_reduced_once_a_step(four):
    net = sw.AutoParallel(sw.GradAccumulation(Layers(2), 3))
    assert counted(net) == {"all_gather": 0, "all_reduce": 4, "reduce_scatter": 0}


@pytest.mark.parametrize("level, gathers, scatters", [("level1", 4, 4), ("level2", 12, 12)])
def test_the_level_says_how_often_split_parameters_move(four, level, gathers, scatters):
    net = sw.AutoParallel(sw.GradAccumulation(Layers(2), 3)).hsdp(threshold=0, optimizer_level=level)
    assert counted(net) == {"all_gather": gathers, "all_reduce": 0, "reduce_scatter": scatters}


class Box:
    """What autograd holds in place of a tensor."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_one_part_at_a_time_is_held(four):
    """Bytes that autograd holds after the forward do not grow with the number of parts."""
    (x,) = layer_batches(1, batch=24)[0]

    def held(model):
        boxes = weakref.WeakSet()

        def pack(tensor):
            boxes.add(box := Box(tensor))
            return box

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            loss = sw.AutoParallel(model)(x)
        kept = sum(box.tensor.nbytes for box in boxes)
        loss.backward()
        return kept

    assert held(sw.GradAccumulation(Layers(2), 4)) < held(Layers(2)) / 3


# -- errors ------------------------------------------------------------------------------------------------------------------


def test_a_batch_that_is_not_divided(four):
    model = sw.GradAccumulation(Layers(1), 5)
    for run in (model, sw.AutoParallel(model)):
        with pytest.raises(ValueError, match=r"dim 0 of the inputs is 12, which 5 does not divide"):
            run(*layer_batches(1)[0])


@pytest.mark.parametrize(
    "parts, error", [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError)]
)
def test_numbers_that_make_no_sense(parts, error):
    with pytest.raises(error, match="micro_size"):
        sw.GradAccumulation(Layers(1), parts)


def test_what_is_no_network():
    with pytest.raises(TypeError, match="give a module"):
        sw.GradAccumulation(torch.relu, 2)


def test_a_network_without_a_loss(four):
    model = sw.GradAccumulation(nn.Linear(16, 2).double(), 2)
    with pytest.raises(ValueError, match="must be the loss"):
        sw.AutoParallel(model)(*layer_batches(1)[0])


if __name__ == "__main__":
    main(PROGRAMS)
