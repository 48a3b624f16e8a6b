"""Operations: which family an operator is of, and how many operations it does."""

from __future__ import annotations

import math
from functools import cache

from shardwright.cost.convolution import is_transposed
from shardwright.rules.operator import Operator

# Whatever is in none of these is pointwise, also a name that nobody has seen.
_FAMILIES = {
    "matmul": """linear matmul mm bmm mv dot vdot outer ger addmm addmv addbmm baddbmm einsum bilinear tensordot""",
    "norm": """layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm native_group_norm batch_norm native_batch_norm
        instance_norm""",
    "softmax": """softmax _softmax log_softmax _log_softmax cross_entropy_loss logsumexp nll_loss nll_loss_nd nll_loss2d
        nll_loss_forward logcumsumexp""",
    "index": """embedding gather index _unsafe_index index_select index_add index_copy index_fill index_put index_reduce
        _unsafe_index_put scatter scatter_add scatter_reduce take take_along_dim one_hot bucketize searchsorted isin
        repeat_interleave""",
    "sort": """sort argsort msort topk kthvalue median nanmedian mode randperm multinomial""",
    "random": """dropout native_dropout alpha_dropout feature_dropout feature_alpha_dropout bernoulli binomial poisson rand
        randn rand_like randn_like randint randint_like uniform normal normal_functional log_normal exponential cauchy
        geometric random rrelu""",
    "reduce": """sum mean max min amax amin aminmax var std var_mean std_mean prod norm linalg_norm linalg_vector_norm argmax
        argmin any all count_nonzero nansum nanmean cumsum cumprod cummax cummin""",
    "copy": """cat concat concatenate stack vstack hstack dstack row_stack column_stack clone contiguous repeat tile pad
        constant_pad_nd flip fliplr flipud roll rot90 tril triu im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle
        diag_embed diagonal_copy diagonal_scatter select_scatter slice_scatter reshape reshape_as ravel flatten to _to_copy
        type_as lift_fresh_copy""",
    "create": """zeros ones full arange range linspace eye zeros_like ones_like full_like new_zeros new_ones new_full
        scalar_tensor fill zero""",
    "view": """view _unsafe_view _reshape_alias view_as expand expand_as broadcast_to broadcast_tensors meshgrid transpose t
        permute adjoint mT mH numpy_T matrix_H movedim moveaxis swapaxes swapdims unsqueeze squeeze atleast_1d atleast_2d
        atleast_3d select slice narrow split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk
        tensor_split hsplit vsplit dsplit unbind unfold diagonal detach alias unflatten real imag view_as_real
        view_as_complex empty empty_like empty_permuted empty_strided new_empty new_empty_strided""",
}
_FAMILY_OF = {name: kind for kind, names in _FAMILIES.items() for name in names.split()}


def family(op: Operator) -> str:
    """The family that an operator's cost follows.

    ``matmul``, ``attention``, ``conv``, ``norm``, ``softmax``, ``index``, ``sort``, ``random``, ``reduce``, ``copy``,
    ``create``, ``view`` (free) or ``pointwise``, which all others count as. A reshape of what lies in order is a view, and
    so is a dropout that drops nothing.
    """
    name = op.name.rsplit(".", 1)[-1]
    kind = _family_of(name)
    if kind == "copy" and name in ("reshape", "reshape_as", "ravel", "flatten", "contiguous") and _lies_in_order(op):
        return "view"
    if name in ("to", "type_as") and op.inputs and op.outputs and op.inputs[0].dtype == op.outputs[0].dtype:
        return "view"
    if name == "dropout" and op.inputs and (op.argument("train", True) is False or op.argument("p", 0.5) == 0):
        return "view"
    return kind


@cache
def _family_of(name: str) -> str:
    if "attention" in name:
        return "attention"
    if name.startswith(("conv", "_conv")):
        return "conv"
    return _FAMILY_OF.get(name, "pointwise")


def _lies_in_order(op: Operator) -> bool:
    """Whether the first input's elements lie in memory as its dims say."""
    if not op.inputs:
        return False
    expected = 1
    for size, step in zip(reversed(op.inputs[0].shape), reversed(op.inputs[0].stride)):
        if size != 1 and step != expected:
            return False
        expected *= size
    return len(op.inputs[0].shape) == len(op.inputs[0].stride)


# -- operations -----------------------------------------------------------------------------------------------------------


def flops(op: Operator) -> float:
    """Operations of the forward on the whole tensors; a multiplication and an addition are two.

    Causal attention counts half of the pairs of positions. Families that memory bounds count none.

    >>> import torch
    >>> from shardwright.rules.operator import Slot, TensorMeta
    >>> a, b, c = (TensorMeta(shape, torch.float32) for shape in ((8, 16), (4, 16), (8, 4)))
    >>> flops(Operator(torch.ops.aten.linear.default, (Slot(0), Slot(1)), {}, (a, b), (c,)))
    1024.0
    """
    kind = family(op)
    if not op.inputs or not op.outputs:
        return 0.0
    if kind == "matmul":
        return 2.0 * op.outputs[0].numel * _summed(op)
    if kind == "attention":
        query, key, value = (meta.shape for meta in op.inputs[:3])
        pairs = math.prod(query[:-1]) * key[-2] * (0.5 if op.argument("is_causal", False) else 1.0)
        return 2.0 * pairs * (query[-1] + value[-1])
    if kind == "conv":
        # each output value is a product over a filter; a transposed convolution does one for each input value
        values, weight = op.inputs[0].numel if is_transposed(op) else op.outputs[0].numel, op.inputs[1]
        return 2.0 * values * weight.numel / max(1, weight.shape[0])
    return 0.0


def _summed(op: Operator) -> float:
    """The size of the dims that a product sums over."""
    name = op.name.rsplit(".", 1)[-1]
    if name in ("outer", "ger"):
        return 1.0
    if name == "einsum":
        return _summed_by_einsum(op)
    if name == "bilinear":
        return float(op.inputs[0].shape[-1] * op.inputs[1].shape[-1])
    if name == "tensordot":
        return math.sqrt(op.inputs[0].numel * op.inputs[1].numel / max(1, op.outputs[0].numel))
    left = op.inputs[-2 if name in ("addmm", "addmv", "addbmm", "baddbmm") else 0].shape
    return float(math.prod(left[-1:]) * (left[0] if name == "addbmm" else 1))


def _summed_by_einsum(op: Operator) -> float:
    inputs, arrow, output = str(op.argument("equation", "")).replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, meta in zip(inputs.split(","), op.inputs):
        leading, _, trailing = term.partition("...")
        found = [*zip(leading, meta.shape), *zip(reversed(trailing), reversed(meta.shape))]
        for letter, size in found:
            sizes[letter] = max(size, sizes.get(letter, 1))
    if not arrow:  # then the letters that stand there once are the output's
        output = "".join(letter for letter in sizes if inputs.count(letter) == 1)
    return float(math.prod(size for letter, size in sizes.items() if letter not in output))
