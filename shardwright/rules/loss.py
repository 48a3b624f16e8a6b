"""Rules of losses: the batch may be split under every reduction, and so may the classes of a cross-entropy.

A mean is a local sum over the global count. Where the count depends on the data (ignored targets, class weights), sum
and count are reduced together, in one all-reduce, and the loss comes out whole. Logits split by class meet in two
all-reduces of one number per sample: the largest logit, then the sum of exponentials with the target's logit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shardwright.base.derivatives import first_derivative_only
from shardwright.ir.instructions import Ref
from shardwright.ir.layout import Layout
from shardwright.ir.operator import Operator, Slot
from shardwright.ir.signature import Signature
from shardwright.rules.in_range import check_in_range
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pointwise import aten_names
from shardwright.rules.reduce import largest, sum_over_count, wide
from shardwright.rules.registry import rule_for
from shardwright.rules.traits import Traits, register_traits

NONE, MEAN, SUM = 0, 1, 2

# -- elementwise losses -----------------------------------------------------------------------------------------------

ELEMENTWISE = aten_names("""
    binary_cross_entropy binary_cross_entropy_with_logits hinge_embedding_loss huber_loss kl_div l1_loss
    margin_ranking_loss mse_loss poisson_nll_loss smooth_l1_loss soft_margin_loss
