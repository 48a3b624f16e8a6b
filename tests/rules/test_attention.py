"""Attention, proved by splitting samples, heads, queries and the values' last dim."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.capture.capture import capture
from shardwright.capture.closure import FunctionModule
from shardwright.ir.signature import Signature
from shardwright.rules.registry import signature_of
from shardwright.testing.rules import check_rule

Shape = tuple[int, ...]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def tensors(*, batch: Shape = (2,), heads: int = 3, served: int = 0, length: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; fewer heads of the latter two with ``served``."""
    kept = served or heads
    return numbers(*batch, heads, length, 5), numbers(*batch, kept, 6, 5), numbers(*batch, kept, 6, 4)


@pytest.mark.parametrize("batch", [(2,), (3,), (1,), (), (2, 3)], ids=str)
def test_attention(batch: Shape) -> None:
    check_rule(F.scaled_dot_product_attention, *tensors(batch=batch), limit=30)


@pytest.mark.parametrize("shape", [(4, 6), (1, 6), (2, 1, 1, 6), (1, 3, 4, 6), (2, 3, 4, 6)], ids=str)
@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_mask(shape: Shape, kind: str) -> None:
    mask = torch.rand(shape) > 0.3 if kind == "boolean" else numbers(*shape)
    if kind == "boolean":
        mask[..., 0] = True  # a query that sees nothing has no result
    check_rule(F.scaled_dot_product_attention, *tensors(), mask, limit=20)


def test_one_key_for_all_samples() -> None:
    _, keys, values = tensors(batch=(1,))
    check_rule(F.scaled_dot_product_attention, numbers(3, 3, 4, 5), keys, values, limit=20)


def test_own_scale() -> None:
    check_rule(F.scaled_dot_product_attention, *tensors(), scale=0.5, limit=20)


@pytest.mark.parametrize("served", [2, 3, 1, 6])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_grouped_queries(served: int, causal: bool) -> None:
    inputs = tensors(heads=6, served=served)
    check_rule(F.scaled_dot_product_attention, *inputs, is_causal=causal, enable_gqa=True, limit=20)


@pytest.mark.parametrize("shape", [(4, 6), (2, 1, 4, 6), (2, 6, 1, 6)], ids=str)
def test_mask_of_grouped_queries(shape: Shape) -> None:
    inputs = tensors(heads=6, served=2)
    check_rule(F.scaled_dot_product_attention, *inputs, numbers(*shape), enable_gqa=True, limit=20)


def test_causal() -> None:
    check_rule(F.scaled_dot_product_attention, *tensors(), is_causal=True, limit=40)


def signature(*args: Tensor, **kwargs: object) -> Signature | None:
    graph = capture(FunctionModule(F.scaled_dot_product_attention), args, kwargs, torch.device("cpu"))
    return signature_of(graph.nodes[0].op)


def test_what_stays_whole() -> None:
    plain, causal = signature(*tensors()), signature(*tensors(), is_causal=True)
    assert plain is not None
    assert causal is not None
    assert plain.whole == {"s", "e"}
    assert causal.whole == {"l", "s", "e"}


def test_dropout_has_no_rule() -> None:
    assert signature(*tensors(), dropout_p=0.1) is None
