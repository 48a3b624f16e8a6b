"""What crosses stages and gets no gradient gives none: a parameter before it is left alone, as on a single device."""

from __future__ import annotations

import copy

import jobs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardwright as sw

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble_h1", "zero_bubble_v", "searched")

# Ways to read the value q of an earlier stage beside its value h.
READS = {
    "detached": lambda h, q, w: (w(h) * q.detach()).square().mean(),
    "compared": lambda h, q, w: (w(h) * (q > 0)).square().mean(),
    "target": lambda h, q, w: F.mse_loss(w(h), q.detach()),
    "chosen": lambda h, q, w: F.cross_entropy(w(h), q.argmax(-1), reduction="sum"),
    "rounded straight": lambda h, q, w: (w(h) + (w(h).round() - w(h)).detach() * q.detach().sign()).square().mean(),
    "switched off": lambda h, q, w: w(h).square().mean() + frozen(q),
    "beside a gradient": lambda h, q, w: (w(h) * q.detach()).square().mean() + q.square().mean(),
    "one result": lambda h, q, w: (w(h).square().mean(), q.detach() * 2),
    "two results": lambda h, q, w: (w(h).square().mean(), q.square().mean()),
}


def frozen(q):
    with torch.no_grad():
        return q.square().mean()


class Net(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.read = READS[read]
        self.first, self.beside, self.middle, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        q = self.beside(h.detach())
        return self.read(torch.tanh(self.middle(h)), q, self.last)


def train(read, schedule):
    torch.manual_seed(0)
    model = Net(read).double()
    single, x = copy.deepcopy(model), torch.randn(7, 4).double()
    rows = {"first": 0, "beside": 0, "middle": 0, "last": 1}
    config = None if schedule in ("interleaved", "zero_bubble_v") else rows
    kind = {"interleave": True} if schedule == "interleaved" else {"scheduler": schedule}
    net = sw.AutoParallel(sw.PipelineCell(model, 4, stage_config=config)).pipeline(stages=2, **kind)
    optimizers = [torch.optim.AdamW(own.parameters(), 1e-2, weight_decay=0.1) for own in (model, single)]
    for step in range(3):
        for target, optimizer in zip((net, single), optimizers, strict=True):
            optimizer.zero_grad()
            found = target(x)
            found = found if isinstance(found, tuple) else (found,)
            # of one result, of both, and of the first again: what is reached is that of the step
            (found[0] if step != 1 or not found[-1].requires_grad else sum(found)).backward()
        for (name, ours), theirs in zip(model.named_parameters(), single.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), f"{read}, {schedule}, step {step}: {name}"
        for optimizer in optimizers:
            optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), single.named_parameters(), strict=True):
        value = sw.full_value(ours).detach()
        torch.testing.assert_close(value, theirs[1].detach(), rtol=1e-10, atol=1e-12, msg=f"{read}, {schedule}: {name}")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("read", list(READS))
def test_what_gets_no_gradient_gives_none(read, schedule):
    sw.init(devices=4)
    train(read, schedule)


def job(rank, folder):
    sw.init()
    for at, read in enumerate(READS):
        train(read, SCHEDULES[at % len(SCHEDULES)])
        print(f"case {read}: equal", flush=True)


def test_what_gets_no_gradient_gives_none_on_ranks(tmp_path):
    assert len(jobs.cases(tmp_path, job)) == len(READS)
