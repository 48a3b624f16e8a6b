"""Products in two and three dimensions: the single device's numbers, and the bytes of the closed forms.

Per device, for two products of an activation (bs, h) with weights (h, e) and (e, h) on P ranks:

===  =================================================  ==========================
     elements sent, forward (and again backward)        mesh
===  =================================================  ==========================
1-D  2 (P-1) bs h / P                                   P
2-D  2 bs [e (x-1) + h (y-1)] / xy                      x y
3-D  2 [bs e (x-1) + bs h (y-1) + h e (z-1)] / xyz      x y z
===  =================================================  ==========================
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardwright as sw
from harness import main, on_ranks, rank_counts, same_steps, simulated
from shardwright.errors import ShardwrightError, StrategyError
from shardwright.world.current import current_world

MESHES = {  # devices -> meshes of two and of three axes
    4: [(2, 2), (1, 4), (4, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1)],
    6: [(3, 2), (2, 3)],
    8: [(2, 4), (2, 2, 2)],
}


def patterns(sizes):
    """The layout, then activation and weight of the first product and of the second, as users write them."""
    if len(sizes) == 2:
        layout = sw.Layout(sizes, ("x", "y"))
        first = (layout("None", ("x", "y")), layout("x", "y"))
        return layout, first, (layout("None", ("y", "x")), layout("y", "x"))
    layout = sw.Layout(sizes, ("x", "y", "z"))
    first = (layout(("z", "y"), "x"), layout(("x", "z"), "y"))
    return layout, first, (layout(("z", "x"), "y"), layout(("y", "z"), "x"))


class Products(nn.Module):
    """Two products with a ReLU between them, all configured; the loss as nobody configured it."""

    def __init__(self, sizes, h=24, e=48, nd=True):
        super().__init__()
        _, first, second = patterns(sizes)
        self.matmul1, self.matmul2 = sw.ops.MatMul().shard(first), sw.ops.MatMul()
        self.matmul1.add_prim_attr("enable_nd_tp", nd)
        self.matmul2.add_prim_attr("enable_nd_tp", nd).shard(second)
        self.relu = sw.ops.ReLU().shard((second[0],))
        self.w1 = nn.Parameter(torch.randn(h, e, dtype=torch.float64) / h**0.5)
        self.w2 = nn.Parameter(torch.randn(e, h, dtype=torch.float64) / e**0.5)

    def forward(self, x, target=None):
        y = self.matmul2(self.relu(self.matmul1(x, self.w1)), self.w2)
        return y if target is None else F.mse_loss(y, target)


class Layers(nn.Module):
    """The same of ``nn.Linear``, with biases, and more of them."""

    def __init__(self, h=24, e=48, layers=4):
        super().__init__()
        sizes = [h, e] * (layers // 2) + [h]
        self.layers = nn.ModuleList(nn.Linear(i, o, dtype=torch.float64) for i, o in pairwise(sizes))

    def forward(self, x, target):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.mse_loss(x, target)


def transposed(layout, weight):
    """The layout of a weight that is stored as (out, in)."""
    return type(layout).of(weight.mesh, weight.bound[::-1])


def by_name(model, sizes):
    layout, first, second = patterns(sizes)
    told = {}
    for number in range(len(model.layers)):
        act, weight = (first, second)[number % 2]
        told[f"layers.{number}"] = {"in_strategy": (act, transposed(layout, weight)), "attributes": {"enable_nd_tp": True}}
    return sw.AutoParallel(model, "sharding_propagation").shard(told)


def batches(rows, h, count=2):
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(2, rows, h, dtype=torch.float64, generator=generator).unbind()) for _ in range(count)]


def meshes():
    return MESHES[current_world().size]


def one_of_each_kind():
    """The first mesh of two axes and the first of three."""
    return {len(sizes): sizes for sizes in reversed(meshes())}.values()


def products():
    for sizes in meshes():
        same_steps(Products(sizes), batches(24, 24), sw.AutoParallel)


def products_of_uneven_sizes():
    for sizes in meshes():
        same_steps(Products(sizes, 7, 10), batches(9, 7), sw.AutoParallel)


def linear_modules_with_biases():
    for sizes in meshes():
        same_steps(Layers(), batches(24, 24), lambda model, sizes=sizes: by_name(model, sizes))


def linear_modules_of_uneven_sizes():
    for sizes in one_of_each_kind():
        same_steps(Layers(5, 11), batches(7, 5), lambda model, sizes=sizes: by_name(model, sizes))


def a_frozen_weight():
    for sizes in one_of_each_kind():
        model = Products(sizes)
        model.w1.requires_grad_(False)
        same_steps(model, batches(24, 24), sw.AutoParallel)


def computed_again():
    for sizes in one_of_each_kind():
        same_steps(Layers(), batches(24, 24), lambda model, sizes=sizes: by_name(model, sizes).recompute("layers.*"))


def two_copies_of_the_batch():
    for sizes in one_of_each_kind():
        same_steps(sw.MicroBatchInterleaved(Products(sizes)), batches(24, 24), sw.AutoParallel)


def parts_of_the_batch_one_after_the_other():
    for sizes in one_of_each_kind():
        same_steps(sw.GradAccumulation(Products(sizes), 2), batches(24, 24), sw.AutoParallel)


def optimizer_parallel():
    for sizes in one_of_each_kind():
        same_steps(Layers(), batches(24, 24), lambda model, sizes=sizes: by_name(model, sizes).hsdp(threshold=0))


PROGRAMS = (
    computed_again,
    two_copies_of_the_batch,
    parts_of_the_batch_one_after_the_other,
    optimizer_parallel,
    products,
    products_of_uneven_sizes,
    linear_modules_with_biases,
    linear_modules_of_uneven_sizes,
    a_frozen_weight,
)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("devices", MESHES)
def test_simulated(program, devices):
    simulated(program, devices)


@pytest.mark.long
def test_on_real_ranks():
    on_ranks(__file__, 4, PROGRAMS)


# -- bytes --------------------------------------------------------------------------------------------------------------


def closed_form(sizes, bs, h, e):
    """Elements that a device sends for the two products."""
    x, y, z = (*sizes, 1)[:3]
    weights = h * e * (z - 1) if len(sizes) == 3 else 0
    return 2 * (bs * e * (x - 1) + bs * h * (y - 1) + weights) // math.prod(sizes)


def recorded(sizes, bs=48, h=24, e=96, nd=True):
    sw.init(devices=math.prod(sizes))
    torch.manual_seed(0)
    model = Products(sizes, h, e, nd)
    net = sw.AutoParallel(model)
    x = torch.randn(bs, h, dtype=torch.float64, requires_grad=True)
    with sw.record_communication() as log:
        net(x).sum().backward()
    return net, log


@pytest.mark.parametrize("sizes", [(2, 2), (2, 4), (1, 4), (3, 2), (4, 4), (2, 2, 2), (1, 2, 3), (4, 2, 3)])
def test_bytes_are_those_of_the_closed_form(sizes):
    bs, h, e = 48, 24, 96
    _, log = recorded(sizes, bs, h, e)
    for phase in ("forward", "backward"):
        events = [event for event in log.events if event.phase == phase and event.cause in ("matmul", "matmul1")]
        assert {event.kind for event in events} == {"all_gather", "reduce_scatter"}
        assert sum(event.bytes for event in events) == 8 * closed_form(sizes, bs, h, e)


@pytest.mark.parametrize("sizes", [(2, 4), (2, 2, 2)])
def test_nothing_else_moves_before_the_result_is_made_whole(sizes):
    _, log = recorded(sizes)
    others = {event.edge for event in log.events if event.phase == "forward" and event.cause not in ("matmul", "matmul1")}
    assert len(others) == 1
    assert others.pop().endswith("-> output")


def test_gathers_and_scatters_change_places_backward():
    _, log = recorded((2, 2, 2))
    seen = {(event.phase, event.kind, event.axes, event.shape) for event in log.events if event.cause == "matmul"}
    x, w, y = (48, 24), (24, 96), (48, 96)
    assert seen == {
        ("forward", "all_gather", ("y",), x),
        ("forward", "all_gather", ("z",), w),
        ("forward", "reduce_scatter", ("x",), y),
        ("backward", "reduce_scatter", ("y",), x),
        ("backward", "reduce_scatter", ("z",), w),
        ("backward", "all_gather", ("x",), y),
    }


@pytest.mark.parametrize("sizes", [(2, 4), (3, 2), (2, 2, 2)])
def test_a_rank_holds_its_share_of_the_parameters(sizes):
    net, _ = recorded(sizes)
    ranks = math.prod(sizes)
    for i in net.plan.graph.inputs:
        if i.kind == "parameter":
            layout = net.plan.input_layouts[i.value]
            held = [math.prod(layout.local_shape(i.meta.shape, rank)) for rank in range(ranks)]
            assert set(held) == {i.meta.numel // ranks}


@pytest.mark.parametrize("ranks", rank_counts(4, more=(2, 8)))
def test_the_one_dimensional_form(ranks):
    """Columns, then rows: one all-reduce, 2 (P-1) bs h / P."""
    sw.init(devices=ranks)
    bs, h, e = 16, 24, 32
    first = sw.ops.MatMul().shard(((1, 1), (1, ranks)))
    relu, second = sw.ops.ReLU().shard(((1, ranks),)), sw.ops.MatMul().shard(((1, ranks), (ranks, 1)))
    w1, w2 = nn.Parameter(torch.randn(h, e)), nn.Parameter(torch.randn(e, h))
    with sw.record_communication() as log:
        sw.AutoParallel(lambda x: second(relu(first(x, w1)), w2))(torch.randn(bs, h))
    assert [(event.kind, event.bytes) for event in log.events] == [("all_reduce", 4 * 2 * (ranks - 1) * bs * h // ranks)]


def test_the_shapes_of_the_tutorial():
    sw.init(devices=8)
    model = Products((2, 4), 256, 512)
    net = sw.AutoParallel(model).compile(torch.ones(1024, 256, dtype=torch.float64))
    plan = net.plan
    made = [node.outputs[0] for node in plan.graph.nodes]
    at_rest, mid, relu, again, out = (plan.program.places[value] for value in made)
    layouts, shapes = plan.program.layouts, [(1024, 256), (1024, 512), (1024, 512), (1024, 512), (1024, 256)]
    held = [layouts[p].local_shape(s, 0) for p, s in zip((at_rest, mid, relu, again, out), shapes)]
    assert held == [(1024, 32), (1024, 64), (1024, 64), (1024, 64), (1024, 32)]
    weights = {
        i.target: plan.input_layouts[i.value].local_shape(i.meta.shape, 0) for i in plan.graph.inputs if i.kind != "input"
    }
    assert weights == {"w1": (128, 128), "w2": (128, 128)}
    assert layouts[mid].short() == layouts[relu].short() == layouts[again].short() == "None,y>x"
    assert layouts[out].short() == "None,(x,y)"


@pytest.mark.parametrize("sizes", [(2, 4), (3, 2), (2, 2, 2)])
def test_without_the_attribute_sums_are_all_reduced(sizes):
    sw.init(devices=math.prod(sizes))
    x = torch.randn(24, 24, dtype=torch.float64)
    layout, first, _ = patterns(sizes)
    act = layout("None", "x") if len(sizes) == 2 else layout("z", "x")
    outputs = []
    w = torch.randn(24, 48, dtype=torch.float64)
    for matmul in (
        sw.ops.MatMul().shard(first).add_prim_attr("enable_nd_tp", True),
        sw.ops.MatMul().shard((act, layout("x", "y"))),
    ):
        with sw.record_communication() as log:
            outputs.append(sw.AutoParallel(matmul)(x, w))
    assert log.count("all_reduce") == 1
    assert not log.count("reduce_scatter")
    for output in outputs:
        torch.testing.assert_close(output, x @ w)


# -- forms --------------------------------------------------------------------------------------------------------------


def check(operator, *operands):
    """A marked function computes what it does on one device, and so do the gradients of all its operands."""
    operands = nn.ParameterList(operands)
    report = sw.verify(lambda: operator(*operands))
    assert str(report) == f"matches single device: 1 outputs, {len(operands)} gradients", report


FORMS = {  # transpose_a, transpose_b, leading dims
    "plain": (False, False, ()),
    "transpose_b": (False, True, ()),
    "transpose_a": (True, False, ()),
    "both": (True, True, ()),
    "batch": (False, False, (3,)),
    "batch, transpose_b": (False, True, (3,)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(2, 2), (2, 2, 2)])
def test_transposed_and_batched_products(form, sizes):
    sw.init(devices=math.prod(sizes))
    a, b, batch = FORMS[form]
    _, (act, weight), _ = patterns(sizes)
    lead = ((),) * len(batch)
    act = sw.Layout.of(act.mesh, (*lead, *(act.bound[::-1] if a else act.bound)))
    weight = sw.Layout.of(weight.mesh, (*lead, *(weight.bound[::-1] if b else weight.bound)))
    matmul = sw.ops.BatchMatMul(transpose_a=a, transpose_b=b).shard((act, weight)).add_prim_attr("enable_nd_tp", True)
    x = torch.randn(*batch, *((6, 10) if a else (10, 6)), dtype=torch.float64, requires_grad=True)
    w = torch.randn(*batch, *((8, 6) if b else (6, 8)), dtype=torch.float64, requires_grad=True)
    check(matmul, x, w)
    with sw.record_communication() as log:
        sw.AutoParallel(matmul)(x, w)
    kinds = [event.kind for event in log.events if not event.edge.endswith("-> output")]
    assert kinds == ["all_gather"] * (len(sizes) - 1) + ["reduce_scatter"]


def test_a_linear_primitive_with_a_bias():
    sw.init(devices=4)
    layout = sw.Layout((2, 2), ("x", "y"))
    linear = sw.ops.Linear().add_prim_attr("enable_nd_tp", True)
    linear.shard((layout("None", "None", ("x", "y")), layout("y", "x"), layout(("y", "x"))))
    x, w, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (8, 6), (8,)))
    check(linear, x, w, b)


def test_a_function():
    sw.init(devices=8)
    _, (act, weight), _ = patterns((2, 4))
    weight = sw.Layout.of(weight.mesh, weight.bound[::-1])
    product = sw.shard(lambda x, w: torch.relu(x @ w.t()), (act, weight), attributes={"enable_nd_tp": True})
    x, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((8, 16), (32, 16)))
    check(product, x, w)
    with sw.record_communication() as log:
        sw.AutoParallel(product)(x, w)
    assert log.count("reduce_scatter") == 1


def test_modules_whose_weights_are_not_given_follow_each_other():
    """The order of the activation's axes says which of them the weight has; a second layer goes on from the first."""
    sw.init(devices=8)
    layout = sw.Layout((2, 4), ("x", "y"))
    model = Layers(layers=2)
    act = {"in_strategy": (layout("None", ("x", "y")),), "attributes": {"enable_nd_tp": True}}
    net = sw.AutoParallel(model, "sharding_propagation").shard({"layers.*": act})
    x, target = batches(24, 24)[0]
    expected = model(x, target)
    torch.testing.assert_close(net(x, target), expected)
    stored = {str(i.target): net.plan.input_layouts[i.value].short() for i in net.plan.graph.inputs if i.kind == "parameter"}
    assert stored["layers.0.weight"] == "y,x"
    assert stored["layers.1.weight"] == "x,y"


