"""Layouts: the seed's table, notation, uneven dims, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwright import Layout
from shardwright.ir.pieces import chunk_pieces

BASE = Layout((2, 2, 2), ("dp", "sp", "mp"))


def test_the_seed_table():
    x, w = BASE("mp", ("sp", "dp")).slices((32, 784)), BASE(("sp", "dp"), "None").slices((784, 512))
    for rank in range(8):
        rows, quarter = rank % 2, rank // 2
        columns = slice(196 * quarter, 196 * quarter + 196)
        assert x[rank] == (slice(16 * rows, 16 * rows + 16), columns)
        assert w[rank] == (columns, slice(0, 512))


def test_explicit_order():
    assert BASE("None", "sp>dp").slices((1, 784))[2] == (slice(0, 1), slice(392, 588))
    assert BASE("None", "dp>sp") == BASE("None", ("sp", "dp"))


def test_rank_list():
    layout = Layout((2, 2), ("a", "b"), [3, 1, 0, 2])("a", "b")
    assert layout.slices((4, 4)) == {
        3: (slice(0, 2), slice(0, 2)),
        1: (slice(0, 2), slice(2, 4)),
        0: (slice(2, 4), slice(0, 2)),
        2: (slice(2, 4), slice(2, 4)),
    }


@given(size=st.integers(0, 40), count=st.integers(1, 9))
def test_uneven_pieces_are_those_of_torch_chunk(size, count):
    pieces = Layout((count,), ("a",))("a").slices((size,))
    data = torch.arange(size)
    chunks = list(data.chunk(count)) if size else []
    for rank in range(count):
        expected = chunks[rank] if rank < len(chunks) else data[:0]
        assert torch.equal(data[pieces[rank]], expected)


def test_explicit_sizes():
    layout = Layout.of(BASE.mesh, (("dp", "sp"), ()), (), ((10, 0, 30, 4), None))
    assert layout.local_shape((44, 3), 7) == (4, 3)
    assert layout.local_shape((44, 3), 2) == (0, 3)
    with pytest.raises(ValueError, match="add up to 44"):
        layout.slices((45, 3))


@st.composite
def layouts(draw):
    axes = draw(st.integers(1, 4))
    names = tuple("abcd"[:axes])
    sizes = tuple(draw(st.integers(1, 3)) for _ in names)
    ndim = draw(st.integers(0, 3))
    dims: list[list[str]] = [[] for _ in range(ndim)]
    partial = []
    for name in draw(st.permutations(names)):
        at = draw(st.integers(-2, ndim - 1))
        if at >= 0:
            dims[at].append(name)
        elif at == -2:
            partial.append((name, draw(st.sampled_from(["sum", "max"]))))
    ranks = draw(st.permutations(range(int(torch.tensor(sizes).prod()))))
    return Layout.of(Layout(sizes, names, list(ranks)).mesh, dims, partial)


@given(layouts())
def test_text_parses_back(layout):
    assert Layout.parse(str(layout)) == layout


@given(layouts(), st.integers(0, 7))
def test_pieces_cover_a_tensor_once(layout, size):
    shape = (size,) * layout.ndim
    count = torch.zeros(shape)
    for piece in set(map(str, layout.slices(shape).values())):
        count[eval(piece)] += 1
    assert (count == 1).all() or 0 in shape


def test_nested_chunks():
    assert chunk_pieces(5, (2, 2)) == (2, 1, 1, 1)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: Layout([2, 2], ("a", "b")), TypeError),
        (lambda: Layout((2, 2), ["a", "b"]), TypeError),
        (lambda: Layout((2, 2.0), ("a", "b")), TypeError),
        (lambda: Layout((2, True), ("a", "b")), TypeError),
        (lambda: Layout((2, 2), ("a", 1)), TypeError),
        (lambda: Layout((2, 0), ("a", "b")), ValueError),
        (lambda: Layout((2, 2), ("a",)), ValueError),
        (lambda: Layout((2, 2), ("a", "a")), ValueError),
        (lambda: Layout((2, 2), ("a", "None")), ValueError),
        (lambda: Layout((2, 2), ("a", "")), ValueError),
        (lambda: Layout((2, 2), ("a", "b"), 4), TypeError),
        (lambda: Layout((2, 2), ("a", "b"), [0, 1, 2, 3.0]), TypeError),
        (lambda: Layout((2, 2), ("a", "b"), [0, 1, 2]), ValueError),
        (lambda: Layout((2, 2), ("a", "b"), [0, 1, 2, 2]), ValueError),
        (lambda: BASE("xx", "None"), ValueError),
        (lambda: BASE("dp", "dp"), ValueError),
        (lambda: BASE(("dp", "dp")), ValueError),
        (lambda: BASE(3), TypeError),
        (lambda: BASE("dp", "None").slices((4,)), ValueError),
        (lambda: BASE.slices((4,)), ValueError),
        (lambda: BASE("dp").local_shape((4,), 8), ValueError),
        (lambda: Layout.parse("dp,None"), ValueError),
    ],
)
def test_errors(call, error):
    with pytest.raises(error):
        call()
