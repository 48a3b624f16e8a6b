"""What the tests of rules share: an operator as capture sees it, and which dims its rule allows to split."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import shardwright.rules.tables  # noqa: F401
from shardwright.capture.capture import capture
from shardwright.capture.closure import FunctionModule
from shardwright.ir.graph import Node
from shardwright.ir.signature import Signature, TensorFactors
from shardwright.rules.registry import signature_of


def node_of(function: Callable[..., Any], args: tuple[Any, ...], operator: str | None = None) -> Node:
    """The node of ``operator`` (default: the last one) in what ``function`` does."""
    graph = capture(FunctionModule(function), args, {}, torch.device("cpu"))
    return [n for n in graph.nodes if operator in (None, n.op.name)][-1]


def free_dims(function: Callable[..., Any], *args: Any, operator: str | None = None) -> tuple[str, ...]:
    """The dims that may be split, as digits, of each input and then each output; empty where there is no rule."""
    signature = signature_of(node_of(function, args, operator).op)
    if signature is None:
        return ()
    return tuple(_free(signature, tensor) for tensor in (*signature.inputs, *signature.outputs))


def _free(signature: Signature, tensor: TensorFactors) -> str:
    major = [signature.major(dim) for dim in tensor]
    return "".join(str(i) for i, factor in enumerate(major) if factor and signature.splittable(factor))


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