def test_readers_of_one_activation_share_its_gather():
    sw.init(devices=4)
    _, first, _ = patterns((2, 2))
    q, k, v = (sw.ops.MatMul().shard(first).add_prim_attr("enable_nd_tp", True) for _ in range(3))
    weights = [nn.Parameter(torch.randn(8, 8)) for _ in range(3)]
    net = sw.AutoParallel(lambda x: q(x, weights[0]) + k(x, weights[1]) + v(x, weights[2]))
    with sw.record_communication() as log:
        net(torch.randn(8, 8))
    assert sum(event.kind == "all_gather" and event.shape == (8, 8) and "at_rest" in event.edge for event in log.events) == 1


def test_more_axes_than_the_pattern_needs():
    """The batch over another axis, and axes of the product that are two each."""
    sw.init(devices=8)
    layout = sw.Layout((2, 2, 2), ("dp", "x", "y"))
    matmul = sw.ops.MatMul().add_prim_attr("enable_nd_tp", True)
    x, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((8, 12), (12, 20)))
    check(matmul.shard((layout("dp", ("x", "y")), layout("x", "y"))), x, w)
    wide = sw.ops.MatMul().add_prim_attr("enable_nd_tp", True)
    check(wide.shard((layout("None", ("dp", "x", "y")), layout(("dp", "x"), "y"))), x, w)


