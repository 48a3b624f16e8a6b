"""Operator attributes: tables cut by hand, layouts of one's own, reshapes that stay where they are, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardwright as sw
from harness import main, on_ranks, rank_counts, same_steps, simulated
from shardwright.capture.attributes import ATTRIBUTES, REFUSED
from shardwright.errors import ArgumentTypeError, ShardwrightError, StrategyError
from shardwright.world.current import current_world

ROWS = {2: (10, 54), 4: (10, 20, 30, 4)}


class Fields(nn.Module):
    """A table of fields of 10, 20, 30 and 4 rows (of 10 and 54 on two ranks), one column of indices a field."""

    def __init__(self, rows, strategy, width=6):
        super().__init__()
        self.gather = sw.ops.Gather().shard(strategy).add_prim_attr("manual_split", rows)
        self.table = nn.Parameter(torch.randn(64, width, dtype=torch.float64))
        self.head = nn.Linear(width * len(rows), 3, dtype=torch.float64)

    def forward(self, indices, labels):
        return F.cross_entropy(self.head(self.gather(self.table, indices).flatten(1)), labels)


def indices_of(rows, batch, seed=0):
    """Column k reads the rows of slice k."""
    generator = torch.Generator().manual_seed(seed)
    first = [sum(rows[:k]) for k in range(len(rows))]
    return torch.stack([torch.randint(a, a + n, (batch,), generator=generator) for a, n in zip(first, rows)], 1)


def batches(rows, batch=12):
    labels = torch.arange(batch) % 3
    return [(indices_of(rows, batch, seed), labels) for seed in range(2)]


def a_table_cut_by_fields():
    n = current_world().size
    same_steps(Fields(ROWS[n], ((n, 1), (1, n))), batches(ROWS[n]), sw.AutoParallel)


def a_table_cut_by_rows_alone():
    n = current_world().size
    same_steps(Fields(ROWS[n], ((n, 1), (1, 1))), batches(ROWS[n]), sw.AutoParallel)


def an_operator_in_layouts_of_its_own():
    n = current_world().size
    model = Scattered(n)
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randint(0, 5, (3,), generator=generator), torch.randn(3, 8, dtype=torch.float64)) for _ in range(2)]
    same_steps(model, data, sw.AutoParallel)


class Scattered(nn.Module):
    """Rows written into a parameter; every column by itself."""

    def __init__(self, devices):
        super().__init__()
        layout = sw.Layout((devices,), ("mp",))
        update = Update().shard((layout("None", "mp"), layout("None"), layout("None", "mp")), (layout("None", "mp"),))
        self.update = update.add_prim_attr("self_define_shard", True)
        self.x = nn.Parameter(torch.randn(5, 8, dtype=torch.float64))

    def forward(self, rows, values):
        return (self.update(self.x, rows, values) ** 2).sum()


class Update(sw.ops.Primitive):
    function = staticmethod(lambda x, rows, values: torch.index_copy(x, 0, rows, values))


PROGRAMS = (a_table_cut_by_fields, a_table_cut_by_rows_alone, an_operator_in_layouts_of_its_own)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("devices", rank_counts(4, more=(2,)))
def test_simulated(program, devices):
    simulated(program, devices)


@pytest.mark.parametrize("ranks", rank_counts(2, more=(4,)))
def test_on_real_ranks(ranks):
    on_ranks(__file__, ranks, PROGRAMS)


# -- manual_split -------------------------------------------------------------------------------------------------------


def looked_up(strategy, rows, indices, devices=4, **settings):
    sw.init(devices=devices)
    table = nn.Parameter(torch.randn(64, 6, dtype=torch.float64))
    gather = sw.ops.Gather(**settings).shard(strategy).add_prim_attr("manual_split", rows)
    net = sw.AutoParallel(lambda i: gather(table, i))
    with sw.record_communication() as log:
        out = net(indices)
        out.sum().backward()
    torch.testing.assert_close(out, F.embedding(indices, table))
    expected = torch.zeros_like(table).index_add_(0, indices.flatten(), torch.ones(indices.numel(), 6, dtype=torch.float64))
    torch.testing.assert_close(table.grad, expected)
    return net, log


def test_fields_read_their_own_rows_without_communication():
    net, log = looked_up(((4, 1), (1, 4)), (10, 20, 30, 4), indices_of((10, 20, 30, 4), 8))
    assert [(e.phase, e.kind, e.edge.endswith("-> output")) for e in log.events] == [("forward", "all_gather", True)]
    assert next(iter(net.plan.price.operators.values())).collectives == 0
    layout = next(net.plan.input_layouts[i.value] for i in net.plan.graph.inputs if i.kind == "parameter")
    assert [layout.local_shape((64, 6), rank)[0] for rank in range(4)] == [10, 20, 30, 4]


def test_rows_alone_are_summed_once_and_any_index_may_read_any_row():
    indices = torch.randint(0, 64, (8, 4), generator=torch.Generator().manual_seed(0))
    _, log = looked_up(((4, 1), (1, 1)), (10, 20, 30, 4), indices)
    assert [e.kind for e in log.events if e.phase == "forward"] == ["all_reduce"]


def test_fields_beside_a_split_batch_and_split_columns():
    rows = (20, 44)
    _, log = looked_up(((2, 2), (2, 2)), rows, indices_of(rows, 8), devices=8)
    assert {(e.kind, e.axes) for e in log.events if e.phase == "backward"} == {("all_reduce", ("batch0",))}


def test_fields_by_layouts():
    layout, rows = sw.Layout((2, 2), ("dp", "mp")), (20, 44)
    looked_up((layout("mp", "None"), layout("dp", "mp")), rows, indices_of(rows, 8))


def test_an_embedding_module_by_name():
    sw.init(devices=4)
    model = nn.Sequential(nn.Embedding(64, 6, dtype=torch.float64))
    layout, rows = sw.Layout((4,), ("mp",)), (10, 20, 30, 4)
    net = sw.AutoParallel(model).shard({"0": {"in_strategy": (layout("None", "mp"),), "attributes": {"manual_split": rows}}})
    indices = indices_of(rows, 8)
    expected = model(indices)
    with sw.record_communication() as log:
        torch.testing.assert_close(net(indices), expected)
    assert log.count() == 1


def test_an_index_into_another_slice_is_an_error():
    with pytest.raises(ShardwrightError, match="these fields read rows 10 to 29, but the indices have"):
        looked_up(((4, 1), (1, 4)), (10, 20, 30, 4), torch.zeros(8, 4, dtype=torch.long))


def refused(attribute, value, strategy, operator=None, inputs=None, devices=4):
    sw.init(devices=devices)
    operator = operator or sw.ops.Gather()
    operator.shard(*strategy).add_prim_attr(attribute, value)
    inputs = inputs or (torch.randn(64, 6), torch.zeros(8, 4, dtype=torch.long))
    with pytest.raises(StrategyError) as caught:
        sw.AutoParallel(operator)(*inputs)
    assert "test_operator_attributes.py:" in str(caught.value)
    return str(caught.value)


UNFIT = {
    "sum": ((10, 20, 30, 5), ((4, 1), (1, 4)), "has 65 rows in all, but the table has 64"),
    "count": ((32, 32), ((4, 1), (1, 4)), "has 2 slices, but the strategy cuts the rows into 4"),
    "indices": ((10, 20, 30, 4), ((4, 1), (1, 2)), "cut it into 4, or into 1"),
    "devices": ((10, 20, 34), ((3, 1), (1, 3)), "needs 3 devices, which does not divide 4"),
    "dims": ((10, 20, 30, 4), ((4, 1), (4,)), "give one positive count a dim"),
    "no strategy": ((10, 20, 30, 4), (), "the table has no strategy"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_splits_that_do_not_fit(case):
    rows, strategy, expected = UNFIT[case]
    text = refused("manual_split", rows, (strategy,) if strategy else ())
    assert expected in text
    assert "Gather (aten.embedding)" in text


def test_a_split_of_something_else():
    text = refused("manual_split", (1, 3), (((4, 1),),), sw.ops.ReLU(), (torch.randn(4, 4),))
    assert "for plain lookups of rows" in text


@pytest.mark.parametrize("value", [(10, 0), (10, -1), (10, 2.0), (), [10, 20], 5, (True, 3)])
def test_values_that_are_no_split(value):
    with pytest.raises(ArgumentTypeError, match="rows"):
        sw.ops.Gather().add_prim_attr("manual_split", value)


# -- self_define_shard --------------------------------------------------------------------------------------------------


def test_pieces_of_other_shapes_than_told_are_an_error():
    sw.init(devices=2)
    layout = sw.Layout((2,), ("mp",))
    operator = sw.ops.ReLU().shard((layout("mp", "None"),), (layout("None", "mp"),)).add_prim_attr("self_define_shard", True)
    with pytest.raises(ShardwrightError, match=r"made a piece of shape \[2, 8\], but out_strategy says \[4, 4\]"):
        sw.AutoParallel(operator)(torch.randn(4, 8))


def test_layouts_are_needed_for_everything():
    layout = sw.Layout((4,), ("mp",))
    text = refused("self_define_shard", True, ((layout("mp", "None"),),), sw.ops.ReLU(), (torch.randn(4, 4),))
    assert "needs a Layout for each of its 1 inputs and 1 outputs" in text
    text = refused("self_define_shard", True, (((4, 1),), ((4, 1),)), sw.ops.ReLU(), (torch.randn(4, 4),))
    assert "needs a Layout" in text


def test_sums_and_copies_cannot_be_told_apart():
    layout = sw.Layout((4,), ("mp",))
    strategy = ((layout("mp", "None"),), (layout("None", "None"),))
    text = refused("self_define_shard", True, strategy, sw.ops.ReLU(), (torch.randn(4, 4),))
    assert "mp splits inputs or output 0 but not both" in text


# -- skip_redistribution ------------------------------------------------------------------------------------------------


def reshaped(strategy, shape, then=None):
    sw.init(devices=4)
    relu = sw.ops.ReLU().shard((strategy,))
    reshape = sw.ops.Reshape().add_prim_attr("skip_redistribution", True)
    after = sw.ops.Tanh().shard((then,)) if then else torch.tanh
    x = torch.randn(8, 6, dtype=torch.float64)
    net = sw.AutoParallel(lambda x: after(reshape(relu(x), shape)))
    with sw.record_communication() as log:
        torch.testing.assert_close(net(x), torch.tanh(torch.relu(x).reshape(shape)))
    return log


def test_a_reshape_stays_where_it_is():
    log = reshaped((4, 1), (8, 2, 3), (4, 1, 1))
    assert [e.edge.endswith("-> output") for e in log.events] == [True]


def test_a_reshape_that_cannot_stay_is_refused():
    with pytest.raises(StrategyError, match="skip_redistribution, but before it stands all_gather"):
        reshaped((1, 2), (48,))
    with pytest.raises(StrategyError, match="skip_redistribution, but after it stands all_to_all"):
        reshaped((4, 1), (8, 6), (1, 4))


def test_it_is_for_reshapes():
    text = refused("skip_redistribution", True, (((4, 1),),), sw.ops.ReLU(), (torch.randn(4, 4),))
    assert "skip_redistribution is for reshapes" in text


# -- names and values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_says_why_and_what_to_do(name):
    with pytest.raises(ShardwrightError) as caught:
        sw.ops.ReduceMean().add_prim_attr(name, True)
    text = str(caught.value)
    assert text.startswith(f"ReduceMean.add_prim_attr({name!r}, True) at test_operator_attributes.py:")
    assert REFUSED[name] in text
    sw.ops.ReduceMean().add_prim_attr(name, False)


def test_what_is_to_be_done_instead_of_cross_batch():
    """Means by group are the same on one device, and cost no communication."""
    sw.init(devices=4)
    layout = sw.Layout((4,), ("dp",))
    mean = sw.ops.ReduceMean().shard((layout("dp", "None", "None"),))
    net = sw.AutoParallel(lambda x: mean(x.unflatten(0, (4, -1)), dim=1))
    x = torch.randn(8, 3)
    with sw.record_communication() as log:
        torch.testing.assert_close(net(x), torch.stack([x[i : i + 2].mean(0) for i in (0, 2, 4, 6)]))
    assert [e.edge.endswith("-> output") for e in log.events] == [True]


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ShardwrightError) as caught:
        sw.ops.MatMul().add_prim_attr("enable_tp", True)
    assert all(name in str(caught.value) for name in ("'enable_tp'", "test_operator_attributes.py", *ATTRIBUTES))
    with pytest.raises(ArgumentTypeError, match="is a str"):
        sw.ops.MatMul().add_prim_attr(3, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("enable_nd_tp", 1), ("self_define_shard", "yes"), ("skip_redistribution", None), ("ndtp_reduce_scatter_axis", True)],
)
def test_values_of_the_wrong_type(name, value):
    with pytest.raises(ArgumentTypeError, match=name):
        sw.ops.MatMul().add_prim_attr(name, value)


def test_attributes_given_in_other_ways_are_checked_too():
    sw.init(devices=4)
    with pytest.raises(ShardwrightError, match="no attribute 'fast'"):
        sw.shard(torch.matmul, ((4, 1), (1, 1)), attributes={"fast": True})
    with pytest.raises(ArgumentTypeError, match="give a dict"):
        sw.shard(torch.matmul, ((4, 1), (1, 1)), attributes=("enable_nd_tp",))
    net = sw.AutoParallel(nn.Sequential(nn.Linear(4, 4))).shard({"0": {"in_strategy": ((4, 1),), "attributes": {"fast": 1}}})
    with pytest.raises(ShardwrightError, match="no attribute 'fast'"):
        net(torch.randn(4, 4))


def test_an_attribute_that_is_switched_off_does_nothing():
    sw.init(devices=4)
    matmul = sw.ops.MatMul().shard(((4, 1), (1, 1))).add_prim_attr("enable_nd_tp", False)
    x, w = torch.randn(4, 4), torch.randn(4, 4)
    torch.testing.assert_close(sw.AutoParallel(matmul)(x, w), x @ w)


def test_outside_of_auto_parallel_nothing_changes():
    gather = sw.ops.Gather().shard(((4, 1), (1, 4))).add_prim_attr("manual_split", (1, 1, 1, 1))
    table = torch.randn(4, 2)
    assert torch.equal(gather(table, torch.tensor([3])), table[3:])


def test_data_parallel_mode_ignores_attributes_as_it_does_strategies():
    sw.init(devices=4)
    gather = sw.ops.Gather().shard(((4, 1), (1, 4))).add_prim_attr("manual_split", (10, 20, 30, 4))
    table = nn.Parameter(torch.randn(64, 6))
    indices = torch.randint(0, 64, (8, 4))
    net = sw.AutoParallel(lambda i: gather(table, i), "data_parallel")
    torch.testing.assert_close(net(indices), F.embedding(indices, table))


if __name__ == "__main__":
    main(PROGRAMS)
