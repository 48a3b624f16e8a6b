"""Indices and targets out of range: an IndexError as on a single device, whatever is cut, and never a row of zeros."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from world.test_distributed import run_job

import shardwright as sw

WRONG = (-1, 10, 10**6)
GRID = sw.Layout((2, 2), ("dp", "tp"))


def _table():
    return nn.Parameter(torch.randn(10, 4))


def _embedding(ids, strategy):
    w = _table()
    return sw.AutoParallel(lambda i: F.embedding(i, w)).shard({"w": strategy}), ids


def _gather(ids, strategy):
    w = _table()
    gather = sw.ops.Gather().shard((strategy, (1,)))
    return sw.AutoParallel(lambda i: gather(w, i)), ids


LOOKUPS = {"embedding": _embedding, "Gather": _gather}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("strategy", [(4, 1), (2, 1), (2, 2), (1, 4), (1, 1)])
@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups(name, strategy, wrong):
    sw.init(devices=4)
    net, ids = LOOKUPS[name](torch.tensor([0, 9, 3, 4]), strategy)
    assert net(ids).abs().sum() > 0
    with pytest.raises(IndexError):
        net(torch.tensor([0, 9, wrong, 3]))
    assert net(ids).abs().sum() > 0  # and the next call is fine


def _losses():
    reductions = ("mean", "sum", "none")
    for ignored, smoothing, weighted, reduction in itertools.product((-100, -1, 2, 7), (0.0, 0.1), (False, True), reductions):
        weight = torch.rand(5) + 0.5 if weighted else None
        options = {"ignore_index": ignored, "reduction": reduction, "weight": weight}
        yield F.cross_entropy, {**options, "label_smoothing": smoothing}
        if not smoothing:
            yield (lambda a, b, **o: F.nll_loss(a.log_softmax(1), b, **o)), options


@pytest.mark.parametrize(("function", "options"), list(_losses()))
def test_targets(function, options):
    sw.init(devices=4)
    pinned = GRID("dp", "tp")
    net = sw.AutoParallel(lambda a, b: function(sw.reshard(a, pinned), b, **options))
    scores, ignored = torch.randn(8, 5), options["ignore_index"]
    right = torch.tensor([0, 1, 2, 3, 4, 0, ignored, 1])
    torch.testing.assert_close(net(scores, right), function(scores, right, **options))
    for wrong in (-1, 5, 7, -100, 10**6):
        target = torch.tensor([0, 1, 2, 3, 4, 0, ignored, wrong])
        try:
            expected = function(scores, target, **options)
        except IndexError:
            with pytest.raises(IndexError):
                net(scores, target)
        else:
            torch.testing.assert_close(net(scores, target), expected)


def out_of_range_on_every_rank(world):
    """The table is cut over all ranks, which hold the same indices: all of them raise, before anything is sent."""
    torch.manual_seed(0)
    w = _table()
    net = sw.AutoParallel(lambda i: F.embedding(i, w)).shard({"w": (world.size, 1)})
    net(torch.arange(8)).sum().backward()
    for wrong in WRONG:
        with pytest.raises(IndexError, match=f"{wrong} of 10"):
            net(torch.tensor([0, 1, wrong, 3, 4, 5, 6, 7]))
    net(torch.arange(8)).sum().backward()  # and they are together afterwards
    ce = sw.shard(F.cross_entropy, (sw.Layout((world.size,), ("tp",))("None", "tp"), sw.Layout((world.size,), ("tp",))("None")))
    loss = sw.AutoParallel(lambda a, b: ce(a, b))
    for wrong in (-1, 4):
        with pytest.raises(IndexError, match=f"{wrong} of 4"):
            loss(torch.zeros(3, 4), torch.tensor([0, wrong, 1]))
    loss(torch.zeros(3, 4), torch.tensor([0, -100, 1]))


def test_on_real_ranks():
    run_job(2, out_of_range_on_every_rank)


def test_rows_of_fields():
    sw.init(devices=2)
    w = _table()
    lookup = sw.ops.Gather().shard(((2, 1), (1, 2)))
    lookup.add_prim_attr("manual_split", (5, 5))
    net = sw.AutoParallel(lambda i: lookup(w, i))
    ids = torch.tensor([[0, 5], [4, 9]])
    torch.testing.assert_close(net(ids), w[ids])
    for wrong in WRONG:
        with pytest.raises(IndexError):
            net(torch.tensor([[0, 5], [4, wrong]]))
