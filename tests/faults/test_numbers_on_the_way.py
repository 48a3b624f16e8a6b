"""Parts of torch that read numbers off tensors or have no derivative, and weights that hooks of modules compute."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, update_bn

import shardwright as sw

torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _three(monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    sw.init(devices=3)


def compare(function, model, mode="data_parallel", rows=7):
    """Compares what a function yields of a model with what it yields of its net."""
    single = copy.deepcopy(model)
    batches = [torch.randn(rows, 6).double() for _ in range(3)]
    expected = list(function(single, single, batches))
    found = list(function(sw.AutoParallel(model, mode), model, batches))
    assert len(expected) == len(found)
    for ours, wanted in zip(found, expected):
        torch.testing.assert_close(ours, wanted, equal_nan=True)


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(6, 4).double(), function

    def forward(self, x):
        return self.function(self.layer(x))


def train(net, model, batches):
    for x in batches[:2]:
        result = net(x)
        yield result
        torch.view_as_real(result).square().sum().backward() if result.is_complex() else result.square().sum().backward()
    yield from [p.grad for p in model.parameters()]


COUNTS, SHARES = torch.arange(1, 8), torch.linspace(0.5, 1, 7).double()
COVARIANCES = {
    "cov": lambda h: torch.cov(h.t()),
    "correction": lambda h: h.t().cov(correction=0),
    "weights": lambda h: torch.cov(h.t(), fweights=COUNTS, aweights=SHARES),
    "shares": lambda h: torch.cov(h.t(), correction=0, aweights=SHARES),
    "one row": lambda h: torch.cov(h[:, 0]),
    "complex": lambda h: torch.cov(torch.complex(h, h.sin()).t()),
    "corrcoef": lambda h: torch.corrcoef(h.t()),
}


@pytest.mark.parametrize("name", COVARIANCES)
def test_covariances(name):
    compare(train, Of(COVARIANCES[name]))


def fourier(net, model, batches):
    for x in batches[:2]:
        loss = net(x)
        yield loss
        loss.backward()
    yield from [p.grad for p in model.parameters()]


class Spectrum(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6).double()

    def forward(self, x):
        x = x.detach().requires_grad_()
        found = torch.fft.irfft(torch.fft.rfft(self.layer(x))[:, :3].square(), n=6)
        return torch.autograd.grad(found.square().sum(), x, create_graph=True)[0].square().sum()


def test_trained_derivatives_of_fourier_transformations():
    compare(fourier, Spectrum())


def averaged(net, model, batches):
    average = AveragedModel(model)
    for x in batches:
        net(x).square().mean().backward()
    update_bn(batches, average)
    yield from average.state_dict().values()
    parallel = sw.AutoParallel(average, "data_parallel") if isinstance(net, sw.AutoParallel) else average
    update_bn(batches[:2], parallel)
    yield from average.state_dict().values()
    yield from model.buffers()


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_statistics_of_all_batches(momentum):
    compare(averaged, nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Linear(4, 2)).double())


def pruned(net, model, batches):
    prune.l1_unstructured(model[0], "weight", 0.4)
    prune.l1_unstructured(model[1], "weight", 0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x in batches:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        yield model[0].weight  # of this call's forward
    places = [(model[0], "weight"), (model[1], "weight")]
    prune.global_unstructured(places, pruning_method=prune.L1Unstructured, amount=0.3)
    yield net(batches[0])
    yield from model.state_dict().values()


def weight_normed(net, model, batches):
    torch.manual_seed(1)
    nn.utils.spectral_norm(model[0])
    for x in batches:
        net(x).square().mean().backward()
        yield model[0].weight


@pytest.mark.parametrize("run", [pruned, weight_normed])
def test_weights_that_hooks_compute_are_those_of_the_last_call(run):
    compare(run, nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).double())
