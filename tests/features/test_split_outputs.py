"""Outputs beside a loss, which stay split over the ranks until they are read."""

from __future__ import annotations

import copy
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.train.outputs.split_output import SplitOutput
from shardwright.world.current import current_world

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
import jobs

from shardwright.agreement import watcher

MODES = ("data_parallel", "auto", "rows")


class Model(nn.Module):
    """Returns a loss, and logits of 2 MiB in float64 beside it."""

    def __init__(self, words=512):
        super().__init__()
        self.embed, self.head = nn.Embedding(words, 24), nn.Linear(24, words)

    def forward(self, ids, gain=1.0):
        logits = self.head(torch.tanh(self.embed(ids))) * gain
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()), "logits": logits, "words": 512}


def made(mode="data_parallel", **settings):
    torch.manual_seed(0)
    model = Model().double()
    single = copy.deepcopy(model)
    net = sw.AutoParallel(model, "semi_auto" if mode == "rows" else mode, **settings)
    if mode == "rows":
        net.shard({"head": ((1, 1, current_world().size),)})  # a pending sum is returned
    return net, model, single, torch.randint(512, (7, 73))


def in_place(out):
    with torch.no_grad():
        out.mul_(2)
    return out + 0


def saved(out):
    file = io.BytesIO()
    torch.save(out, file)
    file.seek(0)
    return torch.load(file)


