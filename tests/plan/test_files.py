"""A plan that was saved is the same plan when it is loaded; what does not fit is refused, all of it, with the difference."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_random_graphs import RandomNet
from torch import nn
from torch.nn import functional as F

import shardwright as sw
from shardwright.api.marks import gather_marks
from shardwright.api.settings import Settings
from shardwright.capture.capture import capture
from shardwright.capture.closure import FunctionModule
from shardwright.errors import ShardwrightError, StrategyError
from shardwright.ir.layout import Layout
from shardwright.ir.names import operator_keys
from shardwright.partition.partitioner import partition
from shardwright.plan.file.match import plan_from_file
from shardwright.plan.file.read import load_plan_file
from shardwright.plan.file.write import save_parameter_layouts, save_plan, save_strategies
from shardwright.plan.modes.table import plan_graph
from shardwright.plan.request import PlanRequest
from shardwright.report.plan_view import PlanView

GRID = sw.Layout((2, 2), ("dp", "tp"))


class Attention(nn.Module):
    """Linears with a bias, attention over heads, norms, a residual; and an embedding before it."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads = heads
        self.words = nn.Embedding(32, width)
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, ids, targets):
        x = self.words(ids) + torch.arange(ids.shape[1], dtype=torch.float32)[:, None].cos()
        y = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(y[0], y[1], y[2]).transpose(1, 2).flatten(2))
        x = x + self.down(torch.relu(self.up(x)))
        return F.cross_entropy((x @ self.words.weight.t()).flatten(0, 1), targets.flatten())


IDS = torch.zeros(8, 6, dtype=torch.long)
MEGATRON = {
    "words": {"in_strategy": (GRID("dp", "None"),)},
    "qkv.weight": GRID("None", "None"),
    "up.weight": GRID("tp", "None"),
    "down.weight": GRID("None", "tp"),
}


def planned(target, *inputs, mode="semi_auto", devices=4, strategies=None, dataset="full_batch", **asked):
    """A graph, what is asked of its plan, and its plan."""
    root = target if isinstance(target, nn.Module) else FunctionModule(target)
    settings = Settings(mode=mode, dataset_strategy=dataset, strategies=strategies, source="train.py:1")
    marks, parameter_plan = gather_marks(root, settings)
    with torch.enable_grad():
        graph = capture(root, inputs, {}, torch.device("cpu"), marks)
    request = PlanRequest(devices, dataset, parameter_plan, mode != "data_parallel", mode, "h100", **asked)
    return graph, request, plan_graph(graph, request)


def loaded(plan, graph, request, path, save=save_plan):
    save(plan, path)
    return plan_from_file(path, graph, request)


def assert_same(plan, other):
    assert plan.mesh == other.mesh
    assert plan.choices == other.choices
    assert plan.input_layouts == other.input_layouts
    assert str(partition(plan.graph, plan)) == str(partition(other.graph, other))


def never(graph, request):
    raise AssertionError("a complete file needs no planner")


# -- round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", ["semi_auto", "data_parallel", "sharding_propagation", "dynamic_programming", "recursive_programming", "auto"]
)
def test_a_saved_plan_is_the_very_plan(mode, tmp_path):
    strategies = MEGATRON if mode in ("semi_auto", "sharding_propagation") else None
    graph, request, plan = planned(Attention(), IDS, IDS, mode=mode, strategies=strategies)
    save_plan(plan, tmp_path / "plan.json")
    again = plan_from_file(load_plan_file(tmp_path / "plan.json"), graph, request, planner=never)
    assert_same(plan, again)
    assert again.search == plan.search
    assert again.notes[-1] == f"as saved in {tmp_path / 'plan.json'}"
    save_plan(again, tmp_path / "again.json")
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("plan.json", "again.json"))
    assert {**first, "machine": "h100"} == second


