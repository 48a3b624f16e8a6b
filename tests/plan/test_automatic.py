"""The modes that search: exact results, respected strategies, memory limits, any device count, the same price everywhere."""

from __future__ import annotations

import copy
import random
import re

import pytest
import torch
from models import GPT, MLP
from test_random_graphs import RandomNet
from torch import nn

import shardwright as sw
from shardwright.errors import MemoryLimitError, ShardwrightError
from shardwright.plan.modes.search import SearchPlanner
from shardwright.plan.problem.blocks import blocks_of
from shardwright.plan.problem.formulation import Folded
from shardwright.search.solve import solve

SEARCHES = ("auto", "dynamic_programming", "recursive_programming")


def tokens(*shape, vocab=32):
    return torch.randint(0, vocab, shape), torch.randint(0, vocab, shape)


def compare(net, single, inputs):
    loss, expected = net(*inputs), single(*inputs)
    if isinstance(loss, tuple):
        loss, expected = (sum(part.sum() for part in parts) for parts in (loss, expected))
    loss.backward()
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-10)
    for mine, theirs in zip(net.parameters(), single.parameters()):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("mode", SEARCHES)
@pytest.mark.parametrize("devices", [1, 2, 3, 6, 7, 8])
def test_any_device_count_trains_as_the_single_device(mode, devices):
    torch.manual_seed(0)
    sw.init(devices)
    model = GPT(vocab=32, d=16, layers=2, heads=4, length=8).double()
    single = copy.deepcopy(model)
    # links for nothing: plans that split and move as much as they can
    net = sw.AutoParallel(model, parallel_mode=mode).search(machine=fast_links())
    compare(net, single, tokens(4, 8))
    assert net.plan.mesh.size == devices
    assert net.plan.mode == mode


def fast_links():
    from dataclasses import replace

    from shardwright.cost.machine_files import load_machine

    machine = load_machine("h100")
    levels = tuple(replace(level, latency=0.0, bandwidth=1e15) for level in machine.levels)
    return replace(machine, collective_launch=0.0, operator_launch=0.0, levels=levels)


