"""Data: dataset strategies in all their forms, and loaders of which each rank reads its part."""

from __future__ import annotations

import copy
import itertools
import random
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from features_data import Counted, Images, Noisy, Stream
from torch import nn
from torch.distributed import checkpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

import shardwright as sw
from harness import compare, main, on_ranks, rank_counts, simulated
from shardwright.api.plan_for import planning
from shardwright.data.order import Order
from shardwright.data.strategy import layouts_of
from shardwright.errors import ShardwrightError, StrategyError, WorldError
from shardwright.train.accumulation.module import GradAccumulation
from shardwright.world.current import current_world

DOUBLE = torch.float64


class Net(nn.Module):
    """Convolutions, batch norm, pooling and a loss: all that looks across the width of an image."""

    def __init__(self, width=12):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.out = nn.Linear(4 * 4 * (width // 2), 3)

    def forward(self, images, labels):
        hidden = self.pool(self.norm(self.conv(images)).relu())
        return F.cross_entropy(self.out(hidden.flatten(1)), labels)


def piece(tensor, counts):
    """What this rank hands in of a tensor, cut with torch.chunk; in the simulated world the whole."""
    world = current_world()
    if world.is_simulated:
        return tensor
    rest = world.size
    for count in counts:
        rest //= count
    position = world.rank // rest
    for dim, count in reversed(list(enumerate(counts))):
        position, index = divmod(position, count)
        chunks = tensor.chunk(count, dim)
        tensor = chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)
    return tensor


def trained(make, strategy, batches, cut, steps=True):
    """Trains a parallel net on slices and a copy on whole batches; everything agrees."""
    torch.manual_seed(1)
    model = make().double()
    plain = copy.deepcopy(model)
    net = sw.AutoParallel(model).dataset_strategy(strategy)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, model)]
    for number, batch in enumerate(batches):
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected, got = plain(*batch), net(*cut(batch))
        expected.backward()
        got.backward()
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        compare(plain, model, f"{strategy}, batch {number}", 1e-9)
        for optimizer in optimizers:
            optimizer.step()
    compare(plain, model, f"{strategy}, at the end", 1e-9, gradients=False)
    return net


def some_images(count, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, width, generator=generator, dtype=DOUBLE), torch.arange(count) % 3


# -- programs: run in both worlds -------------------------------------------------------------------------------------------


def batch_slices():
    """Slices of the batch, by name and by counts; uneven ones, and fewer samples than ranks."""
    size = current_world().size
    batches = [some_images(n, seed=n) for n in (2 * size, 2 * size + 1, 2 * size - 1, max(2, size - 1))]
    for strategy in ("data_parallel", ((size, 1, 1, 1), (size,))):
        trained(Net, strategy, batches, lambda b: (piece(b[0], (size, 1, 1, 1)), piece(b[1], (size,))))


def width_slices():
    """Images cut along the width, labels whole, equal and not."""
    size = current_world().size
    batches = [some_images(5, seed=n) for n in range(2)]
    trained(Net, ((1, 1, 1, size), (1,)), batches, lambda b: (piece(b[0], (1, 1, 1, size)), b[1]))
    uneven = [some_images(4, width=10)]
    trained(lambda: Net(10), ((1, 1, 1, size), (1,)), uneven, lambda b: (piece(b[0], (1, 1, 1, size)), b[1]))


def several_dims():
    """Slices of batch and width, of height and width; labels sliced more, less or not at all."""
    size = current_world().size
    if size % 2:
        return
    half = size // 2
    batches = [some_images(6), some_images(5, seed=1)]
    for images, labels in (((2, 1, 1, half), (2,)), ((2, 1, 1, half), (1,)), ((1, 1, half, 2), (1,)), ((1, 1, 1, 1), (size,))):
        trained(Net, (images, labels), batches, lambda b, i=images, j=labels: (piece(b[0], i), piece(b[1], j)))


