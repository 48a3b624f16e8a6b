"""What a plan says of itself is what it costs: explanations, alternatives, summaries and differences."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_files import GRID, IDS, MEGATRON, Attention, planned, write
from torch import nn

import shardwright as sw
from shardwright.cost.machine_files import load_machine
from shardwright.cost.operations import flops
from shardwright.errors import ShardwrightError
from shardwright.plan.choose.tables import choices_of, table_of_choice
from shardwright.plan.file.match import plan_from_file
from shardwright.plan.file.read import load_plan_file
from shardwright.plan.price.alternatives import Repricer
from shardwright.report.diff import placement
from shardwright.report.explain import explain
from shardwright.report.plan_view import PlanView


def priced(*args, **kwargs):
    return PlanView(replace(planned(*args, **kwargs)[2], machine=load_machine("h100")))


@pytest.fixture(scope="module")
def megatron():
    return priced(Attention(), IDS, IDS, strategies=MEGATRON)


class Layers(nn.Module):
    def __init__(self, count, width=8):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(block(x))
        return x.sum()


# -- explain --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["down", "down/aten.linear", "linear3", "dow?", "down.weight", "*/aten.linear"])
def test_operators_are_found_by_every_name_they_have(megatron, name):
    found = megatron.explain(name).operators
    down = [one for one in found if one.name == "down/aten.linear"]
    assert len(down) == 1
    assert len(found) == (4 if name.startswith("*") else 1)
    assert [layout.short() for layout in down[0].inputs] == [c.short() for c in megatron.choices["linear3"].inputs]


def test_a_name_that_nothing_has_is_an_error_with_close_ones(megatron):
    with pytest.raises(ShardwrightError, match=r"nothing in the plan is called 'dwon': .*; close to it: down"):
        megatron.explain("dwon")
    with pytest.raises(ShardwrightError, match=r"there are, for example, add, "):
        megatron.explain("@")


def test_the_parts_are_those_of_the_price(megatron):
    one = megatron.explain("down").operators[0]
    price = megatron.price.operators["linear3"]
    assert one.price == price
    assert {id(m.move) for m in one.moves if m.side == "reads"} == set(map(id, megatron.price.moves_to("linear3")))
    assert [p.name for p in one.parameters] == ["down.weight", "down.bias"]
    assert one.parameters[0].bytes == 64 * 16 * 4 / 2
    text = str(megatron.explain("down"))
    assert "stored down.weight" in text
    assert all(str(step) in text for m in one.moves for step in (*m.move.forward, *m.move.backward))
    assert "None,None,None +sum(tp) -> None,None,None: all_reduce(tp) 3.1 kB" in text  # before the bias is added
    assert "(1, 2) of [16, 64], 2.0 kB a rank" in text


def why(plan, name):
    return explain(plan, name).operators[0].why


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x):
        return torch.softmax(self.down(torch.relu(self.up(x))), -1)


@pytest.mark.parametrize(
    "plan",
    [
        {"up.weight": GRID("tp", "None"), "down.weight": GRID("None", "tp")},  # the second product does its own sums
        {"up.weight": GRID("tp", "None"), "down.weight": GRID("tp", "None")},
        {},
    ],
)
def test_bytes_are_those_that_a_rank_sends(plan):
    """Redistributions and operators' own collectives together; and own collectives explain the seconds they take."""
    sw.init(devices=GRID.mesh.size)
    net = sw.AutoParallel(Pair()).shard(plan)
    with sw.record_communication() as log:
        net(torch.randn(16, 8)).sum().backward()
    price = net.plan.price
    assert price.bytes == pytest.approx(log.bytes())
    assert price.bytes > 0
    for one in price.operators.values():
        assert sum(step.seconds for phase in one.own for step in phase) == pytest.approx(one.collectives)
    sums = {step.kind for phase in price.operators["linear1"].own for step in phase}
    assert sums == ({"all_reduce"} if len(plan) and plan["down.weight"].short() == "None,tp" else set())
    assert ("own collectives" in str(net.plan.explain("down"))) == bool(sums)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.pair = nn.LayerNorm(8), Pair()

    def forward(self, x):
        return x + self.pair(self.norm(x))