""")


@rule_for(*ELEMENTWISE)
def _elementwise(op: Operator) -> Signature:
    """Broadcasts the inputs; a reduced loss sums over every dim."""
    shape = torch.broadcast_shapes(*(meta.shape for meta in op.inputs))
    mark = "" if op.argument("reduction") == NONE else "+"
    dims = [f"d{i}{mark}" for i in range(len(shape))]
    inputs = [" ".join(dims[len(dims) - len(meta.shape) :]) for meta in op.inputs]
    sizes = {f"d{i}": size for i, size in enumerate(shape)}
    return parse(f"{', '.join(inputs)} -> {'' if mark else ' '.join(dims)}", op, sizes, (), _elementwise_mean)


def _elementwise_mean(local: Local) -> Any:
    if local.op.argument("reduction") != MEAN or not local.split:
        return local.same_call()
    dtype = local.op.outputs[0].dtype
    count = math.prod(local.signature.sizes.values())
    return (local.call(sum_over_count, _summable(local, dtype), [], False, count, dtype),)


def _summable(local: Local, dtype: torch.dtype) -> Ref:
    """Emits the local losses, or their sum if that is safe in their own dtype."""
    return local.same_call(reduction=SUM if wide(dtype) == dtype else NONE)[0]


# -- cross-entropy and negative log-likelihood ------------------------------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """Parts of a classification loss.

    Args:
        kind: ``logits`` (cross-entropy), ``probabilities`` (cross-entropy with targets of all classes) or
            ``log_probabilities`` (negative log-likelihood).
        dim: the dim of classes.
        classes, samples: their numbers, over all ranks.
        dtype: of the result.
    """

    kind: str
    dim: int
    classes: int
    samples: int
    reduction: int
    ignore_index: int
    smoothing: float
    weighted: bool
    dtype: torch.dtype

    @property
    def sums(self) -> int:
        """The number of sums over classes that make the loss; see :func:`loss_of_sums`."""
        if self.kind == "probabilities":
            return 3
        return 1 + self.weighted + 2 * bool(self.smoothing) + (self.kind == "logits")


def _terms(op: Operator) -> Terms:
    shape, target = op.inputs[0].shape, op.inputs[1]
    dim = 0 if len(shape) == 1 else 1
    kind = "log_probabilities"
    if op.name == "aten.cross_entropy_loss":
        kind = "probabilities" if target.shape == shape and target.differentiable else "logits"
    return Terms(
        kind,
        dim,
        classes=shape[dim],
        samples=math.prod(size for d, size in enumerate(shape) if d != dim),
        reduction=op.argument("reduction"),
        ignore_index=op.argument("ignore_index"),
        smoothing=op.argument("label_smoothing", 0.0),
        weighted=isinstance(op.argument("weight"), Slot),
        dtype=op.outputs[0].dtype,
    )


@rule_for("aten.cross_entropy_loss", "aten.nll_loss", "aten.nll_loss2d", "aten.nll_loss_nd")
def _classification(op: Operator) -> Signature:
    """Splits samples and positions, which are a batch. A mean is taken by the lowering unless its count is known."""
    terms, shape = _terms(op), op.inputs[0].shape
    mark = "" if terms.reduction == NONE else "+" if _count_is_known(terms) else "~"
    batch = [f"b{i}{mark}" for i in range(len(shape) - 1)]
    scores = [*batch[: terms.dim], "c~", *batch[terms.dim :]]
    texts = [scores, scores if terms.kind == "probabilities" else batch, ["c~"]][: len(op.inputs)]
    result = " ".join([] if mark else batch)
    signature = parse(f"{', '.join(' '.join(t) for t in texts)} -> {result}", op, None, (), _classify)
    return replace(signature, pairs=signature.inner - {"c"})


def count_depends_on_data(op: Operator) -> bool:
    """Tells whether an operator is a loss whose mean divides by a number that its targets decide."""
    names = ("aten.cross_entropy_loss", "aten.nll_loss", "aten.nll_loss2d", "aten.nll_loss_nd")
    return op.name in names and _terms(op).kind != "probabilities"


def _count_is_known(terms: Terms) -> bool:
    return terms.reduction == SUM or terms.kind == "probabilities"


def _classify(local: Local) -> Any:
    terms = _terms(local.op)
    if local.axes_of("c"):
        return (_loss_of_split_classes(local, terms),)
    if terms.reduction != MEAN or not local.split:
        return local.same_call()
    losses = _summable(local, terms.dtype)
    if _count_is_known(terms):
        return (local.call(sum_over_count, losses, [], False, terms.samples, terms.dtype),)
    weight = local.inputs[2] if terms.weighted else None
    return (_mean_over_batch(local, terms, local.call(sum_and_count, losses, local.inputs[1], weight, terms)),)


def sum_and_count(losses: Tensor, target: Tensor, weight: Tensor | None, terms: Terms) -> Tensor:
    """Computes ``[sum of losses, divisor of their mean]`` of the local samples.

    Args:
        losses: the loss per local sample.
        target: the target per local sample.
        weight: one weight per class, or None.
        terms: the loss.
    """
    total = losses.sum(dtype=wide(losses.dtype))
    counted = target != terms.ignore_index
    if weight is None:
        return torch.stack((total, counted.sum().to(total.dtype)))
    weights = weight.detach()[target.where(counted, 0)].where(counted, 0)
    return torch.stack((total, weights.sum(dtype=total.dtype)))


def _mean_over_batch(local: Local, terms: Terms, pair: Ref) -> Ref:
    """Emits the mean: reduces ``[sum, count]`` over the axes that split the batch, in one all-reduce, and divides."""
    axes = tuple(a for factor, (own, _) in local.split.items() if factor != "c" for a in own)
    whole = Layout.replicated(local.mesh, 1)
    pair = local.move(pair, (2,), whole.with_partial(axes), whole, (), wide(terms.dtype))
    return local.call(ratio, pair, terms.dtype)


def ratio(pair: Tensor, dtype: torch.dtype) -> Tensor:
    """Divides the first of two numbers by the second."""
    return (pair[0] / pair[1]).to(dtype)


# -- classes split ----------------------------------------------------------------------------------------------------


def _loss_of_split_classes(local: Local, terms: Terms) -> Ref:
    """Emits the loss of local samples from local classes: two all-reduces over the axes of classes."""
    scores, target, *weight = local.inputs
    axes, layout = local.axes_of("c"), _sample_layout(local, terms)
    shape = tuple(size for dim, size in enumerate(local.op.inputs[0].shape) if dim != terms.dim)
    dtype = local.op.inputs[0].dtype
    peak = None
    if terms.kind != "log_probabilities":
        peak = local.call(largest, scores, terms.dim, False)
        peak = local.move(peak, shape, layout.with_partial(axes, "max"), layout, (), dtype)
    first = local.offset(False, 0, terms.dim)
    parts = local.call(class_sums, scores, peak, target, weight[0] if weight else None, first, terms)
    stacked = Layout.of(local.mesh, ((), *layout.bound), (), (None, *layout.sizes))
    parts = local.move(parts, (terms.sums, *shape), stacked.with_partial(axes), stacked, (), wide(dtype))
    result = local.call(loss_of_sums, parts, target if terms.kind != "probabilities" else None, terms)
    return result if terms.reduction != MEAN or _count_is_known(terms) else _mean_over_batch(local, terms, result)


def _sample_layout(local: Local, terms: Terms) -> Layout:
    """Returns the layout of one number per sample: that of the scores without the dim of classes."""
    layout = local.input_layouts[0]
    kept = [dim for dim in range(layout.ndim) if dim != terms.dim]
    return Layout.of(local.mesh, [layout.bound[d] for d in kept], (), [layout.sizes[d] for d in kept])


def class_sums(scores: Tensor, peak: Tensor | None, target: Tensor, weight: Tensor | None, first: int, terms: Terms) -> Tensor:
    """Computes, per sample, the sums over local classes that its loss is made of, stacked; see :func:`loss_of_sums`.

    Args:
        scores: local logits or log-probabilities.
        peak: the largest score over all classes, per sample, which keeps the exponentials in range.
        target: the target per local sample, as a class of all.
        weight: one weight per local class, or None.
        first: the first local class.
        terms: the loss.

    Raises:
        IndexRangeError: a target that is no class.
    """
    if terms.kind == "probabilities":
        assert peak is not None
        return _sums_of_probabilities(scores, peak, target, weight, terms)
    check_in_range(target, terms.classes, "target", terms.ignore_index)
    dim, index = terms.dim, target.to(torch.int64) - first
    sums = []
    if peak is not None:
        sums += Exponentials.apply(scores, peak, index, dim)
    else:
        sums.append(_at(scores, index, dim))
    if weight is not None:
        weight = _along(weight.detach(), scores, dim)
        sums.append(_at(weight.expand_as(scores), index, dim))
    if terms.smoothing:
        assert peak is not None
        weights = (
            torch.full_like(peak, scores.shape[dim], dtype=wide(scores.dtype))
            if weight is None
            else weight.expand_as(scores).sum(dim)
        )
        scored = (scores if weight is None else scores * weight).sum(dim, dtype=wide(scores.dtype))
        sums += [weights, scored - weights * peak]
    return torch.stack([each.to(wide(scores.dtype)) for each in sums])


def _sums_of_probabilities(scores: Tensor, peak: Tensor, target: Tensor, weight: Tensor | None, terms: Terms) -> Tensor:
    shifted = scores.to(wide(scores.dtype)) - peak.unsqueeze(terms.dim)
    share = target * (1 - terms.smoothing) + terms.smoothing / terms.classes
    share = share if weight is None else share * _along(weight, scores, terms.dim)
    sums = (shifted.exp(), share.to(shifted.dtype), share * shifted)
    return torch.stack([each.sum(terms.dim) for each in sums])


class Exponentials(torch.autograd.Function):
    """Computes the sum of ``exp(score - peak)`` over local classes.

    It also returns ``score - peak`` at the target, and saves one tensor.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, peak: Tensor, index: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        shifted = scores.to(wide(scores.dtype)) - peak.unsqueeze(dim)
        at_target = _at(shifted, index, dim)
        exponentials = shifted.exp_()
        ctx.save_for_backward(exponentials.to(scores.dtype), index)
        ctx.dim = dim
        return exponentials.sum(dim), at_target

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, of_sum: Tensor, of_target: Tensor) -> tuple[Tensor, None, None, None]:
        exponentials, index = ctx.saved_tensors
        gradient = exponentials * of_sum.unsqueeze(ctx.dim).to(exponentials.dtype)
        if gradient.shape[ctx.dim]:
            inside = _inside(index, gradient, ctx.dim)
            index, of_target = index.where(inside, 0), of_target.where(inside, 0).to(gradient.dtype)
            gradient.scatter_add_(ctx.dim, index.unsqueeze(ctx.dim), of_target.unsqueeze(ctx.dim))
        return gradient, None, None, None


