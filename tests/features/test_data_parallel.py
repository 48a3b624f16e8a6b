"""Data parallel is the single device: losses, gradients, weights, running statistics; simulated and on real ranks."""

from __future__ import annotations

import copy
import re
import runpy
from functools import reduce
from operator import add
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardwright as sw
from harness import compare, main, on_ranks, rank_counts, same_steps, simulated
from shardwright.world import current
from shardwright.world.current import current_world

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


class Images(nn.Module):
    """A convolution, batch norms, a frozen and an unused parameter, a tied weight; the loss is a mean over the batch."""

    def __init__(self):
        super().__init__()
        first, second = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Linear(4 * 36, 8, bias=False)
        self.layers = nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), second, nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 8, bias=False)
        self.unused = nn.Parameter(torch.randn(5))
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.double()

    def forward(self, x, y):
        h = self.head(torch.tanh(self.layers(x) * self.frozen))
        return F.cross_entropy(F.linear(h, self.head.weight), y)


def _batches(rows, count=3):
    return [(torch.randn(rows, 3, 6, 6).double(), torch.randint(8, (rows,))) for _ in range(count)]


def steps():
    """Even and uneven batches, and one smaller than the number of ranks."""
    n = current_world().size
    for rows in (4 * n, 4 * n + 1, max(2, n - 1)):
        net = same_steps(Images(), _batches(rows), lambda m: sw.AutoParallel(m, "data_parallel"))
        assert sw.verify(net, *_batches(rows, 1)[0])


def evaluation():
    """Running statistics are used, and left alone."""
    model = Images()
    plain = copy.deepcopy(model)
    net = sw.AutoParallel(model, "data_parallel")
    (x, y), n = _batches(2 * current_world().size)[0], current_world().size
    net(x, y), plain(x, y)
    model.eval(), plain.eval()
    assert abs(float(net(x, y).detach()) - float(plain(x, y).detach())) < 1e-12
    compare(plain, model, f"{n} ranks", gradients=False)


def own_slices():
    """Every real rank hands in its part of the batch; in the simulated world the caller hands in the whole."""
    world = current_world()
    model = Images()
    plain = copy.deepcopy(model)
    net = sw.AutoParallel(model, "data_parallel").dataset_strategy("data_parallel")
    ours, theirs = (torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, plain))
    for x, y in _batches(3 * world.size):
        parts = (x, y) if world.is_simulated else tuple(t.chunk(world.size)[world.rank] for t in (x, y))
        loss, expected = net(*parts), plain(x, y)
        assert abs(float(loss.detach()) - float(expected.detach())) < 1e-12
        for update, value in ((ours, loss), (theirs, expected)):
            update.zero_grad()
            value.backward()
            update.step()
        compare(plain, model, tolerance=1e-8)


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4, sparse=True, padding_idx=1, dtype=torch.float64)

    def forward(self, rows):
        return self.table(rows).square().mean()


def gradients_of_rows():
    """A sparse gradient is summed as a dense one."""
    model = Rows()
    plain = copy.deepcopy(model)
    rows = torch.randint(10, (4 * current_world().size, 3))
    for mode in ("data_parallel", "hybrid_parallel"):
        model.table.weight.grad = plain.table.weight.grad = None
        sw.AutoParallel(model, mode)(rows).backward()
        plain(rows).backward()
        assert torch.allclose(sw.full_value(model.table.weight.grad), plain.table.weight.grad.to_dense(), rtol=1e-12)


def slices_of_several_shapes():
    """An error on all ranks, and no hang, where ranks run a program of their own."""
    world = current_world()
    if not world.is_simulated:
        net = sw.AutoParallel(nn.Linear(4, 4), "hybrid_parallel").dataset_strategy("data_parallel")
        with pytest.raises(sw.errors.WorldError, match=r"rank 0('s|:) float32 \[2, 4\]"):
            net(torch.ones(2 + world.rank, 4))
        assert net(torch.ones(2, 4)).shape == (2 * world.size, 4)


