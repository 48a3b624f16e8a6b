"""Rules of reductions, scans and sorts: sums may be split, other reductions keep their dims whole.

The dims that are not reduced are always free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.layout import Layout
from shardwright.ir.operator import Operator
from shardwright.ir.signature import Signature
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pieces import guarded_same_call
from shardwright.rules.pointwise import aten_names, pointwise
from shardwright.rules.registry import rule_for
from shardwright.rules.traits import Traits, register_traits


def reduced_dims(op: Operator, empty_means_all: bool = True) -> frozenset[int]:
    """Returns the dims that a call reduces: all of them if it names none."""
    ndim = len(op.inputs[0].shape)
    given = op.argument("dim")
    if given is None or (given in ([], ()) and empty_means_all):
        return frozenset(range(ndim))
    dims = given if isinstance(given, (list, tuple)) else [given]
    return frozenset(d % ndim for d in dims) if ndim else frozenset()


def _reduction(op: Operator, mark: str, dims: frozenset[int]) -> str:
    """Returns the notation of a call that reduces ``dims`` to nothing, or to size 1."""
    keepdim = bool(op.argument("keepdim", False))
    ndim = len(op.inputs[0].shape)
    before = " ".join(f"d{i}{mark if i in dims else ''}" for i in range(ndim))
    after = " ".join("1" if i in dims else f"d{i}" for i in range(ndim) if keepdim or i not in dims)
    return f"{before} -> {', '.join([after] * len(op.outputs))}"


# -- sums ---------------------------------------------------------------------------------------------------------


@rule_for("aten.sum", "aten.nansum", "aten.count_nonzero")
def _sum(op: Operator) -> Signature:
    plain = op.name == "aten.sum" and op.inputs[0].dtype == op.outputs[0].dtype
    return parse(_reduction(op, "+", reduced_dims(op)), op, None, [[0]] if plain else ())


@rule_for("aten.mean")
def _mean(op: Operator) -> Signature:
    plain = op.inputs[0].dtype == op.outputs[0].dtype
    return parse(_reduction(op, "+", reduced_dims(op)), op, None, [[0]] if plain else (), _mean_of_split)


def _mean_of_split(local: Local) -> Any:
    """Emits a mean over split dims as a partial sum: the local sum over the global count."""
    if not any(local.axes_of(factor) for factor in local.signature.summed):
        return local.same_call()
    op = local.op
    dims = sorted(reduced_dims(op))
    count = op.inputs[0].numel // max(op.outputs[0].numel, 1)
    keepdim = bool(op.argument("keepdim", False))
    return (local.call(sum_over_count, local.inputs[0], dims, keepdim, count, op.outputs[0].dtype),)


def sum_over_count(x: Tensor, dims: list[int], keepdim: bool, count: int, dtype: torch.dtype) -> Tensor:
    """Computes the sum over ``dims`` (none: over all) divided by ``count``.

    Args:
        x: the local tensor.
        dims: the dims to sum over.
        keepdim: whether they stay, with size 1.
        count: the global number of elements.
        dtype: of the result.
    """
    return (x.sum(dims, keepdim=keepdim, dtype=wide(dtype)) / count).to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype to take sums in: single for half precision, where a sum may overflow though the mean does not."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


# -- reductions that keep their dims whole ------------------------------------------------------------------------


WHOLE = aten_names("""
    amax amin aminmax argmax argmin kthvalue linalg_norm linalg_vector_norm logsumexp median mode nanmean nanmedian norm
    prod
