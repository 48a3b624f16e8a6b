"""Random operators: in every layout the numbers are, bit for bit, those that the single device draws."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.rules import random_draw
from shardwright.testing.rules import check_rule
from tests.rules.splits import doubles, free_dims, node_of

aten = torch.ops.aten
Function = Callable[[Tensor], Any]

DROPOUTS: dict[str, Function] = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout of most": lambda x: F.dropout(x, 0.9),
    "dropout of all": lambda x: F.dropout(x, 1.0),
    "dropout of none": lambda x: F.dropout(x, 0.0),
    "dropout in evaluation": lambda x: F.dropout(x, 0.3, training=False),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.3, True),
    "native_dropout of all": lambda x: torch.native_dropout(x, 1.0, True),
    "native_dropout in evaluation": lambda x: torch.native_dropout(x, 0.3, False),
    "feature_dropout": lambda x: torch.feature_dropout(x, 0.4, True),
    "rrelu in evaluation": lambda x: F.rrelu(x, training=False),
    "feature_alpha_dropout": lambda x: torch.feature_alpha_dropout(x, 0.4, True),
}

FILLS: dict[str, Function] = {
    "rand": lambda x: torch.rand(5, 4),
    "rand of bfloat16": lambda x: torch.rand(5, 4, dtype=torch.bfloat16),
    "randn": lambda x: torch.randn(5, 7),
    "randn of few": lambda x: torch.randn(3, 2),
    "randint": lambda x: torch.randint(9, (4, 3)),
    "randint from": lambda x: torch.randint(3, 9, (5,)),
    "randperm": lambda x: torch.randperm(7),
    "normal": lambda x: torch.normal(1.0, 2.0, (5, 4)),
    "rand_like": lambda x: torch.rand_like(x),
    "rand_like of another dtype": lambda x: torch.rand_like(x, dtype=torch.float32),
    "randn_like": lambda x: torch.randn_like(x),
    "randint_like": lambda x: torch.randint_like(x, 9),
    "randint_like from": lambda x: torch.randint_like(x, 3, 9),
    "bernoulli": lambda x: torch.bernoulli(x.detach(), 0.3),
    "uniform": lambda x: aten.uniform(x.detach(), -1.0, 2.0),
    "normal_functional": lambda x: aten.normal_functional(x.detach(), 1.0, 2.0),
    "exponential": lambda x: aten.exponential(x.detach(), 2.0),
    "log_normal": lambda x: aten.log_normal(x.detach()),
    "cauchy": lambda x: aten.cauchy(x.detach()),
    "geometric": lambda x: aten.geometric(x.detach(), 0.3),
    "random": lambda x: aten.random(x.detach()),
    "random to": lambda x: aten.random.to(x.detach(), 9),
}

BY_VALUE: dict[str, Function] = {
    "bernoulli": lambda x: torch.bernoulli(x.detach().sigmoid()),
    "multinomial": lambda x: torch.multinomial(x.detach().sigmoid(), 2),
    "poisson": lambda x: torch.poisson(x.detach().exp()),
    "binomial": lambda x: torch.binomial(torch.full_like(x, 9.0), x.detach().sigmoid()),
    "normal of means": lambda x: torch.normal(x, 2.0),
    "normal of deviations": lambda x: torch.normal(1.0, x.exp()),
    "normal of both": lambda x: torch.normal(x, x.exp()),
    "rrelu": lambda x: F.rrelu(x, training=True),
}


def _operator(name: str) -> str:
    return f"aten.{name.split()[0]}"


@pytest.mark.parametrize("name", DROPOUTS)
@pytest.mark.parametrize("shape", [(4, 6), (5, 1), (3, 5, 2)], ids=str)
def test_dropout_is_that_of_the_single_device(name: str, shape: tuple[int, ...]) -> None:
    tried = check_rule(DROPOUTS[name], doubles(*shape), operator=_operator(name), limit=16, tolerance=0)
    assert tried > 4


@pytest.mark.parametrize("name", [*DROPOUTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_rounds_as_the_single_device_does(name: str, dtype: torch.dtype) -> None:
    check_rule(DROPOUTS[name], torch.randn(6, 5, 3).to(dtype), operator=_operator(name), meshes=((3,), (2, 2)), tolerance=0)


ORDERS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: doubles(5, 7).t(),
    "channels last": lambda: doubles(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "cut out": lambda: doubles(9, 8)[::2, 1:],
    "expanded": lambda: doubles(5, 1).expand(5, 6),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["dropout", "alpha_dropout", "native_dropout", "rand_like", "randn_like", "bernoulli"])
def test_the_order_of_draws_is_that_of_the_memory(name: str, order: str) -> None:
    """The single device draws in the order of its memory, which the local pieces do not have."""
    function = {**DROPOUTS, **FILLS}[name]
    x = ORDERS[order]().detach()
    assert node_of(function, (x,), _operator(name)).op.inputs[0].stride == x.stride()
    check_rule(function, x, operator=_operator(name), meshes=((2,), (2, 2)), limit=12, tolerance=0)


@pytest.mark.parametrize("name", FILLS)
def test_numbers_are_those_of_the_single_device(name: str) -> None:
    assert check_rule(FILLS[name], doubles(5, 6), operator=_operator(name), limit=24, tolerance=0) > 2


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.uniform_(),
        lambda x: x.normal_(1.0, 2.0),
        lambda x: x.exponential_(2.0),
        lambda x: x.random_(9),
        lambda x: x.geometric_(0.3),
        lambda x: x.bernoulli_(0.3),
        lambda x: F.dropout(x.fill_(1), 0.3, inplace=True),
    ],
    ids=["uniform_", "normal_", "exponential_", "random_", "geometric_", "bernoulli_", "dropout_"],
)
def test_writes_of_random_numbers(write: Function) -> None:
    """A write fills in the order of the memory it writes to."""
    check_rule(lambda x: write(torch.empty_like(x)), doubles(6, 5).t(), meshes=((2,), (2, 2)), limit=12, tolerance=0)


@pytest.mark.parametrize("name", BY_VALUE)
def test_what_is_drawn_by_value_runs_whole(name: str) -> None:
    assert set("".join(free_dims(BY_VALUE[name], doubles(4, 5), operator=_operator(name)))) == set()


@pytest.mark.parametrize("name", BY_VALUE)
def test_what_is_drawn_by_value_is_that_of_the_single_device(name: str) -> None:
    """Split the operator before it, so that it meets other strides than the single device's."""
    for x in (doubles(4, 5), doubles(5, 4).t()):
        check_rule(lambda x: BY_VALUE[name](x * 2), x, operator="aten.mul", meshes=((2,),), tolerance=0)


