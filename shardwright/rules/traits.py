"""Traits: what is known about an operator apart from its rule."""

from __future__ import annotations

from functools import cache

from shardwright.ir.operator import Operator

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
