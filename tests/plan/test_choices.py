"""The table of an operator's choices says what each choice really is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shardwright.capture.capture import capture
from shardwright.ir.mesh import Mesh
from shardwright.plan.choose.tables import choices_of, code_of, layout_of, local_sizes, table_of_choice
from shardwright.rules.registry import replicated_signature, signature_of


class Everything(nn.Module):
    """One of each kind of operator: a bias after the sum, views, a norm, attention, an embedding, a loss."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(24, 12), nn.LayerNorm(12)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12, bias=False)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)

    def forward(self, ids, target):
        x = self.embedding(ids)
        q, k, v = (t.unflatten(-1, (4, 3)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.out(y), 0.1, self.training)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return F.cross_entropy((x @ self.embedding.weight.T).flatten(0, 1), target.flatten()) + x.square().mean()


@pytest.fixture(scope="module")
def graph():
    with torch.enable_grad():
        ids = torch.zeros(6, 8, dtype=torch.long)
        return capture(Everything(), (ids, ids), {}, torch.device("cpu"), {})


@pytest.mark.parametrize("sizes", [(2,), (3,), (2, 2), (2, 3), (2, 1, 2)])
def test_rows_are_the_choices_they_stand_for(graph, sizes):
    mesh = Mesh(("a", "b", "c")[: len(sizes)], sizes)
    for node in graph.nodes:
        signature = signature_of(node.op) or replicated_signature(node.op)
        table = choices_of(node.op, signature, mesh)
        needs = [value in graph.needs_grad for value in node.inputs]
        assert len(table) >= 1
        for row in range(len(table)):
            choice = table.choice(row, needs)
            what = f"{node.op.name} {choice}"
            for i, layout in enumerate(choice.inputs):
                assert code_of(layout, mesh) == tuple(table.inputs[i][row]), what
                if needs[i]:
                    partial = tuple(axis in choice.partial_gradient[i] for axis in mesh.axes)
                    assert partial == tuple(table.gradients[i][row]), what
            for o in range(len(choice.outputs)):
                assert code_of(choice.computed[o], mesh) == tuple(table.computed[o][row]), what
                assert code_of(choice.outputs[o], mesh) == tuple(table.outputs[o][row]), what


def test_a_choice_made_elsewhere_is_a_table_of_one_row(graph):
    mesh = Mesh(("a", "b"), (2, 2))
    for node in graph.nodes:
        signature = signature_of(node.op) or replicated_signature(node.op)
        table = choices_of(node.op, signature, mesh)
        for row in range(0, len(table), 5):
            needs = [True] * len(node.inputs)
            one = table_of_choice(node.op, signature, mesh, table.choice(row, needs))
            for name in ("inputs", "gradients", "computed", "outputs"):
                for mine, theirs in zip(getattr(one, name), getattr(table, name)):
                    assert (mine[0] == theirs[row]).all(), f"{node.op.name} {name}"
            assert one.fraction[0] == pytest.approx(table.fraction[row])


def test_only_some_axes_may_vary(graph):
    mesh = Mesh(("a", "b"), (2, 2))
    node = next(n for n in graph.nodes if n.op.name == "aten.linear")
    signature = signature_of(node.op)
    whole = choices_of(node.op, signature, mesh)
    base = tuple(whole.symbols[s] for s in whole.rows[7])
    part = choices_of(node.op, signature, mesh, base, (1,))
    assert {tuple(r) for r in part.rows.tolist()} == {tuple(r) for r in whole.rows.tolist() if r[0] == whole.rows[7][0]}


def test_largest_pieces(graph):
    mesh = Mesh(("a", "b"), (2, 3))
    import itertools

    import numpy as np

    for code in itertools.product((-1, 0, 1), repeat=2):
        layout = layout_of(code, 2, mesh)
        shape = (7, 12)
        largest = max((b[0][1] - b[0][0]) * (b[1][1] - b[1][0]) for b in layout.bounds(shape).values())
        assert local_sizes(np.array(code), shape, mesh.sizes) == largest


def test_no_dim_is_cut_into_more_pieces_than_it_has():
    with torch.enable_grad():
        graph = capture(nn.Linear(3, 2), (torch.ones(5, 3),), {}, torch.device("cpu"), {})
    node = graph.nodes[0]
    table = choices_of(node.op, signature_of(node.op), Mesh(("a",), (4,)))
    factors = {table.symbols[s].factor for s in table.rows[:, 0]}
    assert factors == {None}, "5 rows in 4 pieces of 2 would leave one rank without any"
