"""The examples' large language models: the tiny ones train as a single device does, the full ones can be planned."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import deepseek_moe
import llama
import shardwright as sw
from shardwright.capture.capture import capture
from shardwright.capture.repeated import capture_repeated, same_graphs
from shardwright.rules.registry import signature_of

MODELS = {"llama": (llama, "8b"), "deepseek_moe": (deepseek_moe, "v3")}
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
AXES = {"llama": ("dp", "tp"), "deepseek_moe": ("dp", "ep")}
PARAMETERS = {(llama, "8b"): 8.03, (llama, "70b"): 70.55, (llama, "405b"): 405.85, (deepseek_moe, "v3"): 671.0}


@pytest.fixture(autouse=True)
def _a_world_of_its_own(monkeypatch):
    monkeypatch.setattr("shardwright.world.current._current", [])
    monkeypatch.delenv("SHARDWRIGHT_DEVICES", raising=False)
    monkeypatch.delenv("CONFIG", raising=False)


def tiny_graph(name, **options):
    module, _ = MODELS[name]
    model = module.build("tiny", **options)
    return capture(model, module.inputs(8, 16, size="tiny"), {}, torch.device("cpu"))


@pytest.mark.parametrize("module, size", PARAMETERS)
def test_published_sizes(module, size):
    count = sum(p.numel() for p in module.build(size).parameters())
    assert count / 1e9 == pytest.approx(PARAMETERS[module, size], abs=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_a_planner_finds_the_model_and_its_inputs(name, monkeypatch):
    module, _ = MODELS[name]
    monkeypatch.setenv("CONFIG", "tiny")
    model, inputs = module.model(), module.inputs()
    assert all(t.is_meta for t in [*model.parameters(), *inputs])
    assert model.embedding.num_embeddings == 96


@pytest.mark.parametrize("name", MODELS)
def test_every_operator_has_a_rule(name):
    assert [str(node.op) for node in tiny_graph(name).nodes if signature_of(node.op) is None] == []


def test_experts_may_be_split():
    """From where tokens are gathered for them to where their results are added up."""
    graph = tiny_graph("deepseek_moe")
    products = [n for n in graph.nodes if n.op.name == "aten.bmm"]
    assert len(products) == 6
    for node in products:
        signature = signature_of(node.op)
        expert = {signature.inputs[0][0][0], signature.inputs[1][0][0], signature.outputs[0][0][0]}
        assert expert == {"b"}
        assert signature.splittable("b")
        assert signature.sizes["b"] == 8
    for node in graph.nodes:
        if node.op.name == "aten.scatter_add":
            assert "written" in signature_of(node.op).summed


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_trains_as_a_single_device(name, devices):
    module, _ = MODELS[name]
    model = module.build("tiny", dtype=torch.float64, device="cpu")
    tokens, targets = module.inputs(8, 16, "cpu", "tiny")
    expected = model(tokens, targets)
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    sw.init(devices=devices)
    layout = sw.Layout((max(devices // 2, 1), min(devices, 2)), AXES[name])
    net = sw.AutoParallel(model).shard(module.strategies(layout))
    loss = net(tokens, targets)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)  # the loss is taken in float32
    for n, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[n], rtol=1e-5, atol=1e-7, msg=lambda m, n=n: f"{n}: {m}")


def test_full_experts_drop_the_last_of_a_sequence():
    """Each place of each expert holds the first tokens that chose it, with its weight; the others are left out."""
    torch.manual_seed(0)
    layer = deepseek_moe.MixtureOfExperts(deepseek_moe.CONFIGS["tiny"])
    with torch.no_grad():
        expert, gate = layer.choose(torch.randn(3, 10, 32))
        tokens, weights = layer.fill(expert, gate, 2)
    for b in range(3):
        for e in range(8):
            mine = [(i // 2, gate[b, i].item()) for i in range(20) if expert[b, i] == e][:2]
            places = range(2 * e, 2 * e + 2)
            assert [(tokens[b, p].item(), weights[b, p].item()) for p in places if weights[b, p] > 0] == mine


def test_with_room_for_all_nothing_is_dropped():
    torch.manual_seed(0)
    layer = deepseek_moe.MixtureOfExperts(deepseek_moe.CONFIGS["tiny"]).double()
    layer.capacity = 8 / 2
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    expert, gate = layer.choose(x)
    expected = layer.shared(x)
    for b in range(2):
        for i in range(12):
            e, token = int(expert[b, i]), x[b, i // 2]
            hidden = torch.nn.functional.silu(token @ layer.routed.gate[e]) * (token @ layer.routed.up[e])
            expected[b, i // 2] += gate[b, i] * (hidden @ layer.routed.down[e])
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name, layers", [("llama", 7), ("deepseek_moe", 9)])
def test_the_graph_of_few_layers_makes_that_of_all(name, layers):
    module, _ = MODELS[name]
    model, inputs = module.build("tiny", layers), module.inputs(8, 16, size="tiny")
    made = capture_repeated(model, inputs, {}, torch.device("cpu"))
    assert same_graphs(made, capture(model, inputs, {}, torch.device("cpu")))


@pytest.mark.parametrize("name", MODELS)
def test_the_script_trains(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--size", "tiny", "--steps", "11"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert text.startswith("plan for 4 ranks")
    losses = [float(loss) for loss in re.findall(r"loss is (\d\.\d+)", text)]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
