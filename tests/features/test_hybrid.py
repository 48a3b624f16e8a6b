"""Programs of one rank, with collectives of their own, compute what a single device does: simulated and on real ranks."""

from __future__ import annotations

import copy
import functools
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardwright as sw
from harness import compare, main, on_ranks, rank_counts, same_steps, simulated
from shardwright.world import current
from shardwright.world.current import current_world

cc = sw.collectives
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def meshes():
    """One axis of all ranks, and two where their number allows."""
    n = current_world().size
    yield sw.Mesh(("dp",), (n,))
    if n % 2 == 0 and n > 2:
        yield sw.Mesh(("dp", "mp"), (n // 2, 2))
        yield sw.Mesh(("mp", "dp"), (2, n // 2))


def alone(model):
    """The same model with all of its parameters whole, whose collectives are over one rank."""
    forward = type(model).forward

    def run(*args):
        with cc.over(sw.Mesh(("dp", "mp"), (1, 1))):
            return forward(model, *args)

    model.forward = run
    return model


def built_alone(make):
    with cc.over(sw.Mesh(("dp", "mp"), (1, 1))):
        torch.manual_seed(0)
        return alone(make())


def built(make):
    torch.manual_seed(0)
    return make()


# -- each collective ------------------------------------------------------------------------------------------------------


def grouped(mesh, axis, x, of_group):
    """What ``of_group`` makes of the stacked tensors of each group, put back in the order of ranks."""
    results = [None] * mesh.size
    for group in mesh.groups((axis,)):
        for rank, made in zip(group, of_group(x[group]), strict=True):
            results[rank] = made
    return torch.stack(results)


def _all_to_all(x, split, concat):
    pieces = [p.chunk(len(x), split) for p in x]
    return [torch.cat([p[i] for p in pieces], concat) for i in range(len(x))]


def _pairs(x):
    """Rank 0 sends to the last, the last to nobody and so on: position i gets that of i + 1, the last gets zeros."""
    return [*x[1:], x[0] * 0]


CASES = {
    "sum": (lambda x, a: cc.all_reduce(x, a), lambda x: [x.sum(0)] * len(x)),
    "mean": (lambda x, a: cc.all_reduce(x, a, op="mean"), lambda x: [x.mean(0)] * len(x)),
    "gather": (lambda x, a: cc.all_gather(x, a, 1), lambda x: [torch.cat(list(x), 1)] * len(x)),
    "scatter": (lambda x, a: cc.reduce_scatter(x, a, -1), lambda x: x.sum(0).chunk(len(x), -1)),
    "scatter mean": (lambda x, a: cc.reduce_scatter(x, a, 0, op="mean"), lambda x: x.mean(0).chunk(len(x), 0)),
    "all_to_all": (lambda x, a: cc.all_to_all(x, a, 0, 1), lambda x: _all_to_all(x, 0, 1)),
    "all_to_all same": (lambda x, a: cc.all_to_all(x, a, 0, 0), lambda x: _all_to_all(x, 0, 0)),
    "broadcast": (lambda x, a: cc.broadcast(x, a, cc.size(a) - 1), lambda x: [x[-1]] * len(x)),
    "next": (lambda x, a: cc.permute(x, a), lambda x: x.roll(1, 0)),
    "back": (lambda x, a: cc.permute(x, a, shift=-1), lambda x: x.roll(-1, 0)),
    "pairs": (lambda x, a: cc.permute(x, a, pairs=[(i + 1, i) for i in range(cc.size(a) - 1)]), _pairs),
    "chosen": (lambda x, a: cc.all_reduce(x.chunk(cc.size(a))[cc.rank(a)], a), lambda x: _chosen(x)),
    "scaled": (lambda x, a: cc.all_reduce(x.sum() * (cc.rank(a) + 1), a).reshape(1, 1), lambda x: _scaled(x)),
}


def _scaled(x):
    return [sum(p.sum() * (i + 1) for i, p in enumerate(x)).reshape(1, 1)] * len(x)


def _tensors(mesh, function):
    x = torch.randn(mesh.size, 12, 24, dtype=torch.float64, requires_grad=True)
    y = function(x)
    weights = torch.randn(y.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    return x, y, weights, gradient


def _chosen(x):
    return [sum(p.chunk(len(x))[i] for i, p in enumerate(x))] * len(x)


class Each(nn.Module):
    """A collective of what every rank is given."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x[0])[None] + 0 * x.sum()  # another value on each rank, as far as anyone knows


def collectives_in_programs():
    for mesh in list(meshes())[:2]:
        for name, (function, expected) in CASES.items():
            for axis in mesh.axes:
                x, y, weights, gradient = _tensors(mesh, lambda x, e=expected, a=axis, m=mesh: grouped(m, a, x, e))
                with cc.over(mesh, data=mesh.axes):
                    net = sw.AutoParallel(Each(lambda t, f=function, a=axis: f(t, a)), "hybrid_parallel")
                got = net(x)
                assert torch.allclose(got, y, rtol=1e-12, atol=1e-12), (name, axis, str(mesh))
                (found,) = torch.autograd.grad((got * weights).sum(), x)
                assert torch.allclose(found, gradient, rtol=1e-12, atol=1e-12), (name, axis, str(mesh))


def collectives_in_plain_code():
    world = current_world()
    if world.is_simulated:
        return
    for mesh in meshes():
        for name, (function, expected) in CASES.items():
            for axis in mesh.axes:
                x, y, weights, gradient = _tensors(mesh, lambda x, e=expected, a=axis, m=mesh: grouped(m, a, x, e))
                mine = x[world.rank].detach().requires_grad_()
                with cc.over(mesh):
                    got = function(mine, axis)
                assert torch.allclose(got, y[world.rank], rtol=1e-12, atol=1e-12), (name, axis, str(mesh))
                (got * weights[world.rank]).sum().backward()
                assert torch.allclose(mine.grad, gradient[world.rank], rtol=1e-12, atol=1e-12), (name, axis, str(mesh))


# -- models -----------------------------------------------------------------------------------------------------------------


class Tensor2D(nn.Module):
    """Two products, the first weight cut by columns and the second by rows, around replicated norms; the loss is a mean."""

    def __init__(self, axis="mp"):
        super().__init__()
        self.axis = axis
        make = functools.partial(torch.randn, dtype=torch.float64)
        self.norm = nn.LayerNorm(6, dtype=torch.float64)
        self.up = cc.own(make(12, 6), axis)
        self.bias = cc.own(make(12), axis)
        self.down = cc.own(make(6, 12), axis, dim=1)
        self.unused = nn.Parameter(make(3))
        self.frozen = nn.Parameter(make(6), requires_grad=False)
        self.head = nn.Linear(6, 6, dtype=torch.float64)
        self.tied = self.head.weight

    def forward(self, x, y):
        h = F.gelu(F.linear(self.norm(x), self.up, self.bias))
        h = cc.all_reduce(h @ self.down.t(), self.axis) * self.frozen
        return F.mse_loss(self.head(h) @ self.tied, y)


def _batches(rows, count=3, columns=6):
    return [tuple(torch.randn(rows, columns, dtype=torch.float64) for _ in range(2)) for _ in range(count)]


def tensor_parallel():
    for mesh in meshes():
        axis = "mp" if "mp" in mesh.axes else "dp"
        for rows in (12, 10):
            with cc.over(mesh, data=tuple(a for a in mesh.axes if a != axis)):
                model = built(functools.partial(Tensor2D, axis))
                batches = _batches(rows)
                plain = built_alone(functools.partial(Tensor2D, axis))
                net = same_steps(model, batches, lambda m: sw.AutoParallel(m, "hybrid_parallel"), plain=plain, tolerance=1e-8)
                assert mesh.size == 1 or "all_reduce" in str(net.program)
                assert sw.verify(net, *batches[0])


class Sequence(nn.Module):
    """Rows over ``mp`` between products whose weights are cut over it."""

    def __init__(self):
        super().__init__()
        make = functools.partial(torch.randn, dtype=torch.float64)
        self.norm = nn.LayerNorm(6, dtype=torch.float64)
        self.up = cc.own(make(12, 6), "mp")
        self.down = cc.own(make(6, 12), "mp", dim=1)

    def forward(self, x, y):
        n, mine = cc.size("mp"), cc.rank("mp")
        x, y = x.chunk(n)[mine], y.chunk(n)[mine]
        h = cc.all_gather(self.norm(x), "mp", 0)
        h = cc.reduce_scatter(torch.relu(h @ self.up.t()) @ self.down.t(), "mp", 0)
        return F.mse_loss(x + h, y)


def sequence_parallel():
    """Also where data ranks have different numbers of rows: 16 over 3 are 6, 6 and 4."""
    n = current_world().size
    if n % 2:
        return
    with cc.over(sw.Mesh(("dp", "mp"), (n // 2, 2))):
        model = built(Sequence)
        batches = _batches(16 if n == 6 else 4 * n)
        same_steps(model, batches, lambda m: sw.AutoParallel(m, "hybrid_parallel"), plain=built_alone(Sequence), tolerance=1e-8)


class Experts(nn.Module):
    """Every rank reads a weight of its own among those that all ranks hold, and some of what others computed."""

    def __init__(self, count):
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(6, dtype=torch.float64)) for _ in range(count)])

    def forward(self, x):
        sums = [cc.all_reduce(x * i, "dp") for i in range(1, len(self.scales) + 1)]
        return (torch.tanh(sums[cc.rank()]) * self.scales[cc.rank()]).sum()


def values_that_ranks_choose():
    """What a rank does not choose has a gradient of zeros there, and nobody waits."""
    n = current_world().size
    model = built(lambda: Experts(n))
    plain = copy.deepcopy(model)
    x = torch.randn(n, 6, dtype=torch.float64, requires_grad=True)
    sw.AutoParallel(model, "hybrid_parallel")(x).backward()
    found, x.grad = x.grad, None
    total = x.sum(0)
    (sum((torch.tanh(total * (i + 1)) * p).sum() for i, p in enumerate(plain.scales)) / n).backward()
    compare(plain, model)
    assert torch.allclose(found, x.grad, rtol=1e-12)


class Data(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()

    def forward(self, x, y):
        return F.mse_loss(self.layers(x), y)


def data_only():
    """Uneven parts too: each rank's mean counts as its share."""
    n = current_world().size
    for rows in (4 * n, 4 * n - 1):
        same_steps(built(Data), _batches(rows), lambda m: sw.AutoParallel(m, "hybrid_parallel"))


def sums():
    """A sum over the batch, and gradients that are summed."""

    class Sum(Data):
        def forward(self, x, y):
            return F.mse_loss(self.layers(x), y, reduction="sum")

    class Cut(Tensor2D):
        def forward(self, x, y):
            return super().forward(x, y) * y.numel()

    def summed(model):
        return sw.AutoParallel(model, "hybrid_parallel").enable_gradients_mean(False)

    n = current_world().size
    batches = _batches(2 * n)
    same_steps(built(Sum), batches, summed)
    if n % 2 == 0:
        with cc.over(sw.Mesh(("dp", "mp"), (n // 2, 2))):
            same_steps(built(Cut), batches, summed, plain=built_alone(Cut), tolerance=1e-8)


def own_slices_of_the_batch():
    """Real ranks hand in their parts; the simulated world is handed the whole."""
    world = current_world()
    batches = _batches(4 * world.size)
    parts = [tuple(t.chunk(world.size)[world.rank] for t in batch) for batch in batches]
    for strategy in ("data_parallel", ((world.size, 1), (world.size, 1))):
        model = built(Data)
        plain = copy.deepcopy(model)
        net = sw.AutoParallel(model, "hybrid_parallel").dataset_strategy(strategy)
        for whole, part in zip(batches, parts, strict=True):
            loss = net(*(whole if world.is_simulated else part))
            expected = plain(*whole)
            assert abs(float(loss.detach()) - float(expected.detach())) < 1e-12
            loss.backward()
            expected.backward()
            compare(plain, model)


class Product(nn.Module):
    """The product of slices is summed: each rank is handed columns of ``x``."""

    def __init__(self, whole):
        super().__init__()
        self.weight = cc.own(whole, "mp")

    def forward(self, x):
        return cc.all_reduce(x @ self.weight, "mp")


def columns_of_the_input():
    n = current_world().size
    x, w = torch.randn(32, 60, dtype=torch.float64), torch.randn(60, 16, dtype=torch.float64)
    layout = sw.Layout((n,), ("mp",))
    mine = x if current_world().is_simulated else x.chunk(n, 1)[current_world().rank]
    with cc.over(sw.Mesh(("mp",), (n,))):
        model = Product(w)
        got = sw.AutoParallel(model, "hybrid_parallel").dataset_strategy((layout("None", "mp"),))(mine)
    assert torch.allclose(got, x @ w)
    got.square().sum().backward()
    reference = w.clone().requires_grad_()
    (x @ reference).square().sum().backward()
    assert torch.allclose(sw.full_value(model.weight.grad), reference.grad)


def train_step():
    """The same within a train step, with logits that leave the model and a loss outside of it."""
    n = current_world().size
    model = built(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double())
    plain = copy.deepcopy(model)
    x, y = torch.randn(3 * n, 6, dtype=torch.float64), torch.randint(3, (3 * n,))

    def step(model, optimizer):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    ours, theirs = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, plain))

    def gradients(model):
        return sw.value_and_grad(lambda: F.cross_entropy(model(x), y), None, model.parameters())()[1]

    parallel = sw.AutoParallel(lambda: step(model, ours), "hybrid_parallel")
    for _ in range(3):
        assert abs(float(parallel().detach()) - float(step(plain, theirs).detach())) < 1e-12
    found = sw.AutoParallel(lambda: gradients(model), "hybrid_parallel")()
    for got, expected in zip(found, gradients(plain), strict=True):
        assert torch.allclose(sw.full_value(got), expected, rtol=1e-9, atol=1e-12)
    compare(plain, model, tolerance=1e-8)


def in_parts():
    """Micro-batches: gradients are reduced once for all; buckets are as told."""
    n = current_world().size
    for mesh in meshes():
        axis = "mp" if "mp" in mesh.axes else "dp"
        with cc.over(mesh, data=tuple(a for a in mesh.axes if a != axis)):
            model = built(functools.partial(Tensor2D, axis))
            plain = built_alone(functools.partial(Tensor2D, axis))
            wrapped = sw.GradAccumulation(model, 2)
            net = sw.AutoParallel(wrapped, "hybrid_parallel").comm_fusion({"allreduce": {"mode": "auto"}})
            ((x, y),) = _batches(8 * n, 1)
            with sw.record_communication() as log:
                loss = net(x, y)
                loss.backward()
            expected = plain(x, y)
            expected.backward()
            assert abs(float(loss.detach()) - float(expected.detach())) < 1e-9
            compare(plain, model, tolerance=1e-8)
            assert sum("norm_weight" in e.edge for e in log.events if e.phase == "backward") == (n > 1)


def begun_late():
    """A model that has no values yet, a state that is loaded, and gradients that are clipped by the norm of all slices."""
    n = current_world().size
    with cc.over(sw.Mesh(("mp",), (n,))):
        make = functools.partial(Tensor2D, "mp")
        plain = built_alone(make)
        with sw.no_init_parameters():
            model = built(make)
        net = sw.AutoParallel(model, "hybrid_parallel")
        ((x, y),) = _batches(6, 1)
        net.compile(x, y)
        compare(plain, model, gradients=False)
        for parameter in plain.parameters():
            parameter.data.mul_(1.5)
        model.load_state_dict(plain.state_dict())
        for run, each in ((plain, plain), (net, model)):
            run(x, y).backward()
            torch.nn.utils.clip_grad_norm_(each.parameters(), 0.1)
        compare(plain, model)
        other = sw.AutoParallel(model, "hybrid_parallel")  # of a model that is distributed already
        assert abs(float(other(x, y).detach()) - float(plain(x, y).detach())) < 1e-10
        model.eval()
        with torch.no_grad():
            assert abs(float(net(x, y)) - float(plain(x, y))) < 1e-10


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6).double()
        self.register_buffer("seen", torch.zeros(()).double())

    def forward(self, x):
        self.seen += 1
        return self.norm(x).square().mean()


def buffers():
    """Running statistics become the mean of the ranks'; what is the same on all stays."""
    n = current_world().size
    x = torch.randn(4 * n, 6, dtype=torch.float64)
    model = Normed()
    net = sw.AutoParallel(model, "hybrid_parallel")
    means, variances = torch.zeros(6).double(), torch.ones(6).double()
    for _ in range(2):
        net(x).backward()
        parts = x.chunk(n)
        means = 0.9 * means + 0.1 * torch.stack([p.mean(0) for p in parts]).mean(0)
        variances = 0.9 * variances + 0.1 * torch.stack([p.var(0) for p in parts]).mean(0)
    assert torch.allclose(model.norm.running_mean, means)
    assert torch.allclose(model.norm.running_var, variances)
    assert int(model.norm.num_batches_tracked) == 2
    assert float(model.seen) == 2
    model.eval()
    assert net(x).isfinite()
    assert int(model.norm.num_batches_tracked) == 2


PROGRAMS = (
    collectives_in_programs,
    collectives_in_plain_code,
    tensor_parallel,
    sequence_parallel,
    values_that_ranks_choose,
    data_only,
    sums,
    own_slices_of_the_batch,
    columns_of_the_input,
    train_step,
    in_parts,
    begun_late,
    buffers,
)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("devices", rank_counts(4, more=(1, 3)))
def test_simulated(program, devices):
    simulated(program, devices)


def test_six_ranks():
    simulated(sequence_parallel, 6)
    simulated(tensor_parallel, 6)


def test_the_example(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(current, "_current", [])
    runpy.run_path(str(EXAMPLES / "hybrid_parallel.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert "matmul = aten.matmul(chunk_o0_1, weight_1)" in text
    assert "# weight: parameter weight [256, 128] of [512, 128], mp,None" in text
    assert all(float(size) < 1e-12 for size in re.findall(r"differs by (\S+)", text))
    assert text.endswith("matches single device: 1 outputs, 1 gradients\n")


@pytest.mark.parametrize("ranks", rank_counts(3, more=(4,)))
def test_on_real_ranks(ranks):
    on_ranks(__file__, ranks, PROGRAMS)


if __name__ == "__main__":
    main(PROGRAMS)