TENSOR_PARALLEL = {"*.up.weight": GRID("tp", "None"), "*.down.weight": GRID("None", "tp")}


@pytest.mark.parametrize(
    "tell",
    [
        lambda net: net.shard(TENSOR_PARALLEL).recompute("*"),
        lambda net: net.shard(TENSOR_PARALLEL).recompute(["0", "2.pair"]),
        lambda net: net.shard(TENSOR_PARALLEL).recompute("*", mp_comm_recompute=False),
        lambda net: net.shard(TENSOR_PARALLEL).recompute("*", recompute_slice_activation=True),
        lambda net: net.hsdp(threshold=0, optimizer_level="level3"),
        lambda net: net.hsdp(threshold=0).recompute("*", parallel_optimizer_comm_recompute=True),
    ],
)
def test_what_is_done_again_is_a_part_of_a_step(tell):
    """Its bytes are those that the ranks really send."""
    sw.init(devices=GRID.mesh.size)
    net = tell(sw.AutoParallel(nn.Sequential(*(Residual() for _ in range(3)))))
    with sw.record_communication() as log:
        net(torch.randn(16, 8)).sum().backward()
    price = net.plan.price
    assert price.parts["recompute"] > 0
    assert price.seconds == pytest.approx(sum(price.parts.values()))
    assert price.bytes == pytest.approx(log.bytes())
    assert "recompute" in str(net.plan.summary())
    assert "recompute" not in PlanView(replace(net.plan.value, passes=())).price.parts


def test_what_makes_an_operator_run_so(tmp_path):
    f = sw.shard(torch.matmul, (GRID("dp", "tp"), GRID("tp", "None")))
    weight = nn.Parameter(torch.ones(8, 8))
    pinned = GRID("tp", "None")
    graph, request, plan = planned(lambda x: torch.relu(sw.reshard(f(x, weight) + 1, pinned)), torch.ones(4, 8))
    assert why(plan, "aten.matmul").startswith("the strategy of matmul at ")
    assert "test_explain.py" in why(plan, "aten.matmul")
    assert why(plan, "aten.alias").startswith("a layout is pinned here: reshard input 0 at ")
    assert why(plan, "aten.relu").startswith("nothing asks for it")
    assert why(replace(plan, mode="data_parallel"), "aten.matmul").startswith("data parallel")

    path = write(tmp_path / "part.json", operators={"aten.relu": {"inputs": ["dp,tp"]}})
    assert why(plan_from_file(path, graph, request), "aten.relu") == f"pinned at {path}:7"
    PlanView(plan).save(tmp_path / "plan.json")
    whole = plan_from_file(load_plan_file(tmp_path / "plan.json"), graph, request)
    assert why(whole, "aten.relu") == f"as saved in {tmp_path / 'plan.json'}"

    searched = planned(Attention(), IDS, IDS, mode="dynamic_programming")[2]
    assert why(searched, "up").startswith("chosen by the search (")
    assert why(searched, "aten.cos").startswith("every rank can make any piece of it")
    assert explain(searched, "aten.cos").operators[0].alternatives == ()
    propagated = planned(Attention(), IDS, IDS, mode="sharding_propagation", strategies=MEGATRON)[2]
    assert why(propagated, "out") == "propagated from the operators that are configured"


def test_inside_a_marked_module_and_without_a_rule():
    model = sw.shard(nn.Sequential(nn.Linear(8, 8)), (GRID("dp", "None"),))
    assert why(priced(model, torch.ones(4, 8)), "0").startswith("it stands inside Sequential at ")
    weight = nn.Parameter(torch.ones(8, 8))
    plan = priced(lambda x: torch.linalg.inv(x @ weight), torch.ones(8, 8))
    assert why(plan, "aten.linalg_inv") == "the operator has no rule: it runs whole on every rank"


