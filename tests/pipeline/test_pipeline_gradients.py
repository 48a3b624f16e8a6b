"""What users do with the gradients of a pipeline on real ranks, whose stages hold a part of the parameters each."""

from __future__ import annotations

import copy

import jobs
import torch
from sampling import IS_ON
from torch import nn

import shardwright as sw


class Net(nn.Module):
    """A number as a parameter, one that a later stage reads without a gradient, and one that nobody reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        y = self.second(torch.tanh(self.first(x))) * self.scale
        return (y + self.first.weight.detach().sum()).square().mean()


def clip_by_torch(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def clip_one_by_one(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=False)


def clip_values(model):
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def clip_by_a_loop(model):
    total = sum(p.grad.norm() ** 2 for p in model.parameters() if p.grad is not None).sqrt()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(0.5 / total)


def smooth(model):
    for p in model.parameters():
        if p.grad is not None:
            p.grad += 0.1 * p.detach() + p.grad.abs().max()


def note(model):
    found = [None if p.grad is None else (tuple(p.grad.shape), float(p.grad.sum())) for p in model.parameters()]
    assert [g is None for g in found] == [name.startswith("unused") for name, _ in model.named_parameters()]
    with torch.no_grad():
        model.scale += sum(g[1] for g in found if g)


WAYS = {way.__name__: way for way in (clip_by_torch, clip_one_by_one, clip_values, clip_by_a_loop, smooth, note)}
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-2, centered=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
}

PAIRS = [
    (way, optimizer) for i, way in enumerate(WAYS) for j, optimizer in enumerate(OPTIMIZERS) if not IS_ON or (i + j) % 4 == 0
]


def train(called, model, way, optimizer, sets_to_none):
    update = OPTIMIZERS[optimizer](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        update.zero_grad(set_to_none=sets_to_none)
        scaler.scale(called(torch.arange(16.0).view(4, 4).double() / 16)).backward()
        scaler.unscale_(update)
        WAYS[way](model)
        scaler.step(update)
        scaler.update()
        average.update_parameters(model)
    values = [sw.full_value(p).flatten() for p in (*model.parameters(), *average.module.parameters())]
    return torch.cat([*values, sw.full_value(nn.utils.parameters_to_vector(model.parameters()))])


def job(rank, folder):
    sw.init()
    for at, (way, optimizer) in enumerate(PAIRS):
        torch.manual_seed(0)
        model = Net().double()
        single = copy.deepcopy(model)
        net = sw.AutoParallel(sw.PipelineCell(model, 2)).pipeline(stages=torch.distributed.get_world_size())
        found = [train(called, own, way, optimizer, at % 2) for called, own in ((net, model), (single, single))]
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
        print(f"case {way} {optimizer}: equal", flush=True)


def test_gradients(tmp_path):
    assert len(jobs.cases(tmp_path, job)) == len(PAIRS)
