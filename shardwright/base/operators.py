"""Facts about operators by name. They are for floors below the rules, and for code that writes graphs.

Most facts are in ``shardwright/rules``, a row of traits beside each rule. Graphs, captures and parameters lie below
that and may not import it, so what they need and torch does not tell is here:

- the overloads that shardwright itself writes into graphs;
- which results have no gradient;
- how capture makes a write functional, and which operators it refuses or skips;
- the memory order that kernels give their results, where shape functions of torch say another;
- which operators the replay of initialisations and DTensors' random numbers treat on their own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

_aten = torch.ops.aten


def operator_of(overload: Any) -> str:
    """Returns the name of an overload's operator, without its library.

    >>> operator_of(torch.ops.aten.add.Tensor)
    'add'
    """
    return str(overload.overloadpacket.__name__)


def may_draw(function: Any) -> bool:
    """Tells whether an operator may take numbers from a generator, according to torch's tag.

    >>> may_draw(torch.ops.aten.dropout.default), may_draw(torch.relu)
    (True, False)
    """
    return torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())


def is_unsafe_view(function: Any) -> bool:
    """Tells whether an operator's results share memory that nobody else writes to, so that they count as copies.

    >>> is_unsafe_view(torch.ops.aten.unsafe_split.Tensor), is_unsafe_view(torch.ops.aten.split.Tensor)
    (True, False)
    """
    return getattr(function, "__name__", "").lstrip("_").startswith("unsafe_")


def without_library(name: str) -> str:
    """Returns an operator's full name as users know it. Torch's own have no library in it.

    >>> without_library("aten.linear"), without_library("mine.linear")
    ('linear', 'mine.linear')
    """
    return name.removeprefix("aten.")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _packets(names: str) -> frozenset[Any]:
    return frozenset(getattr(_aten, name) for name in names.split())


# -- what shardwright writes into graphs itself ------------------------------------------------------------------------------

ALIAS = _aten.alias.default
CAT = _aten.cat.default
CLONE = _aten.clone.default
DETACH = _aten.detach.default
DIAGONAL_SCATTER = _aten.diagonal_scatter.default
EXPAND = _aten.expand.default
EYE = _aten.eye.m
FULL = _aten.full.default
FULL_LIKE = _aten.full_like.default
LOGICAL_AND = _aten.logical_and.default
MASKED_FILL = _aten.masked_fill.Scalar
MEAN = _aten.mean.dim
NORM_WITH_STATISTICS = _aten._native_batch_norm_legit_functional.default  # returns the moved statistics as its last two results
ONES_LIKE = _aten.ones_like.default
PERMUTE = _aten.permute.default
REPEAT = _aten.repeat.default
RESHAPE = _aten.reshape.default
SELECT = _aten.select.int
SELECT_SCATTER = _aten.select_scatter.default
SLICE = _aten.slice.Tensor
SLICE_SCATTER = _aten.slice_scatter.default
TO_COPY = _aten._to_copy.default  # operators that casts become under autocast
TO_DTYPE = _aten.to.dtype
TRANSPOSE = _aten.transpose.int
VIEW = _aten.view.default
WHERE = _aten.where.self

# -- random numbers ----------------------------------------------------------------------------------------------------------

# Draws of a number per element of one tensor, in the order of its memory, whatever its dims are.
DRAWS_ELEMENTWISE = (_aten.dropout.default, _aten.alpha_dropout.default, _aten.rand_like.default, _aten.randn_like.default)

# -- gradients ---------------------------------------------------------------------------------------------------------------

# Operators whose result has no gradient though its dtype could have one: they only read the shape of a tensor.
_WITHOUT_GRADIENT = _names("""
    detach zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full new_empty
    new_empty_strided uniform normal_functional log_normal cauchy exponential geometric random
""")
# Operators for which it depends on an argument: if that is a number, not a tensor, the result has no gradient.
_WITHOUT_GRADIENT_GIVEN = {"bernoulli": "p"}


def has_gradient(name: str) -> bool:
    """Tells whether a gradient may flow through an operator of torch to its tensors.

    >>> has_gradient("relu"), has_gradient("zeros_like")
    (True, False)
    """
    return name not in _WITHOUT_GRADIENT


def number_without_gradient(name: str) -> str | None:
    """Returns the argument that, passed as a number, makes an operator's result have no gradient."""
    return _WITHOUT_GRADIENT_GIVEN.get(name)