@pytest.mark.parametrize("mode", ["semi_auto", "data_parallel", "dynamic_programming"])
def test_alternatives_cost_what_the_whole_plan_then_costs(mode):
    plan = priced(Attention(), IDS, IDS, mode=mode, strategies=MEGATRON if mode == "semi_auto" else None)
    repricer, rng, checked = Repricer(plan), random.Random(1), 0
    for node in plan.graph.nodes:
        if not repricer.is_priced(node) or plan.choices[node.name].mesh != plan.mesh:
            continue
        rule = plan.signatures[node.name]
        now = repricer.pricing.interned_table(table_of_choice(node.op, rule, plan.mesh, plan.choices[node.name]))
        table = repricer.pricing.interned_table(choices_of(node.op, rule, plan.mesh))
        more = repricer.cost(node, table) - repricer.cost(node, now)[0]
        for row in rng.sample(range(len(table)), min(3, len(table))):
            if np.isfinite(more[row]):
                choice = table.choice(row, [v in plan.graph.needs_grad for v in node.inputs])
                other = PlanView(replace(plan.value, choices={**plan.choices, node.name: choice}))
                before, after = (each.price.seconds - each.price.unshared for each in (plan, other))
                assert after - before == pytest.approx(more[row], abs=1e-12)
                checked += 1
    assert checked > 30


def test_alternatives_are_the_best_others(megatron):
    one = megatron.explain("up").operators[0]
    assert 1 <= len(one.alternatives) <= 4
    assert [a.more for a in one.alternatives] == sorted(a.more for a in one.alternatives)
    now = ([la.short() for la in one.inputs], [la.short() for la in one.outputs])
    assert all(([la.short() for la in a.inputs], [la.short() for la in a.outputs]) != now for a in one.alternatives)


def test_of_a_plan_that_is_optimal_no_alternative_is_better():
    plan = priced(Attention(), IDS, IDS, mode="dynamic_programming")
    found = [a.more for one in plan.explain("*").operators for a in one.alternatives]
    assert found
    assert min(found) >= -1e-12


def test_repeated_layers_are_one_explanation():
    plan = priced(Layers(6), torch.ones(16, 8))
    found = plan.explain("*linear").operators
    assert sum(len(one.nodes) for one in found) == 6
    assert max(len(one.nodes) for one in found) >= 4
    assert "× blocks.*/aten.linear" in str(plan.explain("*linear"))


# -- summary --------------------------------------------------------------------------------------------------------------


def test_the_summary_adds_up(megatron):
    found = megatron.summary()
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert found.bytes == megatron.price.bytes
    assert found.memory == pytest.approx(sum(found.memory_parts.values()))
    assert found.gap is None
    text = str(found)
    assert text.startswith("plan for 4 ranks, mesh dp=2,tp=2, mode semi_auto\nmachine")
    for word in ("h100", "forward", "backward", "a rank sends", "a rank holds", "of FLOPs", "most expensive operators"):
        assert word in text


def test_how_much_is_really_split():
    split = priced(Layers(2), torch.ones(16, 8)).summary()
    assert (split.flops_split, split.parameters_split) == (1.0, 0.25)
    one = priced(Layers(2), torch.ones(1, 8)).summary()
    assert one.flops_split == 0.25
    uneven = priced(Layers(1), torch.ones(6, 8)).summary()
    assert uneven.flops_split == pytest.approx(6 / (2 * 4))
    plan = priced(Layers(2), torch.ones(16, 8), strategies={"blocks.0.weight": ((4, 1))})
    assert plan.summary().parameters_split == pytest.approx((1 + 0.25) / 2)


def test_flops_count_by_what_they_are():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 24, bias=False))
    strategies = {"0": ((1, 1),), "1.weight": GRID("None", "None")}
    plan = priced(model, torch.ones(16, 8), strategies=strategies)
    shares = {}
    for node in plan.graph.nodes:
        if flops(node.op):
            choice = plan.choices[node.name]
            shares[node.module] = 1 / choice.mesh.count(choice.axes) if choice.axes else 1.0
    expected = (1 / (4 * shares["0"]) + 3 / (4 * shares["1"])) / 4
    assert plan.summary().flops_split == pytest.approx(expected)


