"""Distributed parameters in the user's own code: right, or refused with what to write; simulated, all of it is right."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import warnings

import jobs
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import shardwright as sw

ALL = os.environ.get("SHARDWRIGHT_TEST_ALL") == "1"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.a(x).tanh())


X = torch.linspace(-1, 1, 24).view(6, 4)
MODES = {
    "data_parallel": lambda m: sw.AutoParallel(m, "data_parallel"),
    "hsdp": lambda m: sw.AutoParallel(m).hsdp(threshold=0),
    "tensor_parallel": lambda m: sw.AutoParallel(m).shard({"a.weight": (sw.current_size(), 1)}),
}


def made(mode, train=True):
    """A model and its net after a step, and the single device's model after the same."""
    model, plain = Net(), Net()
    net = MODES[mode](model)
    for run in (net, plain):
        loss = run(X).square().sum()
        if train:
            loss.backward()
    return model, net, plain


READINGS = {
    "item": lambda t: t.norm().item(),
    "float": lambda t: float(t.sum()),
    "int": lambda t: int(t.sum() * 100),
    "bool": lambda t: bool(t.mean() > 0.01),
    "if": lambda t: 1 if (t > 0.4).any() else 0,
    "format": lambda t: f"{t.mean():.3f}",
    "max": lambda t: t.max().item(),
    "isnan": lambda t: torch.isnan(t).any().item(),
    "count": lambda t: (t > 0).sum().item(),
    "norms": lambda t: t.norm().item() ** 2,
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: np.asarray(t).sum().item(),
    "element": lambda t: t[0, 0].item(),
    "complex": lambda t: complex(t.norm()).real,
    "in": lambda t: 12.5 in t,
    "std": lambda t: t.std().item(),
    "quantile": lambda t: t.quantile(0.3).item(),
    "largest norm": lambda t: t.norm(float("inf")).item(),
    "norm of rows": lambda t: t.norm(dim=1).tolist(),
    "allclose": lambda t: torch.allclose(t, t * 1.0) and not torch.equal(t, t + 1),
    "print": lambda t: re.sub(r"\d\.\d+", "number", repr(t)),
}


def same(a, b):
    if isinstance(a, (list, float)):
        return bool(np.allclose(a, b, rtol=1e-5, atol=1e-6))
    return a == b


def readings(mode, case):
    model, net, plain = made(mode)
    for name, read in READINGS.items():
        mine_and_true = (model.a.weight, plain.a.weight), (model.a.weight.grad, plain.a.weight.grad)
        for what, (mine, true) in zip(("value", "gradient"), mine_and_true, strict=True):
            expected = read(true.detach())
            got = read(mine.detach())
            case(f"{mode} {name} {what}", "right" if same(expected, got) else f"WRONG {got} for {expected}")


def norms(mode, case):
    model, net, plain = made(mode)
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    case(f"{mode} float(total_norm)", "right" if same(float(expected), float(total)) else "WRONG")
    assert same(sw.full_value(total).item(), expected.item())
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, sw.full_value(b.grad))
    case(f"{mode} clip_grad_norm_", "right")


def assign(model, plain, how):
    """What users do to ``.data``."""
    if how == "zeros":
        for m in (model, plain):
            m.a.weight.data = torch.zeros(6, 4)
            m.a.bias.data = torch.zeros_like(m.a.bias)
    elif how == "sam":  # a step away and back
        for m in (model, plain):
            old = [p.data.clone() for p in m.parameters()]
            for p in m.parameters():
                p.data = p.data + 0.1 * p.grad
            for p, kept in zip(m.parameters(), old, strict=True):
                p.data = kept
    elif how == "vector":
        vector = torch.arange(sum(p.numel() for p in plain.parameters())) * 0.01
        for m in (model, plain):
            nn.utils.vector_to_parameters(vector, m.parameters())
    elif how == "swap":
        for m in (model, plain):
            m.a.weight.data = m.a.weight.data.flip(0)
    elif how == "whole":
        for m in (model, plain):
            m.b.weight.data = sw.full_value(m.b.weight) * 2


def assignments(mode, case):
    for how in ("zeros", "sam", "vector", "swap", "whole"):
        model, net, plain = made(mode)
        assign(model, plain, how)
        for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.detach(), sw.full_value(b), msg=f"{mode} {how} {name}")
        torch.testing.assert_close(net(X), plain(X))
        net(X).sum().backward()
        case(f"{mode} data = {how}", "right")
    for value in (torch.zeros(3, 4), torch.zeros(6, 4).double()):
        with pytest.raises(sw.errors.WorldError, match="give the whole tensor"):
            model.a.weight.data = value