def layouts_given():
    """Layouts over a device matrix of the user, with ranks that hand in the same."""
    size = current_world().size
    if size % 2:
        return
    grid = sw.Layout((size // 2, 2), ("other", "width"))
    strategy = (grid("None", "None", "None", "width"), grid("None"))
    trained(Net, strategy, [some_images(4)], lambda b: (piece_of(b[0], strategy[0]), b[1]))
    backwards = sw.Layout((size,), ("dp",), list(reversed(range(size))))
    strategy = (backwards("dp", "None", "None", "None"), backwards("dp"))
    trained(Net, strategy, [some_images(size + 1)], lambda b: (piece_of(b[0], strategy[0]), piece_of(b[1], strategy[1])))


def piece_of(tensor, layout):
    world = current_world()
    return tensor if world.is_simulated else tensor[layout.slices(tensor.shape)[world.rank]]


def pieces_of_any_size():
    """Ranks hand in as many samples as they have; the loss is the mean over all."""
    world = current_world()
    images, labels = some_images(world.size * (world.size + 1) // 2)
    first = world.rank * (world.rank + 1) // 2
    own = slice(None) if world.is_simulated else slice(first, first + world.rank + 1)
    trained(Net, "data_parallel", [(images, labels)], lambda b: (b[0][own], b[1][own]))


class Many(nn.Module):
    """Inputs of many kinds: nested, by name, none, numbers, and one of another first dim."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, pair, power, nothing=None, *, weights, labels):
        assert nothing is None
        x, offset = pair["x"], pair["offset"]
        return F.cross_entropy(self.linear(x**power + offset), labels, weight=weights)


def many_inputs():
    """Nested inputs, inputs by name in any order, numbers and None; entries are of the tensors alone, in order."""
    size = current_world().size
    torch.manual_seed(2)
    model = Many().double()
    plain = copy.deepcopy(model)
    x, offset = torch.randn(2 * size + 1, 4, dtype=DOUBLE), torch.randn(4, dtype=DOUBLE)
    weights, labels = torch.rand(3, dtype=DOUBLE), torch.arange(2 * size + 1) % 3
    expected = plain({"x": x, "offset": offset}, 2, weights=weights, labels=labels)
    expected.backward()
    cut_x, cut_labels = piece(x, (size, 1)), piece(labels, (size,))
    net = sw.AutoParallel(model).dataset_strategy(((size, 1), (1,), (1,), (size,)))
    got = net({"x": cut_x, "offset": offset}, 2, weights=weights, labels=cut_labels)
    got.backward()
    torch.testing.assert_close(got, expected)
    compare(plain, model, "by name", 1e-9)
    model.zero_grad()
    net.dataset_strategy(((size, 1), (1,), (size,), (1,)))
    got = net({"x": cut_x, "offset": offset}, 2, None, labels=cut_labels, weights=weights)
    got.backward()
    torch.testing.assert_close(got, expected)
    compare(plain, model, "by name, in another order", 1e-9)


def step_of(body, head, optimizer):
    def step(images, labels):
        optimizer.zero_grad()
        assert images.shape[1:] == (1, 8, 12)
        features = body(images / images.abs().max()) + body(images)
        loss = F.cross_entropy(head(features.mean((2, 3))), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def train_steps():
    """What a train step is handed are slices for its nets, whole tensors for the code between."""
    size = current_world().size
    for strategy, counts in (("data_parallel", ((size, 1, 1, 1), (size,))), (((1, 1, 1, size), (1,)), ((1, 1, 1, size), (1,)))):
        torch.manual_seed(3)
        body, head = nn.Conv2d(1, 2, 3, padding=1).double(), nn.Linear(2, 3).double()
        models = nn.ModuleList([body, head])
        plain = copy.deepcopy(models)

        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, models)]
        single, step = step_of(*plain, optimizers[0]), sw.AutoParallel(step_of(body, head, optimizers[1]))
        step.dataset_strategy(strategy)
        for count in (2 * size, 2 * size + 1):
            images, labels = some_images(count, seed=count)
            got = step(piece(images, counts[0]), piece(labels, counts[1]))
            torch.testing.assert_close(got, single(images, labels), rtol=1e-9, atol=1e-12)
            compare(plain, models, f"{strategy} of {count}", 1e-9)


def functional_steps():
    """A step of value_and_grad: its forward function is handed the slices."""
    size = current_world().size
    torch.manual_seed(3)
    model = Net().double()
    plain = copy.deepcopy(model)
    images, labels = some_images(2 * size + 1)
    grad_fn = sw.value_and_grad(lambda x, y: model(x, y), None, list(model.parameters()))

    def step(x, y):
        return grad_fn(x, y)

    net = sw.AutoParallel(step).dataset_strategy("data_parallel")
    loss, gradients = net(piece(images, (size, 1, 1, 1)), piece(labels, (size,)))
    expected = plain(images, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for parameter, gradient in zip(plain.parameters(), gradients):
        torch.testing.assert_close(sw.full_value(gradient), parameter.grad, rtol=1e-9, atol=1e-11)


def loaders():
    """Nets trained from loaders compute what a single device computes on the whole batches, in the same order."""
    size = current_world().size
    images, labels = some_images(4 * size + 3)

    for strategy in ("data_parallel", "full_batch", ((1, 1, 1, size), (1,)), ((size, 1, 1, 1), (size,))):
        torch.manual_seed(4)
        model = Net().double()
        plain = copy.deepcopy(model)
        net = sw.AutoParallel(model).dataset_strategy(strategy)
        batches = sw.data.loader(TensorDataset(images, labels), 2 * size, net=net, shuffle=True, seed=3)
        assert len(batches) == 3
        for epoch in range(2):
            seen = []
            for number, batch in enumerate(batches):
                indices = list(batches.order.batches(epoch))[number]
                seen += indices
                expected = plain(images[indices], labels[indices])
                got = net(*batch)
                plain.zero_grad()
                model.zero_grad()
                expected.backward()
                got.backward()
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
                compare(plain, model, f"{strategy}, batch {number}", 1e-9)
            assert sorted(seen) == list(range(4 * size + 3)), seen
            assert batches.epoch == epoch + 1


def ranks_that_differ():
    """Data sets of different lengths are refused on every rank, before anything is read."""
    world = current_world()
    dataset = Counted(10 + world.rank % 2)
    batches = sw.data.loader(dataset, 4, strategy="data_parallel")
    if world.is_simulated:
        return
    with pytest.raises(WorldError, match="length of the data set: rank 0 has 10, rank 1 has 11"):
        next(iter(batches))
    assert not dataset.read
    streams = sw.data.loader(Stream(10 - world.rank % 2), 4, strategy="data_parallel")
    with pytest.raises(WorldError, match=r"sample 8: rank 0 has 2, rank 1 has 1"):
        list(streams)


def accumulated():
    """A batch in parts: slices of the batch and of the width; the parts are those of the single device."""
    size = current_world().size
    images, labels = some_images(6 * size)
    for strategy, counts in (
        ("data_parallel", ((size, 1, 1, 1), (size,))),
        (((1, 1, 1, size), (1,)), ((1, 1, 1, size), (1,))),
        (((size, 1, 1, 1), (1,)), ((size, 1, 1, 1), (1,))),
    ):
        cut = lambda batch, counts=counts: tuple(map(piece, batch, counts))  # noqa: E731
        trained(lambda: GradAccumulation(Net(), 3), strategy, [(images, labels)], cut)


def gradients_of_inputs():
    """The gradient of what a rank hands in is its slice of the whole one's; in a train step too."""
    size = current_world().size
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh()).double()
    plain = copy.deepcopy(model)
    x = torch.randn(2 * size + 1, 6, dtype=DOUBLE)
    whole = x.clone().requires_grad_()
    plain(whole).square().mean().backward()
    for counts in ((size, 1), (1, size)):
        for own in (False, True):
            given = piece(x, counts).clone().requires_grad_()

            def step(x):
                loss = model(x).square().mean()
                loss.backward()
                return loss.detach()

            net = sw.AutoParallel(step if own else model).dataset_strategy((counts,))
            if own:
                net(given)
            else:
                net(given).square().mean().backward()
            torch.testing.assert_close(given.grad, piece(whole.grad, counts), rtol=1e-9, atol=1e-12)


def changed_in_a_step():
    """What a step writes to its inputs is what its nets read; code that only asks for shapes gathers nothing."""
    size = current_world().size
    torch.manual_seed(6)
    model = nn.Linear(6, 4).double()
    plain = copy.deepcopy(model)
    x = torch.randn(2 * size, 6, dtype=DOUBLE)

    def step(x, changes):
        assert (x.shape, x.ndim, len(x), x.size(1), x.dtype) == ((2 * size, 6), 2, 2 * size, 6, DOUBLE)
        if changes:
            x[0] = 7.0
            x.mul_(2)
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    net = sw.AutoParallel(step).dataset_strategy("data_parallel")
    for changes in (False, True, False):
        expected = x.clone()
        if changes:
            expected[0] = 7.0
            expected = expected * 2
        with sw.record_communication() as log:
            got = net(piece(x, (size, 1)).clone(), changes)
        torch.testing.assert_close(got, plain(expected).square().mean().detach())
        assert changes or not [e for e in log.events if e.phase == "forward" and e.shape == tuple(x.shape)]


def slices_that_do_not_fit():
    """Slices that are not of one global tensor are refused on every rank, and the net goes on working."""
    world = current_world()
    if world.is_simulated:
        return
    model = nn.Linear(4, 2)
    net = sw.AutoParallel(model).dataset_strategy("data_parallel")
    with pytest.raises(StrategyError, match=r"rank 0 hands in \[2, 4\], rank 1 \[2, 5\], .* dim 1"):
        net(torch.ones(2, 4 + world.rank % 2))
    with pytest.raises(StrategyError, match="as many on all ranks"):
        net(torch.ones((2, 4) if world.rank else (4,)))
    with pytest.raises(StrategyError, match="2 entries for 1 tensor inputs"):
        net.dataset_strategy(((world.size, 1), (1,)))(torch.ones(2, 4))
    assert type(model.weight) is nn.Parameter
    x = torch.randn(2 * world.size, 4)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(net.dataset_strategy("data_parallel")(piece(x, (world.size, 1))), expected)


PROGRAMS = (
    batch_slices,
    width_slices,
    several_dims,
    layouts_given,
    pieces_of_any_size,
    many_inputs,
    train_steps,
    functional_steps,
    loaders,
    accumulated,
    gradients_of_inputs,
    changed_in_a_step,
    ranks_that_differ,
    slices_that_do_not_fit,
)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("devices", rank_counts(3, more=(2, 4)))
def test_simulated(program, devices):
    simulated(program, devices)


@pytest.mark.parametrize("ranks", rank_counts(3, more=(2, 4)))
def test_on_real_ranks(ranks):
    on_ranks(__file__, ranks, PROGRAMS)


@pytest.mark.parametrize("mode", ["semi_auto", "sharding_propagation", "auto", "recursive_programming", "data_parallel"])
def test_every_mode_takes_width_slices(mode):
    def program():
        torch.manual_seed(0)
        model = Net().double()
        plain = copy.deepcopy(model)
        images, labels = some_images(6)
        net = sw.AutoParallel(model, mode).dataset_strategy(((1, 1, 1, 4), (1,)))
        if mode == "sharding_propagation":
            net.shard({"out": ((4, 1),)})
        net(images, labels).backward()
        plain(images, labels).backward()
        compare(plain, model, mode, 1e-9)
        layout = net.plan.input_layouts[next(i.value for i in net.plan.graph.inputs if i.kind == "input")]
        assert layout.local_shape(images.shape, 1) == (6, 1, 8, 3)

    simulated(program, 4)


def test_a_step_is_planned_for_another_number_of_devices():
    """What the nets of a step follow are the counts that were given, not what they are on the devices at hand."""
    model = nn.Linear(4, 4)

    def step(x):
        model(x).sum().backward()

    with planning(8, None, False, {}) as plans:
        sw.init(devices=4)
        sw.AutoParallel(step).dataset_strategy(((2, 1),))(torch.ones(8, 4))
    (plan,) = plans
    assert plan.mesh.size == 8
    (layout,) = (plan.input_layouts[i.value] for i in plan.graph.inputs if i.kind == "input")
    assert [layout.local_shape((8, 4), rank) for rank in (0, 3, 4)] == [(4, 4)] * 3


# -- a loader as another rank of another job sees it ------------------------------------------------------------------------


@pytest.fixture
def as_rank(monkeypatch):
    """Lets loaders run as one rank of a job, which agrees with the others."""

    def become(rank, size):
        world = SimpleNamespace(
            inputs_are_whole=False, rank=rank, size=size, processes=size, gather_numbers=lambda numbers: [numbers] * size
        )
        monkeypatch.setattr("shardwright.data.loading.current_world", lambda: world)

    return become


STRATEGIES = {
    1: ["data_parallel", "full_batch", ((1, 1, 1, 1), (1,))],
    2: ["data_parallel", ((2, 1, 1, 1), (2,)), ((1, 1, 1, 2), (1,)), ((1, 1, 1, 2), (2,))],
    3: ["data_parallel", ((1, 1, 3, 1), (1,)), ((3, 1, 1, 1), (1,))],
    4: ["data_parallel", ((2, 1, 1, 2), (2,)), ((2, 1, 1, 2), (4,)), ((1, 1, 2, 2), (1,)), ((2, 1, 1, 1), (1,))],
}


@pytest.mark.parametrize("size", STRATEGIES)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_ranks_batches_make_the_global_batch(size, workers, as_rank):
    dataset = Images(11, width=10)
    order = list(Order(11, 4, True, 5, False).batches(0)) if workers else None
    for strategy in STRATEGIES[size]:
        if workers and strategy != STRATEGIES[size][-1]:
            continue
        batches = []
        for rank in range(size):
            as_rank(rank, size)
            batches.append(list(sw.data.loader(dataset, 4, strategy=strategy, shuffle=True, seed=5, num_workers=workers)))
        assert [len(b) for b in batches] == [3] * size
        for number in range(3):
            images, labels = zip(*(b[number] for b in batches))
            whole_images, whole_labels = together(images, strategy, 0, size), together(labels, strategy, 1, size)
            assert len(whole_labels) == (4, 4, 3)[number]
            expected = torch.stack([dataset[int(i)][0] for i in whole_labels])
            assert torch.equal(whole_images, expected)
            assert order is None or whole_labels.tolist() == order[number]


def together(pieces, strategy, entry, size):
    """Puts pieces together by hand: ranks in order, leftover ones last and the same."""
    if strategy == "full_batch":
        counts = (1,) * pieces[0].ndim
    else:
        counts = (size,) + (1,) * (pieces[0].ndim - 1) if strategy == "data_parallel" else strategy[entry]
    rest = size
    for count in counts:
        rest //= count
    for first in range(0, size, rest):
        assert all(torch.equal(pieces[first], pieces[first + other]) for other in range(rest))
    tensors = list(pieces[::rest])
    for dim in reversed(range(len(counts))):
        tensors = [torch.cat(tensors[i : i + counts[dim]], dim) for i in range(0, len(tensors), counts[dim])]
    (whole,) = tensors
    return whole


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_rank_reads_only_its_samples(size, as_rank):
    read = []
    for rank in range(size):
        as_rank(rank, size)
        dataset = Counted(4 * size)
        list(sw.data.loader(dataset, 2 * size, strategy="data_parallel", shuffle=True))
        assert len(dataset.read) == 4
        read += dataset.read
    assert sorted(read) == list(range(4 * size))


def test_of_other_slices_a_rank_reads_whole_samples(as_rank):
    as_rank(1, 4)
    dataset = Counted(8)
    list(sw.data.loader(dataset, 4, strategy=((1, 4),)))
    assert dataset.read == list(range(8))
    dataset.read.clear()
    (first, _) = sw.data.loader(dataset, 4, strategy=((2, 2),))
    assert dataset.read == [0, 1, 4, 5]
    assert first.shape == (2, 2)


def test_the_order_is_that_of_any_number_of_ranks_resumed_or_not(as_rank):
    def labels(size, rank_batches):
        return [torch.cat([b[n] for b in rank_batches]).tolist() for n in range(len(rank_batches[0]))]

    def read(size, state=None, epochs=2, batch_size=6, workers=0):
        every, states = [], []
        for rank in range(size):
            as_rank(rank, size)
            found = sw.data.loader(Counted(20), batch_size, strategy="data_parallel", shuffle=True, seed=9, num_workers=workers)
            if state is not None:
                found.load_state_dict(state)
            got, here = [], []
            for _ in range(epochs):
                for batch in found:
                    got.append(batch[:, 0].long())
                    here.append(found.state_dict())
            every.append(got)
            states.append(here)
        assert all(s == states[0] for s in states)
        return labels(size, every), states[0]

    whole, states = read(1)
    assert sorted(i for batch in whole[:4] for i in batch) == list(range(20))
    assert whole[:4] != whole[4:]
    assert [(s["epoch"], s["batch"]) for s in states] == [(e, b) for e in (0, 1) for b in (1, 2, 3, 4)]
    for size in (2, 3, 4):
        assert read(size) == (whole, states)
    for size, number in itertools.product((1, 2, 3, 4), (0, 2, 3, 5)):
        resumed, after = read(size, states[number], epochs=2 - states[number]["epoch"])
        assert resumed == whole[number + 1 :], (size, number)
        assert after == states[number + 1 :]
    assert read(2, states[1], epochs=2, workers=2) == (whole[2:], states[2:])
    other_batches, _ = read(2, states[1], epochs=1, batch_size=4)
    assert [i for b in other_batches for i in b] == [i for b in whole[2:4] for i in b]


def test_a_state_tells_what_was_handed_out_not_what_workers_have_read():
    sw.init(devices=1)
    found = sw.data.loader(Counted(20), 2, num_workers=2, prefetch_factor=4)
    iterator = iter(found)
    next(iterator)
    assert found.state_dict() == {"epoch": 0, "samples": 2, "batch": 1, "seed": 0, "shuffle": False, "length": 20}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # what no_dist=True asks for
def test_checkpoints_take_loaders(tmp_path):
    sw.init(devices=1)
    found = sw.data.loader(Counted(6), 2, shuffle=True, seed=1)
    iterator = iter(found)
    next(iterator)
    checkpoint.save({"loader": found}, checkpoint_id=str(tmp_path), no_dist=True)
    rest = list(iterator)
    again = sw.data.loader(Counted(6), 2, shuffle=True)
    checkpoint.load({"loader": again}, checkpoint_id=str(tmp_path), no_dist=True)
    assert torch.equal(torch.cat(list(again)), torch.cat(rest))


def test_an_epoch_that_was_left_starts_over_and_epochs_can_be_set():
    sw.init(devices=1)
    found = sw.data.loader(Counted(6), 2, shuffle=True, seed=1)
    first = next(iter(found))
    assert found.state_dict()["batch"] == 1
    every = list(found)
    assert torch.equal(first, every[0])
    assert len(every) == 3
    assert found.epoch == 1
    found.set_epoch(0)
    assert torch.equal(torch.cat(list(found)), torch.cat(every))
    found.load_state_dict({**found.state_dict(), "epoch": 0, "samples": 4})
    found.set_epoch(0)  # as a script does at the start of each epoch
    assert torch.equal(torch.cat(list(found)), every[2])
    assert not torch.equal(torch.cat(list(found)), torch.cat(every))


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_go_on_over_epochs_and_leave_random_numbers_alone(persistent):
    sw.init(devices=1)
    torch.manual_seed(0)
    expected = torch.rand(1)
    alone = [torch.cat(list(e)) for e in [sw.data.loader(Noisy(6), 4, shuffle=True)] for _ in range(2)]
    torch.manual_seed(0)
    found = sw.data.loader(Noisy(6), 4, shuffle=True, num_workers=2, persistent_workers=persistent)
    for epoch in range(2):
        assert torch.equal(torch.cat(list(found)), alone[epoch])
    assert torch.equal(torch.rand(1), expected)


def test_what_a_data_set_draws_is_the_same_on_every_rank(as_rank):
    def noise(rank, size, **options):
        as_rank(rank, size)
        torch.manual_seed(rank)
        return list(sw.data.loader(Noisy(6), 4, shuffle=True, **options))

    whole = noise(0, 1)
    assert not torch.equal(whole[0][0, 1:], whole[0][1, 1:])
    for size in (2, 4):
        pieces = [noise(rank, size, strategy="data_parallel") for rank in range(size)]
        assert torch.equal(torch.cat([p[0] for p in pieces]), whole[0])
        assert all(torch.equal(b, w) for b, w in zip(noise(size - 1, size), whole))
    assert not torch.equal(noise(0, 1, seed_samples=False)[0], noise(1, 2, seed_samples=False)[0])
    assert not torch.equal(noise(0, 1, seed=1)[0], whole[0])


def test_drawing_leaves_the_generators_where_they_were():
    sw.init(devices=1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(sw.data.loader(Noisy(6), 4))
    assert torch.equal(states[0], torch.get_rng_state())
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_streams(size, as_rank):
    kept = []
    batches = []
    for rank in range(size):
        as_rank(rank, size)
        own = []
        keep = lambda s, own=own: own.append(int(s[0])) or s  # noqa: E731
        found = sw.data.loader(Stream(11), 6, strategy="data_parallel", transform=keep)
        batches.append([b[:, 0].long().tolist() for b in found])
        kept += own
        resumed = sw.data.loader(Stream(11), 6, strategy="data_parallel", num_workers=1)
        resumed.load_state_dict({**found.state_dict(), "epoch": 0, "samples": 6})
        assert [b[:, 0].long().tolist() for b in resumed] == batches[-1][1:]
    assert [list(itertools.chain(*parts)) for parts in zip(*batches)] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert sorted(kept) == list(range(11))
    as_rank(0, 1)
    assert len(list(sw.data.loader(Stream(11), 4, drop_last=True))) == 2


def test_ranks_without_samples_hand_in_none(as_rank):
    as_rank(3, 4)
    for strategy in ("data_parallel", ((4, 1),)):
        first, last = sw.data.loader(Counted(5), 4, strategy=strategy)
        assert (first.shape, last.shape) == ((1, 4), (0, 4))
    (last,) = sw.data.loader(Stream(1), 4, strategy="data_parallel")
    assert last.shape == (0, 4)


def test_an_order_of_ones_own(as_rank):
    as_rank(1, 2)
    found = sw.data.loader(Counted(10), 4, strategy="data_parallel", order=lambda epoch: [epoch, 3, 5, 7, 7, 9])
    assert len(found) == 2
    assert [b[:, 0].tolist() for b in found] == [[5, 7], [9]]
    assert [b[:, 0].tolist() for b in found] == [[5, 7], [9]]


def test_a_loader_of_a_dataloader():
    sw.init(devices=1)
    given = DataLoader(Counted(10), batch_size=4, drop_last=True, shuffle=True, collate_fn=lambda s: torch.stack(s) + 1)
    found = sw.data.loader(given, seed=2)
    assert (found.order.batch_size, found.order.drop_last, found.order.shuffle) == (4, True, True)
    assert len(list(found)) == 2
    assert len(list(sw.data.loader(given, 5, seed=2))) == 2
    weighted = DataLoader(Counted(10), batch_size=4, sampler=WeightedRandomSampler([1.0] * 10, 10))
    with pytest.raises(ShardwrightError, match=r"WeightedRandomSampler.*order="):
        sw.data.loader(weighted)


def test_batches_of_any_form(as_rank):
    class Named(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"image": torch.full((2, 6), float(index)), "name": f"image {index}", "label": index}

    as_rank(1, 2)
    (batch,) = sw.data.loader(Named(), 4, strategy="data_parallel")
    assert batch["name"] == ["image 2", "image 3"]
    assert batch["label"].tolist() == [2, 3]
    (batch,) = sw.data.loader(Named(), 4, strategy=((1, 1, 2), (1,)))
    assert batch["image"].shape == (4, 2, 3)
    assert len(batch["name"]) == 4


def test_the_example(monkeypatch, capsys):
    for name in ("DATA_PATH", "RANK", "WORLD_SIZE", "SHARDWRIGHT_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("shardwright.world.current._current", [])
    path = Path(__file__).resolve().parents[2] / "examples" / "data_sharded.py"
    assert len(path.read_text("utf-8").splitlines()) < 60
    runpy.run_path(str(path), run_name="__main__")
    losses = [
        tuple(map(float, re.findall(r"(?:loss|device) (\d\.\d+)", line))) for line in capsys.readouterr().out.splitlines()
    ]
    assert len(losses) == 8
    assert all(got == pytest.approx(expected, abs=1e-4) for got, expected in losses)
    assert losses[-1][0] < losses[0][0]


# -- errors -----------------------------------------------------------------------------------------------------------------

GRID = sw.Layout((2, 2), ("dp", "mp"))


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (None, ValueError, "dataset_strategy\\(None\\)"),
        ("half", ValueError, "'full_batch', 'data_parallel' or a tuple"),
        ([(1, 1)], TypeError, "is a list"),
        ((1,), TypeError, "entry 0, 1, is a int"),
        (((2, 1), [2]), TypeError, "entry 1, \\[2\\], is a list"),
        (((1.5, 1),), TypeError, "holds 1.5, a float"),
        (((True, 1),), TypeError, "holds True, a bool"),
        (((0, 1),), ValueError, "holds 0; .* at least 1"),
        ((GRID,), ValueError, "without dims"),
        ((GRID("dp", "None").with_partial(("mp",)),), ValueError, "pending sums"),
        (((2, 1), GRID("dp")), ValueError, "mixes"),
    ],
)
def test_no_dataset_strategy(config, error, words):
    net = sw.AutoParallel(nn.ReLU())
    with pytest.raises(error, match=words):
        net.dataset_strategy(config)
    assert net.settings.dataset_strategy == "full_batch"
    if config is not None:
        with pytest.raises(error, match=words):
            sw.data.loader(Counted(4), 2, strategy=config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (((2, 1), (2,)), "2 entries for 1 tensor inputs"),
        ((), "0 entries for 1 tensor inputs"),
        (((2,),), "1 counts for a tensor of 2 dims"),
        (((8, 1),), "needs 8 devices, the world has 4"),
        (((3, 1),), "3 devices, which does not divide the 4"),
        ((GRID("dp"),), "has 1 dims, the tensor 2"),
        ((sw.Layout((2,), ("dp",))("dp", "None"),), "over 2 devices"),
    ],
)
def test_a_dataset_strategy_that_does_not_fit(config, words):
    def program():
        model = nn.Linear(4, 4)
        before = model.weight
        net = sw.AutoParallel(model).dataset_strategy(config)
        with pytest.raises(StrategyError, match=words):
            net(torch.ones(4, 4))
        assert model.weight is before
        assert net.dataset_strategy("full_batch")(torch.ones(4, 4)).shape == (4, 4)

    simulated(program, 4)


def test_a_batch_that_does_not_fit_the_strategy(as_rank):
    as_rank(0, 2)
    with pytest.raises(StrategyError, match="2 entries for 1 tensor inputs"):
        list(sw.data.loader(Counted(4), 2, strategy=((2, 1), (2,))))
    sideways = sw.data.loader(Counted(4), 4, strategy=((2, 1),), collate_fn=lambda s: torch.stack(s, 1))
    with pytest.raises(StrategyError, match=r"a batch of 2 samples became a tensor \[4, 2\]"):
        list(sideways)
    rows = sw.Layout.parse("dp[3 1],None @ dp=2")
    with pytest.raises(StrategyError, match="drop_last=True"):
        list(sw.data.loader(Counted(6), 4, strategy=(rows,)))
    assert [len(b) for b in sw.data.loader(Counted(6), 4, strategy=(rows,), drop_last=True)] == [3]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"batch_size": 2.0}, TypeError, "batch_size=2.0"),
        ({"batch_size": None}, TypeError, "batch_size=None"),
        ({"num_workers": -1}, ValueError, "num_workers=-1"),
        ({"seed": "a"}, TypeError, "seed='a'"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"sampler": [0]}, TypeError, "order="),
        ({"order": [1]}, TypeError, "a function of the epoch"),
        ({"order": list, "shuffle": True}, ValueError, "contradict"),
        ({"net": 3}, TypeError, "net=3"),
        ({"dataset": 3}, TypeError, "__len__ and __getitem__"),
        ({"dataset": Stream(3), "shuffle": True}, ValueError, "a stream"),
        ({"dataset": Stream(3), "num_workers": 2}, ValueError, "num_workers=1"),
    ],
)
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=words):
        sw.data.loader(**{"dataset": Counted(4), "batch_size": 2, **options})


