"""What a net and its model both have, and transformations around a net: never silently something else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.errors import ShardwrightError

OWN = [name for name in dir(sw.AutoParallel) if not name.startswith("_") and name not in {*dir(nn.Module), *vars(nn.Module())}]


@pytest.mark.whole
@pytest.mark.parametrize("name", [*OWN, "target", "settings"])
def test_a_submodule_with_the_name_of_a_nets_attribute_works_and_is_not_confused(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            setattr(self, name, nn.Linear(4, 4))

        def forward(self, x):
            return getattr(self, name)(self.first(x))

    sw.init(devices=2)
    model, x = Model(), torch.randn(4, 4)
    single, net = copy.deepcopy(model), sw.AutoParallel(model)
    torch.testing.assert_close(net(x), single(x))
    net(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in single.named_parameters()]
    with pytest.raises(ShardwrightError, match=rf"net.{name} may be .* test_names_and_transforms.py:\d+"):
        getattr(net, name)


@pytest.mark.whole
@pytest.mark.parametrize(
    "transform",
    [
        lambda net, x: torch.func.vmap(net)(x),
        lambda net, x: torch.func.grad(lambda x: net(x).sum())(x),
        lambda net, x: torch.func.jvp(net, (x,), (x,)),
    ],
)
def test_a_transformation_around_a_net_says_what_to_write(transform):
    sw.init(devices=2)
    model = nn.Linear(4, 4)
    net, x = sw.AutoParallel(model), torch.randn(4, 4)
    with pytest.raises(ShardwrightError, match="Give AutoParallel the function that transforms the model"):
        transform(net, x)
    torch.testing.assert_close(sw.AutoParallel(lambda x: torch.func.vmap(model)(x))(x), model(x))


@pytest.mark.whole
def test_a_functional_call_of_a_net_uses_the_parameters_that_it_is_given():
    sw.init(devices=2)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    net, x = sw.AutoParallel(model), torch.randn(4, 4, dtype=torch.float64)
    results = []
    for called in (net, model):
        doubled = {name: 2 * p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        loss = torch.func.functional_call(called, doubled, (x,)).sum()
        results.append((loss, *torch.autograd.grad(loss, list(doubled.values()))))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.whole
def test_a_norm_whose_result_nothing_reads_moves_its_statistics():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.instance = nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)

        def forward(self, x):
            self.norm(x)
            self.instance(x[:, :, None].expand(-1, -1, 3))
            return x * 2

    sw.init(devices=3)
    model, x = Net().double(), torch.randn(7, 4, dtype=torch.float64)
    single = copy.deepcopy(model)
    for called in (sw.AutoParallel(model), single):
        called(x)
    for ours, theirs in zip(model.buffers(), single.buffers()):
        torch.testing.assert_close(ours, theirs)