@pytest.mark.parametrize("mode", SEARCHES)
@pytest.mark.parametrize("seed", range(6))
def test_configured_operators_keep_their_strategies(mode, seed):
    """Random graphs of which operators are configured at random, as slice counts and Layouts."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    devices = rng.choice([2, 4, 6])
    sw.init(devices)
    model = RandomNet(rng, devices, 4, 6, 8, 6).double()
    single = copy.deepcopy(model)
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    told = sw.AutoParallel(copy.deepcopy(model)).compile(x).plan
    net = sw.AutoParallel(model, parallel_mode=mode).search(machine=fast_links())
    compare(net, single, (x,))
    for node in net.plan.graph.nodes:
        if node.mark is not None and node.mark.in_strategy is not None and not node.mark.is_pin:
            mine, theirs = net.plan.choices[node.name], told.choices[node.name]
            shapes = [m.shape for m in node.op.inputs]
            for i, shape in enumerate(shapes):
                assert mine.inputs[i].slices(shape) == theirs.inputs[i].slices(shape), node.where


@pytest.mark.parametrize("strategy", ["data_parallel", ((4, 1), (4, 1)), ((2, 2), (2, 2))])
def test_inputs_that_come_in_slices(strategy):
    sw.init(4)
    model = GPT(vocab=32, d=16, layers=1, heads=4, length=8).double()
    single = copy.deepcopy(model)
    net = sw.AutoParallel(model, parallel_mode="auto").dataset_strategy(strategy).search(machine=fast_links())
    compare(net, single, tokens(4, 8))


def test_parameter_layouts_are_kept():
    sw.init(4)
    model = MLP((16, 32, 32, 8)).double()
    layout = sw.Layout((2, 2), ("dp", "tp"))
    net = sw.AutoParallel(model, parallel_mode="auto").shard({"layers.1.weight": layout("tp", "dp")})
    compare(net, copy.deepcopy(model), (torch.randn(8, 16, dtype=torch.float64), torch.randint(0, 8, (8,))))
    stored = {str(i.target): net.plan.input_layouts[i.value] for i in net.plan.graph.inputs}
    assert stored["layers.1.weight"].short() == "tp,dp"


def plan(model, inputs, devices=8, **options):
    options = {"machine": "h100", **options}
    return sw.plan_for(devices, model, *inputs, **options)


def big_gpt(layers=6):
    with torch.device("meta"):
        model = GPT(vocab=512, d=1024, layers=layers, heads=16, length=512).bfloat16()
    return model, tuple(torch.empty(32, 512, dtype=torch.long, device="meta") for _ in range(2))


@pytest.mark.long
def test_a_memory_limit_holds_and_what_does_not_fit_says_so():
    model, inputs = big_gpt(layers=3)
    free = plan(model, inputs, memory=1e15, mesh=(2, 4))
    with pytest.raises(MemoryLimitError, match=r"(?s)no plan for 8 devices fits into 1\.0 MB.*use more devices") as caught:
        plan(model, inputs, memory="1MB", mesh=(2, 4))
    # what it says would fit does fit
    needed = re.search(r"allow memory='([^']+)'", str(caught.value))
    assert plan(model, inputs, memory=needed[1], mesh=(2, 4)).memory.peak <= caught.value.least * 1.01 + 1e8
    limit = (free.memory.peak + caught.value.least) / 2
    tight = plan(model, inputs, memory=limit, mesh=(2, 4))
    assert tight.memory.peak <= limit < free.memory.peak
    assert tight.search.seconds >= free.search.seconds


@pytest.mark.long
@pytest.mark.parametrize("mode", SEARCHES)
def test_memory_is_predicted_only_for_a_limit(monkeypatch, mode):
    # a prediction writes a program: far longer than the search, for a model of many layers
    from shardwright.plan.modes import search

    sw.init(4)
    asked = []
    predict = search.step_memory
    monkeypatch.setattr(search, "step_memory", lambda plan: asked.append(plan) or predict(plan))
    sw.AutoParallel(nn.Linear(16, 4), mode).compile(torch.randn(8, 16))
    assert not asked
    sw.AutoParallel(nn.Linear(16, 4), mode).search(memory="1GB").compile(torch.randn(8, 16))
    assert asked


@pytest.mark.long
def test_recursion_is_close_to_the_optimum():
    model, inputs = big_gpt()
    for mesh in ((8,), (2, 4), (2, 2, 2)):
        best = plan(model, inputs, mesh=mesh, mode="dynamic_programming", memory=1e15)
        quick = plan(model, inputs, mesh=mesh, mode="recursive_programming", memory=1e15)
        assert best.search.gap == 0
        assert best.search.seconds <= quick.search.seconds <= 1.05 * best.search.seconds


def test_several_meshes_are_tried_and_the_best_is_kept():
    model, inputs = big_gpt(2)
    found = plan(model, inputs, devices=12, memory=1e15)
    assert len(found.search.tried) > 1
    assert found.search.seconds == min(seconds for _, seconds in found.search.tried)


def test_folded_layers_cost_what_they_cost_one_by_one(monkeypatch):
    """The same problem with every layer written out has the same optimum; a plan is priced as the search reckoned."""
    import shardwright.plan.modes.search as automatic

    model, inputs = big_gpt(5)
    folded = plan(model, inputs, mesh=(2, 4), memory=1e15)
    assert blocks_of(folded.graph)[0].count == 5
    monkeypatch.setattr(automatic, "blocks_of", lambda *given: ())
    flat = plan(model, inputs, mesh=(2, 4), memory=1e15)
    assert flat.search.seconds == pytest.approx(folded.search.seconds, rel=1e-9)
    for each in (folded, flat):
        assert each.price.seconds - each.price.unshared == pytest.approx(each.search.seconds, rel=1e-6)


def test_price_does_not_depend_on_how_layers_are_folded(monkeypatch):
    import shardwright.plan.price.plan_price as price

    model, inputs = big_gpt(5)
    found = plan(model, inputs, mesh=(2, 4), mode="recursive_programming", memory=1e15)
    folded = found.priced_on("a100")
    monkeypatch.setattr(price, "blocks_of", lambda *given: ())
    flat = found.priced_on("a100")
    assert folded.seconds == pytest.approx(flat.seconds, rel=1e-9)
    assert folded.bytes == pytest.approx(flat.bytes, rel=1e-9)
    assert set(folded.operators) == set(flat.operators)
    assert set(folded.parameters) == set(flat.parameters)
    assert {(m.value, m.readers) for m in folded.moves} == {(m.value, m.readers) for m in flat.moves}


def test_a_train_step_is_searched_too():
    sw.init(4)
    torch.manual_seed(0)
    model = MLP((12, 16, 16, 6)).double()
    single = copy.deepcopy(model)
    x, y = torch.randn(8, 12, dtype=torch.float64), torch.randint(0, 6, (8,))

    def train(module):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)

        def step():
            loss = module(x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    ours = sw.AutoParallel(train(model), parallel_mode="auto")
    theirs = train(single)
    for _ in range(3):
        assert torch.allclose(ours(), theirs(), rtol=1e-10)


def test_what_search_is_told_is_checked():
    net = sw.AutoParallel(nn.Linear(2, 2), parallel_mode="auto")
    with pytest.raises(ShardwrightError, match="machine 'h1000' is not known: use a100"):
        net.search(machine="h1000")
    with pytest.raises(ShardwrightError, match="memory '80 parsecs' is not a size"):
        net.search(memory="80 parsecs")
    with pytest.raises(TypeError, match="give a tuple of sizes"):
        net.search(mesh=[2, 4])
    with pytest.raises(ShardwrightError, match="give one alias for each of the 2 axes"):
        net.search(mesh=(2, 4), axes=("dp",))
    with pytest.raises(ShardwrightError, match="optimizer 'adamax2' is not known"):
        net.search(optimizer="adamax2")


def test_a_mesh_of_another_size_is_refused():
    sw.init(4)
    net = sw.AutoParallel(nn.Linear(4, 4), parallel_mode="auto").search(mesh=(2, 4))
    with pytest.raises(ShardwrightError, match="2·4 = 8 was asked for, the world has 4 devices"):
        net(torch.ones(4, 4))


def test_the_problem_is_solved_as_a_brute_force_would():
    import itertools

    import numpy as np

    sw.init(2)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False))
    with torch.enable_grad():
        from shardwright.capture.capture import capture

        graph = capture(model, (torch.ones(4, 4),), {}, torch.device("cpu"), {})
    from shardwright.plan.request import PlanRequest

    seen = []

    class Watched(SearchPlanner):
        def formulate(self, *given):
            seen.append(super().formulate(*given))
            return seen[-1]

    found = Watched(graph, PlanRequest(2, mode="auto", mesh=(2,), machine=fast_links())).plan()
    problem = seen[-1].problem
    best = min(problem.price(list(rows))[0] for rows in itertools.product(*(range(len(n.cost)) for n in problem.nodes)))
    assert np.isclose(found.search.seconds, best)
    assert np.isclose(solve(problem).cost, best)
    assert isinstance(seen[-1].folded, Folded)