def test_the_sum_may_be_scattered_over_another_dim():
    sw.init(devices=4)
    layout, first, _ = patterns((2, 2))
    matmul = sw.ops.MatMul().shard(first).add_prim_attr("enable_nd_tp", True).add_prim_attr("ndtp_reduce_scatter_axis", 0)
    x, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((8, 12), (12, 20)))
    check(matmul, x, w)
    net = sw.AutoParallel(matmul).compile(x, w)
    assert next(c for name, c in net.plan.choices.items() if name == "matmul").outputs[0] == layout("x", "y")


@pytest.mark.parametrize("mode", ["semi_auto", "sharding_propagation", "dynamic_programming", "recursive_programming", "auto"])
def test_in_every_mode(mode):
    sw.init(devices=8)
    model = Products((2, 4), 32, 64)
    x, target = batches(16, 32)[0]
    expected = model(x, target)
    net = sw.AutoParallel(model, mode)
    with sw.record_communication() as log:
        torch.testing.assert_close(net(x, target), expected)
    assert log.count("reduce_scatter") >= 2


def test_a_plan_file_says_all_of_it(tmp_path):
    sw.init(devices=8)
    model = Products((2, 2, 2))
    x, target = batches(24, 24)[0]
    net = sw.AutoParallel(model)
    expected = net(x, target)
    net.plan.save(tmp_path / "plan.toml")
    again = sw.AutoParallel(model).load_strategies(tmp_path / "plan.toml")
    torch.testing.assert_close(again(x, target), expected)
    assert not net.plan.diff(again.plan)


