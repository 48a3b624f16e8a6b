"""Results that a call computes others of, such as logits beside their loss: whoever asks for their gradients is refused."""

import copy

import pytest
import torch
from torch import nn

import shardwright as sw

torch.manual_seed(0)
X = torch.randn(6, 4).double()


class Net(nn.Module):
    """Returns three results, of which each is computed of the one before; on request it retains a gradient itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)).double()
        self.retains = False

    def forward(self, x):
        found = [self.layers[0](x)]
        if self.retains:
            found[0].retain_grad()
        for layer in self.layers[1:]:
            found.append(layer(found[-1].tanh()))
        return found


ASKS = {
    "retain_grad": lambda result, loss: (result.retain_grad(), loss.backward()),
    "hook": lambda result, loss: (result.register_hook(lambda gradient: gradient * 2), loss.backward()),
    "derivative": lambda result, loss: torch.autograd.grad(loss, result),
    "inputs": lambda result, loss: loss.backward(inputs=[result]),
}


@pytest.fixture(autouse=True)
def _four(monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    sw.init(devices=4)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("ask", ASKS)
def test_a_gradient_that_would_not_be_whole_is_refused(ask, place):
    results = sw.AutoParallel(Net(), "data_parallel")(X)
    loss = sum(result.square().sum() for result in results)
    with pytest.raises(sw.errors.CaptureError, match="in forward"):
        ASKS[ask](results[place], loss)


@pytest.mark.parametrize("ask", ASKS)
def test_the_last_result_has_its_whole_gradient(ask):
    model = Net()
    single, found = copy.deepcopy(model), []
    for net in (single, sw.AutoParallel(model, "data_parallel")):
        results = net(X)
        found.append(ASKS[ask](results[2], sum(result.square().sum() for result in results)))
        found.append(results[2].grad if results[2].grad_fn is not None and results[2].retains_grad else None)
    if ask == "derivative":
        torch.testing.assert_close(found[2], found[0])
    if ask == "retain_grad":
        torch.testing.assert_close(found[3], found[1])


def test_others_go_on():
    """Gradients of weights and of the input, saving a result, and what forward retains are as before."""
    model = Net()
    model.retains = True
    single, kept = copy.deepcopy(model), []
    for net in (single, sw.AutoParallel(model, "data_parallel")):
        x = X.clone().requires_grad_()
        results = net(x)
        loss = sum(result.square().sum() for result in results)
        gradients = torch.autograd.grad(loss, [x, *net.parameters()], retain_graph=True)
        loss.backward()
        kept.append([results[0].grad / 2, *gradients, x.grad])  # retained in both backward passes
    for expected, ours in zip(*kept, strict=True):
        torch.testing.assert_close(ours, expected)