def test_the_summary_of_a_search_says_what_is_certified():
    plan = PlanView(planned(Attention(), IDS, IDS, mode="auto", memory_limit=1e9)[2])
    found = plan.summary()
    assert found.gap == plan.search.gap
    assert found.memory_limit == 1e9
    assert ("optimal, planned in" in str(found)) == (found.gap < 1e-9)
    assert "of 1.0 GB at most" in str(found)


def test_repeated_layers_are_one_row_of_the_summary():
    found = priced(Layers(6), torch.ones(16, 8)).summary()
    assert ("blocks.*/linear", 6) in {(row.name, row.count) for row in found.operators}
    assert ("blocks.*.weight to blocks.*", 6) in {(row.name, row.count) for row in found.moves}


# -- diff -----------------------------------------------------------------------------------------------------------------


def test_equal_plans_do_not_differ(megatron):
    again = priced(Attention(), IDS, IDS, strategies=MEGATRON)
    assert not megatron.diff(again)
    assert str(megatron.diff(again)) == "the plans are equal"


def test_a_mesh_of_other_names_or_finer_axes_is_no_difference():
    def plan(*matrix):
        names = tuple("abcd"[: len(matrix)])
        layout = sw.Layout(matrix, names)
        model = sw.shard(Layers(2), (layout(names, "None"),))
        return priced(model, torch.ones(16, 8), devices=8)

    assert not plan(8).diff(plan(2, 4))
    assert not plan(2, 2, 2).diff(plan(4, 2))
    reversed_order = sw.Layout((2, 4), ("a", "b"))
    other = priced(sw.shard(Layers(2), (reversed_order("b>a", "None"),)), torch.ones(16, 8), devices=8)
    assert plan(8).diff(other)


def test_placements_see_pieces_and_sums():
    grid = sw.Layout((2, 2), ("a", "b"))
    flat = sw.Layout((4,), ("c",))
    same = [
        (grid(("a", "b")), flat("c"), (8,), True),
        (grid("b>a"), flat("c"), (8,), False),
        (grid("a"), grid("b"), (8,), False),
        (grid(("a", "b")), flat("c"), (5,), False),  # 3 2 0 0 in halves of halves against 2 2 1 0
        (grid("None").with_partial(("a", "b")), flat("None").with_partial(("c",)), (8,), True),
        (grid("None").with_partial(("a",)), grid("None"), (8,), False),
        (grid("None").with_partial(("a",), "max"), grid("None").with_partial(("a",)), (8,), False),
    ]
    for here, there, shape, equal in same:
        assert (placement(here, shape) == placement(there, shape)) == equal, (here, there)


def test_a_diff_shows_both_sides_and_what_it_costs(megatron):
    other = priced(Attention(), IDS, IDS, mode="data_parallel")
    found = megatron.diff(other)
    assert found
    by_name = {one.name: one for one in found.operators}
    assert "tp" in by_name["up/aten.linear"].here
    assert "tp" not in by_name["up/aten.linear"].there
    assert {one.name for one in found.parameters} == {"up.weight", "up.bias", "down.weight"}
    assert found.prices["seconds"] == (megatron.price.seconds, other.price.seconds)
    assert found.prices["memory"] == (megatron.memory.peak, other.memory.peak)
    assert any(one.name.startswith("down/aten.linear input") for one in found.edges)
    backwards = other.diff(megatron)
    assert {(o.name, o.here, o.there) for o in backwards.operators} == {(o.name, o.there, o.here) for o in found.operators}
    for word in ("here:  plan for 4 ranks", "operators", "parameters", "edges", "a step", "memory of a rank"):
        assert word in str(found)


def test_plans_of_other_graphs_and_devices_are_compared_as_far_as_they_go(megatron):
    other = priced(Layers(2), torch.ones(16, 8), devices=8)
    found = megatron.diff(other)
    missing = {one.name for one in found.operators if one.there is None}
    assert {"up/aten.linear", "norm/aten.layer_norm"} <= missing
    assert {one.name for one in found.operators if one.here is None} >= {"blocks.0/aten.linear", "blocks.1/aten.linear"}
    assert "not there" in str(found)
    assert "there: plan for 8 ranks" in str(found)