READS = {
    "sum": lambda out: out.sum(), "index": lambda out: out[1, 2:5], "method": lambda out: out.argmax(-1),
    "torch": lambda out: torch.softmax(out, 1), "list": lambda out: torch.cat([out, out], 1), "operator": lambda out: 2 - out,
    "detach": lambda out: out.detach(), "numpy": lambda out: torch.tensor(np.asarray(out.detach())), 
    "copy": lambda out: copy.deepcopy(out.detach()),
    "number": lambda out: torch.tensor(float(out.detach().max()), dtype=torch.float64), 
    "text": lambda out: torch.tensor(len(f"{out} {out!r}") > 200),
    "iterate": lambda out: next(iter(out)), "to": lambda out: out.to(torch.float32), "data": lambda out: out.data,
    "in place": in_place, "saved": lambda out: saved(out.detach()), "item": lambda out: torch.tensor(out[0, 0, 0].item()),
    "compare": lambda out: (out > 0) & (out == out), "module": lambda out: nn.LayerNorm(512, dtype=torch.float64)(out),
    "tolist": lambda out: torch.tensor(out.tolist()), "view": lambda out: out.view(-1, 512).T,
    "stride": lambda out: torch.tensor(out.stride()),
    "grad_fn": lambda out: torch.tensor(out.grad_fn is not None),
    "leaf": lambda out: torch.tensor(out.is_leaf), "under no_grad": lambda out: torch.no_grad()(torch.sum)(out),
    "inference": lambda out: torch.inference_mode()(torch.sum)(out).item(),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("read", READS)
def test_reading_is_as_reading_the_whole(mode, read):
    sw.init(devices=3)
    net, _, single, ids = made(mode)
    ours, plain = net(ids)["logits"], single(ids)["logits"]
    assert type(ours) is SplitOutput
    assert (ours.shape, ours.dtype, ours.requires_grad, len(ours)) == (plain.shape, plain.dtype, True, 7)
    assert ours._whole is None  # all that can be told without reading
    torch.testing.assert_close(READS[read](ours), READS[read](plain))
    assert type(READS[read](ours)) is not SplitOutput


def through_loss(out):
    out["loss"].backward()


def through_both(out):
    (out["loss"] + out["logits"].square().mean()).backward()


def read_under_no_grad_first(out):
    with torch.no_grad():
        out["logits"].sum()
    (out["logits"].std() * out["loss"]).backward()


def twice(out):
    out["loss"].backward(retain_graph=True)
    out["logits"].mean().backward()


def with_gradient(out):
    out["logits"].backward(torch.ones(7, 73, 512, dtype=torch.float64))


def by_grad(out):
    hooked = []
    out["logits"].register_hook(lambda gradient: hooked.append(gradient.sum()))
    torch.autograd.backward(out["logits"].sum())
    assert hooked[0] == 7 * 73 * 512


def by_function(out):
    torch.autograd.backward([out["logits"]], [torch.ones(7, 73, 512, dtype=torch.float64)])


BACKWARDS = (by_function, through_loss, through_both, read_under_no_grad_first, twice, with_gradient, by_grad)


@pytest.mark.parametrize("output", [None, "sharded", "whole"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backward", BACKWARDS, ids=lambda f: f.__name__)
def test_gradients_through_outputs(backward, mode, output):
    sw.init(devices=4)
    net, model, single, ids = made(mode, output=output)
    for called in (net, single):
        backward(called(ids))
    for ours, expected in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.whole
def test_only_outputs_beside_a_loss_are_split_and_only_large_ones():
    sw.init(devices=2)
    net, model, _, ids = made()
    assert type(net(ids[:2, :4])["logits"]) is torch.Tensor  # 32 kB
    assert type(net(ids)["loss"]) is torch.Tensor
    alone = sw.AutoParallel(lambda ids: model(ids)["logits"], "data_parallel")
    assert type(alone(ids)) is torch.Tensor
    alone = sw.AutoParallel(lambda ids: model(ids)["logits"], "data_parallel", output="sharded")
    out = alone(ids[:2, :4])
    assert type(out) is SplitOutput
    assert [tuple(out.to_local(rank).shape) for rank in range(2)] == [(1, 4, 512)] * 2
    with pytest.raises(sw.errors.ShardwrightError, match=r"to_local\(2\): this process runs the ranks \[0, 1\]"):
        out.to_local(2)
    with pytest.raises(sw.errors.ShardwrightError, match="output='split' is unknown; use one of whole, sharded"):
        sw.AutoParallel(model, output="split")
    with torch.no_grad():
        assert type(net(ids)["logits"]) is SplitOutput
    accumulating = sw.AutoParallel(sw.GradAccumulation(model, 2), output="sharded")
    with pytest.raises(sw.errors.ShardwrightError, match="GradAccumulation joins the results of its parts to whole ones"):
        accumulating(ids[:2])
    hybrid = sw.AutoParallel(model, "hybrid_parallel", output="sharded")
    with pytest.raises(sw.errors.StrategyError, match="a program of one rank has no plan; drop the argument"):
        hybrid(ids)
    with pytest.raises(sw.errors.ShardwrightError, match="reads an output that is split over the ranks: give it output.full"):
        torch.func.vmap(torch.sum)(net(ids)["logits"])


class Leaves(Model):
    """Leaves an activation in an attribute, and may decide by a value."""

    def __init__(self, decides):
        super().__init__()
        self.decides, self.left = decides, None

    def forward(self, ids):
        found = super().forward(ids)
        if self.decides and not torch.isfinite(found["loss"]):
            found["loss"] = found["loss"] * 0
        self.left = found["logits"] * 2
        return found


@pytest.mark.whole
@pytest.mark.parametrize("output", [None, "sharded"])
@pytest.mark.parametrize("decides", [False, True])
def test_what_attributes_are_assigned_is_whole(decides, output):
    sw.init(devices=3)
    model, ids = Leaves(decides).double(), torch.randint(512, (7, 73))
    single = copy.deepcopy(model)
    ours, plain = sw.AutoParallel(model, "data_parallel", output=output)(ids), single(ids)
    assert type(ours["logits"]) is SplitOutput
    assert type(model.left) is torch.Tensor
    torch.testing.assert_close((ours["logits"], model.left), (plain["logits"], single.left))


@pytest.mark.whole
@pytest.mark.parametrize("mode", ["data_parallel", "auto"])
def test_what_is_not_made_whole_is_not_priced_and_takes_no_memory(mode):
    sw.init(devices=4)
    seconds, memory, moves = [], [], []
    for output in ("whole", None):
        net, *_, ids = made(mode, output=output)
        net(ids)["loss"].backward()
        seconds.append(net.plan.price.seconds)
        memory.append(net.plan.memory.peak)
        moves.append(len(net.program.moves))
    assert seconds[1] < seconds[0]
    assert memory[1] < memory[0] - 2**20
    assert moves[1] < moves[0] or mode == "auto"  # whose plan with whole outputs may split nothing


@pytest.mark.whole
def test_outputs_as_inputs_and_in_other_nets():
    sw.init(devices=2)
    net, model, single, ids = made()
    other = sw.AutoParallel(lambda logits: logits.square().mean())
    other(net(ids)["logits"]).backward()
    single(ids)["logits"].square().mean().backward()
    torch.testing.assert_close(model.embed.weight.grad, single.embed.weight.grad)
    step = sw.AutoParallel(lambda ids: model(ids, gain=2.0)["logits"].sum())
    torch.testing.assert_close(step(ids), single(ids, gain=2.0)["logits"].sum())


@pytest.mark.whole
@pytest.mark.parametrize("settings", ["compile", "hsdp", "recompute", "half"])
def test_with_other_features(settings):
    sw.init(devices=2)
    net, model, single, ids = made(**({"compile": "eager"} if settings == "compile" else {}))
    if settings == "hsdp":
        net.hsdp(threshold=0)
    if settings == "recompute":
        net.recompute("head")
    if settings == "half":
        model.bfloat16()
        single.bfloat16()
    for called in (net, single):
        through_both(called(ids))
    close = {"rtol": 5e-2, "atol": 2e-3} if settings == "half" else {}
    for ours, expected in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, **close)


# -- real ranks -------------------------------------------------------------------------------------------------------------


def whole_job(rank, folder):
    sw.init()
    for mode in MODES:
        for backward in (*BACKWARDS, "reads"):
            net, model, single, ids = made(mode)
            if backward == "reads":
                for name in ("sum", "method", "list", "text", "in place", "saved", "numpy"):
                    torch.testing.assert_close(READS[name](net(ids)["logits"]), READS[name](single(ids)["logits"]))
                continue
            for called in (net, single):
                backward(called(ids))
            for ours, expected in zip(model.parameters(), single.parameters(), strict=True):
                torch.testing.assert_close(sw.full_value(ours.grad), expected.grad, rtol=1e-11, atol=1e-12)
        local = net(ids)["logits"].to_local()
        print(f"case {mode}: {local.dim()}")


@pytest.mark.whole
def test_on_real_ranks(tmp_path):
    assert jobs.cases(tmp_path, whole_job) == dict.fromkeys(MODES, "3")


def alone_job(rank):
    watcher._STILL, watcher._GRACE = 1.0, 2.0  # seconds; so that the test is short
    sw.init()
    net, _, _, ids = made()
    for step in range(6):
        out = net(ids)
        if rank == 0 and step == 2:
            print(out["logits"].sum())
        out["loss"].backward()
    print("came through")


@pytest.mark.whole
def test_reading_on_one_rank_alone_ends_the_job(tmp_path):
    ended = jobs.run(tmp_path, 2, alone_job, seconds=60)
    for each in ended:
        assert each.code
        assert "made whole where it is read" in each.text, each.text
        assert each.seconds < 40
        assert "came through" not in each.text