def test_a_file_has_a_line_for_each_operator_and_parameter(tmp_path):
    _, _, plan = planned(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), torch.ones(4, 8), mode="data_parallel")
    PlanView(plan).save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert lines[1:4] == ['  "format": "shardwright plan",', '  "version": 1,', '  "devices": 4,']
    assert (
        '    "0/aten.linear": {"inputs": ["d0,None", "None,None", "None"], "outputs": ["d0,None"], '
        '"shapes": "4x8 16x8 16 -> 4x16"},' in lines
    )
    assert '    "0.weight": {"shape": [16, 8], "dtype": "float32", "layout": "None,None"},' in lines


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_under_random_strategies(seed, tmp_path):
    rng = random.Random(seed)
    devices = rng.choice([1, 2, 3, 4, 6, 8, 12])
    shape = rng.choice([3, 4, 7, 8]), rng.choice([2, 5, 6]), rng.choice([4, 6, 9])
    net = RandomNet(rng, devices, *shape, depth=6)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    graph, request, plan = planned(net, x, devices=devices)
    assert_same(plan, loaded(plan, graph, request, tmp_path / "plan.json"))
    pinned = loaded(plan, graph, request, tmp_path / "strategies.json", save_strategies)
    assert pinned.choices == plan.choices


def test_scattered_sums_uneven_pieces_orders_of_axes_and_meshes_that_share_nothing(tmp_path):
    grid, other = sw.Layout((2, 3), ("a", "b")), sw.Layout((3, 2), ("c", "d"))
    scatter = sw.shard(torch.matmul, (grid("None", "b"), grid("b", "None")), (grid("b", "None"),))
    crossed = sw.shard(torch.relu, (other("d>c", "None"),))
    backwards = sw.Layout((6,), ("r",), [5, 4, 3, 2, 1, 0])
    last = sw.shard(torch.tanh, (backwards("r", "None"),))
    cut = sw.shard(torch.sin, ((6, 1),))  # as torch.chunk(6) does, not as 2 and then 3
    weight = nn.Parameter(torch.ones(10, 8))
    graph, request, plan = planned(lambda x: cut(last(crossed(scatter(x, weight)))), torch.ones(7, 10), devices=6)
    again = loaded(plan, graph, request, tmp_path / "plan.json")
    assert_same(plan, again)
    text = (tmp_path / "plan.json").read_text()
    assert "+sum" not in text
    assert " @ c=3,d=2" in text
    assert " @ r=6 ranks=5,4,3,2,1,0" in text
    assert "(a,b)[2 2 2 1 0 0]" in text
    assert "d>c" in text


def test_sums_that_are_handed_on_stay_pending(tmp_path):
    model = sw.shard(nn.Linear(8, 8, bias=False), (GRID("dp", "tp"),), parameter_plan={"weight": GRID("None", "tp")})
    graph, request, plan = planned(model, torch.ones(4, 8))
    again = loaded(plan, graph, request, tmp_path / "plan.json")
    assert "+sum(" in (tmp_path / "plan.json").read_text()
    assert_same(plan, again)


@pytest.mark.parametrize("dataset", ["data_parallel", ((4, 1), (2, 1))])
def test_what_ranks_hand_in_is_a_part_of_the_plan(dataset, tmp_path):
    graph, request, plan = planned(Attention(), IDS, IDS, dataset=dataset)
    assert_same(plan, loaded(plan, graph, request, tmp_path / "plan.json"))
    with pytest.raises(StrategyError, match=r"plan.json:\d+: input 0 is .*, dataset_strategy says None,None"):
        plan_from_file(tmp_path / "plan.json", graph, replace(request, dataset_strategy="full_batch"))


# -- parts of a plan ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["semi_auto", "data_parallel", "sharding_propagation", "auto"])
def test_a_file_of_strategies_pins_operators_in_every_mode(mode, tmp_path):
    strategies = MEGATRON if mode in ("semi_auto", "sharding_propagation") else None
    graph, request, plan = planned(Attention(), IDS, IDS, mode=mode, strategies=strategies)
    pinned = loaded(plan, graph, request, tmp_path / "strategies.json", save_strategies)
    assert "parameters" not in json.loads((tmp_path / "strategies.json").read_text())
    assert pinned.choices == plan.choices


@pytest.mark.parametrize("mode", ["semi_auto", "data_parallel", "sharding_propagation", "auto"])
def test_a_file_of_parameter_layouts_pins_how_they_are_stored(mode, tmp_path):
    graph, request, plan = planned(Attention(), IDS, IDS, mode="auto", mesh=(2, 2))
    pinned = loaded(plan, graph, replace(request, mode=mode), tmp_path / "layouts.json", save_parameter_layouts)
    assert "operators" not in json.loads((tmp_path / "layouts.json").read_text())
    for i in graph.inputs:
        if i.kind == "parameter":
            assert pinned.input_layouts[i.value].bounds(i.meta.shape) == plan.input_layouts[i.value].bounds(i.meta.shape)