def test_states_that_do_not_fit():
    found = sw.data.loader(Counted(4), 2)
    state = found.state_dict()
    for wrong, words in ((3, "give what state_dict"), ({}, "give what"), ({**state, "length": 5}, "length 5.*has 4"),
                         ({**state, "shuffle": True}, "shuffle True")):  # fmt: skip
        with pytest.raises(ShardwrightError, match=words):
            found.load_state_dict(wrong)
    with pytest.raises(TypeError):
        found.set_epoch(-1)
    with pytest.raises(TypeError, match="no length"):
        len(sw.data.loader(Stream(4), 2))


# -- patches ----------------------------------------------------------------------------------------------------------------


def test_patches():
    image = torch.arange(2 * 5 * 7.0).view(2, 5, 7)
    padded = sw.data.SlicePatches(2, 3, "pad", 9)
    patches = padded(image)
    assert [tuple(p.shape) for p in patches] == [(2, 3, 3)] * 6
    whole = torch.cat([torch.cat(patches[:3], -1), torch.cat(patches[3:], -1)], -2)
    assert torch.equal(whole, padded.even(image))
    assert torch.equal(whole[:, :5, :7], image)
    assert bool((whole[:, 5:] == 9).all() and (whole[:, :, 7:] == 9).all())
    dropped = sw.data.SlicePatches(2, 3, "drop")(image)
    assert torch.equal(torch.cat([torch.cat(dropped[:3], -1), torch.cat(dropped[3:], -1)], -2), image[:, :4, :6])
    assert torch.equal(sw.data.SlicePatches()(image)[0], image)
    assert sw.data.SlicePatches(1, 2)(torch.zeros(4, 4, dtype=torch.uint8))[1].dtype == torch.uint8