# -- writes in place ---------------------------------------------------------------------------------------------------------

# Operators that change a tensor's shape or strides, and not its values.
_VIEWS_IN_PLACE = _packets("squeeze_ unsqueeze_ t_ transpose_ swapaxes_ swapdims_")
# Writes that have no functional form of their own, or need none.
COPIES, FILLS_DIAGONAL, DETACHES = (_packets(name) for name in ("copy_", "fill_diagonal_", "detach_"))
# Writes of booleans: their result has no gradient, whatever was there. Those without an underscore write to ``out``.
WRITES_TRUTH = _packets("""
    logical_and_ logical_not_ logical_or_ logical_xor_ logical_and logical_not logical_or logical_xor
""")
# Operators that give a tensor other memory, which no graph shows.
CHANGES_MEMORY = _packets("set_ resize_ resize_as_ sparse_resize_")
# Operators that compute nothing: they check what the trace assumed.
CHECKS = _packets("_assert_tensor_metadata _assert_scalar sym_constrain_range _assert_async")
# What programs decide by: these hold as a rule, and what is made of them by these does not.
USUALLY_HOLDS, NEGATES = _packets("all _is_all_true equal allclose isfinite"), _packets("logical_not bitwise_not")
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")  # networks that read packed sequences, too
RENORMALISES_TABLE = _packets("embedding_renorm embedding_renorm_")
LIFTS_COPY = _aten.lift_fresh_copy.default  # not a view of its input, though they share memory in an exported program

# Overloads whose functional form has another default or other types.
OTHER_FORMS: dict[Any, Any] = {_aten.bernoulli_.float: _aten.bernoulli.p}

_KIND_OF_VIEW = {
    name: kind
    for kind, names in {
        "reshaped": "view reshape _unsafe_view squeeze unsqueeze flatten unflatten view_as",
        "same": "alias detach contiguous to lift_fresh clone",
        "two dims swapped": "transpose swapaxes swapdims",
        "last dims swapped": "t numpy_T mT",
        "permuted": "permute",
        "one index": "select",
        "sliced": "slice",
        "narrowed": "narrow",
        "in pieces": "split chunk split_with_sizes tensor_split",
        "in indices": "unbind",
        "diagonal": "diagonal",
    }.items()
    for name in names.split()
}


def kind_of_view(overload: Any) -> str:
    """Returns the kind of view that an operator makes of its input. Empty if no write goes back."""
    return _KIND_OF_VIEW.get(operator_of(overload), "")


def views_in_place(overload: Any) -> bool:
    """Tells whether an in-place operator changes a tensor's shape or strides, and not its values."""
    return overload.overloadpacket in _VIEWS_IN_PLACE


def functional_packets(overload: Any) -> list[Any]:
    """Lists the operators that may compute what a writing one writes, the likeliest first."""
    name = operator_of(overload)
    plain = f"__{name[3:]}" if name.startswith("__i") and name.endswith("__") else name.rstrip("_")
    found = (getattr(_aten, each, None) for each in dict.fromkeys((plain, f"{plain}_functional", f"_{plain}_functional")))
    return [packet for packet in found if packet is not None]


# Operators that move running statistics though their schema does not say so, and the argument that turns it on.
_MOVES_STATISTICS = {"batch_norm": "training", "native_batch_norm": "training", "instance_norm": "use_input_stats"}
STATISTICS = ("running_mean", "running_var")  # the arguments that they write to


def statistics_flag(function: Any) -> str | None:
    """Returns the argument that makes an operator write to running statistics. Its schema does not show it.

    >>> statistics_flag(torch.ops.aten.instance_norm.default), statistics_flag(torch.ops.aten.layer_norm.default)
    ('use_input_stats', None)
    """
    packet = getattr(function, "overloadpacket", None)
    name = operator_of(function) if packet is not None else ""
    return _MOVES_STATISTICS.get(name) if packet is getattr(_aten, name, None) else None


def moves_statistics() -> list[Any]:
    """Returns the operators that may write to running statistics."""
    packets = [getattr(_aten, name) for name in _MOVES_STATISTICS]
    return [getattr(packet, overload) for packet in packets for overload in packet.overloads()]


def has_statistics_of_samples(overload: Any) -> bool:
    """Tells whether each sample has its own statistics, whose mean moves the running ones."""
    return statistics_flag(overload) == "use_input_stats"