HEAD = {"format": "shardwright plan", "version": 1, "devices": 4, "mesh": "dp=2,tp=2"}


def write(path: Path, **sections):
    path.write_text(json.dumps({**HEAD, **sections}, indent=1))
    return path


@pytest.mark.parametrize("mode", ["semi_auto", "data_parallel", "sharding_propagation", "dynamic_programming", "auto"])
def test_a_single_entry_is_followed_in_every_mode(mode, tmp_path):
    graph, request, _ = planned(Attention(), IDS, IDS)
    entry = {"inputs": ["tp,None,dp", "None,dp", "None"], "outputs": ["tp,None,None"]}
    path = write(tmp_path / "one.json", operators={"up/aten.linear": entry})
    plan = plan_from_file(path, graph, replace(request, mode=mode))
    node = next(n for n in plan.graph.nodes if n.module == "up")
    assert node.mark.source == f"{path}:7"
    same = plan.choices[node.name]
    assert [same.mesh.count(a) for a in same.inputs[0].bound] == [2, 1, 2]
    assert same.outputs[0].slices((8, 6, 64)) == Layout.parse("tp,None,None @ dp=2,tp=2").slices((8, 6, 64))


def test_entries_run_with_the_values_of_one_device(tmp_path):
    sw.init(devices=4)
    model = Attention()
    ids = torch.randint(32, (8, 6))
    net = sw.AutoParallel(model).compile(ids, ids)
    entry = {"inputs": ["tp,None,dp", "None,dp", "None"], "outputs": ["(dp,tp),None,None"]}
    path = write(tmp_path / "one.json", operators={"up/aten.linear": entry}, parameters={"down.weight": {"layout": "dp,tp"}})
    plan = plan_from_file(path, net.latest.graph, PlanRequest(4))
    run = net.latest.world.bind(partition(plan.graph, plan))
    outputs, _ = run(*net.latest._values([ids, ids]))
    torch.testing.assert_close(outputs[0], model(ids, ids))


def test_a_pattern_stands_for_operators_alike_and_a_name_of_its_own_comes_first(tmp_path):
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    graph, request, _ = planned(model, torch.ones(8, 8))
    operators = {
        "2/aten.linear": {"inputs": ["None,dp", "None,dp"]},
        "*/aten.linear": {"inputs": ["dp,None", "tp,None"]},
    }
    plan = plan_from_file(write(tmp_path / "some.json", operators=operators), graph, request)
    texts = [plan.choices[n.name].inputs[1].short() for n in graph.nodes]
    assert texts == ["tp,None", "tp,None", "None,dp", "tp,None"]
    assert [plan.choices[n.name].outputs[0].short() for n in graph.nodes] == ["dp,tp", "dp,tp", "None,None", "dp,tp"]


def test_a_part_of_a_train_step_passes_over_what_is_for_other_parts(tmp_path):
    graph, request, plan = planned(nn.Sequential(nn.Linear(8, 8)), torch.ones(8, 8))
    other, _, _ = planned(nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), torch.ones(8, 8))
    save_plan(plan, tmp_path / "plan.json")
    assert plan_from_file(tmp_path / "plan.json", other.__class__((), (), ()), request, part=True).choices == {}
    with pytest.raises(StrategyError, match="1 operator is not in the model any more: 0/aten.linear"):
        plan_from_file(tmp_path / "plan.json", other, request)


def test_operators_are_known_by_module_name_and_place(tmp_path):
    graph, _, _ = planned(lambda x: (x + 1) * (x + 2) + torch.relu(x), torch.ones(4))
    assert list(operator_keys(graph).values()) == ["aten.add", "aten.add#2", "aten.mul", "aten.relu", "aten.add#3"]


# -- what is refused ------------------------------------------------------------------------------------------------------


def refused(call, *args) -> str:
    with pytest.raises(ShardwrightError) as found:
        call(*args)
    return str(found.value)


