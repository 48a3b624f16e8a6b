"""Operators that read or write at indices, proved by splitting them: even, uneven and empty pieces."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.rules.index import embedding_of_rows
from shardwright.testing.rules import check_rule
from tests.rules.splits import doubles, free_dims

aten = torch.ops.aten
Case = tuple[Callable[..., Any], tuple[Any, ...], tuple[str, ...]]


def below(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


# name -> function, its arguments, the dims that may be split of each input and then the output
CASES: dict[str, Case] = {
    "embedding": (F.embedding, (below(7, 4, 3), doubles(7, 6)), ("01", "01", "012")),
    "embedding of a vector": (F.embedding, (below(3, 5), doubles(3, 1)), ("01", "0", "01")),
    "embedding of a scalar": (F.embedding, (torch.tensor(2), doubles(4, 5)), ("01", "", "0")),
    "embedding with padding": (
        lambda i, w: F.embedding(i, w, padding_idx=0), (below(4, 9), doubles(4, 2)), ("01", "0", "01"),
    ),
    "embedding with padding at the end": (
        lambda i, w: F.embedding(i, w, padding_idx=-1), (below(5, 9), doubles(5, 2)), ("01", "0", "01"),
    ),
    "embedding of int32": (F.embedding, (below(5, 4, 2).int(), doubles(5, 2)), ("01", "01", "012")),
    "gather": (lambda x, i: x.gather(1, i), (doubles(4, 5), below(5, 4, 3)), ("0", "01", "01")),
    "gather with fewer indices": (
        lambda x, i: x.gather(1, i), (doubles(4, 5, 2), below(5, 3, 3, 2)), ("2", "12", "12"),
    ),
    "gather along the first dim": (lambda x, i: x.gather(0, i), (doubles(4, 1), below(4, 6, 1)), ("1", "01", "01")),
    "take_along_dim": (lambda x, i: torch.take_along_dim(x, i, 1), (doubles(4, 5), below(5, 4, 3)), ("0", "01", "01")),
    "take_along_dim that broadcasts": (
        lambda x, i: torch.take_along_dim(x, i, 1), (doubles(4, 5, 1), below(5, 1, 3, 2)), ("0", "12", "012"),
    ),
    "take_along_dim of all": (lambda x, i: torch.take_along_dim(x, i), (doubles(4, 3), below(12, 5)), ("", "0", "0")),
    "take": (lambda x, i: x.take(i), (doubles(4, 3), below(12, 5, 2)), ("", "01", "01")),
    "index_select": (lambda x, i: x.index_select(1, i), (doubles(4, 3, 2), below(3, 5)), ("02", "0", "012")),
    "index of rows": (lambda x, i: x[i], (doubles(5, 4), below(5, 2, 3)), ("1", "01", "012")),
    "index of a middle dim": (lambda x, i: x[:, i], (doubles(4, 5, 3), below(5, 6)), ("02", "0", "012")),
    "index of two dims": (
        lambda x, i, j: x[:, i, j], (doubles(4, 5, 3), below(5, 6), below(3, 6)), ("0", "0", "0", "01"),
    ),
    "index of dims apart": (
        lambda x, i, j: x[i, :, j], (doubles(4, 5, 3), below(4, 6), below(3, 6)), ("1", "0", "0", "01"),
    ),
    "index that broadcasts": (
        lambda x, i, j: x[i, j], (doubles(4, 5, 3), below(4, 6, 1), below(5, 2)), ("2", "0", "0", "012"),
    ),
    "index by a scalar": (
        lambda x, i: aten.index(x, [None, i]), (doubles(4, 5, 3), torch.tensor(2)), ("02", "", "01"),
    ),
    "index_put": (
        lambda x, i, v: x.index_put((i,), v), (doubles(5, 4), torch.tensor([3, 0]), doubles(2, 4)), ("1", "", "1", "1"),
    ),
    "index_put of a middle dim": (
        lambda x, i, v: aten.index_put(x, [None, i], v), (doubles(4, 5, 2), torch.tensor([3, 0]), doubles(2, 2)),
        ("02", "", "1", "02"),
    ),
    "index_put of one number": (
        lambda x, i, v: x.index_put((i,), v), (doubles(5, 4), torch.tensor([3, 0]), doubles(1)), ("1", "", "", "1"),
    ),
    "index_put that adds": (
        lambda x, i, v: x.index_put((i, i), v, accumulate=True), (doubles(5, 5, 3), below(5, 4), doubles(4, 3)),
        ("2", "", "", "1", "2"),
    ),
    "scatter": (
        lambda x, i, s: x.scatter(1, i, s), (doubles(4, 5), torch.tensor([[1, 0, 4]] * 4), doubles(4, 3)),
        ("0", "0", "0", "0"),
    ),
    "scatter of a number": (
        lambda x, i: x.scatter(1, i, 2.5), (doubles(4, 5), torch.tensor([[1, 0, 4]] * 3)), ("", "", ""),
    ),
    "scatter_add": (
        lambda x, i, s: x.scatter_add(0, i, s), (doubles(3, 4), below(3, 5, 4), doubles(5, 4)), ("1", "01", "01", "1"),
    ),
    "scatter_reduce": (
        lambda x, i, s: x.scatter_reduce(1, i, s, "mean"), (doubles(4, 3), below(3, 4, 5), doubles(4, 5)),
        ("0", "0", "0", "0"),
    ),
    "index_add": (
        lambda x, i, s: x.index_add(1, i, s, alpha=0.5), (doubles(4, 3), below(3, 5), doubles(4, 5)),
        ("0", "0", "01", "0"),
    ),
    "index_copy": (
        lambda x, i, s: x.index_copy(0, i, s), (doubles(4, 3), torch.tensor([2, 0]), doubles(2, 3)),
        ("1", "", "1", "1"),
    ),
    "index_fill": (lambda x, i: x.index_fill(0, i, 2.5), (doubles(4, 3), torch.tensor([2, 0])), ("1", "", "1")),
    "index_reduce": (
        lambda x, i, s: x.index_reduce(0, i, s, "mean"), (doubles(4, 3), below(4, 5), doubles(5, 3)),
        ("1", "", "1", "1"),
    ),
    "one_hot": (lambda i: F.one_hot(i, 5), (below(5, 4, 3),), ("01", "01")),
    "bucketize": (
        lambda x, b: torch.bucketize(x, b), (doubles(4, 3), torch.arange(-2.0, 2.0).double()), ("01", "", "01"),
    ),
    "searchsorted": (torch.searchsorted, (torch.arange(-2.0, 2.0).double(), doubles(4, 3)), ("", "01", "01")),
    "searchsorted of rows": (torch.searchsorted, (doubles(4, 6).sort().values, doubles(4, 3)), ("0", "01", "01")),
    "isin": (torch.isin, (below(9, 4, 3), below(9, 5)), ("01", "", "01")),
    "isin of a number": (lambda x: torch.isin(x, 3), (below(5, 4, 3),), ("01", "01")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta:UserWarning")  # said once, by PyTorch, to whoever calls it
@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_whole_computes(name: str) -> None:
    function, args, free = CASES[name]
    assert check_rule(function, *args, limit=24, needs_rule=any(free)) > 0 or not any(free)


@pytest.mark.parametrize("name", CASES)
def test_may_be_split_where_it_is_promised(name: str) -> None:
    function, args, free = CASES[name]
    assert free_dims(function, *args) == free


@pytest.mark.parametrize(
    "function, args",
    [
        (lambda x, m: x.index_put((m,), torch.zeros((), dtype=x.dtype)), (doubles(4), torch.tensor([True, False] * 2))),
        (lambda i, w: F.embedding(i, w, scale_grad_by_freq=True), (below(5, 4), doubles(5, 2))),
        (lambda x: x.put(torch.tensor([1]), torch.ones(1, dtype=x.dtype)), (doubles(4),)),
    ],
    ids=["index_put of a mask", "embedding scaled by frequency", "put"],
)
def test_what_has_no_rule(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    assert free_dims(function, *args) == ()


@pytest.mark.parametrize("rows, first", [(0, 0), (0, 7), (3, 0), (3, 2), (3, 9)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_rows_of_a_table(rows: int, first: int, dtype: torch.dtype) -> None:
    table = torch.zeros(12, 2, dtype=dtype)
    table[first : first + rows] = torch.randn(rows, 2, dtype=dtype)
    weight = table[first : first + rows].clone().requires_grad_()
    indices = below(12, 5, 4)
    found = embedding_of_rows(weight, indices, first)
    assert torch.equal(found, table[indices])
    (gradient,) = torch.autograd.grad(found.sum(), weight)
    counts = torch.bincount(indices.flatten(), minlength=12)[first : first + rows]
    assert torch.equal(gradient, counts.to(dtype).unsqueeze(1).expand(rows, 2))


def test_the_padding_row_gets_no_gradient_on_the_rank_that_holds_it() -> None:
    weight = doubles(3, 2).requires_grad_()
    found = embedding_of_rows(weight, torch.tensor([5, 6, 6, 7, 0]), 5, padding=1)
    (gradient,) = torch.autograd.grad(found.sum(), weight)
    assert gradient[:, 0].tolist() == [1, 0, 1]


def test_rows_with_nan_do_not_reach_other_indices() -> None:
    weight = torch.full((1, 2), float("nan"), requires_grad=True)
    found = embedding_of_rows(weight, torch.tensor([3]), 0)
    assert found.tolist() == [[0, 0]]
    (gradient,) = torch.autograd.grad(found.sum(), weight)
    assert gradient.tolist() == [[0, 0]]
