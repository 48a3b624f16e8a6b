"""Modules that users put into pipelines, in micro-batches: attention, transformers, recurrent networks; and what a batch is."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
from test_pipeline import same, train
from torch import Tensor, nn
from torch.nn import functional as F

import shardwright as sw

D = torch.float64
WIDTH = 8


def causal(size: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(size, dtype=D)


def padding(batch: int, time: int) -> Tensor:
    """Hides the end of some sequences."""
    return torch.arange(time)[None] >= torch.randint(2, time + 1, (batch, 1))


class Attention(nn.Module):
    def __init__(self, batch_first, mask=None, padded=False, dropout=0.2, **options):
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 11)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout, batch_first=batch_first)
        self.mask, self.padded, self.options = mask, padded, options

    def extra(self, batch, time):
        masks = {"square": lambda: causal(time), "each": lambda: torch.randn(2 * batch, time, time, dtype=D)}
        given = {"mask": masks[self.mask]()} if self.mask else {}
        return given | ({"padding": padding(batch, time).double().masked_fill(torch.tensor(False), 0)} if self.padded else {})

    def forward(self, x, mask=None, padding=None):
        h = self.before(x)
        padding = None if padding is None else padding * -1e9
        made, weights = self.attention(h, h, h, padding, attn_mask=mask, **self.options)
        return self.after(h + made) if weights is None else (self.after(h + made), weights)


class Encoder(nn.Module):
    def __init__(self, batch_first, masked=False, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.2, batch_first=batch_first, **options)
        self.encoder, self.head, self.masked = nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, 11), masked

    def extra(self, batch, time):
        return {"mask": causal(time), "padding": padding(batch, time)} if self.masked else {}

    def forward(self, x, mask=None, padding=None):
        return self.head(self.encoder(x, mask, None if padding is None else torch.where(padding, -torch.inf, 0.0).to(x.dtype)))


class Decoder(nn.Module):
    """A decoder layer, or a whole transformer, with another sequence in front of it."""

    def __init__(self, batch_first, whole):
        super().__init__()
        self.before, self.head, self.batch_first = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 11), batch_first
        if whole:
            self.inner = nn.Transformer(WIDTH, 2, 1, 1, 16, 0.2, batch_first=batch_first)
        else:
            self.inner = nn.TransformerDecoderLayer(WIDTH, 2, 16, 0.2, batch_first=batch_first)
        self.whole = whole

    def extra(self, batch, time):
        shape = (batch, 5) if self.batch_first else (5, batch)
        return {"memory": torch.randn(*shape, WIDTH, dtype=D), "mask": causal(time)}

    def forward(self, x, memory, mask):
        given = (memory, self.before(x)) if self.whole else (self.before(x), memory)
        return self.head(self.inner(*given, tgt_mask=mask))


class Recurrent(nn.Module):
    def __init__(self, batch_first, kind, both_ways=False, dropout=0.0, given=False):
        super().__init__()
        self.before, self.kind, self.given, ways = nn.Linear(WIDTH, WIDTH), kind, given, 1 + both_ways
        self.inner = getattr(nn, kind)(WIDTH, 4, 2, batch_first=batch_first, bidirectional=both_ways, dropout=dropout)
        self.head, self.states = nn.Linear(4 * ways, 11), 2 * ways

    def extra(self, batch, time):
        def state():
            return torch.randn(self.states, batch, 4, dtype=D)

        return {} if not self.given else {"state": (state(), state()) if self.kind == "LSTM" else state()}

    def forward(self, x, state=None):
        made, after = self.inner(self.before(x), state)
        return self.head(made), after


class Cell(nn.Module):
    def __init__(self, batch_first, kind):
        super().__init__()
        self.before, self.inner = nn.Linear(WIDTH, WIDTH), getattr(nn, kind)(WIDTH, 4)
        self.head, self.dim = nn.Linear(4, 11), 1 if batch_first else 0

    def extra(self, batch, time):
        return {}

    def forward(self, x):
        state, made = None, []
        for step in self.before(x).unbind(self.dim):
            state = self.inner(step, state)
            made.append(self.head(state[0] if isinstance(state, tuple) else state))
        return torch.stack(made, self.dim)


KINDS: dict[str, Any] = {
    "attention": Attention,
    "attention masked": lambda bf: Attention(bf, "square", True),
    "attention mask of each": lambda bf: Attention(bf, "each"),
    "attention without weights": lambda bf: Attention(bf, "square", need_weights=False),
    "attention each weight": lambda bf: Attention(bf, dropout=0.0, average_attn_weights=False),
    "encoder": Encoder,
    "encoder masked": lambda bf: Encoder(bf, True),
    "encoder norm first": lambda bf: Encoder(bf, norm_first=True, activation="gelu"),
    "decoder": lambda bf: Decoder(bf, False),
    "transformer": lambda bf: Decoder(bf, True),
    **{kind: lambda bf, kind=kind: Recurrent(bf, kind) for kind in ("GRU", "LSTM", "RNN")},
    **{f"{kind} dropout": lambda bf, kind=kind: Recurrent(bf, kind, True, 0.3, True) for kind in ("GRU", "LSTM", "RNN")},
    **{kind: lambda bf, kind=kind: Cell(bf, kind) for kind in ("GRUCell", "LSTMCell", "RNNCell")},
}
SIZES = {"plain": (8, 6), "as long": (8, 8), "uneven": (7, 5)}  # batch and time
ENDS, SCHEDULERS = ("loss", "result"), ("1f1b", "gpipe", "zero_bubble_h1")


class WithLoss(nn.Module):
    """A module, and the loss of its rows beside its other results."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, labels, extra):
        made = self.module(x, **extra)
        made, *rest = made if isinstance(made, tuple) else (made,)
        return F.cross_entropy(made.reshape(-1, 11), labels.reshape(-1), ignore_index=3), rest


