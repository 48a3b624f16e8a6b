"""Ranks of a real job that do different things are refused on all of them, by name: no hang, no abort, no two functions."""

from __future__ import annotations

import copy
import os
import re
import time

import jobs
import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.agreement import watcher
from shardwright.agreement.checksum import checksum, sketch
from shardwright.agreement.job_watch import watch_of
from shardwright.agreement.signature import differing_value, value_summaries
from shardwright.parameters.whole import full_value

ALL = os.environ.get("SHARDWRIGHT_TEST_ALL") == "1"
MODES = ("data_parallel", "tensor_parallel")


def parallel(model, mode):
    if mode == "data_parallel":
        return sw.AutoParallel(model, "data_parallel")
    tp = sw.Layout((2,), ("tp",))
    return sw.AutoParallel(model).shard({"body.0.weight": tp("tp", "None"), "body.3.weight": tp("None", "tp")})


class Net(nn.Module):
    def __init__(self, other=""):
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 4))
        if other == "layer":
            self.body.append(nn.Linear(4, 4))
        if other == "width":
            self.body[3] = nn.Linear(12, 5)
        if other == "frozen":
            self.body[0].weight.requires_grad_(False)
        if other == "double":
            self.double()
        self.other = other
        self.scale = torch.full((3,), 2.0 if other == "constant" else 1.0)

    def forward(self, x, y=None):
        h = self.body(x)
        if self.other == "relu":
            h = h.relu()
        h = h.square().mean() * torch.sum(self.scale) if self.other != "sum" else h.square().sum()
        return h if y is None else h + y.mean()


# -- all ranks ask: refused on all of them, and the job goes on -------------------------------------------------------------


def batch(rows=6, dtype=torch.float32, seed=1):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


# What rank 1 does otherwise at its first call: how it builds, how it calls, and what the error says.
FIRST = {
    "another relu": ({"other": "relu"}, {}, "rank 1 has 'relu"),
    "sum for mean": ({"other": "sum"}, {}, "other graphs"),
    "another layer": ({"other": "layer"}, {}, "parameter body.4.weight"),
    "another width": ({"other": "width"}, {}, r"parameter body.3.weight \[5, 12\]"),
    "frozen": ({"other": "frozen"}, {}, "rank 1's parameter body.0.weight is frozen, rank 0's trained"),
    "another constant": ({"other": "constant"}, {}, "constant|buffer|scale"),
    "eval": ({"mode": "eval"}, {}, r"rank 1's mode of the model is eval\(\), rank 0's train\(\)"),
    "eval of one module": ({"mode": "dropout"}, {}, r"rank 1's module body.2 is eval\(\), rank 0's as the whole model"),
    "another batch size": ({}, {"rows": 4}, r"rank 1's input 0 is float32 \[4, 8\], rank 0's float32 \[6, 8\]"),
    "requires_grad": ({}, {"grad": True}, r"rank 1's input 0 is float32 \[6, 8\], requires_grad"),
    "one more input": ({}, {"extra": True}, "rank 1's input 1 is float32"),
    "another batch": ({}, {"seed": 2}, r"dataset_strategy\(\"data_parallel\"\)"),
    "no_grad": ({}, {"enabled": False}, r"rank 1's gradient mode is off \(torch.no_grad\), rank 0's on"),
    "another strategy": (
        {"strategy": True},
        {},
        r"rank 0 has 'body.0.weight .* None,None .* rank 1 has 'body.0.weight .* d0,None",
    ),
    "autocast": ({}, {"autocast": True}, "rank 1's autocast on cpu is bfloat16, rank 0's off"),
}


def build(rank, told):
    model = Net(told.get("other", "") if rank else "")
    if rank and told.get("mode") == "eval":
        model.eval()
    if rank and told.get("mode") == "dropout":
        model.body[2].eval()
    net = sw.AutoParallel(model)
    if rank and told.get("strategy"):
        net.shard({"body.0.weight": (2, 1)})
    return net


def call(rank, net, told):
    told = told if rank else {}
    x = batch(told.get("rows", 6), seed=told.get("seed", 1))
    if told.get("grad"):
        x.requires_grad_()
    more = (torch.ones(6, 4),) if told.get("extra") else ()
    with torch.set_grad_enabled(told.get("enabled", True)), torch.autocast("cpu", enabled=told.get("autocast", False)):
        return net(x, *more)


def refusals(rank):
    sw.init()
    for name, (built, called, _) in FIRST.items():
        net = build(rank, built)
        try:
            call(rank, net, called)
        except sw.errors.ShardwrightError as error:
            print(f"case {name}: {type(error).__name__} {error}")
        else:
            print(f"case {name}: accepted")
    # wrong, then right: the same net goes on
    net = sw.AutoParallel(Net().eval())
    try:
        net(batch(6 - rank))
    except sw.errors.WorldError:
        torch.testing.assert_close(net(batch()), Net().eval()(batch()))
    order_and_steps(rank)
    strategies(rank)
    drift(rank)
    accepted(rank)
    print("case the end: reached")


