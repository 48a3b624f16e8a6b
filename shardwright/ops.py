"""Primitive operators: a name, a torch function, and a strategy.

Outside of ``AutoParallel`` a primitive is the plain torch function.

>>> import torch
>>> matmul = MatMul().shard(((2, 4), (4, 1)))
>>> matmul(torch.ones(4, 8), torch.ones(8, 2)).shape
torch.Size([4, 2])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from shardwright.base.user_code import user_line
from shardwright.capture.attributes import check_attribute
from shardwright.capture.session import current_session
from shardwright.errors import ArgumentTypeError, ShardwrightError
from shardwright.ir.marks import Mark


def check_strategies(in_strategy: Any, out_strategy: Any) -> None:
    """Refuses values that cannot be strategies. Counts and layouts are checked against the operator when planning.

    Raises:
        ArgumentTypeError: a strategy of the wrong type.
        ShardwrightError: an output strategy without an input strategy.
    """
    for name, strategy in (("in_strategy", in_strategy), ("out_strategy", out_strategy)):
        if strategy is not None and not isinstance(strategy, tuple):
            raise ArgumentTypeError(
                f"{name} is {strategy!r}, a {type(strategy).__name__}; give a tuple with one entry a tensor, ((2, 4), (4, 1))"
            )
    if in_strategy is None and out_strategy is not None:
        raise ShardwrightError("out_strategy needs an in_strategy: give both")


class Primitive:
    """Base of the primitive operators; see each subclass for its torch function.

    Args:
        settings: keyword arguments of the torch function, fixed for every call.
    """

    function: Callable[..., Any]

    def __init__(self, **settings: Any):
        self.settings = settings
        self.attributes: dict[str, Any] = {}
        self.mark: Mark | None = None

    @property
    def name(self) -> str:
        return type(self).__name__

    def shard(self, in_strategy: Any = None, out_strategy: Any = None) -> Primitive:
        """Gives the operator a strategy.

        Args:
            in_strategy: one entry per tensor input: a tuple of slice counts, one per dim, or a Layout.
            out_strategy: one entry per output, in the same form; for operators that sum, scattering the sum over a dim
                turns the all-reduce into a reduce-scatter.

        Returns:
            The operator itself.
        """
        check_strategies(in_strategy, out_strategy)
        if in_strategy is not None:
            self.mark = Mark(self.name, in_strategy, out_strategy, attributes=self.attributes, source=user_line())
        return self

    def add_prim_attr(self, name: str, value: Any) -> Primitive:
        """Sets an operator attribute, before or after :meth:`shard`.

        Args:
            name: ``"recompute"``, which does what :meth:`recompute` does, ``"enable_nd_tp"``,
                ``"ndtp_reduce_scatter_axis"``, ``"manual_split"``, ``"self_define_shard"`` or ``"skip_redistribution"``; see
                the page on operator attributes.

        Returns:
            The operator itself.

        Raises:
            ShardwrightError: there is no such attribute, it is not supported, or it cannot have this value.

        >>> from shardwright import Layout
        >>> layout = Layout((2, 4), ("x", "y"))
        >>> MatMul().shard((layout("None", ("x", "y")), layout("x", "y"))).add_prim_attr("enable_nd_tp", True)
        MatMul().shard((Layout('None,(x,y) @ x=2,y=4'), Layout('x,y @ x=2,y=4')))
        """
        if name == "recompute":
            return self.recompute(value)
        check_attribute(f"{self.name}.add_prim_attr({name!r}, {value!r}) at {user_line()}", name, value)
        self.attributes = {**self.attributes, name: value}
        mark = self.mark or Mark(self.name, source=user_line())
        self.mark = replace(mark, attributes=self.attributes)
        return self

    def recompute(self, mode: bool = True) -> Primitive:
        """Recomputes the operator's output, and what it saves, in the backward pass.

        Args:
            mode: ``False`` keeps them, also where the operator's module is computed again.

        Returns:
            The operator itself.

        Raises:
            ArgumentTypeError: ``mode`` is no bool.
        """
        if not isinstance(mode, bool):
            raise ArgumentTypeError(f"{self.name}.recompute({mode!r}): give True or False")
        self.attributes = {**self.attributes, "recompute": mode}
        self.mark = replace(self.mark or Mark(self.name, source=user_line()), attributes=self.attributes)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function, settings = type(self).function, {**self.settings, **kwargs}
        now = current_session()
        if now is not None and self.mark is not None:
            return now.run(self.mark, function, args, settings)
        return function(*args, **settings)

    def __repr__(self) -> str:
        strategy = f".shard({self.mark.in_strategy})" if self.mark and self.mark.in_strategy is not None else ""
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.settings.items())}){strategy}"


def _matmul(x: torch.Tensor, w: torch.Tensor, transpose_a: bool = False, transpose_b: bool = False) -> torch.Tensor:
    """Computes a product by one operator, whatever is transposed. So a strategy applies to the operands as passed."""
    if not transpose_a and not transpose_b:
        return torch.matmul(x, w)
    if not transpose_a and w.ndim == 2:
        return F.linear(x, w)
    return torch.einsum(f"...{'km' if transpose_a else 'mk'},...{'nk' if transpose_b else 'kn'}->...mn", x, w)


def _flatten(x: torch.Tensor) -> torch.Tensor:
    return torch.flatten(x, 1)


def _bias_add(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x + bias


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float | None = None) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:] if weight is None else weight.shape, weight, bias, eps)


def _gather(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return F.embedding(indices, table)


def _softmax(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return torch.softmax(x, dim)


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True) -> torch.Tensor:
    return F.dropout(x, p, training)


def _transpose(x: torch.Tensor, perm: tuple[int, ...]) -> torch.Tensor:
    return x.permute(perm)


def _primitive(name: str, function: Callable[..., Any], text: str) -> type[Primitive]:
    return type(name, (Primitive,), {"function": staticmethod(function), "__doc__": text, "__module__": __name__})


MatMul = _primitive("MatMul", _matmul, "``torch.matmul(x, w)``; ``transpose_a``, ``transpose_b``: of ``x.mT``, ``w.mT``.")
BatchMatMul = _primitive("BatchMatMul", _matmul, "As ``MatMul``, with equal leading dims.")
Linear = _primitive("Linear", F.linear, "``F.linear(x, weight, bias=None)``.")
Add = _primitive("Add", torch.add, "``x + y``, broadcasting.")
Sub = _primitive("Sub", torch.sub, "``x - y``, broadcasting.")
Mul = _primitive("Mul", torch.mul, "``x * y``, broadcasting.")
Div = _primitive("Div", torch.div, "``x / y``, broadcasting.")
BiasAdd = _primitive("BiasAdd", _bias_add, "``x + bias``, the bias over the last dim.")
ReLU = _primitive("ReLU", torch.relu, "``torch.relu(x)``.")
GeLU = _primitive("GeLU", F.gelu, "``F.gelu(x)``.")
SiLU = _primitive("SiLU", F.silu, "``F.silu(x)``.")
Sigmoid = _primitive("Sigmoid", torch.sigmoid, "``torch.sigmoid(x)``.")
Tanh = _primitive("Tanh", torch.tanh, "``torch.tanh(x)``.")
Exp = _primitive("Exp", torch.exp, "``torch.exp(x)``.")
Softmax = _primitive("Softmax", _softmax, "``torch.softmax(x, dim=-1)``.")
LayerNorm = _primitive("LayerNorm", _layer_norm, "Layer norm of the dims of ``weight``: ``(x, weight, bias)``.")
RMSNorm = _primitive("RMSNorm", _rms_norm, "RMS norm of the last dim: ``(x, weight)``.")
Flatten = _primitive("Flatten", _flatten, "All dims after the first become one.")
Reshape = _primitive("Reshape", torch.reshape, "``torch.reshape(x, shape)``.")
Transpose = _primitive("Transpose", _transpose, "``x.permute(perm)``.")
Gather = _primitive("Gather", _gather, "Rows of a table: ``(table, indices)``.")
Embedding = _primitive("Embedding", F.embedding, "``F.embedding(indices, table)``.")
Dropout = _primitive("Dropout", _dropout, "``F.dropout(x, p=0.5)``.")
ReduceSum = _primitive("ReduceSum", torch.sum, "``torch.sum(x, dim, keepdim)``.")
ReduceMean = _primitive("ReduceMean", torch.mean, "``torch.mean(x, dim, keepdim)``.")
ReduceMax = _primitive("ReduceMax", torch.amax, "``torch.amax(x, dim, keepdim)``.")
Conv2D = _primitive("Conv2D", F.conv2d, "``F.conv2d(x, weight, bias=None, ...)``.")
MaxPool = _primitive("MaxPool", F.max_pool2d, "``F.max_pool2d(x, kernel_size, ...)``.")
AvgPool = _primitive("AvgPool", F.avg_pool2d, "``F.avg_pool2d(x, kernel_size, ...)``.")
CrossEntropy = _primitive("CrossEntropy", F.cross_entropy, "``F.cross_entropy(logits, target, ...)``.")
Attention = _primitive("Attention", F.scaled_dot_product_attention, "``F.scaled_dot_product_attention(q, k, v, ...)``.")
Concat = _primitive("Concat", lambda tensors, dim=0: torch.cat(tensors, dim), "``torch.cat(tensors, dim)``.")