class WithResult(WithLoss):
    def forward(self, x, labels, extra):
        return self.module(x, **extra)


def generated() -> list[Any]:
    """Every kind, batch first or time, of every size, in 2 and 4 micro-batches; ends and schedules in turn."""
    draw, found = random.Random(0), []
    for case in itertools.product(KINDS, (True, False), SIZES, (2, 4)):
        end, scheduler = draw.choice(ENDS), draw.choice(SCHEDULERS)
        kind, batch_first, sizes, micro = case
        ident = f"{kind}-{'batch' if batch_first else 'time'}-{sizes}-{micro}-{end}-{scheduler}"
        marks = [pytest.mark.long] if draw.random() < 0.6 else []
        found.append(pytest.param(*case, end, scheduler, id=ident, marks=marks))
    return found


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize(("kind", "batch_first", "sizes", "micro", "end", "scheduler"), generated())
def test_kinds(kind, batch_first, sizes, micro, end, scheduler):
    sw.init(devices=micro)
    batch, time = SIZES[sizes]
    module = KINDS[kind](batch_first).double()
    model = (WithLoss if end == "loss" else WithResult)(module)
    shape = (batch, time) if batch_first else (time, batch)
    args = (torch.randn(*shape, WIDTH, dtype=D), torch.randint(11, shape), module.extra(batch, time))
    single = copy.deepcopy(model)
    cell = sw.PipelineCell(model, micro, batch_dim=0 if batch_first else 1)
    net = sw.AutoParallel(cell).pipeline(stages=2, scheduler=scheduler)
    same(train(net, model, args, {}, 1), train(single, single, args, {}, 1))
    for (path, ours), theirs in zip(model.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, path=path: f"{path}: {text}")
    assert not net.plan.notes  # nothing waits for all micro-batches


# -- what a batch is -------------------------------------------------------------------------------------------------------

B = T = E = 8  # all as long as each other


def attended(h, mask):
    return F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], attn_mask=mask)[:, 0]


def square(h):
    return h.square().mean()


def r(*shape):
    return torch.randn(shape, dtype=D)