def order_and_steps(rank):
    """Nets in another order, and what a train step calls."""
    nets = [sw.AutoParallel(nn.Linear(8, 4)), sw.AutoParallel(Net())]
    model, loss = nn.Linear(8, 4), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(x):
        optimizer.zero_grad()
        value = loss(model(x), torch.zeros(6, 4))
        value.backward()
        optimizer.step()
        return value.detach()

    cases = {"order": lambda: nets[rank](batch()), "step": lambda: sw.AutoParallel(step)(batch(seed=rank))}
    for name, do in cases.items():
        try:
            do()
        except sw.errors.ShardwrightError as error:
            print(f"case {name}: {type(error).__name__} {error}")
    trained = sw.AutoParallel(step)
    losses = [trained(batch()).item() for _ in range(3)]
    assert losses[2] < losses[0]


def strategies(rank):
    """Slices of other dtypes."""
    for name, make in (("data_parallel", lambda m: sw.AutoParallel(m, "data_parallel")), ("hybrid", hybrid)):
        net = make(Net().eval() if name == "data_parallel" else nn.Linear(8, 4)).dataset_strategy("data_parallel")
        try:
            net(batch(dtype=torch.float64 if rank else torch.float32))
        except sw.errors.ShardwrightError as error:
            print(f"case slices of other dtypes, {name}: {type(error).__name__} {error}")
    net(batch(seed=rank))  # slices may differ


def drift(rank):
    """A weight that one rank changes by hand, where the ranks are to compare them all after every three calls."""
    for name, every in (("other numbers of calls", 3 + rank), ("drift", 3)):
        sw.init(check_weights=every)
        model = Net()
        net, called = sw.AutoParallel(model), 0
        try:
            for step in range(9):
                if step == 4 and rank:
                    model.body[3].bias.data[1] += 0.5
                net(batch(seed=step))
                called += 1
        except sw.errors.ShardwrightError as error:
            print(f"case {name}: {type(error).__name__} {error} after {called}")
    sw.init()


def hybrid(model):
    return sw.AutoParallel(model, "hybrid_parallel")


def accepted(rank):
    """What may differ: seeds, threads, the last bits of inputs, the order in which ranks come, slices of a batch."""
    torch.set_num_threads(1 + rank)
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5))
    net = sw.AutoParallel(model)
    for step in range(140):  # twice past a comparison
        x = batch(seed=step)
        loss = net(x * (1 + 1e-7 * rank)).square().mean()
        loss.backward()
    half = sw.AutoParallel(copy.deepcopy(Net()).bfloat16().eval())
    half((batch().bfloat16() * (1 + 0.002 * rank)).bfloat16())
    with torch.no_grad():
        for step in range(3):
            net(batch(4 + step))
            time.sleep(0.3 * rank)
    sliced = sw.AutoParallel(nn.Linear(8, 4)).dataset_strategy("data_parallel")
    sliced(batch(3 + rank, seed=rank))
    torch.set_num_threads(1)
    print("case what may differ: accepted")


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    ended = jobs.run(tmp_path_factory.mktemp("job"), 2, refusals, seconds=300)
    assert [e.code for e in ended] == [0, 0], ended[0].text[-3000:] + ended[1].text[-3000:]
    return [dict(re.findall(r"^case (.*?): (.*)$", e.text, re.M)) for e in ended]


@pytest.mark.parametrize("name", FIRST)
def test_a_first_call_that_differs_is_refused_by_name(refused, name):
    for said in refused:
        assert said[name].startswith("WorldError")
        assert re.search(FIRST[name][2], said[name]), said[name]


def test_slices_of_other_dtypes_are_refused(refused):
    for said in refused:
        assert "float32 and rank 1 of float64" in said["slices of other dtypes, data_parallel"]
        assert "float64 [6, 8]" in said["slices of other dtypes, hybrid"]


def test_the_order_of_nets_and_the_parts_of_a_step_are_compared(refused):
    for said in refused:
        assert re.search(r"rank 1 is in call 1 of net \d+ \(Net\), rank 0 in call 1 of net \d+ \(Linear\)", said["order"])
        assert "rank 1's input 0 holds other values" in said["step"]


def test_a_weight_that_drifts_is_found_when_asked_for(refused):
    for said in refused:
        assert re.search(r"parameter body.3.bias is another on rank 1 than on rank 0", said["drift"])
        assert 4 <= int(said["drift"].split()[-1]) <= 7
        assert "check_weights=4 on rank 1 and 3 on rank 0: give the same on every rank" in said["other numbers of calls"]


def test_what_may_differ_is_accepted(refused):
    assert all(said["what may differ"] == "accepted" and said["the end"] == "reached" for said in refused)


# -- one rank only does something new: no timeout, no abort -----------------------------------------------------------------


