"""Normalisations, proved by splitting; batch norm in training also by the running statistics it leaves behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.capture.capture import capture
from shardwright.ir.choice import make_choice
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.plan import Plan
from shardwright.partition.partitioner import partition
from shardwright.rules.registry import signature_of
from shardwright.testing.rules import check_rule
from shardwright.world.simulated.world import SimulatedWorld

Shape = tuple[int, ...]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def scales(*shape: int, count: int) -> tuple[Tensor, ...]:
    return tuple(numbers(*shape) for _ in range(count))


@pytest.mark.parametrize("shape, over", [((4, 6), (6,)), ((5, 3, 2), (2,)), ((2, 5, 3, 2), (3, 2)), ((1, 4), (4,))], ids=str)
@pytest.mark.parametrize("count", [0, 1, 2], ids=["plain", "weight", "weight-and-bias"])
def test_layer_norm(shape: Shape, over: Shape, count: int) -> None:
    check_rule(F.layer_norm, numbers(*shape), over, *scales(*over, count=count), limit=30)


def test_layer_norm_of_a_vector_runs_whole() -> None:
    assert check_rule(F.layer_norm, numbers(4), (4,), needs_rule=False) == 0


def test_native_layer_norm_returns_its_statistics() -> None:
    weight, bias = scales(2, count=2)
    check_rule(lambda x, w, b: torch.native_layer_norm(x, (2,), w, b, 1e-5), numbers(5, 3, 2), weight, bias)


@pytest.mark.parametrize("count", [0, 1], ids=["plain", "weight"])
def test_rms_norm(count: int) -> None:
    check_rule(F.rms_norm, numbers(5, 3, 4), (4,), *scales(4, count=count))
    check_rule(F.rms_norm, numbers(2, 3, 4), (3, 4), *scales(3, 4, count=count))


GROUPED: list[tuple[Shape, int]] = [((4, 6, 3), 3), ((2, 6), 6), ((3, 4, 2, 2), 1), ((1, 8, 2), 4), ((5, 6, 2), 2)]


@pytest.mark.parametrize("shape, groups", GROUPED, ids=str)
@pytest.mark.parametrize("count", [0, 2], ids=["plain", "weight-and-bias"])
def test_group_norm(shape: Shape, groups: int, count: int) -> None:
    check_rule(F.group_norm, numbers(*shape), groups, *scales(shape[1], count=count), limit=30)


@pytest.mark.parametrize("count", [0, 2], ids=["plain", "weight-and-bias"])
def test_instance_norm(count: int) -> None:
    def function(x: Tensor, *scale: Tensor) -> Tensor:
        return F.instance_norm(x, None, None, *scale)

    for shape in ((4, 6, 3), (2, 3, 2, 2), (1, 5, 4)):
        check_rule(function, numbers(*shape), *scales(shape[1], count=count), limit=20)


def test_instance_norm_with_given_statistics() -> None:
    def function(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.instance_norm(x, mean.detach(), var.detach(), use_input_stats=False)

    check_rule(function, numbers(2, 5, 3), numbers(5), torch.rand(5).double() + 1, operator="aten.instance_norm")


@pytest.mark.parametrize("shape", [(4, 6), (5, 3, 2), (2, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("count", [0, 2], ids=["plain", "weight-and-bias"])
def test_batch_norm_with_given_statistics(shape: Shape, count: int) -> None:
    def function(x: Tensor, mean: Tensor, var: Tensor, *scale: Tensor) -> Tensor:
        return F.batch_norm(x, mean.detach(), var.detach(), *scale)

    statistics = numbers(shape[1]), torch.rand(shape[1]).double() + 1
    check_rule(function, numbers(*shape), *statistics, *scales(shape[1], count=count), operator="aten.batch_norm", limit=20)


@pytest.mark.parametrize("shape", [(4, 6), (5, 3, 2), (3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 2], ids=["plain", "weight", "weight-and-bias"])
def test_batch_norm_over_a_split_batch(shape: Shape, count: int) -> None:
    def function(x: Tensor, *scale: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, *scale, training=True)

    check_rule(function, numbers(*shape) + 10, *scales(shape[1], count=count), limit=40, tolerance=1e-9)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_batch_norm_moves_its_running_statistics_as_one_device_does(ranks: int) -> None:
    x, mean, var = numbers(5, 3, 2), numbers(3), torch.rand(3).double()

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", mean.clone())
            self.register_buffer("var", var.clone())

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.mean, self.var, training=True, momentum=0.3)

    graph = capture(Norm(), (x,), {}, torch.device("cpu"))
    (node,) = graph.nodes
    signature, mesh = signature_of(node.op), Mesh(("dp",), (ranks,))
    assert signature is not None
    choice = make_choice(node.op, signature, mesh, {"n": (("dp",), None)}, [False] * 3)
    layouts = {i.value: Layout.replicated(mesh, len(i.meta.shape)) for i in graph.inputs}
    program = partition(graph, Plan(graph, mesh, {node.name: choice}, {node.name: signature}, layouts))
    left_mean, left_var = mean.clone(), var.clone()
    values = {"mean": left_mean, "var": left_var, "0": x}
    (got,), _ = SimulatedWorld(ranks).bind(program)(*[values[str(i.target)] for i in graph.inputs])
    torch.testing.assert_close(got, F.batch_norm(x, mean, var, training=True, momentum=0.3))
    torch.testing.assert_close((left_mean, left_var), (mean, var))