def strategies_are_ignored():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)).double()
    n = current_world().size
    sw.shard(model[0], ((1, n),))
    net = sw.AutoParallel(model, "data_parallel").shard({"1": ((1, 1), (n, 1))})
    net(torch.randn(2 * n, 6).double())
    assert {layout.short() for layout in net.plan.input_layouts.values() if layout.ndim == 1} == {"None"}
    kinds = {s.kind for m in net.program.moves for s in (*m.redistribution.forward, *m.redistribution.backward)}
    assert kinds <= {"slice", "all_gather", "all_reduce"}


def gradients_travel_as_they_get_ready():
    """Last layers first, alone or in buckets; each gradient once, and nothing else in the backward pass."""
    n = current_world().size
    for config, expected in (
        ({"mode": "size", "config": 0}, [[3], [2], [1], [0]]),
        ({"mode": "index", "config": [2]}, [[2, 3], [0, 1]]),
    ):
        model = nn.Sequential(*(nn.Linear(128, 128, bias=False, dtype=torch.float64) for _ in range(4)))
        net = sw.AutoParallel(model, "data_parallel").comm_fusion({"allreduce": config})
        loss = net(torch.randn(4 * n, 128).double()).square().mean()
        with sw.record_communication() as log:
            loss.backward()
        assert [e.kind for e in log.events] == ["all_reduce"] * (4 if n > 1 else 0)
        together = {e.launch: [] for e in log.events}
        for e in log.events:
            together[e.launch].append(int(e.edge.split("_")[1]))
        assert [sorted(layers) for layers in together.values()] == (expected if n > 1 else [])


def halves_are_added_in_float32():
    """A bf16 gradient is the sum of the ranks' bf16 gradients, added in float32 and rounded once."""
    n = current_world().size
    model = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    plain = copy.deepcopy(model)
    x, weights = (torch.randn(2 * n, k).to(torch.bfloat16) for k in (64, 32))
    net = sw.AutoParallel(lambda x, weights: (model(x) * weights).sum(), "data_parallel")
    net(x, weights).backward()
    parts = []
    for a, b in zip(x.chunk(n), weights.chunk(n), strict=True):
        (gradient,) = torch.autograd.grad((plain(a) * b).sum(), plain.parameters())
        parts.append(gradient)
    got = sw.full_value(next(net.parameters()).grad)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, reduce(add, [p.float() for p in parts]).to(torch.bfloat16))
    if n > 3:
        assert not torch.equal(got, reduce(add, parts)), "adding halves gives the same: the test shows nothing"


PROGRAMS = (
    steps,
    evaluation,
    own_slices,
    slices_of_several_shapes,
    gradients_of_rows,
    strategies_are_ignored,
    gradients_travel_as_they_get_ready,
    halves_are_added_in_float32,
)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("devices", rank_counts(3, more=(1, 4)))
def test_simulated(program, devices):
    simulated(program, devices)


@pytest.mark.parametrize("ranks", rank_counts(3, more=(2,)))
def test_on_real_ranks(ranks):
    on_ranks(__file__, ranks, PROGRAMS)


def test_the_example(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(current, "_current", [])
    runpy.run_path(str(EXAMPLES / "data_parallel.py"), run_name="__main__")
    losses = re.findall(r"loss (\d\.\d{7}), on a single device (\d\.\d{7})", capsys.readouterr().out)
    assert len(losses) == 10
    assert all(ours == single for ours, single in losses)


def test_gradients_are_those_of_the_global_loss():
    net = sw.AutoParallel(nn.ReLU(), "data_parallel")
    assert net.enable_gradients_mean() is net
    with pytest.raises(sw.errors.ShardwrightError, match="reduction='sum'"):
        net.enable_gradients_mean(False)
    with pytest.raises(TypeError, match="give True or False"):
        net.enable_gradients_mean(1)


if __name__ == "__main__":
    main(PROGRAMS)
