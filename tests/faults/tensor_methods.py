"""Calls of every method of a tensor with generic arguments, and what the single device says to them."""

from __future__ import annotations

import math
import os

import torch

import shardwright as sw

ROWS, COLUMNS = 7, 5  # no number of ranks divides them

LEFT_OUT = """
    backward register_hook register_post_accumulate_grad_hook retain_grad requires_grad_ detach detach_ share_memory_ is_shared
    cuda ipu xpu mtia hpu cpu pin_memory storage untyped_storage storage_type data_ptr const_data_ptr set_ resize resize_
    resize_as resize_as_ as_subclass module_load reinforce record_stream refine_names rename rename_ align_to align_as names
    has_names new new_tensor type type_as is_set_to to_mkldnn dim_order element_size is_coalesced is_pinned map2_ stft istft
    to_dense dequantize int_repr
"""
OPERATORS = "add radd iadd mul rmul imul sub rsub truediv rtruediv floordiv mod pow rpow neg eq ne lt ge matmul rmatmul getitem"


EACH = 2 if os.environ.get("SHARDWRIGHT_TEST_ALL") == "1" else 1


def arguments():
    """What a method of a tensor may be called with: the first of these that it takes are tried."""
    torch.manual_seed(1)
    other = torch.rand(ROWS, COLUMNS, dtype=torch.float64) + 0.1
    some = torch.tensor([1, 0])
    rows = torch.zeros(2, COLUMNS, dtype=torch.long)
    return [
        (), (other,), (0.5,), (0,), (0, 1), (0.2, 0.7), (other, 0.3), (other > 0.5, 0.5), (other, other), (other > 0.5, other),
        (0, some), (0, some, 2.0), (0, some, other[:2]), (0, rows, other[:2]), (0, rows), (other.T,), (other[0],),
        ((COLUMNS, ROWS),), ((-1,),), (2, 0), (1, 0, 2), (torch.int32,), (3,), (other[:5, :5],), (other[:, 0], other[0]),
        (other[:, :3], other[:3, :]), (other > 0.5,), (torch.tensor([0, 3]),), (torch.tensor([0, 3]), other[0, :2]),
        (0, rows, other[:2], "sum"), (0, some, other[:2], "amax"), ((some, some), other[0, :2]), (other[0], 0, 1),
        ((COLUMNS, 2), (1, COLUMNS)), ((COLUMNS, 2), 0.5), (0, (ROWS, -1)), ((3, ROWS, COLUMNS),),
    ]  # fmt: skip


def copied(arguments):
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


def method_cases():
    """(name, arguments, result, tensor afterwards) of calls that the single device does."""
    torch.manual_seed(2)
    start = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    skipped = ("_", "q_", "is_", "sparse_", "to_sparse")
    named = [n for n in dir(torch.Tensor) if not n.startswith(skipped) and n not in LEFT_OUT.split()]
    found = []
    for name in named + [f"__{n}__" for n in OPERATORS.split()]:
        taken = 0
        for given in arguments():
            tensor, handed = start.clone(), copied(given)
            if taken == EACH or not callable(getattr(torch.Tensor, name)):
                break
            torch.manual_seed(5)
            try:
                result = getattr(tensor, name)(*handed)
            except Exception:  # it takes other arguments
                continue
            found.append((name, given, result, tensor, handed))
            taken += 1
    return start, found


def differs(got, expected):
    """Returns how two results differ; ``""`` if they do not."""
    got, expected = (torch.utils._pytree.tree_leaves(x) for x in (got, expected))
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, torch.Tensor):
            a = sw.full_value(a)
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{a.dtype} {list(a.shape)} for {b.dtype} {list(b.shape)}"
            if not torch.allclose(a, b, rtol=1e-9, atol=1e-11, equal_nan=True):
                return "other values"
        elif isinstance(b, float):
            if not math.isclose(a, b, rel_tol=1e-9):
                return f"{a} for {b}"
        elif not isinstance(b, (int, str, torch.dtype, torch.device)) or a != b:
            return "" if repr(a) == repr(b) else f"{a} for {b}"
    return ""
