"""Rows of the batch behind another dim, (T * B, ...): what regards no order of them, and what passes in micro-batches."""

from __future__ import annotations

import copy

import pytest
import torch
from operator_calls import Call, calls
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

import shardwright as sw
from shardwright.ir.operator import Operator, Slot, TensorMeta
from shardwright.pipeline.rows import regards_no_order
from shardwright.rules.registry import registered, signature_of

UNSET = {"empty_like", "new_empty", "new_empty_strided"}  # whose values are any
IN_MEMORY = {"_reshape_alias"}  # whose call here reads its argument's memory; in programs it is a reshape
NAMES = sorted({name.removeprefix("aten.") for name in registered() if name.startswith("aten.")} - UNSET - IN_MEMORY)


def operator_of(call: Call) -> Operator:
    tensors: list[Tensor] = []

    def slot(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf)
        return Slot(len(tensors) - 1)

    args, kwargs = tree_map(slot, (call.args, call.kwargs))
    metas = [[TensorMeta(tuple(t.shape), t.dtype, t.stride(), t.device) for t in each] for each in (tensors, call.run())]
    return Operator(call.overload, tuple(args), kwargs, tuple(metas[0]), tuple(metas[1]))


def reordered(tensor: Tensor, dims, factor: str, order: Tensor) -> Tensor:
    """Puts the dim that counts a factor, before anything else, into another order."""
    for dim, factors in enumerate(dims):
        if factors[:1] == (factor,):
            whole = tensor.unflatten(dim, (len(order), -1)).index_select(dim, order)
            return whole.flatten(dim, dim + 1)
    return tensor


def orders(call: Call):
    """Yields each factor along which a call is said to regard no order, with its rule."""
    op = operator_of(call)
    signature = signature_of(op)
    if signature is None or op.draws or len(op.outputs) != len(signature.outputs):
        return
    for factor in signature.order:
        alone = all(dims.count((factor,)) == sum(factor in f for f in dims) <= 1 for dims in signature.inputs)
        first = all(f[0] == factor for dims in signature.outputs for f in dims if factor in f)
        in_inputs = any((factor,) in dims for dims in signature.inputs)
        may = signature.splittable(factor) and factor not in signature.tied and signature.sizes[factor] > 1
        if alone and first and in_inputs and may and regards_no_order(op, signature, factor):
            yield factor, signature


@pytest.mark.whole
def test_operators_that_regard_no_order_compute_the_same_of_rows_in_another_one():
    proved, wrong = set(), []
    for name in NAMES:
        for call in calls(name):
            for factor, signature in orders(call):
                order = torch.arange(signature.sizes[factor]).flip(0).roll(1)
                inputs = iter(signature.inputs)
                args, kwargs = tree_map(
                    lambda leaf, its=inputs, factor=factor, order=order: (
                        reordered(leaf.detach(), next(its), factor, order) if isinstance(leaf, Tensor) else leaf
                    ),
                    (call.args, call.kwargs),
                )
                expected = [
                    reordered(made.detach(), dims, factor, order)
                    for made, dims in zip(call.run(), signature.outputs, strict=True)
                ]
                proved.add(name)
                try:
                    torch.testing.assert_close(Call(call.overload, args, kwargs).run(), expected, equal_nan=True)
                except AssertionError as error:
                    wrong.append(f"{name} {factor}: {str(error).splitlines()[0]}")
    assert wrong == [], "\n".join(wrong)
    assert len(proved) > 150, len(proved)


# -- in pipelines ------------------------------------------------------------------------------------------------------------

