"""Run by torchrun: whole programs on real ranks equal the single device. Prints one line a program that passed."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import shardwright as sw
from shardwright.cost.machine_files import PRESETS
from shardwright.ir.buckets import Buckets, MoveBuckets
from shardwright.parameters.whole import full_value
from shardwright.plan.modes import search as automatic
from shardwright.world import current
from shardwright.world.simulated.world import SimulatedWorld

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "benchmarks")]
from models import GPT  # noqa: E402
from test_programs import Everything, Net  # noqa: E402
from test_random_graphs import RandomNet  # noqa: E402


def compare(name, expected, got, tolerance=1e-9):
    for (n, a), (_, b) in zip(expected.named_parameters(), got.named_parameters(), strict=True):
        for what, left, right in (("value", a, b), ("gradient", a.grad, b.grad)):
            if left is None:
                assert right is None, (name, n)
                continue
            right = full_value(right)
            scale = max(float(left.detach().abs().max()), 1e-5)
            error = float((left - right).detach().abs().max()) / scale
            assert error <= tolerance, f"{name}: {what} of {n} differs by {error:.2e}"
    for (n, a), (_, b) in zip(expected.named_buffers(), got.named_buffers(), strict=True):
        assert torch.allclose(a.double(), b.double()), f"{name}: buffer {n}"


def loss_of(value):
    tensors = [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, torch.Tensor) and v.requires_grad]
    return sum(t.square().mean() for t in tensors)


def steps(name, model, batches, world, prepare=lambda net: net, **kwargs):
    """Three AdamW steps with clipping, the optimizer made before the first call; plain and parallel."""
    plain = copy.deepcopy(model)
    net = prepare(sw.AutoParallel(model))
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (plain, model)]
    held = list(model.parameters())
    for number, batch in enumerate(batches):
        losses = []
        for run, module, optimizer in ((plain, plain, optimizers[0]), (net, model, optimizers[1])):
            torch.manual_seed(number if run is plain else number + 100 * world.rank)  # rank 0's numbers are drawn
            optimizer.zero_grad()
            loss = loss_of(run(*batch, **kwargs))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters() if module is plain else held, 0.3)
            optimizer.step()
            losses.append(float(loss.detach()))
        assert abs(losses[0] - losses[1]) <= 1e-9 * abs(losses[0]), (name, losses)
        compare(name, plain, model)
    if world.rank == 0:
        print("passed", name, flush=True)


def build(cls, *args, **kwargs):
    torch.manual_seed(11)
    return cls(*args, **kwargs).double()


def main():
    world = sw.init()
    size = world.size
    generator = torch.Generator().manual_seed(2)
    images = [(torch.randn(7, 1, 8, 8, generator=generator).double(),) for _ in range(3)]
    steps("cnn", build(Net, 0.3), images, world)
    tp = sw.Layout((size,), ("tp",))
    plan = {"in_strategy": (tp("None", "None"),), "parameter_plan": {"weight": tp("tp", "None"), "bias": tp("tp")}}
    steps("cnn columns", build(Net, 0.3), images, world, lambda net: net.shard({"fc1": plan}))
    ids = [({"ids": torch.randint(0, 11, (5, 5), generator=generator)},) for _ in range(3)]
    steps("everything", build(Everything), ids, world)
    vocabulary = {"embed.weight": tp("tp", "None")}
    steps("vocabulary split, tied", build(Everything), ids, world, lambda net: net.shard(vocabulary))
    for seed in range(6):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        net = RandomNet(rng, size, 4, 6, 6, depth=6)
        x = torch.randn(4, 6, 6, generator=generator).double()
        steps(f"random graph {seed}", net, [(x,), (x + 1,)], world)
    delayed(world)
    sliced_data(world)
    other_seeds(world)
    one_plan(world)
    bits(world)


def delayed(world):
    """Delayed initialisation holds slices only, and equals eager construction bit by bit."""
    torch.manual_seed(4)
    eager = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    torch.manual_seed(4)
    with sw.no_init_parameters():
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    net = sw.AutoParallel(model).shard({"0.weight": (world.size, 1)})
    loss = net(torch.ones(4, 64)).sum()
    for a, b in zip(eager.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, full_value(b))
    local = model[0].weight.to_local()
    assert local.shape[0] == -(-64 // world.size) or world.rank == world.size - 1
    assert local.untyped_storage().nbytes() == local.numel() * 4
    loss.backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]["momentum_buffer"]
    assert state.to_local().shape == local.shape
    if world.rank == 0:
        print("passed delayed", flush=True)


def sliced_data(world):
    """Ranks hand in their own slices of the batch."""
    torch.manual_seed(6)
    model = nn.Linear(5, 3).double()
    plain = copy.deepcopy(model)
    x = torch.randn(2 * world.size, 5, dtype=torch.float64)
    net = sw.AutoParallel(model).dataset_strategy("data_parallel")
    got = net(x.chunk(world.size)[world.rank])
    torch.testing.assert_close(got, plain(x))
    got.square().mean().backward()
    plain(x).square().mean().backward()
    compare("sliced data", plain, model)
    if world.rank == 0:
        print("passed sliced data", flush=True)


def other_seeds(world):
    """Ranks that were not seeded alike train the model of rank 0."""
    torch.manual_seed(world.rank)
    model = nn.Linear(5, 3).double()
    torch.manual_seed(0)
    reference = nn.Linear(5, 3).double()
    x = torch.ones(4, 5, dtype=torch.float64)
    torch.testing.assert_close(sw.AutoParallel(model)(x), reference(x))
    if world.rank == 0:
        print("passed other seeds", flush=True)


def one_plan(world):
    """Ranks with other machines, and searches that end elsewhere, still have one plan: rank 0's."""
    torch.manual_seed(3)
    model = GPT(vocab=24, d=16, layers=2, heads=2, length=6).double()
    plain = copy.deepcopy(model)
    exact = automatic.solve

    def another(problem, **options):
        free = copy.deepcopy(problem.nodes)
        for node in free:
            node.cost[:] *= np.random.default_rng(world.rank).random(len(node.cost))
        return exact(dataclasses.replace(problem, nodes=free), **options)

    automatic.solve = another
    os.environ["SHARDWRIGHT_MACHINE"] = str(PRESETS / ("h100.toml" if world.rank else "cpu-gloo.toml"))
    ids = torch.randint(0, 24, (6, 7), generator=torch.Generator().manual_seed(1))
    for mode in ("auto", "recursive_programming"):
        net = sw.AutoParallel(copy.deepcopy(model), mode)
        loss = net(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        torch.testing.assert_close(loss, plain(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
        assert net.plan.machine.name == "cpu-gloo"
    automatic.solve = exact
    del os.environ["SHARDWRIGHT_MACHINE"]
    if world.rank == 0:
        print("passed one plan", flush=True)


def bits(world):
    """In float32 and bfloat16 too the simulated ranks compute what these do, to the last bit, however moves are scheduled."""
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    gpt, everything, cnn = GPT(layers=2), Everything(), Net(0.3)
    ids = torch.randint(0, 256, (2 * world.size, 33), generator=generator)
    images = torch.randn(7, 1, 8, 8, generator=generator)
    cases = [
        ("gpt", gpt, (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())),
        ("everything", everything, ({"ids": torch.randint(0, 11, (5, 5), generator=generator)},)),
        ("cnn", cnn, (images,)),
        ("cnn bfloat16", copy.deepcopy(cnn).bfloat16(), (images.bfloat16(),)),
    ]
    early = MoveBuckets(small=0, large=0, sums=Buckets(), gathers=Buckets())
    schedules = {"default": MoveBuckets(), "all early": early, "all joined": MoveBuckets(1 << 30, 1 << 30)}
    for (name, model, batch), (how, chosen) in itertools.product(cases, schedules.items()):
        found = []
        for where in (SimulatedWorld(world.size), world):
            current._current[:] = [where]
            module = copy.deepcopy(model)
            net = sw.AutoParallel(module)
            net.settings.schedule = chosen
            torch.manual_seed(9)
            loss = loss_of(net(*batch))
            loss.backward()
            found.append(
                (loss.detach(), {n: p.grad if p.grad is None else full_value(p.grad) for n, p in module.named_parameters()})
            )
        (loss, gradients), (other_loss, others) = found
        assert torch.equal(loss, other_loss), (name, how, float(loss), float(other_loss))
        for n, gradient in gradients.items():
            equal = others[n] is None if gradient is None else torch.equal(gradient, others[n])
            assert equal, f"{name}, {how}: the gradient of {n} has other bits"
    if world.rank == 0:
        print("passed bits", flush=True)


if __name__ == "__main__":
    main()
