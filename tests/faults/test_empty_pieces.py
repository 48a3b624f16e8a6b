"""Ranks without rows: what draws numbers, views of complex numbers, and whatever else refuses nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardwright as sw

DRAWS = {
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda h: torch.randint_like(h, 5),
    "empty_like normal_": lambda h: torch.empty_like(h).normal_(),
    "empty_like uniform_": lambda h: torch.empty_like(h).uniform_(),
    "empty_like exponential_": lambda h: torch.empty_like(h).exponential_(),
    "clone bernoulli_": lambda h: h.clone().bernoulli_(0.3),
    "new_empty normal_": lambda h: h.new_empty(h.shape).normal_(),
    "bernoulli": lambda h: torch.bernoulli(h.sigmoid()),
    "dropout": lambda h: F.dropout(h, 0.4),
    "gumbel_softmax": lambda h: F.gumbel_softmax(h, dim=1),
    "multinomial": lambda h: torch.multinomial(h.softmax(1), 4, replacement=True),
}


def _same(function, layer, x, ranks, mode):
    results = []
    for devices in (0, ranks):
        layer.zero_grad()
        if devices:
            sw.init(devices=devices)
        torch.manual_seed(7)
        out = (sw.AutoParallel(function, mode) if devices else function)(x)
        out.square().sum().backward()
        results.append((out.detach(), *(p.grad.clone() for p in layer.parameters())))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("devices", "rows"), [(8, 12), (5, 6), (6, 8), (8, 9), (8, 3), (3, 3)])
@pytest.mark.parametrize("name", DRAWS)
def test_draws(name, devices, rows):
    layer = nn.Linear(3, 4)

    def run(x):
        h = layer(x)
        return h + 0.1 * DRAWS[name](h)

    _same(run, layer, torch.randn(rows, 3), devices, "data_parallel" if rows >= devices else "semi_auto")


COMPLEX = {
    "view_as_real": lambda h: torch.view_as_real(torch.complex(h, h)),
    "view_as_real of a product": lambda h: torch.view_as_real(torch.complex(h, h * 2) * torch.complex(h, h)).sum(-1),
    "view_as_complex": lambda h: torch.view_as_complex(h.view(-1, 2, 2)).abs(),
    "real": lambda h: torch.complex(h, h).real * 2,
    "imag": lambda h: torch.complex(h, h).imag * 2,
    "abs": lambda h: torch.complex(h, h + 1).abs(),
    "angle": lambda h: torch.complex(h, h + 1).angle(),
    "conj": lambda h: torch.complex(h, h).conj().imag,
    "fft": lambda h: torch.fft.fft(h).abs(),
    "polar": lambda h: torch.view_as_real(torch.polar(h.abs(), h)),
    "view as dtype": lambda h: h.view(torch.int32).float() * 0 + h,
}


@pytest.mark.parametrize(("devices", "rows"), [(4, 6), (5, 6), (4, 8)])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers(name, summed, devices, rows):
    layer = nn.Linear(3, 4).double() if name != "view as dtype" else nn.Linear(3, 4)

    def run(x):
        y = COMPLEX[name](layer(x))
        return y.sum() if summed else y

    x = torch.randn(rows, 3, dtype=layer.weight.dtype)
    _same(run, layer, x, devices, "semi_auto")