DRAWS = {
    "normal_": lambda p: nn.init.normal_(p),
    "xavier_uniform_": lambda p: nn.init.xavier_uniform_(p),
    "kaiming_normal_": lambda p: nn.init.kaiming_normal_(p),
    "bernoulli_": lambda p: p.data.bernoulli_(0.4),
    "exponential_": lambda p: p.data.exponential_(),
    "noise": lambda p: p.data.add_(torch.randn_like(p)),
    "rand_like": lambda p: p.data.copy_(torch.rand_like(p) * 2),
    "randint_like": lambda p: p.data.copy_(torch.randint_like(p, 7)),
    "dropout": lambda p: p.data.copy_(torch.dropout(p.data, 0.5, True)),
    "bernoulli": lambda p: p.data.copy_(torch.bernoulli(p.data.abs().clamp(max=1))),
    "trunc_normal_": lambda p: nn.init.trunc_normal_(p),
    "orthogonal_": lambda p: nn.init.orthogonal_(p),
    "sparse_": lambda p: nn.init.sparse_(p, 0.4),
    "kaiming_uniform_": lambda p: nn.init.kaiming_uniform_(p),
    "xavier_normal_": lambda p: nn.init.xavier_normal_(p),
    "eye_": lambda p: nn.init.eye_(p),
    "constant_": lambda p: nn.init.constant_(p, 0.3),
    "dirac_": lambda p: nn.init.dirac_(p.view(6, 2, 2)),
}


def draws(mode, case, rank):
    model, net, plain = made(mode)
    net.zero_grad()
    for name, draw in DRAWS.items():
        torch.manual_seed(7)
        with torch.no_grad():
            draw(plain.a.weight)
        torch.manual_seed(7 + 100 * rank)  # rank 0's numbers are drawn
        with torch.no_grad():
            draw(model.a.weight)
        equal = torch.allclose(sw.full_value(model.a.weight), plain.a.weight, atol=1e-5)
        case(f"{mode} {name}", "right" if equal else "WRONG")
    torch.manual_seed(7)
    plain.b.reset_parameters()
    torch.manual_seed(7 + rank)
    model.b.reset_parameters()
    for a, b in zip(plain.b.parameters(), model.b.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), sw.full_value(b))
    torch.testing.assert_close(net(X), plain(X))
    case(f"{mode} reset_parameters", "right")


def copies(mode, case, folder):
    model, net, plain = made(mode)
    best = copy.deepcopy(model)  # without gradients, as torch copies parameters
    gradients = copy.deepcopy([p.grad for p in model.parameters()])
    assert all(p.grad is None for p in best.parameters())
    for p, gradient in zip(best.parameters(), gradients, strict=True):
        p.grad = gradient
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
            p.grad.mul_(3)
    for a, b in zip(plain.parameters(), best.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), sw.full_value(b))
        torch.testing.assert_close(a.grad, sw.full_value(b.grad))
    optimizer = torch.optim.AdamW(best.parameters(), 1e-3)
    optimizer.step()
    copy.deepcopy(optimizer)
    case(f"{mode} deepcopy", "right")
    for what in (model.state_dict(), optimizer.state_dict()):
        file = io.BytesIO()
        try:
            torch.save(what, file)
        except sw.errors.WorldError as error:
            case(f"{mode} torch.save", "refused" if "net.whole()" in str(error) else f"unclear {error}")
        else:
            file.seek(0)
            if "a.weight" in what:
                Net().load_state_dict(torch.load(file))  # a plain model takes it
            case(f"{mode} torch.save", "right")
    whole = {name: sw.full_value(value) for name, value in model.state_dict().items()}
    file = io.BytesIO()
    torch.save(whole, file)
    file.seek(0)
    other = Net()
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(X), net(X))
    state = {"model": best.state_dict()}
    dcp.save(state, checkpoint_id=os.path.join(folder, mode))
    kept = {n: sw.full_value(v).clone() for n, v in best.state_dict().items()}
    with torch.no_grad():
        for p in best.parameters():
            p.zero_()
    dcp.load(state, checkpoint_id=os.path.join(folder, mode))
    for name, value in best.state_dict().items():
        torch.testing.assert_close(sw.full_value(value), kept[name])
    case(f"{mode} checkpoint", "right")