# By what an input is: what is computed of the first layers' result and of it, whether the first input has a dim of time, the
# input, and the dim of it that is the batch, if there is one.
INPUTS: dict[str, Any] = {
    "added mask": (lambda m, h, x: square((h @ h.mT + x).softmax(-1) @ h), True, lambda: r(T, T), None),
    "mask of attention": (lambda m, h, x: square(attended(h, x)), True, lambda: torch.ones(T, T).tril().bool(), None),
    "positions": (lambda m, h, x: square(m.after(h + m.table(x))), True, lambda: torch.arange(T), None),
    "class weights": (lambda m, h, x: F.cross_entropy(h, torch.arange(B), x), False, lambda: r(E).abs(), None),
    "features": (lambda m, h, x: square(h * x), False, lambda: r(E), None),
    "matrix": (lambda m, h, x: square(m.after(h @ x)), False, lambda: r(E, E), None),
    "weight": (lambda m, h, x: square(F.linear(h, x)), False, lambda: r(E, E), None),
    "two things": (lambda m, h, x: square((h @ h.mT + x).softmax(-1) @ h + x[:, :, None]), True, lambda: r(T, T), None),
    "indices of time": (lambda m, h, x: square(h[:, x]), True, lambda: torch.randint(T, (T,)), None),
    "labels": (lambda m, h, x: F.cross_entropy(h, x), False, lambda: torch.randint(E, (B,)), 0),
    "labels of time": (
        lambda m, h, x: F.cross_entropy(h.transpose(0, 1).flatten(0, 1), x.flatten()), True,
        lambda: torch.randint(E, (T, B)), 1,
    ),
    "time first": (lambda m, h, x: square(h + m.after(x).transpose(0, 1)), True, lambda: r(T, B, E), 1),
    "flattened": (lambda m, h, x: square(h.reshape(B * T, E) * x), True, lambda: r(B * T, E), 0),
    "flattened behind time": (lambda m, h, x: square(h.transpose(0, 1).flatten(0, 1) * x), True, lambda: r(T * B, E), None),
    "lengths": (
        lambda m, h, x: square(h * (torch.arange(T)[None, :, None] < x[:, None, None])), True,
        lambda: torch.randint(1, T, (B,)), 0,
    ),
    "gathered": (
        lambda m, h, x: square(h.gather(1, x[:, None, None].expand(-1, 1, E))), True, lambda: torch.randint(T, (B,)), 0,
    ),
    "encoded": (lambda m, h, x: F.cross_entropy(h @ m.after(x).T, torch.arange(B)), False, lambda: r(B, E), 0),
    "paired": (lambda m, h, x: square(h * m.after(x)), False, lambda: r(B, E), 0),
    "bias of pairs": (lambda m, h, x: square(h @ m.table.weight.T + x), False, lambda: r(B, T), 0),
    "number": (lambda m, h, x: square(h) * x, False, lambda: r(), None),
}  # fmt: skip


class Reads(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.before = nn.Sequential(nn.Linear(E, E), nn.Tanh(), nn.Linear(E, E))
        self.after, self.table = nn.Sequential(*[nn.Linear(E, E) for _ in range(4)]), nn.Embedding(T, E)
        self.function = function

    def forward(self, x, other):
        return self.function(self, self.before(x), other)


@pytest.mark.parametrize("micro", [4, 3])
@pytest.mark.parametrize("name", INPUTS)
def test_the_graph_says_which_inputs_are_cut(name, micro):
    sw.init(devices=2)
    function, has_time, other, dim = INPUTS[name]
    model = Reads(function).double()
    single, args = copy.deepcopy(model), (r(B, T, E) if has_time else r(B, E), other())
    net = sw.AutoParallel(sw.PipelineCell(model, micro)).pipeline(stages=2)
    for target in (net, single):
        target(*args).backward()
    same(
        [p.grad for p in model.parameters() if p.grad is not None], [p.grad for p in single.parameters() if p.grad is not None]
    )
    bound = net.latest
    names = [i.value for i in bound.graph.inputs if i.kind == "input"]
    assert [bound.pipeline.cut.dim(value) for value in names] == [0, dim][: len(names)]


def test_a_cell_without_a_pipeline_is_its_network():
    sw.init(devices=4)
    model, x = nn.Sequential(nn.Linear(E, E), nn.BatchNorm1d(E)), torch.randn(B, E)
    single = copy.deepcopy(model)
    cell = sw.PipelineCell(model, 4)
    for target in (cell, sw.AutoParallel(cell)):
        torch.testing.assert_close(target(x), single(x))
    same(list(model.buffers()), list(single.buffers()))
