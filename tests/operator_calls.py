"""Small calls of torch's operators, their arguments made up from the schemas: for tests that ask torch what operators do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten
SHAPES = ((4, 4), (2, 4, 4), (1, 4, 4, 4), (4,))
MOST = 4  # calls of one operator


class Call(NamedTuple):
    """A call that runs: an overload and its arguments."""

    overload: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        flat = [leaf for a in (*self.args, *self.kwargs.values()) for leaf in (a if isinstance(a, list) else [a])]
        return [leaf for leaf in flat if isinstance(leaf, Tensor)]

    def run(self) -> list[Tensor]:
        result = self.overload(*self.args, **self.kwargs)
        return [r for r in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(r, Tensor)]


@cache
def calls(name: str) -> tuple[Call, ...]:
    """A few calls of an operator that run, of as many of its overloads as possible; none where no made-up arguments suit it."""
    packet = getattr(aten, name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    found = [
        call for overload in overloads if not overload._schema.is_mutable for call in itertools.islice(_running(overload), 2)
    ]
    return tuple([*(Call(overload, args, {}) for overload, *args in _by_hand().get(name, ())), *found][:MOST])


@cache
def _by_hand() -> dict[str, list[tuple[Any, ...]]]:
    """Calls of operators that want arguments which fit together."""

    def x(*shape: int) -> Tensor:
        return torch.linspace(0.1, 0.9, torch.Size(shape).numel()).reshape(shape).requires_grad_()

    def weights(gates: int) -> list[Tensor]:
        return [x(4 * gates, 4), x(4 * gates, 4), x(4 * gates), x(4 * gates)]

    network = (True, 1, 0.0, False, False, False)  # biases, one layer, no dropout, in evaluation, one way, time first
    whole, truth, numbers = x(4, 4), x(4, 4) > 0.5, torch.arange(16).reshape(4, 4)
    pairs, conv, no = x(4, 2), (None, [1, 1], [0, 0], [1, 1]), [0, 0]
    return {
        "_log_softmax": [(aten._log_softmax.default, whole, 1, False)],
        "_softmax": [(aten._softmax.default, whole, 1, False)],
        "addbmm": [(aten.addbmm.default, whole, x(2, 4, 4), x(2, 4, 4))],
        "addmv": [(aten.addmv.default, x(4), whole, x(4))],
        "binary_cross_entropy": [(aten.binary_cross_entropy.default, whole, x(4, 4).detach())],
        **{
            name: [(getattr(aten, name).Tensor, numbers, numbers % 4)]
            for name in ("__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_left_shift")
        },
        **{
            name: [(getattr(aten, name).input, x(3, 2, 4), *states, *network)]
            for name, states in {
                "gru": (x(1, 2, 4), weights(3)),
                "lstm": ([x(1, 2, 4), x(1, 2, 4)], weights(4)),
                "rnn_relu": (x(1, 2, 4), weights(1)),
                "rnn_tanh": (x(1, 2, 4), weights(1)),
            }.items()
        },
        **{
            f"{name}_cell": [(getattr(aten, f"{name}_cell").default, x(2, 4), state, *weights(gates))]
            for name, gates, state in (
                ("gru", 3, x(2, 4)),
                ("lstm", 4, [x(2, 4), x(2, 4)]),
                ("rnn_relu", 1, x(2, 4)),
                ("rnn_tanh", 1, x(2, 4)),
            )
        },
        "bitwise_not": [(aten.bitwise_not.default, numbers)],
        "clamp": [(aten.clamp.default, whole, 0.2, 0.5)],
        "clip": [(aten.clip.default, whole, 0.2, 0.5)],
        "conv3d": [(aten.conv3d.default, x(1, 2, 4, 4, 4), x(3, 2, 2, 2, 2))],
        "conv_transpose1d": [(aten.conv_transpose1d.default, x(1, 2, 4), x(2, 3, 2))],
        "conv_transpose2d": [(aten.conv_transpose2d.input, x(1, 2, 4, 4), x(2, 3, 2, 2))],
        "conv_transpose3d": [(aten.conv_transpose3d.input, x(1, 2, 4, 4, 4), x(2, 3, 2, 2, 2))],
        "convolution": [(aten.convolution.default, x(1, 2, 4, 4), x(3, 2, 2, 2), *conv, False, no, 1)],
        "diagonal_scatter": [(aten.diagonal_scatter.default, whole, x(4))],
        "embedding": [(aten.embedding.default, whole, numbers % 4)],
        "gather": [(aten.gather.default, whole, 0, numbers % 4)],
        "imag": [(aten.imag.default, torch.complex(whole, whole))],
        "kl_div": [(aten.kl_div.default, whole, x(4, 4).detach())],
        "linear": [(aten.linear.default, x(3, 4), whole, x(4))],
        "masked_fill": [(aten.masked_fill.Scalar, whole, truth, 0.5)],
        "mv": [(aten.mv.default, whole, x(4))],
        "one_hot": [(aten.one_hot.default, numbers)],
        "prelu": [(aten.prelu.default, whole, x(1))],
        "real": [(aten.real.default, torch.complex(whole, whole))],
        "select_scatter": [(aten.select_scatter.default, whole, x(4), 0, 1)],
        "slice_scatter": [(aten.slice_scatter.default, whole, x(2, 4), 0, 1, 3)],
        "where": [(aten.where.self, truth, whole, x(4, 4))],
        "view_as_complex": [(aten.view_as_complex.default, pairs)],
        "view_as_real": [(aten.view_as_real.default, torch.view_as_complex(pairs))],
    }


def _running(overload: Any) -> Iterator[Call]:
    for shape, number in itertools.product(SHAPES, (1, 0, 2)):
        try:
            call = _call(overload, shape, number)
            call.run()
        except Exception:  # these arguments do not suit it
            continue
        if call.tensors or not _is_for_numbers(overload):
            yield call


def _is_for_numbers(overload: Any) -> bool:
    """Whether it is one of a script's own overloads, for plain numbers."""
    return not any("Tensor" in str(r.type) for r in overload._schema.returns)