def test_several_draws_follow_each_other_as_on_the_single_device() -> None:
    def function(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) + torch.rand_like(x) + F.dropout(x * torch.randn(4, 6), 0.2)

    check_rule(function, doubles(4, 6), operator="aten.dropout", limit=12, tolerance=0)
    check_rule(function, doubles(4, 6), operator="aten.randn", limit=12, tolerance=0)


def test_eager_consumes_as_much_of_the_generator_as_the_pieces() -> None:
    """What follows the call draws the same numbers: ``torch.rand`` after the program equals that after eager."""
    check_rule(lambda x: (F.dropout(x, 0.5), torch.rand(3)), doubles(4, 6), operator="aten.dropout", tolerance=0)


def test_whole_dropout_takes_eager_s_strides_into_account() -> None:
    x = doubles(6, 5).t()
    torch.manual_seed(0)
    expected = F.dropout(x, 0.5)
    for given in (x, x.contiguous()):
        torch.manual_seed(0)
        assert torch.equal(random_draw.whole_dropout(given, x.stride(), 0.5), expected)


def test_a_draw_depends_on_no_rank() -> None:
    """Each rank group of a draw would draw again: its arguments are the global ones only."""
    from shardwright.capture.capture import capture
    from shardwright.capture.closure import FunctionModule
    from shardwright.ir.choice import make_choice
    from shardwright.ir.layout import Layout
    from shardwright.ir.mesh import Mesh
    from shardwright.ir.plan import Plan
    from shardwright.partition.partitioner import partition
    from shardwright.rules.registry import signature_of

    graph = capture(FunctionModule(lambda x: F.dropout(x, 0.5)), (doubles(6, 4),), {}, torch.device("cpu"))
    (node,) = graph.nodes
    mesh = Mesh(("x", "y"), (2, 2))
    signature = signature_of(node.op)
    assert signature is not None
    rows, columns = signature.outputs[0]
    split = {rows[0]: (("x",), None), columns[0]: (("y",), None)}
    choice = make_choice(node.op, signature, mesh, split, [False])
    plan = Plan(graph, mesh, {node.name: choice}, {node.name: signature}, {"args_0": Layout.replicated(mesh, 2)})
    program = partition(graph, plan)
    (draw,) = [i for i in program.instructions if getattr(i, "function", None) is random_draw.dropout_noise]
    assert set(draw.rank_groups) == {0}


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_draws_equal_the_eager_operators(p: float, dtype: torch.dtype) -> None:
    x = torch.randn(40, 30).to(dtype).t()
    given = (x.shape, x.stride(), x.dtype, x.device, p)
    pairs = [
        (lambda: F.dropout(x, p), lambda: random_draw.apply_dropout(x, random_draw.dropout_noise(*given), p)),
        (lambda: F.alpha_dropout(x, p, True), lambda: random_draw.apply_alpha(x, random_draw.alpha_noise(*given), p)),
        (
            lambda: torch.native_dropout(x, p, True)[0],
            lambda: random_draw.apply_native(x, random_draw.native_mask(*given), p),
        ),
    ]
    for eager, ours in pairs:
        torch.manual_seed(1)
        expected, after = eager(), torch.rand(1)
        torch.manual_seed(1)
        assert torch.equal(ours(), expected)
        assert torch.equal(torch.rand(1), after)
