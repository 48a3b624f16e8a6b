"""Pipelines on real gloo ranks: the values, gradients and norms of one device, in every schedule."""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import shardwright as sw

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
import jobs
from staged_networks import CASES


class Gpt(nn.Module):
    """Blocks with dropout and skips between a tied embedding and its head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16)) for _ in range(4)
        )

    def forward(self, ids):
        h = self.embed(ids)
        for block in self.blocks:
            h = h + block(h)
        logits = self.head(h) * self.scale
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=3), logits


def compare(stages, micro, batch, scheduler, interleave=False):
    """Trains a model and its copy for three steps, clips, evaluates."""
    torch.manual_seed(0)
    model = Gpt().double()
    single = copy.deepcopy(model)
    steps = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, single)]
    net = sw.AutoParallel(sw.PipelineCell(model, micro))
    net.pipeline(stages=stages, scheduler=scheduler, interleave=interleave, output_broadcast=True)
    ids = torch.randint(32, (batch, 6))
    for number in range(3):
        found = []
        for called, clip, own in ((net, sw.clip_grad_norm_, model), (single, torch.nn.utils.clip_grad_norm_, single)):
            torch.manual_seed(number)
            loss, logits = called(ids)
            loss.backward()
            found.append((loss, logits, clip(own.parameters(), 1.0)))
        torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
        for ours, expected in zip(model.parameters(), single.parameters(), strict=True):
            assert ours.shape == expected.shape
            pairs = [(ours.detach(), expected.detach()), (ours, expected), (ours.grad, expected.grad)]
            # read as any tensors are, on all ranks
            for mine, its in pairs:
                assert (mine.double() - 1).abs().max().item() == pytest.approx((its.double() - 1).abs().max().item(), 1e-9)
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), expected in zip(model.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(sw.full_value(ours), expected.detach(), rtol=1e-9, atol=1e-11, msg=lambda m, n=name: n + m)
    for each in (model, single):
        each.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(ids), single(ids))
    return model


SCHEDULES = (("1f1b", False), ("gpipe", False), ("zero_bubble_h1", False), ("1f1b", True), ("zero_bubble_v", False))


def job(rank, cases, folder):
    sw.init(check_weights=2)
    for stages, micro, batch in cases:
        for scheduler, interleave in SCHEDULES[: 5 if len(cases) > 1 else 2]:
            count = (8, 16) if scheduler == "zero_bubble_v" else (micro, batch)
            model = compare(stages, *count, scheduler, interleave)
            print(f"case {stages} {scheduler} {interleave}: ok", flush=True)
    for case in ("print", "float", "compute"):
        beside(rank, case)
    train("clip", torch.distributed.get_world_size(), 4, 8, "semi_auto", "1f1b", False)
    held = sum(p.to_local().numel() for p in model.parameters())
    whole = sum(p.numel() for p in model.parameters())
    print(f"case part: {held < whole}")


def beside(rank, case):
    """Reads a result beside the loss, which the ranks of the last stage have."""
    net = sw.AutoParallel(sw.PipelineCell(Gpt().eval(), 4)).pipeline(stages=torch.distributed.get_world_size())
    loss, logits = net(torch.arange(24).view(4, 6))
    loss.backward()
    scaled = (logits * 2).sum()
    try:
        text = repr(logits)
        if case != "print":
            text = str(float(scaled) if case == "float" else nn.functional.cross_entropy(logits[0], torch.arange(6)))
    except sw.errors.WorldError as error:
        text = str(error)
    print("case beside:", rank, case, text[:90].replace("\n", " "), flush=True)


def networks(rank, size, names, folder):
    """Trains every network on every shape for so many ranks, with schedules and modes in turn."""
    sw.init()
    draw = random.Random(size)
    for name in names:
        for stages, micro, batch in SHAPES[size]:
            mode, (scheduler, interleave) = draw.choice(MODES), draw.choice(SCHEDULES)
            rows = stages if isinstance(stages, int) else len(stages)
            micro = max(micro, 2 * rows) if scheduler == "zero_bubble_v" else micro
            text = f"{name} {stages} {micro} {batch} {mode} {scheduler} {interleave}"
            print("begins:", text, flush=True)
            train(name, stages, micro, batch, mode, scheduler, interleave)
            print("equal:", text, flush=True)


def train(name, stages, micro, batch, mode, scheduler, interleave):
    torch.manual_seed(0)
    model = CASES[name].make().double()
    single = copy.deepcopy(model)
    net = sw.AutoParallel(sw.PipelineCell(model, micro), mode)
    net.pipeline(stages=stages, scheduler=scheduler, interleave=interleave, output_broadcast=True)
    args, kwargs = CASES[name].batch(batch)
    found = []
    for called, own in ((net, model), (single, single)):
        optimizer, results = torch.optim.AdamW(own.parameters(), 1e-3), []
        for step in range(2):
            torch.manual_seed(step)
            results.append([leaf for leaf in tree_leaves(called(*args, **kwargs)) if isinstance(leaf, torch.Tensor)])
            first = results[-1][0]
            (first if not first.dim() else first.square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        own.eval()
        with torch.no_grad():
            results.append([leaf for leaf in tree_leaves(called(*args, **kwargs)) if isinstance(leaf, torch.Tensor)])
        found.append(results)
    torch.testing.assert_close(found[0], found[1], equal_nan=True)
    for (path, ours), expected in zip(model.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(sw.full_value(ours), expected.detach(), equal_nan=True, msg=lambda m, n=path: n + m)
    for ours, expected in zip(model.buffers(), single.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)


MODES = ["semi_auto", "data_parallel", "auto", "recursive_programming"]
SHAPES = {  # stages, micro-batches, batch
    2: [(2, 4, 8), (2, 4, 10), (2, 3, 3), (2, 2, 1)],
    3: [((2, 1), 2, 5), (3, 3, 7), (3, 3, 1)],
    4: [(2, 4, 8), (2, 3, 10), ((1, 3), 4, 10), (4, 4, 8), (4, 6, 4)],
}


def ended(folder, size, cases):
    found = jobs.run(folder, size, job, cases, str(folder), seconds=500)
    assert [e.code for e in found] == [0] * size, found[0].text[-3000:] + found[-1].text[-3000:]
    for each in found:
        assert "case part: True" in each.text
    assert "case beside: 0 print Elsewhere(shape=[4, 6, 32]" in found[0].text
    for case, name in (("float", "__float__"), ("compute", "cross_entropy")):
        assert f"case beside: 0 {case} {name}: this result of a pipeline is on the ranks of its last" in found[0].text
        assert f"case beside: {size - 1} {case} {name}" not in found[-1].text


@pytest.mark.long
@pytest.mark.parametrize("size", SHAPES)
def test_networks(tmp_path, size):
    found = jobs.run(tmp_path, size, networks, size, list(CASES), str(tmp_path), seconds=3000)
    assert [e.code for e in found] == [0] * size, found[0].text[-3000:] + found[-1].text[-3000:]


@pytest.mark.whole
def test_two_ranks(tmp_path):
    ended(tmp_path, 2, [(2, 3, 7)])


@pytest.mark.long
@pytest.mark.parametrize(("size", "cases"), [(3, [((1, 2), 4, 8), (3, 4, 9)]), (4, [(2, 4, 8), (4, 4, 10), ((1, 3), 4, 8)])])
def test_more_ranks(tmp_path, size, cases):
    ended(tmp_path, size, cases)


def killed(rank, victim, folder):
    """Kills a rank in its fourth step."""
    sw.init()
    torch.manual_seed(0)
    net = sw.AutoParallel(sw.PipelineCell(Gpt(), 4)).pipeline(stages=torch.distributed.get_world_size())
    for step in range(10):
        if step == 3 and rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        net(torch.arange(24).view(4, 6))[0].backward()


@pytest.mark.long
@pytest.mark.parametrize("victim", range(3))
def test_the_job_ends_with_the_name_of_a_rank_that_was_killed(tmp_path, victim):
    found = jobs.run(tmp_path, 3, killed, victim, str(tmp_path))
    assert found[victim].code == -signal.SIGKILL
    for rank in {0, 1, 2} - {victim}:
        assert found[rank].code == 1
        assert found[rank].seconds - found[victim].seconds < 10
    assert any(f"rank {victim}'s process has ended" in each.text for each in found)
