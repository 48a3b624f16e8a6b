"""Numbers of modules that change in every step: no plan per step, and the values of one device."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.api import decided

STEPS = 8


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function
        self.calls, self.t, self.n = 0, 1.5, 1

    def forward(self, x):
        return self.function(self, self.layer(x))


def counts(self, h):
    self.calls += 1
    return h * self.calls


def corrects(self, h):
    self.calls += 1
    return h / (1 - 0.9**self.calls)


def decides(self, h):
    self.calls += 1
    return h * 2 if self.calls > 4 else h * self.calls


def alternates(self, h):
    self.calls += 1
    return h.sin() if self.calls % 2 == 0 else h * 0.1 * self.calls


def in_place(self, h):
    h = h * 1
    h.mul_(self.t).add_(self.n)
    h *= self.t
    h /= 2
    return h


def integers(self, h):
    return h + torch.arange(4) * self.t + (torch.arange(4) * self.n).double()


# with how many captures each needs: the first two values, the number, and one for each other decision
AS_INPUTS = {
    counts: 3, corrects: 3, decides: 4, alternates: 4, in_place: 3, integers: 3,
    "temperature": (lambda self, h: (h / self.t).softmax(1), 3),
    "of no dims": (lambda self, h: h.square().mean() + self.t * h.abs().mean(), 3),
    "arithmetic": (lambda self, h: h * (1 - self.t) ** 2 + self.t * h.sum() - 0.5 * self.t, 3),
    "bounds": (lambda self, h: h * max(self.t, 2.5) * min(1.0, self.n / 3), 5),
    "both": (lambda self, h: h * self.t if self.t < 3.5 and self.n else h + self.n, 4),
}  # fmt: skip
CONSTANTS = {
    "math": lambda self, h: h * math.exp(-self.t),
    "dropout": lambda self, h: nn.functional.dropout(h, self.t * 0.01),
    "clamp": lambda self, h: h.clamp(max=self.t),
    "power": lambda self, h: h.abs() ** self.t,
    "shape": lambda self, h: h[:, : self.n % 4 + 1],
    "text": lambda self, h: h * self.t if f"{self.t}" else h,
}


def named(key, value):
    return (key.__name__, key, value) if callable(key) else (key, *value)


CASES = [*(named(key, value) for key, value in AS_INPUTS.items()), *((name, f, None) for name, f in CONSTANTS.items())]


@pytest.mark.whole
@pytest.mark.parametrize("name, function, captures", CASES, ids=[case[0] for case in CASES])
def test_each_step_is_that_of_one_device(monkeypatch, name, function, captures):
    sw.init(devices=3)
    torch.manual_seed(0)
    model = Net(function).double()
    single, net = copy.deepcopy(model), sw.AutoParallel(model, "data_parallel")
    made = []
    plain = decided.capture_target
    monkeypatch.setattr(decided, "capture_target", lambda *args: made.append(1) or plain(*args))
    for step in range(STEPS):
        x = torch.randn(6, 4, dtype=torch.float64)
        results = []
        for called, own in ((net, model), (single, single)):
            torch.manual_seed(step)
            own.zero_grad()
            loss = called(x).sum()
            loss.backward()
            results.append((loss, own.layer.weight.grad, own.calls))
            if not own.calls:
                own.t, own.n = own.t + 0.5, own.n + 1
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-11, atol=1e-12)
        assert results[0][2] == results[1][2]
        assert type(model.calls) is int
    if captures is not None:
        assert len(made) <= captures


@pytest.mark.whole
def test_a_number_that_changes_with_the_shape_of_the_batch():
    sw.init(devices=2)
    model = Net(AS_INPUTS["temperature"][0]).double()
    net = sw.AutoParallel(model)
    for step in range(6):
        model.t = 1.0 + step
        x = torch.randn(4 + step % 2, 4, dtype=torch.float64)
        torch.testing.assert_close(net(x), model(x))
        model.train(step % 3 == 0)