def lines(**changes) -> str:
    """The text of a file, one key a line."""
    return json.dumps({**HEAD, **changes}, indent=0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "plan.json:1: this is not JSON: Expecting property name"),
        ('{"format": "shardwright plan",\n "version" 1}', "plan.json:2: this is not JSON: Expecting ':' delimiter at column"),
        ("[]", 'plan.json:1: this is not a plan file: it does not say "format": "shardwright plan"'),
        (lines(version=2), "plan.json:3: version 2 is not known, only 1"),
        (lines(devices="4"), "plan.json:4: \"devices\" is '4'; give the number of ranks"),
        (lines(mesh="dp=2,tp=3"), "plan.json:5: \"mesh\" is 'dp=2,tp=3', which does not have 4 ranks"),
        (lines(mesh="dp"), "plan.json:5: cannot read the mesh 'dp'"),
        (lines(operator={}), "plan.json:6: 'operator' is not known; use format, version"),
        (lines(operators=[]), "plan.json:6: 'operators' is []"),
        (lines(operators={"a": {"input": []}}), "plan.json:7: 'a' has 'input', which is not known and lacks 'inputs'"),
        (
            lines(operators={"a": {"inputs": ["xp"]}}),
            "plan.json:7: 'a': cannot read the layout 'xp': layout entry 0 names 'xp', which is not an alias of this layout; "
            "the aliases are dp, tp",
        ),
        (lines(operators={"a": {"inputs": [["dp"]]}}), "'a': the layout ['dp'] is a list"),
        (lines(parameters={"w": {"layout": "dp", "shape": 4}}), "plan.json:7: 'w': \"shape\" is 4"),
        (
            '{"format": "shardwright plan",\n"version": 1,\n"version": 1}',
            "plan.json:3: 'version' stands more than once in one object (lines 2, 3); keep one of them",
        ),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text(text)
    assert says in refused(load_plan_file, "plan.json")


def test_a_file_that_is_not_there():
    assert "there is no plan file gone.json" in refused(load_plan_file, "gone.json")


def test_a_file_that_cannot_be_written(tmp_path):
    _, _, plan = planned(nn.Linear(4, 4), torch.ones(4, 4))
    assert "cannot be written" in refused(PlanView(plan).save, tmp_path / "no folder" / "plan.json")


def test_all_problems_of_a_file_at_once(tmp_path):
    operators = {"a": {"inputs": ["xp"]}, "b": {"inputs": ["dp,dp"]}, "c": 1}
    text = refused(load_plan_file, write(tmp_path / "plan.json", operators=operators))
    assert "3 problems" in text
    assert [f"{n}. " in text for n in (1, 2, 3)] == [True] * 3


def edited(plan, path, change):
    save_plan(plan, path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=1))
    return path


def test_a_stale_file_is_refused_with_the_differences(tmp_path):
    graph, request, plan = planned(Attention(), IDS, IDS)
    path = tmp_path / "plan.json"

    def change(data):
        data["operators"]["up/aten.matmul"] = data["operators"].pop("up/aten.linear")
        data["operators"]["out/aten.linear"]["shapes"] = "8x6x16 8x16 8 -> 8x6x8"
        data["parameters"]["out.weight"]["shape"] = [8, 16]
        data["parameters"]["gone.weight"] = data["parameters"].pop("up.weight")

    text = refused(plan_from_file, edited(plan, path, change), graph, request)
    assert "1 operator is not in the model any more: up/aten.matmul (line " in text
    assert '1 operator is not in the file: up/aten.linear; save the plan again, or delete "complete"' in text
    assert "1 operator is of other shapes: out/aten.linear (line " in text
    assert "has 8x6x16 16x16 16 -> 8x6x16, in the file 8x6x16 8x16 8 -> 8x6x8" in text
    assert "parameter out.weight is [16, 16], in the file [8, 16]" in text
    assert "1 parameter is read by no operator: gone.weight (line " in text
    assert "1 parameter is not in the file: up.weight" in text
    assert "6 problems" in text