def test_planning_for_devices_one_does_not_have():
    model = Products((4, 8)).to("meta")
    plan = sw.plan_for(32, model, torch.empty(64, 24, device="meta", dtype=torch.float64), mode="semi_auto")
    assert "y>x" in str(plan)


@pytest.mark.parametrize("sizes", [(2, 4), (2, 2, 2)])
def test_the_price_is_of_what_runs(sizes):
    """Bytes of every redistribution and of every operator's sums are those recorded."""
    net, log = recorded(sizes)
    price = net.plan.price
    assert {(c.kind, len(c.axes)) for m in price.moves_to("matmul") for c in m.forward} == {("all_gather", 1)}
    assert price.bytes == sum(e.bytes for e in log.events)
    assert "reduce_scatter(x)" in str(net.plan.explain("matmul"))
    assert "exchange" not in str(net.plan.explain("matmul"))


# -- errors -------------------------------------------------------------------------------------------------------------

L2 = sw.Layout((2, 4), ("x", "y"))
L3 = sw.Layout((2, 2, 2), ("x", "y", "z"))
REFUSED = {
    "slice counts": ((((1, 8), (8, 1))), "needs a Layout"),
    "no pattern": ((L2("x", "None"), L2("None", "y")), 'activation ("None", ("x", "y")), weight ("x", "y")'),
    "no pattern of three": ((L3("y", "x"), L3(("x", "z"), "y")), 'activation (("z", "y"), "x"), weight (("x", "z"), "y")'),
    "the wrong order": ((L2("None", "y>x"), L2("x", "y")), "write 'x>y' or a tuple"),
    "other devices": ((sw.Layout((2, 2), ("x", "y"))("None", ("x", "y")), L2("x", "y")), "over 4 devices"),
    "two layouts": ((sw.Layout((4, 2), ("x", "y"))("None", ("x", "y")), L2("x", "y")), "use one Layout for both"),
    "an unbound Layout": ((L2, L2("x", "y")), "has no dims"),
    "too few dims": ((L2(("x", "y")), L2("x", "y")), "has 1 dims, the tensor 2"),
}


