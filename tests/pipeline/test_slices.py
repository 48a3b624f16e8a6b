"""Slices of the sequence compute what the single device computes, or are refused; they need less of a rank at once."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sliced_networks import WORDS, Decoder, Parts, batch_of
from test_pipeline import MODES, same, train
from torch import nn
from torch.nn import functional as F

import shardwright as sw
from shardwright.pipeline.schedules.actions import Action
from shardwright.pipeline.schedules.check import check_schedule
from shardwright.pipeline.schedules.named import make_schedule
from shardwright.pipeline.schedules.schedule import Schedule

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
import jobs

D = torch.float64


def check(model: nn.Module, args: Any, micro: int, slices: int, stages: Any = 2, mode: str = "semi_auto", **more) -> Any:
    """Trains a network and evaluates it, in slices and on one device."""
    single = copy.deepcopy(model)
    net = sw.AutoParallel(sw.PipelineCell(model, micro), mode)
    net.pipeline(stages=stages, **{"scheduler": "seqpipe", "slices": slices, **more})
    args, kwargs = args if isinstance(args[-1], dict) else (args, {})
    same(train(net, model, args, kwargs, 1), train(single, single, args, kwargs, 1))
    for (path, ours), theirs in zip(model.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, path=path: f"{path}: {text}")
    return net


def generated() -> list[Any]:
    """Draws decoders, ranks, micro-batches, slices and lengths; the second is not long."""
    draw, found = random.Random(0), []
    while len(found) < 60:
        parts, (devices, stages) = Parts.drawn(draw), draw.choice([(2, 2), (4, 2), (3, (1, 2)), (1, 1), (4, (1, 3)), (4, 4)])
        micro, slices, samples = draw.randint(1, 4), draw.randint(2, 4), draw.choice([1, 2, 3, 4, 5, 8])
        length, mode = draw.randint(4, 8), draw.choice(MODES)
        if micro * slices < devices or slices > length - (parts.loss == "cut tokens"):
            continue
        case = (parts, devices, stages, micro, slices, samples, length, mode)
        marks = [pytest.mark.long] if len(found) != 1 else []
        found.append(pytest.param(*case, id="-".join(map(str, case)), marks=marks))
    return found


@pytest.mark.parametrize("parts,devices,stages,micro,slices,samples,length,mode", generated())
def test_decoders(parts, devices, stages, micro, slices, samples, length, mode):
    sw.init(devices=devices)
    check(Decoder(parts, length, 2).double(), batch_of(samples, length), micro, slices, stages, mode)


class Around(nn.Module):
    """One layer of attention, and anything after it."""

    def __init__(self, after):
        super().__init__()
        self.embed, self.qkv, self.out, self.head = nn.Embedding(20, 8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 20)
        self.conv, self.gru, self.norm = nn.Conv1d(8, 8, 3, padding=1), nn.GRU(8, 8, batch_first=True), nn.BatchNorm1d(8)
        self.mix, self.rows, self.after = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(24, 8)), after

    def attend(self, x, **how):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2).flatten(2))

    def forward(self, ids):
        x = self.embed(ids)
        found = self.after(self, x + self.attend(x, is_causal=True), ids)
        return found if isinstance(found, tuple) else self.head(found).square().mean()


def tri():
    return torch.ones(6, 6, dtype=torch.bool).tril()


def cross_entropy(s, x, target, **more):
    return F.cross_entropy(s.head(x).flatten(0, 1), target.flatten(), **more)


EXACT = {
    "mask": lambda s, x, i: x + s.attend(x, attn_mask=tri()),
    "mask of numbers": lambda s, x, i: x + s.attend(x, attn_mask=torch.full((6, 6), -torch.inf, dtype=D).triu(1)),
    "parts": lambda s, x, i: x[:, 1:5][:, 1:],
    "last position": lambda s, x, i: x[:, -1:],
    "heads in rows": lambda s, x, i: x.view(4, 6, 2, 4).transpose(1, 2).reshape(8, 6, 4).tanh().view(4, 2, 6, 4)
    .transpose(1, 2).flatten(2),
    "channels in rows": lambda s, x, i: x.reshape(24, 2, 4).mT.reshape(24, 8).view(4, 6, 8),
    "elements": lambda s, x, i: x.reshape(-1).tanh().view(4, 6, 8),
    "a dim of one": lambda s, x, i: x.unflatten(1, (6, 1)).tanh().flatten(1, 2),
    "positions first": lambda s, x, i: F.dropout(x.transpose(0, 1), 0.3).transpose(0, 1),
    "numbers of rows": lambda s, x, i: (x.flatten(0, 1) * torch.arange(24, dtype=D)[:, None]).view(x.shape),
    "random numbers": lambda s, x, i: (x.flatten(0, 1) + torch.rand(24, 8, dtype=D)).view(x.shape) + torch.rand_like(x),
    "one hot": lambda s, x, i: F.one_hot(i, 20).to(D) @ s.embed.weight + x,
    "means of samples": lambda s, x, i: ((x.square().mean((1, 2)) + 1).mean(), x.square().mean((1, 2))),
    "masked mean": lambda s, x, i: ((x.square().mean(-1) * (i > 3)).sum() / (i > 3).sum(),),
    "two losses": lambda s, x, i: (
        cross_entropy(s, x[:, :-1], i[:, 1:], weight=torch.linspace(1, 2, 20, dtype=D))
        + 0.3 * cross_entropy(s, x[:, :-2], i[:, 2:], label_smoothing=0.1) + 1.5,
    ),
    "losses of tokens": lambda s, x, i: (cross_entropy(s, x, i, reduction="none").view(4, 6).mean(1).mean(),),
    "rows returned": lambda s, x, i: (x.mean(), x.flatten(0, 1), x.transpose(0, 1), i.flatten(), i),
    "attention of inputs": lambda s, x, i: x + F.scaled_dot_product_attention(x, x, s.embed(i), is_causal=True),
}  # fmt: skip


@pytest.mark.parametrize("micro,slices,stages", [(2, 2, 2), (1, 3, 1), (4, 2, 4)])
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.long
def test_what_rules_let_pass_is_exact(name, micro, slices, stages):
    sw.init(devices=stages)
    check(Around(EXACT[name]).double(), (torch.randint(20, (4, 6)),), micro, slices, stages)


def cut_in_ranks(name: str, block: nn.Module) -> None:
    """Splits a block among the ranks of its stage."""
    if name == "sums":
        sw.shard(block.down, ((1, 1, 2),))
    elif name == "heads":
        sw.shard(block.out, ((1, 1, 2),))
        sw.shard(block.q, ((1, 1, 1),), out_strategy=((1, 1, 2),))
    else:
        sw.shard(block.kv, ((1, 2, 1),))
        sw.shard(block.up, ((1, 2, 1),))


@pytest.mark.long
@pytest.mark.parametrize("mode", ["semi_auto", "sharding_propagation"])
@pytest.mark.parametrize("name", ["sums", "heads", "positions", "stored in pieces", "computed again"])
def test_stages_split_among_their_ranks(name, mode):
    sw.init(devices=4)
    parts = Parts("rotary", "grouped" if name == "positions" else "dropped", loss="padded labels")
    model = Decoder(parts, 7, 2).double()
    single, args = copy.deepcopy(model), batch_of(5, 7)
    for block in model.blocks:
        cut_in_ranks(name, block)
    net = sw.AutoParallel(sw.PipelineCell(model, 2), mode).pipeline(stages=2, scheduler="seqpipe", slices=3)
    if name == "stored in pieces":
        net.hsdp()
    elif name == "computed again":
        net.recompute(model.blocks)
    same(train(net, model, args, {}, 1), train(single, single, args, {}, 1))
    for ours, theirs in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


WHOLE = r"(?s)cannot pass in 2 slices; with scheduler=\"1f1b\", without slices=, it is whole.*"
REFUSED = {
    r"conv \(aten.conv1d\) at .*needs dim 2 of its input 0 whole, which is the sequence": lambda s, x, i: s.conv(x.mT).mT,
    r"gru \(aten.gru\) at .*needs dim 0": lambda s, x, i: s.gru(x)[0],
    r"aten.flip\) at": lambda s, x, i: x.flip(1),
    r"aten.cumsum\) at": lambda s, x, i: x.cumsum(1),
    r"aten.roll\) at": lambda s, x, i: x.roll(1, 1),
    r"aten.softmax\) at": lambda s, x, i: x.softmax(1),
    r"aten.batch_norm\) at": lambda s, x, i: s.norm(x.flatten(0, 1)).view(x.shape),
    r"aten.scaled_dot_product_attention\) at .*input 1 whole": lambda s, x, i: s.attend(x),
    r"aten.scaled_dot_product_attention\) .*input 1 whole, ": lambda s, x, i: s.attend(x, attn_mask=tri().triu(-2)),
    r"aten.scaled_dot_product_attention\).*input 1 whole, which": lambda s, x, i: s.attend(
        x, attn_mask=tri() & ((i > 1) | (torch.arange(6) == 0))[:, None, None]
    ),
    r"aten.linear\) at .*not linear in what it reads, which is a sum over the whole batch or sequence": lambda s, x, i: s.out(
        s.mix.tril() @ x
    ),
    r"aten.sub\) at .*not linear": lambda s, x, i: x - x.mean(1, keepdim=True),
    r"aten.sqrt\) at .*not linear": lambda s, x, i: (x.square().mean((1, 2)).sqrt().mean(),),
    r"aten.matmul\) at .*input 1 whole": lambda s, x, i: (x @ x.mT).masked_fill(~tri(), -torch.inf).softmax(-1) @ x,
    r"aten.select\) at": lambda s, x, i: x[:, -1],
    r"aten.slice\) at": lambda s, x, i: x[:, ::2],
    r"aten.pad\) at": lambda s, x, i: F.pad(x, (0, 0, 1, 0)),
    r"aten.mul\) at .*cut into \(2, 3\) along dim 1, where others are cut into \(3, 2\)": lambda s, x, i: x[:, :-1] * x[:, 1:],
    r"aten.view\) at .*apart in another way": lambda s, x, i: x.flatten(0, 1).view(6, 4, 8).view(4, 6, 8),
    r"aten.view\) at .*in another way than they were joined": lambda s, x, i: (x.flatten(0, 1).view(12, 2, 8).sum(1).mean(),),
    r"aten.reshape\) at .*between it and the samples": lambda s, x, i: (
        x.view(4, 6, 2, 4).transpose(1, 2).reshape(48, 4).view(4, 2, 6, 4).transpose(1, 2).flatten(2)
    ),
    r"aten.repeat\) at .*not the batch": lambda s, x, i: x.repeat(1, 2, 1),
    r"aten.dropout\) at .*counts positions in rows": lambda s, x, i: F.dropout(x.flatten(0, 1), 0.3).view(x.shape),
    r"aten.add\) at .*has them otherwise": lambda s, x, i: (x.flatten(0, 1) + s.rows).view(x.shape),
    r"aten.embedding\) at .*the same for every slice": lambda s, x, i: x + s.embed((i > 2).long().cumsum(1)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_needs_other_slices_is_refused_with_its_line(message):
    sw.init(devices=2)
    model = Around(REFUSED[message]).double()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    net = sw.AutoParallel(sw.PipelineCell(model, 2)).pipeline(stages=2, scheduler="seqpipe", slices=2)
    with pytest.raises(sw.errors.StrategyError, match=WHOLE + message):
        net(torch.ones(4, 6, dtype=torch.int64))
    same(list(model.state_dict().values()), list(before.values()))
    assert torch.equal(state, torch.get_rng_state())


class Shaped(nn.Module):
    """Attention of sequences of any dim and lengths."""

    def __init__(self, lengths=(4,), dim=1):
        super().__init__()
        self.qkv, self.lengths, self.dim = nn.Linear(8, 24), lengths, dim

    def forward(self, x):
        for length in self.lengths:
            q, k, v = (t[:, :length].transpose(0, 1) if self.dim == 0 else t[:, :length] for t in self.qkv(x).chunk(3, -1))
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x.square().mean()


def request(slices=2, model=None, **settings):
    net = sw.AutoParallel(sw.PipelineCell(model or Shaped(), 2)).pipeline(**{"scheduler": "seqpipe", **settings}, slices=slices)
    return net(torch.randn(4, 4, 8))


REQUESTS = {
    r"has slices=1; give slices=2 or more, or scheduler=\"1f1b\"": lambda: request(1),
    r"slices=0\): give 1 or more": lambda: request(0),
    r"slices='2'\): give the number": lambda: request("2"),
    r"'1f1b' passes micro-batches whole and has slices=2; leave slices out, or give scheduler=\"seqpipe\"": lambda: request(
        scheduler="1f1b"
    ),
    r"'searched' passes micro-batches whole": lambda: request(scheduler="searched"),
    r"has 4 positions; give at most slices=4": lambda: request(5),
    r"sequences of several lengths: 4 in .*; 3 in .*; use scheduler=\"1f1b\"": lambda: request(model=Shaped((4, 3))),
    r"(?s)no operator is F.scaled_dot_product_attention.*; use scheduler=\"1f1b\"": lambda: request(model=nn.Linear(8, 8)),
    r"is of slices=1; give as many": lambda: request(scheduler=make_schedule("1f1b", 1, 2)),
    r"of 1 ranks and 4 micro-batches, the pipeline of 1 and 2": lambda: request(
        scheduler=make_schedule("seqpipe", 1, 4, slices=2)
    ),
    r"it has one stage on each part": lambda: request(interleave=True),
    r"give the batch first": lambda: request(model=Shaped(dim=0)),
}


@pytest.mark.parametrize("message", REQUESTS)
def test_requests_that_cannot_be_are_refused_with_the_edit(message):
    sw.init(devices=1)
    with pytest.raises((sw.errors.ShardwrightError, TypeError), match=f"(?s){message}"):
        REQUESTS[message]()


# Schedules.


def test_a_schedule_of_ones_own_with_backwards_in_halves_is_exact():
    sw.init(devices=2)
    rows = [
        [f"{rank}F{unit}" for unit in range(4)] + [f"{rank}{kind}{unit}" for unit in (1, 0, 3, 2) for kind in "IW"]
        for rank in (0, 1)
    ]
    mine = Schedule("mine", tuple(tuple(map(Action.parse, row)) for row in rows), 2, 4, slices=2)
    check(Decoder(Parts(attention="dropped"), 5, 2).double(), batch_of(3, 5), 2, 2, scheduler=mine)


def test_the_check_knows_the_order_of_slices(tmp_path):
    good = make_schedule("seqpipe", 3, 3, slices=3)
    check_schedule(good)
    check_schedule(good.forward_only(), forward_only=True)
    good.to_csv(tmp_path / "seqpipe.csv")
    assert Schedule.from_csv(tmp_path / "seqpipe.csv", slices=3) == good
    draw, kept = random.Random(0), 0
    for _ in range(200):
        rows = [list(row) for row in good.rows]
        row = draw.choice(rows)
        at = draw.randrange(len(row) - 1)
        row[at], row[at + 1] = row[at + 1], row[at]
        tried = Schedule("swapped", tuple(map(tuple, rows)), 3, 9, 3)
        places = {action: at for own in rows for at, action in enumerate(own)}
        in_order = all(
            places[Action(s, "F", unit)] < places[Action(s, "F", unit + 1)]
            and places[Action(s, "B", unit)] > places[Action(s, "B", unit + 1)]
            for s in range(3)
            for unit in range(9)
            if (unit + 1) % 3
        )
        try:
            check_schedule(Schedule("whole", tried.rows, 3, 9))
            runs = in_order
        except sw.errors.PipelineError:
            runs = False
        kept += runs
        if runs:
            check_schedule(tried)
        else:
            with pytest.raises(sw.errors.PipelineError, match=r"deadlock|stands before"):
                check_schedule(tried)
    assert 0 < kept < 200
    with pytest.raises(sw.errors.PipelineError, match=r"0B0 stands before 0B1 on rank 0, which is of a slice that it needs"):
        check_schedule(Schedule("gpipe", make_schedule("gpipe", 2, 4).rows, 2, 4, 2))
    with pytest.raises(sw.errors.PipelineError, match="give slices= that divides them"):
        check_schedule(Schedule("gpipe", make_schedule("gpipe", 2, 4).rows, 2, 4, 3))


# What slices are for.


def test_a_slice_takes_less_of_a_rank_and_the_bubble_is_that_of_all_slices():
    sw.init(devices=2)
    plans, slices = [], 4
    for more in ({"scheduler": "1f1b"}, {"scheduler": "seqpipe", "slices": slices}):
        net = sw.AutoParallel(sw.PipelineCell(Decoder(Parts(), 128, 2), 2)).pipeline(stages=2, **more)
        plans.append(net.compile(*batch_of(8, 128)).plan)
    whole, sliced = plans
    assert f"2 micro-batches of {slices} slices each" in str(sliced.schedule)
    assert f"each in {slices} slices of {128 // slices} positions" in sliced.summary()
    for before, now in zip(whole.times.memory, sliced.times.memory, strict=True):
        assert before / slices < now < 1.5 * before / slices  # with copies of keys and values
    for before, now in zip(whole.times.forward, sliced.times.forward, strict=True):
        assert now < before
    assert sliced.timeline.bubble < whole.timeline.bubble
    assert sliced.memory[0].peak < whole.memory[0].peak  # the last rank holds all slices of a micro-batch in both
    assert not any(memory.guessed for memory in sliced.memory)


# Jobs.


def job(rank, size, cases, folder):
    sw.init()
    for parts, stages, micro, slices, samples, length in cases:
        torch.manual_seed(0)
        model = Decoder(parts, length, 2).double()
        single, args = copy.deepcopy(model), batch_of(samples, length)
        net = sw.AutoParallel(sw.PipelineCell(model, micro))
        net.pipeline(stages=stages, scheduler="seqpipe", slices=slices, output_broadcast=True)
        same(train(net, model, args, {}, 1), train(single, single, args, {}, 1))
        for ours, theirs in zip(model.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(sw.full_value(ours), theirs.detach())
        print("equal:", parts, stages, flush=True)


CASES = [
    (Parts(attention="dropped"), 2, 2, 2, 5, 7),
    (Parts("rotary", "grouped", "rows", "rms", "padded labels", False), 2, 1, 3, 3, 6),
    (Parts(layers="checkpointed", loss="view"), 1, 3, 2, 4, 5),
]


@pytest.mark.long
@pytest.mark.parametrize(("size", "cases"), [(2, CASES), (4, [(p, (1, 3) if s == 1 else s, *more) for p, s, *more in CASES])])
def test_real_ranks(tmp_path, size, cases):
    found = jobs.run(tmp_path, size, job, size, cases, str(tmp_path), seconds=500)
    for each in found:
        assert each.code == 0, each.text[-3000:]
        assert each.text.count("equal:") == len(cases)


# Models of others.


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_of_transformers(name):
    import transformers as tf

    if name == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = tf.LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, use_cache=False, **sizes)
        model = tf.LlamaForCausalLM(config).double()
    else:
        config = tf.GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=4, n_positions=16, use_cache=False)
        model = tf.GPT2LMHeadModel(config).double()
    sw.init(devices=2)
    ids = torch.randint(WORDS, (4, 7))
    check(model, ((), {"input_ids": ids, "labels": ids.masked_fill(torch.rand(4, 7) < 0.2, -100)}), 2, 2)