def _call(overload: Any, shape: tuple[int, ...], number: int) -> Call:
    args, kwargs = [], {}
    for argument in overload._schema.arguments:
        value = _value(argument, shape, number, len(args))
        if argument.name == "dtype" and not argument.has_default_value():
            raise ValueError("a number stands for a dtype there")
        if not argument.kwarg_only:
            args.append(value)
        elif not argument.has_default_value():
            kwargs[argument.name] = value
    return Call(overload, tuple(args), kwargs)


def _value(argument: Any, shape: tuple[int, ...], number: int, position: int) -> Any:
    kind, name = str(argument.type), argument.name
    if name in ("index", "indices", "target") and kind in ("Tensor", "List[Tensor]", "List[Optional[Tensor]]"):
        index = torch.ones(shape[:1] if name == "target" else shape, dtype=torch.int64)
        return index if kind == "Tensor" else [index]
    if kind == "Tensor" or (kind == "Optional[Tensor]" and name in ("weight", "bias") and not position):
        made = torch.linspace(0.1, 0.9, torch.Size(shape).numel()).reshape(shape)
        return made.requires_grad_()
    if kind == "List[Tensor]":
        return [torch.ones(shape, requires_grad=True), torch.ones(shape, requires_grad=True)]
    if argument.has_default_value() and name not in ("train", "training"):
        return argument.default_value
    if kind == "List[int]":
        return _sizes(name, shape, number)
    if kind == "int" and not name.startswith(("dim", "start", "offset", "diagonal")):
        number = max(1, number)  # kernels may divide by a count without a look at it
    return {"int": number, "float": 0.5, "bool": True, "number": 0.5, "str": "ij,jk->ik" if name == "equation" else "mean"}.get(
        kind
    )


def _sizes(name: str, shape: tuple[int, ...], number: int) -> list[int]:
    if name in ("size", "shape", "repeats"):
        return list(shape)
    if name == "normalized_shape":
        return [shape[-1]]
    if name == "split_sizes":
        return [2, 2]
    if not name.startswith(("dim", "source", "destination", "shifts")):
        return [2] * max(1, len(shape) - 2)  # of kernels and pictures
    return {0: [0], 1: list(reversed(range(len(shape)))), 2: [1]}[number]