def message(operator, *shapes):
    with pytest.raises(ShardwrightError) as caught:
        sw.AutoParallel(operator)(*(torch.randn(shape) for shape in shapes))
    return str(caught.value)


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_layouts_are_refused(case):
    sw.init(devices=8)
    strategy, expected = REFUSED[case]
    matmul = sw.ops.MatMul().shard(strategy).add_prim_attr("enable_nd_tp", True)
    text = message(matmul, (8, 8), (8, 8))
    assert expected in text
    assert "MatMul (aten.matmul)" in text
    assert "test_nd_tensor_parallel.py:" in text


def test_the_expected_pattern_has_the_operators_dims():
    sw.init(devices=8)
    linear = sw.ops.Linear().shard((L2("None", "x"), L2("x", "y"))).add_prim_attr("enable_nd_tp", True)
    text = message(linear, (8, 8), (8, 8))
    assert 'weight ("y", "x")' in text
    assert 'weight ("y", ("x", "z"))' in text


def test_what_is_no_product_is_refused():
    sw.init(devices=8)
    relu = sw.ops.ReLU().shard((L2("x", "y"),)).add_prim_attr("enable_nd_tp", True)
    assert "for products of a matrix by a matrix" in message(relu, (8, 8))
    model = nn.Sequential(nn.ReLU())
    net = sw.AutoParallel(model).shard({"0": {"in_strategy": (L2("x", "y"),), "attributes": {"enable_nd_tp": True}}})
    with pytest.raises(StrategyError, match="has no matrix product"):
        net(torch.randn(8, 8))


def test_what_is_said_of_the_result_has_to_be_the_patterns():
    sw.init(devices=8)
    first = (L2("None", ("x", "y")), L2("x", "y"))
    fine = sw.ops.MatMul().shard(first, (L2("None", ("y", "x")),)).add_prim_attr("enable_nd_tp", True)
    sw.AutoParallel(fine)(torch.randn(8, 8), torch.randn(8, 8))
    wrong = sw.ops.MatMul().shard(first, (L2("x", "y"),)).add_prim_attr("enable_nd_tp", True)
    assert "comes as None,y>x" in message(wrong, (8, 8), (8, 8))


def test_a_dim_that_does_not_exist():
    sw.init(devices=8)
    matmul = sw.ops.MatMul().shard((L2("None", ("x", "y")), L2("x", "y"))).add_prim_attr("enable_nd_tp", True)
    matmul.add_prim_attr("ndtp_reduce_scatter_axis", 2)
    assert "ndtp_reduce_scatter_axis is 2, but the result has 2 dims" in message(matmul, (8, 8), (8, 8))


if __name__ == "__main__":
    main(PROGRAMS)
