"""Attention, proved by splitting samples, heads, queries and the values' last dim."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import shardwright as sw
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


DROPOUTS = [
    (kind, mask, grouped, dtype)
    for kind in ("plain", "causal")
    for mask in (None, torch.bool, torch.float64)
    for grouped in (False, True)
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    if not (kind == "causal" and mask)
]


@pytest.mark.parametrize(("kind", "mask", "grouped", "dtype"), DROPOUTS)
def test_dropout_draws_what_one_device_draws(kind: str, mask: torch.dtype | None, grouped: bool, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(6, 2 if grouped and i else 4, (5, 7, 7)[i], 8, dtype=dtype) for i in range(3))
    given = None if mask is None else (torch.rand(6, 1, 5, 7) > 0.2 if mask == torch.bool else torch.randn(5, 7, dtype=dtype))

    def attend(*tensors: Tensor) -> Tensor:
        causal = kind == "causal"
        return F.scaled_dot_product_attention(*tensors, given, 0.3, causal, enable_gqa=grouped)

    by_heads = sw.shard(F.scaled_dot_product_attention, in_strategy=((1, 2, 1, 1),) * 3)
    nets = [sw.AutoParallel(attend, "data_parallel")]
    if mask is None:
        nets.append(sw.AutoParallel(lambda q, k, v: by_heads(q, k, v, None, 0.3, kind == "causal", enable_gqa=grouped)))
    for net in nets:
        sw.init(devices=4)
        results = []
        for called in (net, attend):
            tensors = [t.clone().requires_grad_() for t in (query, key, value)]
            torch.manual_seed(3)
            out = called(*tensors)
            out.float().square().sum().backward()
            results.append([out, torch.rand(1), *(t.grad for t in tensors)])
        assert all(choice.axes for choice in net.latest.plan.choices.values())
        close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(results[0], results[1], **close)