def test_another_number_of_devices_is_refused(tmp_path):
    graph, request, plan = planned(Attention(), IDS, IDS)
    PlanView(plan).save(tmp_path / "plan.json")
    text = refused(plan_from_file, tmp_path / "plan.json", graph, replace(request, world_size=8))
    assert "it is for 4 devices, here are 8; plan again and save" in text


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        ("up/aten.linear", {"inputs": ["dp,None,tp", "None,None", "None"]},
         "dim 2 of input 0 (dp,None,tp) and dim 1 of input 1 (None,None)|dim 2 of input 0 (dp,None,tp) is split and dim 1 of "
         "input 1 (None,None) is not, but they are the same dim; write both alike"),
        ("up/aten.linear", {"inputs": ["dp,None,None", "dp,None", "dp"]}, "use one axis for different dims"),
        ("up/aten.linear", {"inputs": ["dp,None,None", "tp,None", "None"], "outputs": ["dp,None,tp"]},
         "input 2 is None, but goes with the other tensors only as tp; write that"),
        ("up/aten.linear", {"outputs": ["None,None,None"]}, "output 0 is None,None,None, but these inputs make"),
        ("up/aten.linear", {"inputs": ["dp,None,None", "None,None"]}, "2 layouts for 3 inputs; give one for each"),
        ("up/aten.linear", {"inputs": ["dp,None", "None,None", "None"]}, "the layout has 2 entries for a tensor [8, 6, 16]"),
        ("up/aten.linear", {"inputs": ["dp[3 4],None,None", "None,None", "None"]}, "piece sizes (3, 4) add up to 7"),
        ("aten.relu", {"inputs": ["dp,None,None +sum(tp)"]}, "input 0 has a sum pending, which this operator cannot pass on"),
        ("norm/aten.layer_norm", {"inputs": ["None,None,tp", "None", "None"]}, "must stay whole for this operator; write None"),
        ("aten.flatten", {"inputs": ["None,None,tp[3 1],None"]}, "these inputs make None,None,tp[12 4]; write that"),
        ("aten.relu", {"inputs": ["dp,None,None"], "outputs": ["dp,None,tp"]}, "these inputs make dp,None,None; write that"),
        ("aten.permute", {"inputs": ["None,None,None,tp,None +sum(dp)"], "outputs": ["None,None,tp,None,None +sum(dp)"]},
         "without that sum; read it without"),
        ("aten.unflatten", {"inputs": ["dp,None,tp[25 23]"]}, "is cut within runs of 16 that must stay together"),
    ],
)  # fmt: skip
def test_a_layout_that_an_operator_cannot_follow_is_refused(key, change, says, tmp_path):
    graph, request, plan = planned(Attention(), IDS, IDS, strategies=MEGATRON)
    path = edited(plan, tmp_path / "plan.json", lambda data: data["operators"][key].update(change))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if f'"{key}":' in text)
    text = refused(plan_from_file, path, graph, request)
    assert any(one in text for one in says.split("|")), text
    assert f"{path}:{line}: {key}" in text

    part = write(tmp_path / "part.json", operators={key: json.loads(path.read_text())["operators"][key]})
    text = refused(plan_from_file, part, graph, request)
    assert any(one in text for one in says.split("|")), text


def test_layouts_edited_at_random_are_followed_or_refused(tmp_path):
    graph, request, plan = planned(Attention(), IDS, IDS, strategies=MEGATRON)
    save_plan(plan, tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    rng = random.Random(0)
    entries = ["None", "dp", "tp", "(dp,tp)", "tp>dp", "dp[1 7]", "tp[0 16]"]
    outcomes = {True: 0, False: 0}
    for _ in range(150):
        key = rng.choice(list(data["operators"]))
        entry = json.loads(json.dumps(data["operators"][key]))
        side = rng.choice(["inputs", "outputs"]) if entry["inputs"] else "outputs"
        at = rng.randrange(len(entry[side]))
        dims = entry[side][at].partition(" +")[0].split(",")
        dims[rng.randrange(len(dims))] = rng.choice(entries)
        entry[side][at] = ",".join(dims) + rng.choice(["", "", " +sum(tp)"])
        if rng.random() < 0.3:
            entry.pop("outputs", None)
        path = write(tmp_path / "part.json", operators={key: entry})
        try:
            partition(graph, plan_from_file(path, graph, request))
        except ShardwrightError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert min(outcomes.values()) > 10
