"""Operators that move elements, proved by splitting them: even, uneven and empty pieces, dims of size 1."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.plan.choose.follow import follow
from shardwright.rules.registry import signature_of
from shardwright.rules.view import shared_factors
from shardwright.testing.rules import check_rule
from tests.rules.splits import doubles, free_dims, node_of

aten = torch.ops.aten
Case = tuple[Callable[..., Any], tuple[Any, ...], str]

# name -> function, its arguments, the dims of the (first) output that may be split
RESHAPES: dict[str, Case] = {
    "view to heads": (lambda x: x.view(2, 5, 3, 4), (doubles(2, 5, 12),), "012"),
    "view of heads": (lambda x: x.view(2, 5, 12), (doubles(2, 5, 3, 4),), "012"),
    "view of one element more": (lambda x: x.view(1, 5, 3), (doubles(5, 3),), "12"),
    "reshape with -1": (lambda x: x.reshape(-1, 4), (doubles(2, 3, 4),), "01"),
    "reshape of all": (lambda x: x.reshape(-1), (doubles(3, 1, 5),), "0"),
    "reshape of the same shape": (lambda x: x.reshape(3, 1, 5), (doubles(3, 1, 5),), "012"),
    "reshape of a scalar": (lambda x: x.reshape(()), (doubles(1, 1),), ""),
    "reshape with ones": (lambda x: x.reshape(1, 4, 1, 3), (doubles(4, 3, 1),), "13"),
    "reshape across dims": (lambda x: x.reshape(8, 3), (doubles(6, 4),), "0"),
    "reshape without common factor": (lambda x: x.reshape(5, 2, 3), (doubles(2, 5, 3),), "2"),
    "reshape of groups": (lambda x: x.reshape(12, 5, 2), (doubles(4, 3, 10),), "01"),
    "reshape 4 6 to 2 12": (lambda x: x.reshape(2, 12), (doubles(4, 6),), "0"),
    "reshape of a transpose": (lambda x: aten.reshape(x, [12]), (doubles(3, 4).t().contiguous(),), "0"),
    "_unsafe_view": (lambda x: aten._unsafe_view(x, [6, 5]), (doubles(2, 3, 5),), "01"),
    "flatten": (lambda x: x.flatten(1), (doubles(3, 4, 5),), "01"),
    "flatten of all": (lambda x: x.flatten(), (doubles(3, 4),), "0"),
    "unflatten": (lambda x: x.unflatten(1, (2, -1)), (doubles(3, 6),), "01"),
    "ravel": (lambda x: x.ravel(), (doubles(3, 4),), "0"),
    "view_as": (lambda x, y: x.view_as(y), (doubles(3, 4), doubles(3, 2, 2)), "01"),
    "reshape_as": (lambda x, y: x.reshape_as(y), (doubles(3, 4), doubles(12)), "0"),
    "atleast_3d": (lambda x: torch.atleast_3d(x), (doubles(3, 4),), "01"),
    "view of no elements": (lambda x: x.view(3, 0, 2), (doubles(3, 0),), "01"),
    "view of the same itemsize": (lambda x: x.view(torch.int64), (torch.randint(0, 9, (3, 4)),), "01"),
    "view of half the itemsize": (lambda x: x.view(torch.int32), (torch.randint(0, 9, (3, 4)),), "0"),
}

DIMS: dict[str, Case] = {
    "squeeze": (lambda x: x.squeeze(), (doubles(2, 1, 3, 1),), "01"),
    "squeeze of a dim": (lambda x: x.squeeze(1), (doubles(3, 1, 5),), "01"),
    "squeeze of a larger dim": (lambda x: x.squeeze(0), (doubles(2, 3),), "01"),
    "squeeze of dims": (lambda x: x.squeeze((0, -1)), (doubles(1, 4, 2, 1),), "01"),
    "unsqueeze": (lambda x: x.unsqueeze(1), (doubles(3, 4),), "02"),
    "unsqueeze at the end": (lambda x: x.unsqueeze(-1), (doubles(3, 4),), "01"),
    "transpose": (lambda x: x.transpose(0, -1), (doubles(2, 3, 5),), "012"),
    "t": (lambda x: x.t(), (doubles(3, 5),), "01"),
    "t of a vector": (lambda x: x.t(), (doubles(5),), "0"),
    "T": (lambda x: x.T, (doubles(3, 5),), "01"),
    "mT": (lambda x: x.mT, (doubles(2, 3, 5),), "012"),
    "mH": (lambda x: x.mH, (doubles(2, 3, 5),), "012"),
    "H": (lambda x: x.H, (doubles(3, 5),), "01"),
    "adjoint": (lambda x: x.adjoint(), (doubles(2, 3, 5),), "012"),
    "permute": (lambda x: x.permute(2, 0, 1), (doubles(2, 1, 5),), "012"),
    "movedim": (lambda x: x.movedim(0, -1), (doubles(2, 3, 5),), "012"),
    "movedim of several": (lambda x: x.movedim((0, 1), (2, 0)), (doubles(2, 3, 5),), "012"),
    "moveaxis": (lambda x: x.moveaxis(1, 0), (doubles(2, 3),), "01"),
    "swapaxes": (lambda x: x.swapaxes(0, 1), (doubles(2, 3),), "01"),
    "swapdims": (lambda x: x.swapdims(0, 1), (doubles(2, 3),), "01"),
}

COPIES: dict[str, Case] = {
    "expand": (lambda x: x.expand(5, -1, 3), (doubles(1, 4, 1),), "012"),
    "expand to more dims": (lambda x: x.expand(2, 3, 4), (doubles(3, 4),), "012"),
    "expand of nothing": (lambda x: x.expand(3, 4), (doubles(3, 4),), "01"),
    "expand_as": (lambda x, y: x.expand_as(y), (doubles(4, 1), doubles(3, 4, 2)), "012"),
    "broadcast_to": (lambda x: torch.broadcast_to(x, (3, 4)), (doubles(4),), "01"),
    "broadcast_tensors": (lambda x, y: torch.broadcast_tensors(x, y), (doubles(4, 1), doubles(1, 3)), "01"),
    "repeat": (lambda x: x.repeat(2, 1, 3), (doubles(5, 1),), "012"),
    "repeat of dims": (lambda x: x.repeat(3, 2), (doubles(2, 5),), "01"),
    "repeat of none": (lambda x: x.repeat(0, 1), (doubles(2, 5),), "01"),
    "tile": (lambda x: x.tile(3), (doubles(5, 2),), "01"),
    "tile to more dims": (lambda x: x.tile(2, 1, 2), (doubles(5, 2),), "012"),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), (doubles(4, 3, 2),), "012"),
    "repeat_interleave of all": (lambda x: x.repeat_interleave(2), (doubles(5, 3),), "0"),
    "repeat_interleave of a 1": (lambda x: x.repeat_interleave(4, 0), (doubles(1, 3),), "1"),
    "repeat_interleave of a vector": (lambda x: x.repeat_interleave(3), (doubles(5),), "0"),
}

JOINS: dict[str, Case] = {
    "cat": (lambda x, y: torch.cat([x, y], 1), (doubles(4, 2, 3), doubles(4, 5, 3)), "02"),
    "cat of three": (lambda x, y: torch.cat([x, y, x], -1), (doubles(5, 1), doubles(5, 2)), "0"),
    "cat with an empty vector": (lambda x, y: torch.cat([x, y]), (doubles(3, 2), doubles(0)), "1"),
    "concat": (lambda x, y: torch.concat([x, y]), (doubles(3, 2), doubles(1, 2)), "1"),
    "hstack": (lambda x, y: torch.hstack([x, y]), (doubles(3, 2), doubles(3, 1)), "0"),
    "vstack": (lambda x, y: torch.vstack([x, y]), (doubles(3), doubles(2, 3)), "1"),
    "dstack": (lambda x, y: torch.dstack([x, y]), (doubles(3, 2), doubles(3, 2, 2)), "01"),
    "dstack of vectors": (lambda x, y: torch.dstack([x, y]), (doubles(3), doubles(3)), "1"),
    "stack": (lambda x, y: torch.stack([x, y], 1), (doubles(3, 4), doubles(3, 4)), "02"),
    "stack at the end": (lambda x, y: torch.stack([x, y], -1), (doubles(3, 4), doubles(3, 4)), "01"),
    "meshgrid ij": (lambda x, y: torch.meshgrid(x, y, indexing="ij"), (doubles(3), doubles(5)), "01"),
    "meshgrid xy": (lambda x, y: torch.meshgrid(x, y, indexing="xy"), (doubles(3), doubles(5)), "01"),
}

CUTS: dict[str, Case] = {
    "split": (lambda x: x.split(2, 1), (doubles(4, 5),), "0"),
    "split with sizes": (lambda x: x.split([1, 4], -1), (doubles(3, 1, 5),), "01"),
    "unsafe_split": (lambda x: torch.unsafe_split(x, 2, 0), (doubles(4, 5),), "1"),
    "chunk": (lambda x: x.chunk(3), (doubles(7, 4),), "1"),
    "chunk into one": (lambda x: x.chunk(1), (doubles(7, 4),), "1"),
    "tensor_split": (lambda x: x.tensor_split(3, 1), (doubles(4, 5),), "0"),
    "tensor_split at indices": (lambda x: x.tensor_split((1, 2), 0), (doubles(4, 5),), "1"),
    "hsplit": (lambda x: torch.hsplit(x, 2), (doubles(3, 4),), "0"),
    "hsplit of a vector": (lambda x: torch.hsplit(x, 2)[0], (doubles(4),), ""),
    "vsplit": (lambda x: torch.vsplit(x, 2), (doubles(4, 3),), "1"),
    "dsplit": (lambda x: torch.dsplit(x, 2), (doubles(3, 2, 4),), "01"),
    "unbind": (lambda x: x.unbind(1), (doubles(4, 3, 5),), "01"),
    "select": (lambda x: x[:, 1], (doubles(4, 3, 5),), "01"),
    "select from the end": (lambda x: x.select(-1, -2), (doubles(4, 3),), "0"),
    "slice": (lambda x: x[:, 1:5:2], (doubles(4, 6),), "0"),
    "slice that keeps all": (lambda x: aten.slice(x, 0, 0, 5), (doubles(5, 3),), "01"),
    "slice that keeps all from the end": (lambda x: aten.slice(x, 0, -5), (doubles(5, 3),), "01"),
    "slice of nothing": (lambda x: x[:, 3:3], (doubles(5, 4),), "0"),
    "narrow": (lambda x: x.narrow(0, 1, 2), (doubles(4, 5),), "1"),
    "unfold": (lambda x: x.unfold(1, 3, 2), (doubles(4, 7, 2),), "02"),
    "diagonal": (lambda x: x.diagonal(1, 0, 2), (doubles(3, 4, 5),), "0"),
    "diag_embed": (lambda x: torch.diag_embed(x, 1, 0, 2), (doubles(4, 3),), "1"),
}

WRITES: dict[str, Case] = {
    "slice_scatter": (lambda x, y: torch.slice_scatter(x, y, 1, 1, 5, 2), (doubles(4, 6), doubles(4, 2)), "0"),
    "slice_scatter of rows": (lambda x, y: torch.slice_scatter(x, y, 0, 0, 2), (doubles(4, 5), doubles(2, 5)), "1"),
    "select_scatter": (lambda x, y: torch.select_scatter(x, y, 1, -1), (doubles(4, 3, 5), doubles(4, 5)), "02"),
    "diagonal_scatter": (lambda x, y: torch.diagonal_scatter(x, y, 0, 0, 2), (doubles(3, 5, 3), doubles(5, 3)), "1"),
}

MOVES: dict[str, Case] = {
    "flip": (lambda x: x.flip(1), (doubles(4, 3, 5),), "02"),
    "fliplr": (lambda x: torch.fliplr(x), (doubles(4, 3),), "0"),
    "flipud": (lambda x: torch.flipud(x), (doubles(4, 3),), "1"),
    "roll": (lambda x: x.roll(2, 1), (doubles(4, 5),), "0"),
    "roll of several": (lambda x: x.roll((1, -2), (0, -1)), (doubles(4, 3, 5),), "1"),
    "rot90": (lambda x: torch.rot90(x, 1, (1, 2)), (doubles(4, 3, 5),), "0"),
    "tril": (lambda x: x.tril(), (doubles(5, 5),), "01"),
    "tril above": (lambda x: x.tril(2), (doubles(3, 4, 6),), "012"),
    "triu": (lambda x: x.triu(), (doubles(6, 4),), "01"),
    "triu below": (lambda x: x.triu(-2), (doubles(5, 1),), "01"),
    "triu of booleans": (lambda x: x.triu(1), (torch.ones(5, 5, dtype=torch.bool),), "01"),
    "pad": (lambda x: F.pad(x, (1, 2)), (doubles(4, 3, 5),), "01"),
    "pad of two dims": (lambda x: F.pad(x, (0, 0, 1, -1), value=2.5), (doubles(4, 3, 5),), "02"),
    "constant_pad_nd": (lambda x: aten.constant_pad_nd(x, [1, 1], 1), (doubles(4, 5),), "0"),
    "pad by reflection": (lambda x: F.pad(x, (1, 2), mode="reflect"), (doubles(2, 3, 4),), "01"),
    "pad by repetition": (lambda x: F.pad(x, (1, 2, 1, 1), mode="replicate"), (doubles(2, 3, 4, 3),), "01"),
    "pad around": (lambda x: F.pad(x, (1, 2), mode="circular"), (doubles(2, 3, 4),), "01"),
    "view_as_complex": (lambda x: torch.view_as_real(torch.view_as_complex(x)), (doubles(4, 3, 2),), "01"),
    "view_as_real": (lambda x: torch.view_as_real(x), (torch.randn(4, 3, dtype=torch.complex128),), "01"),
}

CASES = {**RESHAPES, **DIMS, **COPIES, **JOINS, **CUTS, **WRITES, **MOVES}


@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_whole_computes(name: str) -> None:
    function, args, free = CASES[name]
    tried = check_rule(function, *args, limit=24, needs_rule=bool(free))
    assert tried or not free


@pytest.mark.parametrize("name", CASES)
def test_may_be_split_where_it_is_promised(name: str) -> None:
    function, args, free = CASES[name]
    outputs = len(node_of(function, args).op.outputs)
    assert free_dims(function, *args)[-outputs] == free


@pytest.mark.parametrize(
    "source, target, inputs, outputs",
    [
        ((2, 5, 12), (2, 5, 3, 4), "a b (c d)", "a b c d"),
        ((2, 5, 12), (10, 12), "a b c", "(a b) c"),
        ((6, 4), (8, 3), "(a b) c", "(a d) e"),
        ((1, 4), (4, 1), " a", "a "),
        ((6,), (2, 1, 3), "(a b)", "a  b"),
        ((2, 3, 2), (3, 4), "a b c", "d e"),
    ],
)
def test_factors_that_shapes_share(source: tuple[int, ...], target: tuple[int, ...], inputs: str, outputs: str) -> None:
    left, right, sizes, _ = shared_factors(source, target)
    letters: dict[str, str] = {}

    def text(dims: Any) -> str:
        named = [[letters.setdefault(f, "abcdefg"[len(letters)]) for f in dim] for dim in dims]
        return " ".join(f"({' '.join(dim)})" if len(dim) > 1 else "".join(dim) for dim in named)

    assert (text(left), text(right)) == (inputs, outputs)
    for shape, dims in ((source, left), (target, right)):
        assert [torch.Size([sizes[f] for f in dim]).numel() for dim in dims] == list(shape)


def test_every_reshape_of_twenty_four_elements() -> None:
    shapes = [(24,), (4, 6), (6, 4), (2, 3, 4), (3, 8), (8, 3), (2, 12), (1, 24), (4, 1, 6), (3, 2, 2, 2)]
    tried = {
        (source, target): check_rule(
            lambda x, to=target: x.reshape(to), doubles(*source), meshes=((2,), (3,)), limit=8, needs_rule=False
        )
        for source in shapes
        for target in shapes
    }
    leading = {shape: next(size for size in shape if size > 1) for shape in shapes}
    for (source, target), count in tried.items():
        assert count > 0 or math.gcd(leading[source], leading[target]) == 1, (source, target)


@pytest.mark.parametrize(
    "function, shapes",
    [
        (lambda x: x.reshape(4, 2, 3), [(4, 6)]),
        (lambda x: x.transpose(0, 1), [(4, 6)]),
        (lambda x: x.expand(3, 4), [(1, 4)]),
        (lambda x: x[1:], [(4, 6)]),
        (lambda x, y: torch.cat([x, y]), [(4, 6), (2, 6)]),
        (lambda x: x.tril(), [(4, 6)]),
        (lambda x: F.pad(x, (1, 1)), [(4, 6)]),
    ],
)
def test_pending_sums_pass_through(function: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    node = node_of(function, tuple(doubles(*shape) for shape in shapes))
    mesh = Mesh(("x",), (2,))
    signature = signature_of(node.op)
    assert signature is not None
    pending = [Layout.replicated(mesh, len(shape)).with_partial(("x",)) for shape in shapes]
    choice = follow(node.op, signature, pending, [True] * len(shapes), mesh)
    assert choice.outputs[0].partial_axes == ("x",)
    assert sum(function(*(doubles(*s) * 0 for s in shapes)).flatten().tolist()) == 0  # linear: zeros give zeros


@pytest.mark.parametrize(
    "function, args",
    [
        (lambda x: F.pad(x, (1, 1), value=3.0), (doubles(4, 6),)),
        (lambda x, y: torch.cat([x, y]), (doubles(4, 6), torch.randn(2, 6))),
    ],
    ids=["pad with a value", "cat that casts"],
)
def test_pending_sums_are_done_before(function: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
    signature = signature_of(node_of(function, args).op)
    assert signature is not None
    assert signature.linear == ()


@pytest.mark.parametrize(
    "function, args",
    [
        (lambda x: x.as_strided((2, 2), (1, 2)), (doubles(4, 3),)),
        (lambda x, n: x.repeat_interleave(n, output_size=6), (doubles(3), torch.tensor([1, 2, 3]))),
        (lambda x: torch.block_diag(x, x), (doubles(4, 3),)),
    ],
    ids=["as_strided", "repeats as a tensor", "block_diag"],
)
def test_what_has_no_rule(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    assert free_dims(function, *args) == ()


def test_a_local_piece_need_not_have_the_strides_of_the_whole() -> None:
    """``view`` of a tensor whose piece is cut out of the middle, so that the piece itself has no such view."""
    check_rule(lambda x: x.view(4, 6, 2, 3), doubles(4, 6, 6), meshes=((2, 2),))
    check_rule(lambda x: x.transpose(0, 1).view(6, 8), doubles(4, 6, 2).transpose(1, 0).contiguous().transpose(0, 1))
