"""Matrix products, proved by splitting rows, columns, batches and the dim that is summed over."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import Operator, Slot, TensorMeta
from shardwright.rules.registry import signature_of
from shardwright.testing.rules import check_rule

aten = torch.ops.aten
Shape = tuple[int, ...]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


MATMUL: list[tuple[Shape, Shape]] = [
    ((4, 6), (6, 8)),
    ((5, 3), (3, 1)),
    ((1, 7), (7, 5)),
    ((5,), (5,)),
    ((3,), (3, 4)),
    ((5, 3), (3,)),
    ((4,), (2, 4, 3)),
    ((2, 3, 4), (4,)),
    ((2, 3, 4), (4, 5)),
    ((3, 4), (2, 4, 5)),
    ((3, 2, 4), (3, 4, 5)),
    ((3, 2, 4), (1, 4, 5)),
    ((2, 1, 3, 4), (3, 4, 2)),
    ((2, 1, 1), (2, 1, 3)),
]


@pytest.mark.parametrize("left, right", MATMUL, ids=str)
def test_matmul(left: Shape, right: Shape) -> None:
    check_rule(torch.matmul, numbers(*left), numbers(*right), operator="aten.matmul", limit=30)


PRODUCTS: dict[str, list[tuple[Shape, Shape]]] = {
    "mm": [((4, 6), (6, 4)), ((5, 3), (3, 1))],
    "bmm": [((2, 4, 6), (2, 6, 4)), ((3, 1, 5), (3, 5, 2))],
    "mv": [((4, 6), (6,)), ((5, 3), (3,))],
    "dot": [((6,), (6,)), ((1,), (1,))],
    "vdot": [((5,), (5,))],
    "outer": [((4,), (6,)), ((1,), (5,))],
    "ger": [((5,), (3,))],
}


@pytest.mark.parametrize("name, left, right", [(n, a, b) for n, shapes in PRODUCTS.items() for a, b in shapes], ids=str)
def test_product(name: str, left: Shape, right: Shape) -> None:
    check_rule(getattr(aten, name), numbers(*left), numbers(*right), operator=f"aten.{name}", limit=40)


LINEAR: list[tuple[Shape, Shape]] = [
    ((4, 6), (8, 6)),
    ((5, 3), (1, 3)),
    ((3,), (5, 3)),
    ((2, 3, 4), (5, 4)),
    ((2, 1, 3, 2), (3, 2)),
]


@pytest.mark.parametrize("x, weight", LINEAR, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear(x: Shape, weight: Shape, bias: bool) -> None:
    extra = (numbers(weight[0]),) if bias else ()
    check_rule(F.linear, numbers(*x), numbers(*weight), *extra, limit=30)


def test_linear_of_one_feature() -> None:
    check_rule(F.linear, numbers(5, 3), numbers(3))


ADDED: list[tuple[str, tuple[Shape, Shape, Shape]]] = [
    ("addmm", ((4, 8), (4, 6), (6, 8))),
    ("addmm", ((3,), (5, 2), (2, 3))),
    ("addmm", ((5, 1), (5, 3), (3, 2))),
    ("addmm", ((), (5, 3), (3, 2))),
    ("addmv", ((5,), (5, 3), (3,))),
    ("addmv", ((1,), (5, 3), (3,))),
    ("addbmm", ((4, 5), (2, 4, 3), (2, 3, 5))),
    ("addbmm", ((5,), (3, 1, 2), (3, 2, 5))),
    ("baddbmm", ((2, 4, 5), (2, 4, 3), (2, 3, 5))),
    ("baddbmm", ((1, 5), (3, 4, 2), (3, 2, 5))),
]


@pytest.mark.parametrize("name, shapes", ADDED, ids=str)
@pytest.mark.parametrize("beta, alpha", [(1, 1), (0.5, 2), (0, 3)])
def test_added_product(name: str, shapes: tuple[Shape, Shape, Shape], beta: float, alpha: float) -> None:
    def function(*inputs: Tensor) -> Tensor:
        return getattr(torch, name)(*inputs, beta=beta, alpha=alpha)

    check_rule(function, *(numbers(*s) for s in shapes), operator=f"aten.{name}", limit=12)


def test_added_product_ignores_what_beta_drops() -> None:
    inputs = torch.full((2, 2), torch.nan, dtype=torch.float64), numbers(2, 3), numbers(3, 2)
    check_rule(lambda x, a, b: torch.addmm(x.detach(), a, b, beta=0), *inputs, operator="aten.addmm")


EINSUM: list[tuple[str, tuple[Shape, ...]]] = [
    ("ij,jk->ik", ((5, 3), (3, 4))),
    ("ij,jk", ((5, 3), (3, 4))),
    ("ba,B", ((2, 3), (4,))),
    ("ij,ij->", ((5, 3), (5, 3))),
    ("ij->ji", ((5, 3),)),
    ("ij -> i", ((5, 3),)),
    ("bhqd,bhkd->bhqk", ((2, 3, 2, 4), (2, 3, 5, 4))),
    ("...ij,...jk->...ik", ((2, 3, 4), (4, 2))),
    ("...ij,...jk->...ik", ((3, 1, 2, 4), (2, 4, 2))),
    ("...i,i", ((2, 5), (5,))),
    ("...i->i", ((2, 3, 5),)),
    ("bij,bjk->bik", ((3, 2, 4), (1, 4, 2))),
    ("ij,jk->ik", ((5, 1), (3, 4))),
    ("iij,j->j", ((3, 3, 4), (4,))),
    ("i,j,k->ijk", ((2,), (3,), (2,))),
    ("ab,bc,cd->ad", ((3, 4), (4, 2), (2, 5))),
]


@pytest.mark.parametrize("equation, shapes", EINSUM, ids=str)
def test_einsum(equation: str, shapes: tuple[Shape, ...]) -> None:
    check_rule(lambda *operands: torch.einsum(equation, *operands), *(numbers(*s) for s in shapes), limit=20)


@pytest.mark.parametrize("equation", ["ii", "ii->i"])
def test_einsum_of_a_diagonal_stays_whole(equation: str) -> None:
    assert check_rule(lambda x: torch.einsum(equation, x), numbers(4, 4), needs_rule=False) == 0


def test_bias_waits_for_the_sum() -> None:
    metas = tuple(TensorMeta(shape, torch.float32) for shape in ((4, 6), (8, 6), (8,)))
    linear = Operator(aten.linear.default, (Slot(0), Slot(1), Slot(2)), {}, metas, (TensorMeta((4, 8), torch.float32),))
    signature = signature_of(linear)
    assert signature is not None
    assert signature.late == {2}
    _, outputs = signature.layouts(Mesh(("mp",), (2,)), {"k": (("mp",), None)})
    assert outputs[0].partial == (("mp", "sum"),)
