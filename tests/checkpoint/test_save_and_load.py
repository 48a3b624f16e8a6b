"""Checkpoints: what is loaded is what was saved, for other ranks too, and damaged ones change nothing."""

import json

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.errors import WorldError
from tests import jobs


def make(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.BatchNorm1d(10), nn.Linear(10, 5)).double()
    return model


def train(model, net, optimizer, first, steps):
    for step in range(first, first + steps):
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def values_of(model):
    return {name: sw.full_value(t).clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def trained(rank, folder, load_first, steps, save_at):
    model = make(rank if load_first else 0)
    net = sw.AutoParallel(model) if save_at == 7 else sw.AutoParallel(model).hsdp(threshold=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    first = sw.load(folder, model=net, optimizer=optimizer).step if load_first else 0
    train(model, net, optimizer, first, steps)
    sw.save(folder, model=net, optimizer=optimizer, step=save_at)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adafactor"])
def test_a_resumed_run_is_the_uninterrupted_one(kind, tmp_path):
    make_optimizer = {"SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)}.get(kind, getattr(torch.optim, kind))
    model = make(0)
    optimizer = make_optimizer(model.parameters())
    train(model, model, optimizer, 0, 3)
    sw.save(tmp_path, model=model, optimizer=optimizer, step=3, extra={"epoch": [1, None]})
    train(model, model, optimizer, 3, 3)
    other = make(1)
    again = make_optimizer(other.parameters())
    assert sw.load(tmp_path, model=other, optimizer=again) == (3, {"epoch": [1, None]})
    train(other, other, again, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(values_of(model).values(), values_of(other).values(), strict=True))


def test_ranks_resume_each_others_runs(tmp_path):
    model = make(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, model, optimizer, 0, 7)
    for size, load_first, steps, save_at in ((4, False, 3, 3), (3, True, 2, 5), (1, True, 2, 7)):
        if size == 1:
            trained(0, tmp_path, load_first, steps, save_at)
        else:
            ended = jobs.run(tmp_path, size, trained, tmp_path, load_first, steps, save_at)
            assert [rank.code for rank in ended] == [0] * size, ended
    other = make(5)
    sw.load(tmp_path, model=other)
    for name, value in values_of(model).items():
        torch.testing.assert_close(values_of(other)[name], value, rtol=1e-12, atol=1e-12)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def lead_out(path):
    index = path.with_name("index.json")
    found = json.loads(index.read_text())
    for tensor in found["tensors"].values():
        tensor["slices"][0]["file"] = "../rank-0.safetensors"
    index.write_text(json.dumps(found))


@pytest.mark.parametrize("damage", [flip, lead_out, lambda p: p.write_bytes(p.read_bytes()[:-9]), lambda p: p.unlink()])
def test_damaged_checkpoints_change_nothing(damage, tmp_path):
    path = sw.save(tmp_path, model=make(0))
    damage(path / "rank-0.safetensors")
    other = make(1)
    before = values_of(other)
    with pytest.raises(WorldError, match="nothing was changed"):
        sw.load(tmp_path, model=other)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), values_of(other).values(), strict=True))


def test_all_that_differs_is_listed(tmp_path):
    sw.save(tmp_path, model=nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)))
    with pytest.raises(WorldError, match="(?s)3 problems.*1.weight.*1.bias.*0.weight"):
        sw.load(tmp_path, model=nn.Sequential(nn.Linear(3, 3), nn.Identity()))


def test_a_save_that_was_cut_off_is_cleaned_and_the_one_before_stays(tmp_path):
    model = make(0)
    sw.save(tmp_path, model=model, step=1)
    (tmp_path / ".partial-step-2").mkdir()
    (tmp_path / ".partial-step-2" / "rank-0.safetensors").write_bytes(b"half")
    assert sw.load(tmp_path, model=model).step == 1
    sw.save(tmp_path, model=model, step=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2"]
    assert sw.latest(tmp_path) == tmp_path / "step-2"


def test_extra_that_json_does_not_give_back_is_refused(tmp_path):
    with pytest.raises(WorldError, match="extra\\['a'\\].*\n.*extra\\['c'\\]"):
        sw.save(tmp_path, model=make(0), extra={"a": (1, 2), "b": 1, "c": {3: 4}})
    assert not list(tmp_path.iterdir())