def training(rank, fault, mode):
    watcher._STILL, watcher._GRACE = 1.0, 2.0  # seconds; so that the test is short
    sw.init()
    model = Net()
    net = parallel(model, mode)
    other = sw.AutoParallel(nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-2 if rank and fault == "rate" else 1e-2)
    calls = [model.train, model.eval]
    for step in range(200 if fault in ("skip", "rate") else 8):
        x, enabled = batch(seed=step), True
        if fault == "known mode":
            calls[(step + (rank and step == 5)) % 2]()
        if rank and step == 3:
            if fault == "batch":
                x = batch(4)
            if fault == "dtype":
                x = x.double()
            if fault == "requires_grad":
                x.requires_grad_()
            if fault in ("eval", "eval, caught"):
                model.eval()
            if fault == "another net":
                other(x)
            if fault == "skip":
                continue
            if fault == "full_value":  # as within "if world.rank == 1"
                full_value(model.body[0].weight)
            enabled = fault != "no_grad"
        try:
            with torch.set_grad_enabled(enabled):
                loss = net(x)
        except sw.errors.WorldError as error:
            print(f"refused {error}")
            if fault == "eval, caught":
                time.sleep(14)  # a script that goes on with something else
            raise SystemExit(3) from None
        if fault in ("no_backward", "no_grad") and rank and step == 3:
            continue
        if fault == "fewer steps" and rank and step == 5:
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print("came through")


# fault -> what the ranks say, and the seconds in which the job must be down
ALONE = {
    "batch": (r"rank 1's input 0 is float32 \[4, 8\], rank 0's float32 \[6, 8\]", 15),
    "eval, caught": (r"rank 1's mode of the model is eval\(\), rank 0's train\(\)", 25),
    "no_backward": (r"rank 1 is in call 5 of net 0 \(Net\) where rank 0 is in a backward pass", 25),
    "skip": (r"rank 1's input 0 holds other values than rank 0's", 25),
    "fewer steps": (r"rank 1's script has ended after \d+ calls", 15),
}
ALONE_ALL = {
    "rate": (r"call 64 of net 0 \(Net\): parameter body\.\d\.\w+ is another on rank 1 than on rank 0", 25),
    "eval": ALONE["eval, caught"],
    "dtype": ("rank 1's input 0 is float64", 15),
    "requires_grad": ("requires_grad", 15),
    "no_grad": ("gradient mode is off", 15),
    "another net": (r"rank 1 is in call 1 of net 1 \(Linear\), rank 0 in call 4 of net 0 \(Net\)", 15),
    "known mode": (r"rank 1's mode of the model is train\(\), rank 0's eval\(\)", 15),
}
FULL_VALUE = {"full_value": (r"rank 1 is in full_value of a tensor \[12, 8\] where rank 0 is in call 4", 25)}
CASES = [("batch", "tensor_parallel"), *((fault, "data_parallel") for fault in ("eval, caught", "no_backward", "skip", "rate"))]
if ALL:
    CASES = [*((fault, mode) for fault in {**ALONE, **ALONE_ALL} for mode in MODES if (fault, mode) != ("rate", MODES[1]))]
    CASES += [("full_value", "tensor_parallel")]


@pytest.mark.parametrize(("fault", "mode"), CASES, ids=lambda value: value.replace(" ", "_"))
def test_what_one_rank_does_alone_ends_the_job(tmp_path, fault, mode):
    said, seconds = {**ALONE, **ALONE_ALL, **FULL_VALUE}[fault]
    ended = jobs.run(tmp_path, 2, training, fault, mode, seconds=seconds + 120)
    texts = "\n".join(f"--- rank {r}, code {e.code}\n{e.text[-2500:]}" for r, e in enumerate(ended))
    at_fault = ended[0 if fault in ("no_backward", "fewer steps") else 1]
    assert re.search(said, at_fault.text), texts
    assert re.search(said, ended[0].text), texts  # the rank that did nothing wrong says it too
    assert "EnforceNotMet" not in texts
    assert "came through" not in texts, texts
    assert ended[0].code not in (None, 0), texts
    assert ended[1].code is not None or "caught" in fault, texts


# -- the parts, without a job -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64])
def test_values_are_told_apart_and_rounding_is_not(dtype):
    torch.manual_seed(0)
    for shape in ((), (7,), (300, 41), (0, 3)):
        value = (torch.randn(shape) * 30 + 290).to(dtype)
        other = (torch.randn(shape) * 30 + 290).to(dtype)
        if value.numel():
            assert differing_value(*(value_summaries([v], True) for v in (value, other))) == 0
            assert checksum(value) != checksum(other)
        if dtype.is_floating_point or dtype.is_complex:
            near = value + value * torch.finfo(dtype).eps * 0.9
            assert differing_value(*(value_summaries([v], True) for v in (value, near))) is None
        assert differing_value(*(value_summaries([v], True) for v in (value, value.clone()))) is None
    assert value_summaries([torch.empty(3, device="meta"), torch.eye(2).to_sparse(), 3]) == [None, None, None]


def test_a_sketch_is_finite_where_the_values_are_not():
    assert all(abs(n) < 1e9 for n in sketch(torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])))


def test_a_simulated_world_has_no_watch():
    assert watch_of(sw.init(devices=4)) is None
    with pytest.raises(sw.errors.ShardwrightError):
        sw.AutoParallel(Net()).shard({"nothing": (1,)})(batch())