""")
ALONG = aten_names("argsort cummax cummin cumprod cumsum logcumsumexp msort sort")


@rule_for(*WHOLE)
def _whole_dims(op: Operator) -> Signature:
    return parse(_reduction(op, "!", reduced_dims(op)), op)


@rule_for("aten.max", "aten.min")
def _extremum(op: Operator) -> Signature | None:
    """Builds the rule of three operators in one name: over all dims, over one with its indices, or of two tensors."""
    if len(op.inputs) == 2:
        return pointwise(op)
    return parse(_reduction(op, "!", reduced_dims(op)), op)


@rule_for("aten.any", "aten.all")
def _logical(op: Operator) -> Signature:
    """Builds the rule of a logical reduction. Here an empty list of dims reduces none."""
    return parse(_reduction(op, "!", reduced_dims(op, empty_means_all=False)), op)


@rule_for("aten.var", "aten.std", "aten.var_mean", "aten.std_mean")
def _spread(op: Operator) -> Signature:
    """Keeps the dims of a variance whole, because torch would warn about an empty piece."""
    return parse(_reduction(op, "!", reduced_dims(op)), op, None, (), guarded_same_call)


# -- along one dim, which stays --------------------------------------------------------------------------------------


@rule_for(*ALONG)
def _along(op: Operator) -> Signature:
    """Keeps the dim whole along which each position depends on others."""
    dims = _with_one_dim(op, "d!")
    return parse(f"{dims} -> {', '.join([dims] * len(op.outputs))}", op)


@rule_for("aten.topk")
def _topk(op: Operator) -> Signature:
    kept = _with_one_dim(op, "k!")
    return parse(f"{_with_one_dim(op, 'd!')} -> {kept}, {kept}", op)


def _with_one_dim(op: Operator, factor: str) -> str:
    """Returns the notation of a tensor whose dim ``dim`` (default the operator's own) is ``factor``."""
    ndim = len(op.inputs[0].shape)
    dim = op.argument("dim", 0 if op.name == "aten.msort" else -1)
    return " ".join(factor if ndim and i == dim % ndim else f"d{i}" for i in range(ndim))


# -- softmax ----------------------------------------------------------------------------------------------------------


@rule_for("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax")
def _softmax(op: Operator) -> Signature:
    """Splits the dim itself too: the largest value and the sum of exponentials are then reduced."""
    dims = _with_one_dim(op, "d")
    return parse(f"{dims} -> {dims}", op, None, (), _softmax_of_split_dim)


def _softmax_of_split_dim(local: Local) -> Any:
    axes, op = local.axes_of("d"), local.op
    if not axes:
        return local.same_call()
    shape, layout = list(op.inputs[0].shape), local.input_layouts[0]
    dim = op.argument("dim") % len(shape)
    dims, sizes = list(layout.bound), list(layout.sizes)
    shape[dim], dims[dim], sizes[dim] = 1, (), None
    one = Layout.of(local.mesh, dims, (), sizes)
    dtype = wide(op.outputs[0].dtype)
    peak = local.call(largest, local.inputs[0], dim, True)
    peak = local.move(peak, tuple(shape), one.with_partial(axes, "max"), one, (), op.inputs[0].dtype)
    logarithm = op.name in ("aten.log_softmax", "aten._log_softmax")
    prepare, finish = (logits_and_sum, log_softmax_of_sum) if logarithm else (exponentials_and_sum, softmax_of_sum)
    values, total = local.call_many(2, prepare, local.inputs[0], peak, dim, dtype)
    total = local.move(total, tuple(shape), one.with_partial(axes), one, axes, dtype)
    return (local.call(finish, values, total, op.outputs[0].dtype),)


def largest(x: Tensor, dim: int, keepdim: bool) -> Tensor:
    """Computes the largest value along a dim, without gradient; ``-inf`` if the dim is empty."""
    x = x.detach()
    return x.amax(dim, keepdim) if x.shape[dim] else x.sum(dim, keepdim).fill_(-math.inf)


def exponentials_and_sum(x: Tensor, peak: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Computes ``exp(x - peak)`` and its sum over the local piece of ``dim``.

    Args:
        x: the local tensor.
        peak: the largest value along the whole dim.
        dim: the softmax's dim.
        dtype: to compute in.
    """
    exponentials = (x.to(dtype) - peak).exp()
    return exponentials, exponentials.sum(dim, keepdim=True)


def logits_and_sum(x: Tensor, peak: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Computes ``x - peak``, and the sum of its exponentials over the local piece.

    Args:
        x: the local tensor.
        peak: the largest value along the whole dim.
        dim: the softmax's dim.
        dtype: to compute in.
    """
    shifted = x.to(dtype) - peak
    return shifted, shifted.exp().sum(dim, keepdim=True)


def softmax_of_sum(exponentials: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes softmax, given the sum over the whole dim."""
    return (exponentials / total).to(dtype)


def log_softmax_of_sum(shifted: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes the logarithm of softmax, given the sum over the whole dim."""
    return (shifted - total.log()).to(dtype)


# -- traits ------------------------------------------------------------------------------------------------------------------


def _logsumexp_workspace(args: Sequence[Any], results: Sequence[Tensor]) -> float:
    return float(args[0].nbytes)


TRAITS = {
    Traits("reduce", backward="handed on", linear=True): "sum",
    Traits("reduce", linear=True): "mean",
    Traits("reduce", entry_differs=True): "max min norm std var",
    Traits("reduce", has_gradient=False): "argmax argmin any all count_nonzero",
    Traits("reduce"): """
        amax amin aminmax var_mean std_mean prod linalg_norm linalg_vector_norm nansum nanmean cumsum cumprod cummax cummin
    """,
    Traits("softmax"): "softmax _softmax log_softmax _log_softmax logcumsumexp",
    Traits("softmax", workspace=_logsumexp_workspace): "logsumexp",
    Traits("sort", has_gradient=False): "argsort",
    Traits(has_gradient=False): "largest",  # called by the lowering above
    Traits("sort"): "sort msort topk kthvalue median nanmedian mode",
}
register_traits(TRAITS)
