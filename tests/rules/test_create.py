"""Operators that create tensors: each rank makes its own piece, and the pieces are those of the whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.rules.create import eye_block
from shardwright.testing.rules import check_rule
from tests.rules.splits import doubles, free_dims, node_of

aten = torch.ops.aten
X = doubles(3, 2)

# name -> function, the dims of the output that may be split
CASES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "zeros": (lambda x: torch.zeros(5, 4), "01"),
    "zeros of int": (lambda x: torch.zeros(5, 1, dtype=torch.int32), "01"),
    "ones": (lambda x: torch.ones(3), "0"),
    "full": (lambda x: torch.full((4, 3), 2.5), "01"),
    "full of a bool": (lambda x: torch.full((4,), True), "0"),
    "arange": (lambda x: torch.arange(7), "0"),
    "arange from": (lambda x: torch.arange(3, 8), "0"),
    "arange by": (lambda x: torch.arange(9, -6, -4), "0"),
    "arange by three": (lambda x: torch.arange(1, 12, 3, dtype=torch.int32), "0"),
    "arange of floats": (lambda x: torch.arange(0.1, 3, 0.3), "0"),
    "arange of ints as floats": (lambda x: torch.arange(5, dtype=torch.bfloat16), "0"),
    "arange of nothing": (lambda x: torch.arange(0), "0"),
    "linspace": (lambda x: torch.linspace(0.3, 1.7, 23), "0"),
    "eye": (lambda x: torch.eye(5), "01"),
    "eye of a rectangle": (lambda x: torch.eye(3, 7, dtype=torch.float64), "01"),
    "new_zeros": (lambda x: x.new_zeros(5, 4), "01"),
    "new_ones": (lambda x: x.new_ones((4,), dtype=torch.int64), "0"),
    "new_full": (lambda x: x.new_full((4, 3), 7.5), "01"),
    "zero": (lambda x: aten.zero(x), "01"),
}
OF_SHAPE = ["empty", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"]


def _operator(name: str) -> str:
    return f"aten.{name.split()[0]}"


@pytest.mark.parametrize("name", CASES)
def test_makes_what_the_whole_makes(name: str) -> None:
    function, _ = CASES[name]
    assert check_rule(function, X, operator=_operator(name), limit=24) > 2


@pytest.mark.parametrize("name", CASES)
def test_may_be_split_where_it_is_promised(name: str) -> None:
    function, free = CASES[name]
    assert free_dims(function, X, operator=_operator(name))[-1] == free


@pytest.mark.parametrize("name", OF_SHAPE)
def test_memory_without_values(name: str) -> None:
    """Its values may be anything, so only what is written to all of it can be compared."""
    makers: dict[str, Callable[[Tensor], Tensor]] = {
        "empty": lambda x: torch.empty(5, 4),
        "new_empty": lambda x: x.new_empty(5, 4),
        "empty_strided": lambda x: torch.empty_strided((5, 4), (1, 5)),
        "new_empty_strided": lambda x: x.new_empty_strided((5, 4), (1, 5)),
        "empty_permuted": lambda x: torch.empty_permuted((5, 4), (1, 0)),
    }
    make = makers[name]
    assert check_rule(lambda x: torch.full_like(make(x), 2.0), X, operator=f"aten.{name}", limit=24) > 2


def test_scalar_tensor_has_nothing_to_split() -> None:
    assert free_dims(lambda x: x + torch.scalar_tensor(3.0), X, operator="aten.scalar_tensor") == ("",)


def test_new_zeros_reads_its_input_wherever_it_is() -> None:
    assert free_dims(lambda x: x.new_zeros(4), X)[0] == "01"


@pytest.mark.parametrize("name", ["tril_indices", "hann_window"])
def test_what_has_no_rule(name: str) -> None:
    functions: dict[str, Callable[[Tensor], Any]] = {
        "tril_indices": lambda x: torch.tril_indices(3, 3),
        "hann_window": lambda x: torch.hann_window(4),
    }
    assert node_of(functions[name], (X,)).op.name == f"aten.{name}"
    assert free_dims(functions[name], X) == ()


@pytest.mark.parametrize("rows, columns", [(0, 3), (3, 0), (2, 5), (5, 2)])
def test_blocks_of_an_identity_matrix(rows: int, columns: int) -> None:
    eye = torch.eye(9, dtype=torch.int64)
    for r in range(4):
        for c in range(4):
            assert torch.equal(eye_block(rows, columns, r - c, torch.int64), eye[r : r + rows, c : c + columns])
