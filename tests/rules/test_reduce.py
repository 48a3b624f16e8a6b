"""Reductions, scans and sorts, proved by splitting the dims that may be split."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shardwright.capture.capture import capture
from shardwright.capture.closure import FunctionModule
from shardwright.rules.registry import signature_of
from shardwright.testing.rules import check_rule

aten = torch.ops.aten
Function = Callable[[Tensor], object]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def factors(function: Function, x: Tensor) -> tuple[set[str], set[str]]:
    """The summed and the whole factors of the one operator a function calls."""
    (node,) = capture(FunctionModule(function), (x,), {}, torch.device("cpu")).nodes
    signature = signature_of(node.op)
    assert signature is not None
    return set(signature.summed), set(signature.whole)


SUMS: dict[str, Function] = {
    "sum": lambda x: x.sum(),
    "sum-dim": lambda x: x.sum(1),
    "sum-keepdim": lambda x: x.sum(-1, keepdim=True),
    "sum-dims": lambda x: x.sum((0, -1)),
    "sum-no-dims": lambda x: x.sum(()),
    "sum-cast": lambda x: x.sum(1, dtype=torch.float32),
    "mean": lambda x: x.mean(),
    "mean-dim": lambda x: x.mean(0),
    "mean-keepdim": lambda x: x.mean((0, 1), keepdim=True),
    "mean-no-dims": lambda x: x.mean(()),
    "mean-cast": lambda x: x.mean(1, dtype=torch.float32),
    "nansum": lambda x: x.nansum(1),
    "count_nonzero": lambda x: torch.count_nonzero(x > 0, 1),
    "count_nonzero-all": lambda x: torch.count_nonzero(x > 0),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("shape", [(4, 6), (5, 3, 2), (1, 3)], ids=str)
def test_sum(name: str, shape: tuple[int, ...]) -> None:
    tolerance = 1e-5 if "cast" in name else 1e-10
    operator = f"aten.{name.partition('-')[0]}"
    check_rule(SUMS[name], numbers(*shape), operator=operator, limit=30, tolerance=tolerance)


OF_VECTORS: dict[str, Function] = {
    "count_nonzero": lambda x: torch.count_nonzero(x > 0, 0),
    "mean": lambda x: x.mean(0, keepdim=True),
    "nansum": lambda x: x.nansum(),
    "sum": lambda x: x.sum(-1),
}


@pytest.mark.parametrize("name", OF_VECTORS)
def test_sum_of_a_vector(name: str) -> None:
    check_rule(OF_VECTORS[name], numbers(5), operator=f"aten.{name}")


@pytest.mark.parametrize("kind", [torch.int64, torch.bool], ids=str)
def test_sum_of_integers(kind: torch.dtype) -> None:
    check_rule(lambda x: x.sum(0), torch.randint(0, 2, (5, 3)).to(kind), operator="aten.sum")


def test_mean_of_half_precision_does_not_overflow() -> None:
    x = torch.full((64, 64), 60000.0, dtype=torch.float16)
    check_rule(torch.mean, x, meshes=((2,),), tolerance=1e-3)


def test_what_a_sum_may_split() -> None:
    assert factors(lambda x: x.sum(1), numbers(4, 6)) == ({"d1"}, set())
    assert factors(lambda x: x.mean((0, 1)), numbers(4, 6)) == ({"d0", "d1"}, set())


WHOLE: dict[str, Function] = {
    "all": lambda x: (x > 0).all(1),
    "all-dims": lambda x: (x > 0).all((0, 1)),
    "all-no-dims": lambda x: (x > 0).all(()),
    "amax": lambda x: x.amax(1),
    "amax-dims": lambda x: x.amax((0, -1), keepdim=True),
    "amin": lambda x: x.amin(-1),
    "aminmax": lambda x: torch.aminmax(x, dim=1),
    "any": lambda x: (x > 0).any(0, keepdim=True),
    "argmax": lambda x: x.argmax(1),
    "argmax-keepdim": lambda x: x.argmax(0, keepdim=True),
    "argmin": lambda x: x.argmin(-1),
    "kthvalue": lambda x: x.kthvalue(2, 1),
    "linalg_norm": lambda x: torch.linalg.norm(x, dim=1),
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, 3, dim=1),
    "linalg_vector_norm-keepdim": lambda x: x.norm(dim=0, keepdim=True),
    "logsumexp": lambda x: x.logsumexp(1),
    "logsumexp-dims": lambda x: x.logsumexp((0, 1), keepdim=True),
    "max": lambda x: x.max(1),
    "max-keepdim": lambda x: x.max(0, keepdim=True),
    "median": lambda x: x.median(1),
    "min": lambda x: x.min(-1),
    "mode": lambda x: x.mode(1),
    "nanmean": lambda x: x.nanmean(1),
    "nanmedian": lambda x: x.nanmedian(1),
    "norm": lambda x: aten.norm.ScalarOpt_dim(x, 2, [1]),
    "prod": lambda x: x.prod(1),
    "std": lambda x: x.std(1),
    "std-keepdim": lambda x: x.std(0, keepdim=True, correction=0),
    "std_mean": lambda x: torch.std_mean(x, 1),
    "var": lambda x: x.var(1),
    "var-biased": lambda x: x.var(1, unbiased=False),
    "var-correction": lambda x: x.var((1,), correction=1),
    "var_mean": lambda x: torch.var_mean(x, 1),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_dims(name: str) -> None:
    operator = f"aten.{name.partition('-')[0]}"
    check_rule(WHOLE[name], numbers(4, 6, 2), operator=operator, limit=20)
    check_rule(WHOLE[name], numbers(2, 3, 5), operator=operator, limit=20)


@pytest.mark.parametrize("name", ["all", "amax", "argmin", "logsumexp", "max", "median", "min", "prod", "std", "var"])
def test_over_everything_runs_whole(name: str) -> None:
    extra = ((0, 1),) if name == "logsumexp" else ()
    x = numbers(4, 3) > 0 if name in ("all", "any") else numbers(4, 3)
    assert factors(lambda x: getattr(torch, name)(x, *extra), x) == (set(), {"d0", "d1"})


def test_larger_of_two() -> None:
    check_rule(torch.max, numbers(5, 1), numbers(1, 3), operator="aten.max")
    check_rule(torch.min, numbers(5, 3), numbers(5, 3), operator="aten.min")


ALONG: dict[str, Function] = {
    "argsort": lambda x: x.argsort(1),
    "cummax": lambda x: x.cummax(1),
    "cummin": lambda x: x.cummin(-1),
    "cumprod": lambda x: x.cumprod(1),
    "cumsum": lambda x: x.cumsum(0),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "msort": lambda x: x.msort(),
    "sort": lambda x: x.sort(1, descending=True),
    "sort-default": lambda x: x.sort(),
    "sort-stable": lambda x: x.sort(stable=True, dim=0),
    "topk": lambda x: x.topk(2, 1),
    "topk-default": lambda x: x.topk(1),
}


@pytest.mark.parametrize("name", ALONG)
def test_along_a_dim(name: str) -> None:
    operator = f"aten.{name.partition('-')[0]}"
    check_rule(ALONG[name], numbers(4, 6, 2), operator=operator, limit=20)
    check_rule(ALONG[name], numbers(2, 3, 5), operator=operator, limit=20)


@pytest.mark.parametrize("name", ["cumsum", "sort", "topk"])
def test_the_dim_itself_stays_whole(name: str) -> None:
    assert factors(ALONG[name], numbers(4, 6))[1] >= {"d"}


SOFTMAX: dict[str, Function] = {
    "_log_softmax": lambda x: aten._log_softmax(x, 0, False),
    "_softmax": lambda x: aten._softmax(x, 0, False),
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmax": lambda x: x.softmax(-1),
}


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("shape", [(4, 6), (5, 1), (3, 2, 5), (7,)], ids=str)
def test_softmax_of_a_split_dim(name: str, shape: tuple[int, ...]) -> None:
    assert factors(SOFTMAX[name], numbers(*shape)) == (set(), set())
    check_rule(SOFTMAX[name], numbers(*shape) * 5, operator=f"aten.{name}", limit=30)


@pytest.mark.parametrize("name", ["log_softmax", "softmax"])
def test_softmax_with_a_masked_piece(name: str) -> None:
    x = numbers(3, 6)
    x[:, 3:] = -torch.inf
    check_rule(SOFTMAX[name], x, operator=f"aten.{name}")


@pytest.mark.parametrize("name", ["log_softmax", "softmax"])
def test_softmax_of_half_precision(name: str) -> None:
    x = numbers(4, 6).to(torch.bfloat16)
    check_rule(SOFTMAX[name], x, operator=f"aten.{name}", tolerance=0.02)
    check_rule(lambda x: getattr(torch, name)(x, 1, dtype=torch.float32), x, operator=f"aten.{name}", tolerance=0.02)
