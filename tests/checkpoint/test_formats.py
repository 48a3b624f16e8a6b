"""Checkpoints offline, and those of others: what is written anew in other slices and formats has the same values."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

import shardwright as sw
from shardwright.checkpoint import rewrite
from shardwright.checkpoint.source import open_source
from shardwright.checkpoint.strategy_files import Slicing
from shardwright.cli.main import main
from shardwright.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Net(nn.Module):
    """Tied weights, a buffer, a number, several dtypes, an empty tensor and odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.norm, self.half = nn.BatchNorm1d(13), nn.Linear(7, 5).bfloat16()
        self.scale, self.nothing = nn.Parameter(torch.randn(())), nn.Parameter(torch.empty(0, 3))
        self.register_buffer("flags", torch.tensor([True, False, True]))


def saved(folder: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    sum(p.float().square().sum() for p in model.parameters()).backward()
    optimizer.step()
    sw.save(folder, model=model, optimizer=optimizer, step=3, extra={"epoch": 1})
    return model, optimizer


def loads(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Loads into others, which must then be alike."""
    torch.manual_seed(1)
    other = Net()
    again = torch.optim.AdamW(other.parameters(), 0.5)
    if optimizer is None:
        sw.load(folder, model=other)
    else:
        assert sw.load(folder, model=other, optimizer=again) == (3, {"epoch": 1})
        one, two = optimizer.state_dict(), again.state_dict()
        assert one["param_groups"] == two["param_groups"]
        for number, own in one["state"].items():
            assert all(torch.equal(own[key], two["state"][number][key]) for key in own)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    assert other.head.weight is other.embed.weight


def run(*arguments: Any) -> int:
    return main(["checkpoint", *map(str, arguments)])


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 16])
def test_written_for_any_number_of_ranks(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(rewrite, "_BLOCK", 64)  # a few rows at a time
    model, optimizer = saved(tmp_path / "a")
    assert run("transform", tmp_path / "a", tmp_path / "b", "--ranks", ranks) == 0
    assert len(list((tmp_path / "b/step-3").glob("rank-*"))) == ranks
    assert run("verify", tmp_path / "b") == 0
    loads(tmp_path / "b", model, optimizer)
    assert run("merge", tmp_path / "b", tmp_path / "c") == 0
    assert {len(t.slices) for t in open_source(tmp_path / "c/step-3").index.tensors.values()} == {1}
    loads(tmp_path / "c", model, optimizer)


def test_written_as_a_plan_has_it(tmp_path):
    sw.init(devices=6)
    model, optimizer = saved(tmp_path / "a")
    grid = sw.Layout((2, 3), ("x", "y"))
    entries = {"embed.weight": grid(("x", "y"), "None"), "half.weight": grid("None", "x")}
    plan = {
        "format": "shardwright plan", "version": 1, "devices": 6, "mesh": "x=2,y=3",
        "parameters": {name: {"layout": str(layout).split(" @ ")[0]} for name, layout in entries.items()},
    }  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert run("transform", tmp_path / "a", tmp_path / "b", "--plan", tmp_path / "plan.json") == 0
    tensors = open_source(tmp_path / "b/step-3").index.tensors
    assert len(tensors["model.embed.weight"].slices) == len(tensors["optimizer.state.model.embed.weight.exp_avg"].slices) == 6
    assert len(tensors["model.half.weight"].slices) == 2
    loads(tmp_path / "b", model, optimizer)


def test_exported_to_hugging_face_and_back(tmp_path):
    model, _ = saved(tmp_path / "a")
    assert run("export", tmp_path / "a", tmp_path / "one", "--to", "huggingface") == 0
    there = load_file(tmp_path / "one/model.safetensors")
    assert "head.weight" not in there
    assert torch.equal(there["embed.weight"], model.embed.weight)
    loads(tmp_path / "one", model)
    assert run("export", tmp_path / "a", tmp_path / "many", "--to", "huggingface", "--shard", "300") == 0
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    loads(tmp_path / "many", model)
    assert run("transform", tmp_path / "many", tmp_path / "again", "--ranks", 2) == 0
    loads(tmp_path / "again", model)
    assert run("export", tmp_path / "a", tmp_path / "narrow", "--to", "huggingface", "--dtype", "bfloat16") == 0
    assert load_file(tmp_path / "narrow/model.safetensors")["embed.weight"].dtype == torch.bfloat16


def test_exported_to_torch_and_its_checkpoints_and_back(tmp_path):
    model, optimizer = saved(tmp_path / "a")
    assert run("export", tmp_path / "a", tmp_path / "model.pt", "--to", "torch") == 0
    other = Net()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert run("export", tmp_path / "a", tmp_path / "dcp", "--to", "dcp") == 0
    state = {"model": Net().state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state["model"].items())
    own = {key: value for key, value in model.state_dict().items() if value.numel()}
    dcp.save(own, checkpoint_id=tmp_path / "theirs", no_dist=True)
    with pytest.raises(CheckpointError, match=r"model\.nothing is in the model and not in the checkpoint"):
        loads(tmp_path / "theirs", model)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "all", no_dist=True)
    loads(tmp_path / "all", model)
    trained = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 3}
    dcp.save(trained, checkpoint_id=tmp_path / "trained", no_dist=True)
    loads(tmp_path / "trained", model)


class Runs:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_nothing_in_metadata_or_slices_of_others_is_run(tmp_path):
    """The metadata of DCP is a pickle, and its slices are files of torch.save."""
    model, _ = saved(tmp_path / "a")
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    good = (tmp_path / "dcp/.metadata").read_bytes()
    for forged in (Runs(tmp_path / "ran"), [eval], {"state_dict_metadata": Runs(tmp_path / "ran")}, 3, {}):
        (tmp_path / "dcp/.metadata").write_bytes(pickle.dumps(forged))
        with pytest.raises(CheckpointError, match="metadata"):
            sw.load(tmp_path / "dcp", model=Net())
    draw = random.Random(0)
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        (tmp_path / "dcp/.metadata").write_bytes(bad)
        with contextlib.suppress(CheckpointError):
            sw.load(tmp_path / "dcp", model=Net())
    (tmp_path / "dcp/.metadata").write_bytes(good)
    slices = next((tmp_path / "dcp").glob("*.distcp"))
    index = open_source(tmp_path / "dcp").index.tensors["embed.weight"].slices[0]
    offset, length = map(int, index.key.split(":"))
    evil = pickle.dumps(Runs(tmp_path / "ran")).ljust(length, b".")
    content = bytearray(slices.read_bytes())
    content[offset : offset + length] = evil[:length]
    slices.write_bytes(content)
    other = Net()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="damaged"):
        sw.load(tmp_path / "dcp", model=other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert not (tmp_path / "ran").exists()


def strategies(draw: random.Random, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Any]]:
    """A device matrix, and for each parameter a tensor map and a group of optimizer parallel that fit."""
    matrix = [draw.choice([1, 2, 3]) for _ in range(draw.randint(1, 3))]
    found = {}
    for name, shape in shapes.items():
        free = list(range(len(matrix)))
        maps = []
        for size in shape:
            fits = [axis for axis in free if size % matrix[-1 - axis] == 0]
            axis = draw.choice([-1, *fits])
            maps.append(axis)
            free = [a for a in free if a != axis]
        own = {"dev_matrix": matrix, "tensor_map": maps, "param_split_shape": [], "indices_offset": [], "field": 0,
               "opt_weight_shard_step": 0, "opt_weight_shard_size": 0}  # fmt: skip
        split = math.prod(matrix[-1 - axis] for axis in maps if axis >= 0)
        rows = shape[0] // (matrix[-1 - maps[0]] if maps[0] >= 0 else 1)
        replicas = math.prod(matrix) // split
        if replicas > 1 and rows % replicas == 0 and draw.random() < 0.5:
            own["opt_weight_shard_size"] = draw.choice([-1, replicas])
        found[name] = own
    return found


def slices_by_hand(own: dict[str, Any], rank: int, value: torch.Tensor) -> torch.Tensor:
    """The slice of a rank, worked out in another way: by walking over all positions."""
    places = list(product(*map(range, own["dev_matrix"])))
    alike = []
    for place in places:
        cut = value
        for dim, axis in enumerate(own["tensor_map"]):
            if axis >= 0:
                cut = cut.chunk(own["dev_matrix"][len(place) - 1 - axis], dim)[place[len(place) - 1 - axis]]
        alike.append(cut)
    mine = alike[rank]
    same = [r for r in range(len(places)) if alike[r].data_ptr() == mine.data_ptr() and alike[r].shape == mine.shape]
    return mine.chunk(len(same), 0)[same.index(rank)] if own["opt_weight_shard_size"] else mine


@pytest.mark.parametrize("seed", range(12))
def test_folders_of_ranks_by_strategy_files(seed, tmp_path):
    """From folders by one strategy to folders by another one, to one of ours, and whole."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    values = {"w": torch.randn(36, 12), "v": torch.randn(72), "t": torch.randn(12, 6, 18), "step": torch.tensor(5)}
    shapes = {name: tuple(value.shape) for name, value in values.items() if value.dim()}
    for folder in ("one", "two"):
        strategy = strategies(draw, shapes)
        (tmp_path / f"{folder}.json").write_text(json.dumps({"current_stage": 0, "parallel_layout_item": strategy}))
    for folder in ("one", "two"):
        strategy = json.loads((tmp_path / f"{folder}.json").read_text())["parallel_layout_item"]
        ranks = math.prod(strategy["w"]["dev_matrix"])
        if folder == "one":
            for rank in range(ranks):
                own = {n: slices_by_hand(strategy[n], rank, v).clone() if v.dim() else v for n, v in values.items()}
                (tmp_path / f"one/rank_{rank}").mkdir(parents=True)
                save_file(own, tmp_path / f"one/rank_{rank}/checkpoint{rank}.safetensors")
        else:
            given = (tmp_path / "one", tmp_path / "two", "--source-strategy", tmp_path / "one.json")
            assert run("transform", *given, "--strategy", tmp_path / "two.json", "--prefix", "net") == 0
            for rank in range(ranks):
                there = load_file(tmp_path / f"two/rank_{rank}/net{rank}.safetensors")
                for name, value in values.items():
                    wanted = slices_by_hand(strategy[name], rank, value) if value.dim() else value
                    assert torch.equal(there[name], wanted), (name, rank, strategy[name])
    assert run("merge", tmp_path / "two", tmp_path / "whole", "--source-strategy", tmp_path / "two.json") == 0
    module = nn.Module()
    for name, value in values.items():
        module.register_buffer(name, torch.zeros_like(value))
    sw.load(tmp_path / "whole", model=module)
    assert all(torch.equal(getattr(module, name), value) for name, value in values.items())


def test_optimizer_parallel_in_steps():
    slicing = Slicing((4,), ((-1,),), pieces=2, step=2)
    assert Slicing((4,), ((),), pieces=2, step=2).bounds((4,)) == [((0, 2),), ((0, 2),), ((2, 4),), ((2, 4),)]
    assert slicing.tensor_map == ((-1,),)


def test_what_does_not_fit_is_told_before_anything_is_written(tmp_path, capsys):
    saved(tmp_path / "a")
    assert run("inspect", tmp_path / "a") == 0
    text = capsys.readouterr().out
    assert "tied: model.head.weight is model.embed.weight" in text
    assert "model.half.weight" in text
    cases = {
        ("inspect", tmp_path / "none"): "there is no folder",
        ("verify", tmp_path / "a", "--step", 4): "it has the steps 3",
        ("merge", tmp_path / "a", tmp_path / "a"): "name another folder",
        ("transform", tmp_path / "a", tmp_path / "b", "--plan", tmp_path / "no.json"): "there is no plan file",
        ("transform", tmp_path / "a", tmp_path / "b", "--strategy", tmp_path / "no.ckpt"): "ends in .json",
    }
    for arguments, wanted in cases.items():
        assert run(*arguments) == 2
        assert wanted in capsys.readouterr().err, arguments
    file = tmp_path / "a/step-3/rank-0.safetensors"
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)
    assert run("verify", tmp_path / "a") == 1
    assert "1 of" in capsys.readouterr().out
    assert run("merge", tmp_path / "a", tmp_path / "b") == 2
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_the_commands_of_the_page(tmp_path, monkeypatch):
    """Every command of docs/checkpoints.md, in its order."""
    page = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text()
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("shardwright checkpoint ")]
    monkeypatch.chdir(tmp_path)
    model, _ = saved(Path("run"))
    entry = {"layout": "x,None", "shape": [11, 6]}
    plan = {"format": "shardwright plan", "version": 1, "devices": 2, "mesh": "x=2", "parameters": {"embed.weight": entry}}
    Path("plan.json").write_text(json.dumps(plan))
    for name, matrix in (("one", [2]), ("two", [1, 3])):
        own = {"dev_matrix": matrix, "tensor_map": [0] if name == "one" else [-1]}
        Path(f"{name}.json").write_text(json.dumps({"parallel_layout_item": {"w" if name == "one" else "norm.weight": own}}))
    for rank in range(2):
        Path(f"sliced/rank_{rank}").mkdir(parents=True)
        save_file({"w": torch.full((3,), float(rank))}, f"sliced/rank_{rank}/a.safetensors")
    assert len(commands) > 10
    for command in commands:
        assert main(command) == 0, command
    for folder in ("run-on-6", "as-planned", "whole", "dcp", "merged-slices"):
        loads(Path(folder), model)