def modes_of_torch(mode, case):
    """The first call under inference_mode, or by compile, then training."""
    for start in ("call", "compile", "no_grad"):
        model, plain = Net(), Net()
        net = MODES[mode](model)
        with torch.no_grad() if start == "no_grad" else torch.inference_mode():
            if start == "compile":
                net.compile(X)
            else:
                torch.testing.assert_close(net(X), plain(X))
        for run in (net, plain):
            run(X).square().sum().backward()
        for a, b in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, sw.full_value(b.grad))
        case(f"{mode} inference {start}", "right")


def replaced(mode, case):
    model, net, plain = made(mode)
    for m in (model, plain):
        m.a.weight = nn.Parameter(torch.full((6, 4), 0.25))
        m.zero_grad()
    for run in (net, plain):
        run(X).square().sum().backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, sw.full_value(b.grad))
    torch.testing.assert_close(net(X), plain(X))
    case(f"{mode} replaced", "right")
    model.a.weight = nn.Parameter(torch.zeros(5, 4))
    try:
        net(X)
    except (sw.errors.ShardwrightError, RuntimeError) as error:
        case(f"{mode} replaced by another shape", f"refused {type(error).__name__}")


def everything(mode, case, rank, folder):
    readings(mode, case)
    norms(mode, case)
    assignments(mode, case)
    draws(mode, case, rank)
    copies(mode, case, folder)
    modes_of_torch(mode, case)
    replaced(mode, case)


def job(rank, folder):
    warnings.simplefilter("ignore")
    world = sw.init()
    sw.current_size = lambda: world.size
    for mode in MODES:
        everything(mode, lambda name, said: print(f"case {name}: {said}"), rank, folder)
    elsewhere(rank)
    print("case the end: right")


def elsewhere(rank):
    """DTensors that are not ours are torch's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    theirs = distribute_tensor(torch.arange(8.0), init_device_mesh("cpu", (2,), mesh_dim_names=("theirs",)), [Shard(0)])
    assert theirs.sum().item() in (6.0, 22.0)
    theirs.normal_()
    theirs.data = theirs + 1
    with contextlib.suppress(TypeError):
        f"{theirs.sum():.2f}"
    copy.deepcopy(theirs)
    print("case theirs: right")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return jobs.cases(tmp_path_factory.mktemp("job"), job)


def test_nothing_is_silently_wrong_on_real_ranks(cases):
    assert cases["the end"] == cases["theirs"] == "right"
    assert {n: said for n, said in cases.items() if not said.startswith(("right", "refused"))} == {}


@pytest.mark.parametrize("mode", MODES)
def test_readings_are_the_single_devices(cases, mode):
    for name in READINGS:
        for what in ("value", "gradient"):
            assert cases[f"{mode} {name} {what}"] == "right", name


@pytest.mark.parametrize("mode", MODES)
def test_draws_are_the_single_devices(cases, mode):
    for name in DRAWS:
        assert cases[f"{mode} {name}"] == "right", name


@pytest.mark.parametrize("mode", MODES)
def test_saving_copying_replacing(cases, mode):
    assert cases[f"{mode} torch.save"] == ("right" if mode == "data_parallel" else "refused")
    for name in ("deepcopy", "checkpoint", "replaced", "inference call", "inference compile", "reset_parameters"):
        assert cases[f"{mode} {name}"] == "right"
    assert cases[f"{mode} replaced by another shape"].startswith("refused")


@pytest.mark.parametrize("mode", MODES)
def test_all_of_it_is_right_on_simulated_ranks(mode, monkeypatch):
    monkeypatch.setattr(sw, "current_size", lambda: 2, raising=False)
    sw.init(devices=2)
    said = {}
    readings(mode, said.__setitem__)
    norms(mode, said.__setitem__)
    draws(mode, said.__setitem__, 0)
    modes_of_torch(mode, said.__setitem__)
    assert set(said.values()) == {"right"}, said
    model, net, plain = made(mode)
    for how in ("zeros", "sam", "vector", "swap", "whole"):
        assign(model, plain, how)
        torch.testing.assert_close(net(X), plain(X))
    copy.deepcopy(model)
    torch.save(model.state_dict(), io.BytesIO())
    for m in (model, plain):
        m.a.weight = nn.Parameter(torch.full((6, 4), 0.25))
    torch.testing.assert_close(net(X), plain(X))
