"""Every pointwise operator, proved by splitting it: even, uneven and empty pieces, broadcasting, casts, constants."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.ir.operator import Operator, Slot, TensorMeta
from shardwright.rules.pointwise import BINARY, TERNARY, UNARY
from shardwright.rules.registry import signature_of
from shardwright.testing.rules import check_rule

aten = torch.ops.aten

OF_INTEGERS = {
    *("__and__", "__lshift__", "__or__", "__rshift__", "__xor__", "bitwise_and", "bitwise_left_shift", "bitwise_not"),
    *("bitwise_or", "bitwise_right_shift", "bitwise_xor", "floor_divide", "heaviside", "isclose"),
}
ABOVE_ONE = {"acosh", "arccosh"}
MORE_ARGUMENTS = {
    "clip": (0.3, 0.6),
    "full_like": (2.5,),
    "threshold": (0.5, 0.1),
}
MEMORY = "empty_like"  # its values are whatever was in memory


def numbers(*shape: int, name: str = "") -> Tensor:
    """Values in which nearly every operator is smooth and defined."""
    if name in OF_INTEGERS:
        return torch.randint(1, 7, shape)
    return torch.rand(shape, dtype=torch.float64) * 0.8 + (1.1 if name in ABOVE_ONE else 0.1)


def short(names: tuple[str, ...]) -> list[str]:
    return [name.removeprefix("aten.") for name in names if name != f"aten.{MEMORY}"]


@pytest.mark.parametrize("name", short(UNARY))
def test_unary(name: str) -> None:
    arguments = MORE_ARGUMENTS.get(name, ())
    function = lambda x: getattr(aten, name)(x, *arguments)  # noqa: E731
    check_rule(function, numbers(5, 1, name=name), operator=f"aten.{name}", meshes=((3,), (2, 2)))


COMPLEX = {"complex": torch.complex, "polar": torch.polar}
BINARY_INPUTS = {
    "fill": lambda: (numbers(5, 3), numbers()),
    "masked_fill": lambda: (numbers(5, 3), numbers(5, 1) > 0.5, 2.5),
}


@pytest.mark.parametrize("name", [name for name in short(BINARY) if name not in COMPLEX])
def test_binary(name: str) -> None:
    inputs = BINARY_INPUTS.get(name, lambda: (numbers(5, 1, name=name), numbers(1, 3, name=name)))()
    check_rule(getattr(aten, name), *inputs, operator=f"aten.{name}", meshes=((3,), (2, 2)))


@pytest.mark.parametrize("name", COMPLEX)
def test_complex(name: str) -> None:
    function = lambda x, y: torch.view_as_real(COMPLEX[name](x, y))  # noqa: E731
    check_rule(function, numbers(5, 3), numbers(1, 3), operator=f"aten.{name}")


SHAPES = [((4, 6), (4, 6)), ((5, 1), (1, 3)), ((2, 3, 5), (5,)), ((2, 1, 3), (4, 3)), ((), (5, 2)), ((1, 1), (1, 1))]


@pytest.mark.parametrize("left, right", SHAPES, ids=str)
def test_broadcasting(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    check_rule(torch.mul, numbers(*left), numbers(*right))


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[object, ...]]]] = {
    "addcdiv": (
        lambda x, a, b: torch.addcdiv(x, a, b, value=0.5),
        lambda: (numbers(5, 3), numbers(1, 3), numbers(5, 1)),
    ),
    "addcmul": (lambda x, a, b: torch.addcmul(x, a, b, value=0.5), lambda: (numbers(5, 3), numbers(3), numbers(5, 1))),
    "clamp": (torch.clamp, lambda: (numbers(5, 3), numbers(3) - 0.2, numbers(5, 1) + 0.1)),
    "clamp_max": (torch.clamp_max, lambda: (numbers(5, 3), numbers(5, 1))),
    "clamp_min": (torch.clamp_min, lambda: (numbers(5, 3), numbers(3))),
    "lerp": (torch.lerp, lambda: (numbers(5, 3), numbers(5, 3), numbers(3))),
    "where": (torch.where, lambda: (numbers(5, 1) > 0.5, numbers(5, 3), numbers(3))),
}


@pytest.mark.parametrize("name", short(TERNARY))
def test_ternary(name: str) -> None:
    function, inputs = CASES[name]
    check_rule(function, *inputs(), operator=f"aten.{name}")


SCALARS: dict[str, Callable[[Tensor], Tensor]] = {
    "aten.add": lambda x: x + 2,
    "aten.clamp": lambda x: x.clamp(max=0.5),
    "aten.div": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "aten.gelu": lambda x: F.gelu(x, approximate="tanh"),
    "aten.ge": lambda x: x >= 0.5,
    "aten.lerp": lambda x: torch.lerp(x, x * x, 0.3),
    "aten.masked_fill": lambda x: x.masked_fill(x > 0.5, -torch.inf),
    "aten.mul": lambda x: 3 * x,
    "aten.pow": lambda x: x**3,
    "aten.rsub": lambda x: torch.rsub(x, 2, alpha=3),
    "aten.to": lambda x: x.to(torch.float32),
    "aten.where": lambda x: torch.where(x > 0.5, x, 0.0),
}


@pytest.mark.parametrize("operator", SCALARS)
def test_with_a_number(operator: str) -> None:
    check_rule(SCALARS[operator], numbers(5, 3), operator=operator)


@pytest.mark.parametrize("shape", [(5, 3), (4,)], ids=str)
def test_type_as(shape: tuple[int, ...]) -> None:
    check_rule(torch.Tensor.type_as, numbers(5, 3), numbers(*shape).float(), operator="aten.type_as")


def test_power_of_a_number() -> None:
    check_rule(lambda x: 2**x, numbers(5, 3), operator="aten.pow")


def test_memory_is_only_laid_out() -> None:
    check_rule(lambda x: torch.empty_like(x) * 0, torch.zeros(5, 3, dtype=torch.int64), operator="aten.empty_like")


@pytest.mark.parametrize("shape", [(4, 6, 2), (5, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["one-slope", "slope-a-channel"])
def test_prelu(shape: tuple[int, ...], shared: bool) -> None:
    check_rule(F.prelu, numbers(*shape) - 0.5, numbers(1 if shared else shape[1]))


def test_prelu_of_a_vector() -> None:
    check_rule(F.prelu, numbers(5) - 0.5, numbers(1))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_glu(dim: int) -> None:
    check_rule(F.glu, numbers(4, 6, 2), dim)


def test_two_inputs_of_one_value() -> None:
    check_rule(lambda x: x * x, numbers(5, 3))


# -- what may run on pending sums ------------------------------------------------------------------------------------


def call(
    target: object,
    *args: object,
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype = torch.float32,
    **kwargs: object,
) -> Operator:
    metas = tuple(TensorMeta(shape, torch.float32) for shape in shapes)
    return Operator(target, args, kwargs, metas, (TensorMeta((4, 4), dtype),))  # type: ignore[arg-type]


def linear(op: Operator) -> list[set[int]]:
    signature = signature_of(op)
    assert signature is not None
    return [set(group) for group in signature.linear]


X, Y = Slot(0), Slot(1)


@pytest.mark.parametrize(
    "op, expected",
    [
        (call(aten.neg.default, X, shapes=((4, 4),)), [{0}]),
        (call(aten.mul.Tensor, X, 2.0, shapes=((4, 4),)), [{0}]),
        (call(aten.div.Tensor, X, 2.0, shapes=((4, 4),)), [{0}]),
        (call(aten.add.Tensor, X, Y, shapes=((4, 4), (4, 4))), [{0, 1}]),
        (call(aten.sub.Tensor, X, Y, shapes=((4, 4), (4, 4))), [{0, 1}]),
        (call(aten.add.Tensor, X, Y, shapes=((4, 4), (4,))), []),
        (call(aten.add.Tensor, X, 2.0, shapes=((4, 4),)), []),
        (call(aten.mul.Tensor, X, Y, shapes=((4, 4), (4, 4))), []),
        (call(aten.div.Tensor_mode, X, 2.0, rounding_mode="floor", shapes=((4, 4),)), []),
        (call(aten.relu.default, X, shapes=((4, 4),)), []),
        (call(aten.to.dtype, X, torch.float32, shapes=((4, 4),)), [{0}]),
        (call(aten.to.dtype, X, torch.bfloat16, shapes=((4, 4),), dtype=torch.bfloat16), []),
        (call(aten.ones_like.default, X, shapes=((4, 4),)), []),
    ],
    ids=lambda value: str(value.target) if isinstance(value, Operator) else None,
)
def test_linear_in(op: Operator, expected: list[set[int]]) -> None:
    assert linear(op) == expected
