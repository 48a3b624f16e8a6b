"""Graphs made from a few copies of repeated layers equal the capture of the whole model, node by node."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardwright as sw
from shardwright.capture import repeated
from shardwright.capture.capture import capture
from shardwright.capture.closure import FunctionModule
from shardwright.capture.repeated import capture_repeated, same_graphs
from shardwright.capture.runs import find_runs, shortened
from shardwright.ir.marks import Mark

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, dim: int = 8, dropout: float = 0.0):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Stack(nn.Module):
    """Blocks between an embedding and a head that shares its weight."""

    def __init__(self, count: int, make=Block, words: int = 12):
        super().__init__()
        self.words = nn.Embedding(words, 8)
        self.blocks = nn.ModuleList(make() for _ in range(count))
        self.head = nn.Linear(8, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Normed(nn.Module):
    """A layer that updates buffers and has a list of layers of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = layer(x)
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Glue(Stack):
    """The caller computes between the calls, and keeps something of one layer for the next."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        scale = torch.arange(8.0).cos()
        for block in self.blocks:
            new = block(x * scale)
            x = x + new.relu()
        return self.head(x)


class TwoKinds(Stack):
    """Three of one kind, then many of another in the same list; two of a third at the end."""

    def __init__(self):
        super().__init__(0)
        self.blocks.extend([Block() for _ in range(3)])
        self.blocks.extend([Normed() for _ in range(7)])
        self.blocks.extend([Block(dropout=0.5) for _ in range(6)])
        self.blocks.extend([nn.Linear(8, 8) for _ in range(2)])


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return x + F.scaled_dot_product_attention(self.query(x), self.key(memory), memory)


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(*(Block() for _ in range(6)))
        self.decoder = nn.ModuleList(Decoder() for _ in range(8))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        memory = self.encoder(x)
        for layer in self.decoder:
            y = layer(y, memory)
        return {"loss": y.square().mean(), "memory": memory}


class Common(nn.Module):
    """Every layer has a norm of its own and reads the same weight."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.norm, self.weight = nn.LayerNorm(8), weight

    def forward(self, x: Tensor) -> Tensor:
        unused = x.exp()  # noqa: F841  dropped from the graph
        return x + self.norm(x) @ self.weight


def of_common_weight() -> Stack:
    weight = nn.Parameter(torch.randn(8, 8))
    return Stack(6, lambda: Common(weight))


def ids() -> tuple[Tensor, ...]:
    return (torch.randint(0, 12, (2, 4)),)


def pair() -> tuple[Tensor, ...]:
    return torch.randn(2, 4, 8), torch.randn(2, 3, 8)


REPEATED = {
    "tied embedding": (lambda: Stack(9), ids),
    "dropout": (lambda: Stack(6, lambda: Block(dropout=0.1)), ids),
    "buffers and inner lists": (lambda: Stack(6, Normed), ids),
    "work between calls": (lambda: Glue(7), ids),
    "two kinds": (TwoKinds, ids),
    "encoder and decoder": (EncoderDecoder, pair),
    "one weight for all": (of_common_weight, ids),
    "a weight of the layer before": (lambda: Paired(6), ids),
    "a function": (lambda: FunctionModule(_function_of(Stack(8))), ids),
    "meta": (lambda: Stack(8).to("meta"), ids),
    "sequential": (lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)), nn.ReLU()), lambda: pair()[:1]),
}


def _function_of(model: nn.Module):
    def loss(ids: Tensor) -> Tensor:
        return model(ids).logsumexp(-1).mean()

    return loss


def of_few(model, args, marks=None):
    """The graph made from a few copies, ``None`` if the model has to be captured in full."""
    marks = marks or {}
    runs = find_runs(model, marks, repeated.LEAST)
    return repeated._from_few(model, args, {}, CPU, marks, runs) if runs else None


@pytest.mark.parametrize("name", REPEATED)
def test_equals_the_capture_of_the_whole(name):
    make, inputs = REPEATED[name]
    model, args = make(), inputs()
    whole, few = capture(model, args, {}, CPU), of_few(model, args)
    assert few is not None
    assert str(few) == str(whole)
    assert same_graphs(few, whole)
    assert few.metas == whole.metas
    assert few.needs_grad == whole.needs_grad
    assert len({id(node.op) for node in few.nodes}) == len({id(node.op) for node in whole.nodes})


class Numbered(Block):
    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.number == 5 else 1)


class Enumerating(Stack):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for i, block in enumerate(self.blocks):
            x = block(x) if i != 5 else block(x).relu()
        return self.head(x)


class Counting(Stack):
    def forward(self, ids: Tensor) -> Tensor:
        x, left = self.words(ids), 3
        for block in self.blocks:
            x = block(x)
            left -= 1
            x = x.relu() if left == -2 else x
        return self.head(x)


class Sliced(Stack):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks[:5]:
            x = block(x)
        x = x.relu()
        for block in self.blocks[5:]:
            x = block(x)
        return self.head(x)


class ByLength(Stack):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x) / len(self.blocks)
        return self.head(x)


class Skips(Stack):
    """As a U-Net: the second half reads what the first left, last first."""

    def __init__(self, count: int):
        super().__init__(count)
        self.back = nn.ModuleList(Block() for _ in range(count))

    def forward(self, ids: Tensor) -> Tensor:
        x, kept = self.words(ids), []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        for block in self.back:
            x = block(x + kept.pop())
        return self.head(x)