BATCH, TIME, WIDTH = 10, 6, 8
PLACES = torch.arange(TIME * BATCH)
# What is done with rows, (T * B, 8); each of these regards no order, or draws for each element.
PASSING = {
    "linear": lambda r: F.linear(r, torch.eye(WIDTH).double().roll(1, 0)),
    "dropout": lambda r: F.dropout(r, 0.3),
    "alpha dropout": lambda r: F.alpha_dropout(r, 0.3, True),
    "noise like them": lambda r: r + torch.randn_like(r),
    "noise": lambda r: r + torch.rand(len(r), 1, dtype=r.dtype),
    "noise as dims": lambda r: r + torch.randn(TIME, BATCH, 1, dtype=r.dtype).flatten(0, 1),
    "places": lambda r: r * PLACES[:, None],
    "norm": lambda r: F.group_norm(F.layer_norm(r, (WIDTH,)), 2).softmax(1),
    "joined": lambda r: torch.cat([*r.chunk(2, 1)[::-1]], 1),
    "heads": lambda r: r.view(-1, 2, 4).transpose(1, 2).reshape(-1, WIDTH),
    "heads before": lambda r: r.view(TIME, BATCH * 2, 4).relu().view(-1, WIDTH),
    "repeated": lambda r: r.repeat_interleave(2, 0).view(TIME * BATCH, 2, WIDTH).mean(1),
    "largest": lambda r: r + F.one_hot(r.argmax(1), WIDTH) + r.topk(2, 1).values.sum(1, keepdim=True),
    "gathered": lambda r: r.gather(1, (r > 0).long()),
    "in place": lambda r: r.clone().mul_(2),
    "one more dim": lambda r: r[:, None].squeeze(1) + (r[:, :, None] * r[:, None]).sum(2),
}
# These need the order, or all rows at once.
REFUSED = {
    "cumsum": lambda r: r.cumsum(0),
    "flip": lambda r: r.flip(0),
    "roll": lambda r: r.roll(BATCH, 0),
    "index": lambda r: r[PLACES],
    "halves": lambda r: r.view(TIME, 2, BATCH // 2, WIDTH).flip(0).reshape(-1, WIDTH),
    "tile": lambda r: r.repeat(2, 1)[: TIME * BATCH],
    "triangle": lambda r: r.tril(),
    "joined": lambda r: torch.cat([r[:BATCH], r[BATCH:]]),
    "drawn by values": lambda r: r * torch.bernoulli(r.sigmoid()),
    "features dropped": lambda r: F.dropout1d(r[:, :, None], 0.3)[:, :, 0],
    "pairs": lambda r: (r @ r.T).softmax(1) @ r,
}


class Rows(nn.Module):
    """Does something with rows between its layers, or after them."""

    def __init__(self, function, at_end):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.function, self.at_end = function, at_end

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.at_end:
            return self.function(self.last(h).transpose(0, 1).reshape(-1, WIDTH)).square().mean()
        rows = self.function(h.transpose(0, 1).reshape(-1, WIDTH))
        return torch.tanh(self.last(rows.view(-1, BATCH, WIDTH).transpose(0, 1))).square().mean()


def compared(model, micro, devices=2):
    sw.init(devices=devices)
    model, x = model.double(), torch.randn(BATCH, TIME, WIDTH, dtype=torch.float64)
    single = copy.deepcopy(model)
    net = sw.AutoParallel(sw.PipelineCell(model, micro)).pipeline(stages=2)
    found = []
    for target, own in ((net, model), (single, single)):
        torch.manual_seed(3)
        loss = target(x)
        loss.backward()
        found.append([loss, torch.rand(1), *(p.grad for p in own.parameters())])
    torch.testing.assert_close(found[0], found[1])
    return net


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("micro", [2, 4])
@pytest.mark.parametrize("at_end", [False, True], ids=["between", "end"])
@pytest.mark.parametrize("name", PASSING)
def test_rows_pass(name, at_end, micro, devices):
    assert not compared(Rows(PASSING[name], at_end), micro, devices).plan.notes


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_order_of_rows_is_refused_or_runs_at_the_end(name):
    with pytest.raises(sw.errors.StrategyError, match=r"(?s)micro-batches.*needs rows in their order.*Put the batch before"):
        compared(Rows(REFUSED[name], False), 4)
    if name not in ("drawn by values", "features dropped", "pairs"):  # a tail draws nothing, and has a part of the seconds
        assert "after all micro-batches" in str(compared(Rows(REFUSED[name], True), 4).plan.notes)


def test_rows_as_a_result_are_joined_at_the_end():
    sw.init(devices=2)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(6)])

    def rows(x):
        return model(x).transpose(0, 1).reshape(-1, WIDTH)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return rows(x)

    net, x = sw.AutoParallel(sw.PipelineCell(Whole(), 4)).pipeline(stages=2), torch.randn(BATCH, TIME, WIDTH)
    torch.testing.assert_close(net(x), rows(x))