def test_patches_are_what_ranks_hand_in():
    """The patch of a rank is its slice by the counts of the grid."""
    image = torch.randn(1, 4, 6)
    for size, height, width in ((4, 2, 2), (4, 1, 2), (6, 2, 3), (6, 2, 1)):
        cut = sw.data.SlicePatches(height, width)
        (layout,) = layouts_of(((1, height, width),), [3], [False], size)
        for rank in range(size):
            assert torch.equal(cut.of_rank(image, rank, size), image[layout.slices(image.shape)[rank]])
    with pytest.raises(ShardwrightError, match="do not divide 4"):
        sw.data.SlicePatches(1, 3).of_rank(image, 0, 4)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"num_height": 1.0}, TypeError),
        ({"num_width": True}, TypeError),
        ({"num_height": 0}, ValueError),
        ({"slice_mode": 1}, TypeError),
        ({"slice_mode": "crop"}, ValueError),
        ({"fill_value": 0.5}, TypeError),
        ({"fill_value": 256}, ValueError),
    ],
)
def test_bad_patches(arguments, error):
    with pytest.raises(error):
        sw.data.SlicePatches(**arguments)


def test_images_without_patches():
    with pytest.raises(TypeError, match="a list"):
        sw.data.SlicePatches()([1])
    with pytest.raises(ValueError, match="1 dims"):
        sw.data.SlicePatches()(torch.ones(3))
    with pytest.raises(ValueError, match="nothing left"):
        sw.data.SlicePatches(1, 4, "drop")(torch.ones(3, 3))


if __name__ == "__main__":
    main(PROGRAMS)
