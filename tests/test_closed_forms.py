"""Bytes and number of collectives of one training step equal the closed forms.

With P ranks in a group and n bytes in a tensor, the busiest rank sends:

=====================  =====================  ====================================================
collective             bytes                  where
=====================  =====================  ====================================================
all-reduce             2 (P-1)/P n            partial sums forward, gradients of shared inputs
all-gather             (P-1)/P n              n: the gathered tensor
reduce-scatter         (P-1)/P n              n: the tensor before
all-to-all             (P-1)/P n              n: one rank's piece
slice, identity        0
=====================  =====================  ====================================================
"""

from __future__ import annotations

import pytest
import torch
from models import GPT, MLP, tensor_parallel_gpt_plan
from torch import nn

import shardwright as sw


def all_reduce(elements, ranks):
    return -(-2 * (ranks - 1) * elements // ranks) * 4


def step(net, *inputs):
    with sw.record_communication() as log:
        net(*inputs).backward()
    return log


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_data_parallel_reduces_every_gradient_once(ranks):
    sw.init(devices=ranks)
    model = MLP((12, 16, 16, 8))
    log = step(sw.AutoParallel(model), torch.randn(16, 12), torch.randint(0, 8, (16,)))
    backward = [e for e in log.events if e.phase == "backward"]
    assert {e.kind for e in backward} == {"all_reduce"}
    assert len(backward) == 3
    assert sum(e.bytes for e in backward) == sum(all_reduce(p.numel(), ranks) for p in model.parameters())
    forward = [e for e in log.events if e.phase == "forward"]
    assert [(e.kind, e.bytes) for e in forward] == [("all_reduce", all_reduce(2, ranks))]  # the loss: sum and count


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_gpt_is_megatrons_sixteen_all_reduces(ranks):
    sw.init(devices=ranks)
    batch, length, d, layers = 2, 16, 32, 4
    tp = sw.Layout((ranks,), ("tp",))
    model = GPT(vocab=64, d=d, layers=layers, heads=4, length=length)
    for block in model.blocks:
        plan = {name: tp(*axes) for name, axes in tensor_parallel_gpt_plan().items()}
        sw.shard(block, (tp("None", "None", "None"),), parameter_plan=plan)
    net = sw.AutoParallel(model).dataset_strategy((tp("None", "None"),) * 2)
    ids = torch.randint(0, 64, (batch, length))
    log = step(net, ids, ids)
    assert log.count() == log.count("all_reduce") == 4 * layers
    assert log.bytes() == 4 * layers * all_reduce(batch * length * d, ranks)


def test_data_and_tensor_parallel_gpt():
    sw.init(devices=4)
    batch, length, d, layers = 4, 16, 32, 2
    grid = sw.Layout((2, 2), ("dp", "tp"))
    model = GPT(vocab=64, d=d, layers=layers, heads=4, length=length)
    for block in model.blocks:
        plan = {name: grid(*axes) for name, axes in tensor_parallel_gpt_plan("tp").items()}
        sw.shard(block, (grid("dp", "None", "None"),), parameter_plan=plan)
    net = sw.AutoParallel(model).dataset_strategy((grid("dp", "None"),) * 2)
    ids = torch.randint(0, 64, (batch, length))
    log = step(net, ids, ids)
    activations = [e for e in log.events if e.axes == ("tp",)]
    assert len(activations) == 4 * layers
    assert sum(e.bytes for e in activations) == 4 * layers * all_reduce(batch // 2 * length * d, 2)
    gradients = [e for e in log.events if e.axes == ("dp",) and e.phase == "backward"]
    assert len(gradients) == len(list(model.parameters()))
    held = sum(torch.tensor(e.shape).prod().item() for e in gradients)
    assert held == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_strategies_of_one_product(ranks):
    """x (m, k) w (k, n): what each split of one product costs, forward and backward."""
    m, k, n = 16, 32, 8
    sw.init(devices=ranks)
    forms = {  # strategy, out_strategy: forward kinds and bytes, bytes of the gradients of x and w
        (((ranks, 1), (1, 1)), None): ([], 0, all_reduce(k * n, ranks)),
        (((1, 1), (1, ranks)), None): ([], all_reduce(m * k, ranks), 0),
        (((1, ranks), (ranks, 1)), None): ([("all_reduce", all_reduce(m * n, ranks))], 0, 0),
        (((1, ranks), (ranks, 1)), ((ranks, 1),)): ([("reduce_scatter", (ranks - 1) * m * n * 4 // ranks)], 0, 0),
    }
    for (strategy, out), (forward, of_x, of_w) in forms.items():
        product = sw.ops.MatMul().shard(strategy, out)
        first, second = nn.Parameter(torch.randn(m, k)), nn.Parameter(torch.randn(k, n))
        log = step(sw.AutoParallel(lambda p=product, a=first, b=second: p(a, b).sum()))
        got = [(e.kind, e.bytes) for e in log.events if e.phase == "forward" and e.shape == (m, n)]
        assert got == forward
        for shape, expected in (((m, k), of_x), ((k, n), of_w)):
            assert sum(e.bytes for e in log.events if e.phase == "backward" and e.shape == shape) == expected


@pytest.mark.parametrize(("dp", "tp"), [(1, 4), (2, 2), (2, 4)])
def test_columns_then_rows_is_one_all_reduce_forward_and_one_backward(dp, tp):
    """The pairing of a feed-forward block, operator by operator: only the batch's gradients move besides."""
    batch, h, e = 8, 16, 32
    sw.init(devices=dp * tp)
    first, second = sw.ops.MatMul().shard(((dp, 1), (1, tp))), sw.ops.MatMul().shard(((dp, tp), (tp, 1)))
    add, gelu = sw.ops.Add().shard(((dp, tp), (tp,))), sw.ops.GeLU().shard(((dp, tp),))
    w1, b1, w2 = nn.Parameter(torch.randn(h, e)), nn.Parameter(torch.randn(e)), nn.Parameter(torch.randn(e, h))
    net = sw.AutoParallel(lambda x: second(gelu(add(first(x, w1), b1)), w2))
    with sw.record_communication() as log:
        net(torch.randn(batch, h, requires_grad=True)).sum().backward()
    activations = [(x.phase, x.kind, x.bytes) for x in log.events if x.shape == (batch, h) and "reduce" in x.kind]
    size = all_reduce(batch // dp * h, tp)
    assert activations == [("forward", "all_reduce", size), ("backward", "all_reduce", size)]
    gradients = [x for x in log.events if x.shape in ((h, e), (e,), (e, h)) and x.phase == "backward"]
    assert len(gradients) == (3 if dp > 1 else 0)
