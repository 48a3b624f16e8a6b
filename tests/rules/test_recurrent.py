"""Recurrent networks and their cells, proved by splitting samples; dropout between layers draws for the whole batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import shardwright as sw
from shardwright.testing.rules import check_rule

KINDS = {
    "gru": (torch.gru, nn.GRU),
    "lstm": (torch.lstm, nn.LSTM),
    "tanh": (torch.rnn_tanh, nn.RNN),
    "relu": (torch.rnn_relu, nn.RNN),
}
FORMS = list(itertools.product(KINDS, (False, True), (False, True), (0.0, 0.4)))


def network(kind: str, batch_first: bool, both_ways: bool, dropout: float, dtype: torch.dtype = torch.float64) -> nn.RNNBase:
    options = {"nonlinearity": kind} if kind in ("tanh", "relu") else {}
    made = KINDS[kind][1](3, 4, 2, batch_first=batch_first, bidirectional=both_ways, dropout=dropout, **options)
    return made.to(dtype)


def inputs(module: nn.RNNBase, samples: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    """A sequence, and the states before it."""
    states = 2 if isinstance(module, nn.LSTM) else 1
    shape = (samples, 5, 3) if module.batch_first else (5, samples, 3)
    before = (2 * (2 if module.bidirectional else 1), samples, 4)
    return torch.randn(shape, dtype=dtype), [torch.randn(before, dtype=dtype) for _ in range(states)]


@pytest.mark.parametrize("samples", [4, 3, 1])
@pytest.mark.parametrize(("kind", "batch_first", "both_ways", "dropout"), FORMS)
def test_networks(kind: str, batch_first: bool, both_ways: bool, dropout: float, samples: int) -> None:
    module = network(kind, batch_first, both_ways, dropout)
    (x, states), weights = inputs(module, samples), list(module.parameters())
    before = states if len(states) > 1 else states[0]
    check_rule(KINDS[kind][0], x, before, weights, True, 2, dropout, True, both_ways, batch_first, meshes=((2,), (3,)))


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("samples", [4, 3, 1])
def test_cells(cell: str, samples: int) -> None:
    weights = list((nn.LSTMCell if cell == "lstm" else nn.GRUCell if cell == "gru" else nn.RNNCell)(3, 4).double().parameters())
    states = [torch.randn(samples, 4, dtype=torch.float64) for _ in range(2 if cell == "lstm" else 1)]
    before = states if len(states) > 1 else states[0]
    check_rule(getattr(torch, f"{cell}_cell"), torch.randn(samples, 3, dtype=torch.float64), before, *weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_draws_what_one_device_draws(kind: str, batch_first: bool, dtype: torch.dtype) -> None:
    """Also of the kernel that computes single precision."""
    sw.init(devices=4)
    module = network(kind, batch_first, True, 0.4, dtype)
    x, states = inputs(module, 6, dtype)

    def call(x: Tensor) -> list[Tensor]:
        made, after = module(x if batch_first else x.transpose(0, 1), tuple(states) if len(states) > 1 else states[0])
        return [made, *(after if isinstance(after, tuple) else (after,))]

    net, results = sw.AutoParallel(call, "data_parallel"), []
    for called in (net, call):
        module.zero_grad()
        torch.manual_seed(3)
        made = called(x if batch_first else x.transpose(0, 1))
        sum(each.square().sum() for each in made).backward()
        results.append([*made, torch.rand(1), *(p.grad for p in module.parameters())])
    (node,) = (n for n in net.latest.graph.nodes if n.op.draws)
    assert net.latest.plan.choices[node.name].axes
    torch.testing.assert_close(results[0], results[1])


def test_one_sequence_without_samples_runs_whole() -> None:
    sw.init(devices=2)
    module, x = nn.GRU(3, 4), torch.randn(5, 3)
    net = sw.AutoParallel(module)
    torch.testing.assert_close(net(x), module(x))