def _along(weight: Tensor, scores: Tensor, dim: int) -> Tensor:
    """Shapes one weight per class to broadcast against the scores."""
    return weight.view([-1 if d == dim else 1 for d in range(scores.ndim)])


def _at(values: Tensor, index: Tensor, dim: int) -> Tensor:
    """Returns ``values`` at each sample's index if that is a local class, else zero."""
    if not values.shape[dim]:
        return values.sum(dim)
    inside = _inside(index, values, dim)
    return values.gather(dim, index.where(inside, 0).unsqueeze(dim)).squeeze(dim).where(inside, 0)


def _inside(index: Tensor, values: Tensor, dim: int) -> Tensor:
    return (index >= 0) & (index < values.shape[dim])


def loss_of_sums(sums: Tensor, target: Tensor | None, terms: Terms) -> Tensor:
    """Computes the reduced loss of the local samples from sums over all classes; for a mean, ``[sum of losses, count]``."""
    if target is None:
        exponentials, share, scored = sums.unbind(0)
        return _summed(share * exponentials.log() - scored, terms)
    each = iter(sums.unbind(0))
    total = next(each).log() if terms.kind == "logits" else 0
    losses = total - next(each)
    weight = next(each) if terms.weighted else None
    losses = losses if weight is None else losses * weight
    if terms.smoothing:
        weights, scored = each
        losses = losses * (1 - terms.smoothing) + (weights * total - scored) * (terms.smoothing / terms.classes)
    counted = target != terms.ignore_index
    losses = losses.where(counted, 0)
    if terms.reduction != MEAN:
        return _summed(losses, terms)
    return torch.stack((losses.sum(), (counted if weight is None else weight.where(counted, 0)).sum().to(losses.dtype)))


def _summed(losses: Tensor, terms: Terms) -> Tensor:
    if terms.reduction == NONE:
        return losses.to(terms.dtype)
    return (losses.sum() / (terms.samples if terms.reduction == MEAN else 1)).to(terms.dtype)


# -- traits ------------------------------------------------------------------------------------------------------------------

TRAITS = {
    Traits("softmax", fused=True): "cross_entropy_loss",
    Traits("softmax"): "nll_loss nll_loss_nd nll_loss2d",
    Traits(large_mean=True): "mse_loss smooth_l1_loss",
}
register_traits(TRAITS)