# Operators with results that autograd takes for constants, and that formulas of derivatives read: statistics, factors of
# matrices. Third derivatives of them, taken in reverse, miss a part; of a determinant second ones depend on values.
DERIVED_TWICE_AT_MOST = _packets(
    "native_layer_norm native_batch_norm _native_batch_norm_legit _batch_norm_with_update _fused_rms_norm"
)
# Operators that may return an argument itself, the same object.
RETURNS_ARGUMENT = _packets(
    """alpha_dropout atleast_1d atleast_2d atleast_3d broadcast_tensors conj conj_physical contiguous dropout
    feature_alpha_dropout feature_dropout positive real resolve_conj resolve_neg to type_as"""
)
DETERMINANT = _aten._linalg_det.default
FACTORISES = _packets("_linalg_det _linalg_slogdet _linalg_solve_ex linalg_lu_factor_ex linalg_lu")


# -- memory order ------------------------------------------------------------------------------------------------------------

_MEMORY_ORDER = {
    name: order
    for order, names in {
        # new memory in the format that a CPU input suggests: channels last, or else contiguous
        "suggested": """batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional
            _batch_norm_with_update channel_shuffle max_pool1d max_unpool2d""",
        # kernels of two tensors that order dims as a sum does
        "as a sum": """copysign floor_divide heaviside logaddexp logaddexp2 logical_and logical_or logical_xor
            special_xlog1py special_xlogy xlogy div divide""",
        "contiguous": "log_sigmoid",
    }.items()
    for name in names.split()
}


@cache
def memory_order(overload: Any) -> str:
    """Returns the order of a kernel's result in memory where torch's shape function is wrong."""
    return _MEMORY_ORDER.get(operator_of(overload), "")


# -- delayed initialisation and DTensors -------------------------------------------------------------------------------------

# Operators that write every element of their first argument without reading it.
FILLS = _packets("uniform_ normal_ random_ exponential_ geometric_ cauchy_ log_normal_ bernoulli_ zero_ fill_ copy_")
# Operators that read the shape of their first argument, not its values.
READS_SHAPE = _packets("""
    empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_empty_strided new_zeros new_ones
    new_full
""")
# Operators whose results have no defined values: zeros in the replay, so that all ranks agree on them.
EMPTY = _packets("empty empty_strided empty_permuted empty_like new_empty new_empty_strided")
LIFTS = _packets("lift lift_fresh lift_fresh_copy")  # torch.tensor(...) ends in one
READS_NUMBER = _aten._local_scalar_dense.default  # .item(), and the conversions to a number
CHECKS_AND_UNSCALES = _aten._amp_foreach_non_finite_check_and_unscale_.default


# How DTensors run operators. These give a tensor a second name, or ask about it; DTensor itself runs them.
RUN_BY_DTENSOR = _packets("detach detach_ alias is_same_size is_pinned")
# Operators on each element by itself that have no tag for it.
_ON_ELEMENTS = _packets("_to_copy copy copy_ zero zero_ fill fill_ empty_like zeros_like ones_like full_like masked_fill_")
# Operators on lists whose results are no tensors like those in the list.
_REDUCE_LISTS = _names("_foreach_norm _foreach_max _foreach_mm _foreach_powsum")
_STEPS = _names("_fused_adagrad_ _fused_adam_ _fused_adamw_ _fused_sgd_")
AS_NO_VIEW = _aten._unsafe_view.default  # the same memory, as a tensor of its own to autograd
VECTOR_NORM = _aten.linalg_vector_norm.default
LIST_NORM = _aten._foreach_norm.Scalar


@cache
def is_elementwise(overload: Any) -> bool:
    """Tells whether an operator computes each element of its result from those at the same place in its tensors.

    >>> is_elementwise(torch.ops.aten.add.Tensor), is_elementwise(torch.ops.aten.add.out)
    (True, False)
    """
    if may_draw(overload) or torch.Tag.out in overload.tags or overload._schema.overload_name.endswith("out"):
        return False
    if any(str(result.type) != "Tensor" for result in overload._schema.returns):
        return False
    return torch.Tag.pointwise in overload.tags or overload.overloadpacket in _ON_ELEMENTS


@cache
def is_elementwise_on_lists(overload: Any) -> bool:
    """Tells whether an operator takes lists of tensors, and works on the tensors at the same place element by element."""
    name = operator_of(overload)
    if overload._schema.overload_name.endswith("out"):
        return False
    return name in _STEPS or (name.startswith("_foreach_") and name not in _REDUCE_LISTS)