class AllStates(Stack):
    def forward(self, ids: Tensor) -> Tensor:
        states = [self.words(ids)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return torch.stack(states)


class Middle(Stack):
    def forward(self, ids: Tensor) -> Tensor:
        states = [self.words(ids)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return self.head(states[-1] + states[len(states) * 2 // 3])


class First(Stack):
    def forward(self, ids: Tensor) -> Tensor:
        states = [self.words(ids)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return self.head(states[-1]) + self.blocks[0].up.bias.sum()


class Twice(Stack):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return self.head(x)


class Paired(Stack):
    """Each layer but the first reads a weight of the layer before."""

    def forward(self, ids: Tensor) -> Tensor:
        x, before = self.words(ids), self.head
        for block in self.blocks:
            x, before = block(x + before.weight.sum()), block.up
        return self.head(x)


def tied_in_the_middle() -> Stack:
    model = Stack(8)
    model.blocks[5].up.weight = model.blocks[4].up.weight
    return model


def with_a_hook() -> Stack:
    model = Stack(8)
    model.blocks[4].register_forward_hook(lambda module, args, output: output.relu())
    return model


def frozen_in_part() -> Stack:
    model = Stack(8)
    model.blocks[:4].requires_grad_(False)
    return model


def _numbered() -> Stack:
    model = Stack(0)
    model.blocks.extend([Numbered(i) for i in range(8)])
    return model


CAPTURED_IN_FULL = {
    "layers know their number": _numbered,
    "the caller numbers them": lambda: Enumerating(8),
    "the caller counts them": lambda: Counting(8),
    "the caller slices the list": lambda: Sliced(8),
    "the caller asks for the length": lambda: ByLength(8),
    "skips across layers": lambda: Skips(6),
    "all states": lambda: AllStates(6),
    "a state in the middle": lambda: Middle(6),
    "a parameter of one layer": lambda: First(6),
    "every layer twice": lambda: Twice(6),
    "two layers share a weight": tied_in_the_middle,
    "a hook on one": with_a_hook,
    "some are frozen": frozen_in_part,
    "one is in evaluation": lambda: _with(Stack(8), lambda m: m.blocks[4].eval()),
    "one module many times": lambda: _with(Stack(0), lambda m: m.blocks.extend([Block()] * 6)),
}


def _with(model, change):
    change(model)
    return model


@pytest.mark.parametrize("name", CAPTURED_IN_FULL)
def test_what_is_not_repeated_is_captured_in_full(name):
    model, args = CAPTURED_IN_FULL[name](), ids()
    whole = capture(model, args, {}, CPU)
    few = of_few(model, args)
    assert few is None
    assert same_graphs(capture_repeated(model, args, {}, CPU), whole)


def test_marks_are_those_of_each_copy():
    model, args = Stack(7), ids()
    paths = {module: path for path, module in model.named_modules()}
    layout = ((2, 1, 1),)
    marks = {b: Mark("Block", layout, layout, source="here", module_path=paths[b]) for b in model.blocks}
    marks |= {b.up: Mark("Linear", layout, source="here", module_path=paths[b.up]) for b in model.blocks}
    whole, few = capture(model, args, {}, CPU, marks), of_few(model, args, marks)
    assert few is not None
    assert same_graphs(few, whole)
    for a, b in zip(few.nodes, whole.nodes):
        assert a.region is b.region
    assert {n.region.module_path for n in few.nodes if n.region} == {paths[m] for m in marks}


def test_a_mark_on_one_copy_ends_the_run():
    model, args = Stack(11), ids()
    marks = {model.blocks[5]: Mark("Block", ((2, 1, 1),), module_path="blocks.5")}
    runs = find_runs(model, marks, 5)
    assert [len(run.copies) for run in runs] == [5, 5]
    assert same_graphs(capture_repeated(model, args, {}, CPU, marks), capture(model, args, {}, CPU, marks))


def test_marked_functions_in_every_layer():
    split = sw.shard(torch.tanh, ((2, 1, 1),))

    class Marked(Block):
        def forward(self, x: Tensor) -> Tensor:
            return split(super().forward(x))

    model, args = Stack(6, Marked), ids()
    whole, few = capture(model, args, {}, CPU), of_few(model, args)
    assert few is not None
    assert same_graphs(few, whole)
    assert sum(node.mark is not None for node in few.nodes) == 6


def test_the_model_is_left_as_it_was():
    model = Stack(8)
    names, kind, forms = [n for n, _ in model.named_modules()], type(model.blocks), dict(model.blocks.__dict__)
    runs = find_runs(model, {}, 5)
    with pytest.raises(ZeroDivisionError), shortened(runs, 3):
        assert 1 // (3 - len(model.blocks))
    capture_repeated(model, ids(), {}, CPU)
    assert [n for n, _ in model.named_modules()] == names
    assert type(model.blocks) is kind
    assert model.blocks.__dict__ == forms


def test_errors_are_those_of_a_capture():
    class Branching(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(sw.errors.CaptureError, match="Stack cannot be captured as a graph"):
        capture_repeated(Stack(6, Branching), ids(), {}, CPU)


def test_equal_operators_of_a_capture_are_one_object():
    graph = capture(Stack(4), ids(), {}, CPU)
    products = [node.op for node in graph.nodes if node.module.endswith(".up")]
    assert len(products) == 4
    assert len(set(map(id, products))) == 1
    scaled = capture(FunctionModule(lambda x: x * 1 + x * 1.0 + x * True), (torch.ones(2),), {}, CPU)
    assert len({id(node.op) for node in scaled.nodes if node.op.name == "aten.mul"}) == 3
