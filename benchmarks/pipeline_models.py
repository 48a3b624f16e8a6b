"""Models of the pipeline benchmark, as chains of units, and the four ways to train them on the ranks of a job."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import Block
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules as torch_schedules

import shardwright as sw
from shardwright.pipeline.schedules.named import make_schedule
from shardwright.pipeline.schedules.schedule import Schedule

MICRO, UNITS = 8, 8
VOCABULARY, WIDTH, HEADS, LENGTH, BATCH = 256, 256, 4, 64, 64
MLP_WIDTH, MLP_BATCH = 512, 4096
Step = Callable[[], float | None]


class First(nn.Module):
    """Embeddings and the first block of a GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.block = Block(WIDTH, HEADS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.block(self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device)))


class Last(nn.Module):
    """The last block of a GPT, its norm and its head, which is not tied."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm = Block(WIDTH, HEADS), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(x)))


class Chain(nn.Module):
    """Units one after the other, and the mean cross entropy of what the last gives."""

    def __init__(self, units: list[nn.Module]):
        super().__init__()
        self.units = nn.ModuleList(units)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return loss_of(x, target)


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def make(case: str) -> Chain:
    """Makes a model, the same on every rank and for every variant."""
    torch.manual_seed(1)
    if case == "gpt":
        return Chain([First(), *(Block(WIDTH, HEADS) for _ in range(UNITS - 2)), Last()])
    layers = [nn.Sequential(nn.Linear(MLP_WIDTH, MLP_WIDTH), nn.ReLU()) for _ in range(UNITS - 1)]
    return Chain([*layers, nn.Sequential(nn.Linear(MLP_WIDTH, MLP_WIDTH), nn.ReLU(), nn.Linear(MLP_WIDTH, 10))])


def batch(case: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if case == "gpt":
        ids = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return torch.randn(MLP_BATCH, MLP_WIDTH, generator=generator), torch.randint(10, (MLP_BATCH,), generator=generator)


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 1e-2)


@dataclass(frozen=True)
class Order:
    """A schedule as both have it.

    Args:
        ours: what ``pipeline(scheduler=...)`` is given.
        interleave: whether each rank has two stages.
        name: of the schedule that it makes.
        theirs: a class of torch's, ``None``: its runtime follows the file of our schedule.
    """

    ours: str
    interleave: bool
    name: str
    theirs: Any

    @property
    def turns(self) -> int:
        return 2 if self.interleave else 1

    def schedule(self, ranks: int) -> Schedule:
        return make_schedule(self.name, ranks, MICRO, self.turns)


ORDERS = {
    "gpipe": Order("gpipe", False, "gpipe", pipelining.ScheduleGPipe),
    "1f1b": Order("1f1b", False, "1f1b", pipelining.Schedule1F1B),
    "interleaved 1f1b": Order("1f1b", True, "interleaved_1f1b", pipelining.ScheduleInterleaved1F1B),
    "zero bubble h1": Order("zero_bubble_h1", False, "zero_bubble_h1", None),
}


@dataclass
class Trainer:
    """One variant on this rank.

    Args:
        step: trains once; returns the loss where it is known.
        weights: by name, the parameters of the whole model that this rank has.
        call: ours, else ``None``.
    """

    step: Step
    weights: Callable[[], dict[str, Tensor]]
    call: Any = None


def marks(order: Order, ranks: int) -> dict[str, int]:
    """The stage of each unit: as many units in each."""
    per_stage = UNITS // (ranks * order.turns)
    return {f"units.{n}": n // per_stage % ranks for n in range(UNITS)}


def shardwright(case: str, order: Order, ranks: int) -> Trainer:
    """Trains with ours, its stages marked."""
    model, inputs = make(case), batch(case)
    call = sw.AutoParallel(sw.PipelineCell(model, MICRO, stage_config=marks(order, ranks)))
    call.pipeline(stages=ranks, scheduler=order.ours, interleave=order.interleave)
    call.compile(*inputs)  # puts parameters where their stages are
    optimizer = optimizer_of(model.parameters())

    def step() -> float:
        optimizer.zero_grad()
        loss = call(*inputs)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Trainer(step, lambda: {n: sw.full_value(p).detach() for n, p in model.named_parameters()}, call)


def stages_of(case: str, count: int, rank: int, ranks: int) -> dict[int, nn.Sequential]:
    """The stages of a rank, whose parameters keep the names of the whole model's."""
    units, each = make(case).units, UNITS // count
    return {s: nn.Sequential(*units[s * each : (s + 1) * each]) for s in range(rank, count, ranks)}


def names_of(stages: dict[int, nn.Sequential], count: int) -> dict[str, Tensor]:
    """The parameters of stages by their names in the whole model."""
    found: dict[str, Tensor] = {}
    for index, stage in stages.items():
        for name, parameter in stage.named_parameters():
            place, _, rest = name.partition(".")
            found[f"units.{index * (UNITS // count) + int(place)}.{rest}"] = parameter.detach()
    return found


def torch_pipelining(case: str, order: Order, ranks: int) -> Trainer:
    """Trains with ``torch.distributed.pipelining``."""
    rank, count, inputs = dist.get_rank(), ranks * order.turns, batch(case)
    own = stages_of(case, count, rank, ranks)
    stages = [pipelining.PipelineStage(stage, index, count, torch.device("cpu")) for index, stage in own.items()]
    given = stages if order.turns > 1 or order.theirs is None else stages[0]
    if order.theirs is None:
        runtime = torch_schedules._PipelineScheduleRuntime(given, MICRO, loss_fn=loss_of)
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "schedule.csv")
            order.schedule(ranks).to_csv(path)
            runtime._load_csv(path)
    else:
        runtime = order.theirs(given, MICRO, loss_fn=loss_of)
    optimizer = optimizer_of([p for stage in own.values() for p in stage.parameters()])
    has_first, has_last = 0 in own, count - 1 in own

    def step() -> float | None:
        optimizer.zero_grad()
        losses: list[Tensor] = []
        arguments = {"target": inputs[1], "losses": losses} if has_last else {}
        runtime.step(*inputs[:1] if has_first else (), return_outputs=False, **arguments)
        optimizer.step()
        return float(torch.stack(losses).mean().detach()) if has_last else None

    return Trainer(step, lambda: names_of(own, count))


def naive(case: str, order: Order, ranks: int) -> Trainer:
    """Trains stage after stage with the whole batch, by plain sends and receives."""
    rank, (x, target) = dist.get_rank(), batch(case)
    own = stages_of(case, ranks, rank, ranks)
    stage = own[rank]
    optimizer = optimizer_of(stage.parameters())
    shape = (BATCH, LENGTH, WIDTH) if case == "gpt" else (MLP_BATCH, MLP_WIDTH)

    def step() -> float | None:
        optimizer.zero_grad()
        given, loss = x, None
        if rank:
            given = torch.empty(shape)
            dist.recv(given, rank - 1)
            given.requires_grad_()
        result = stage(given)
        if rank == ranks - 1:
            loss = loss_of(result, target)
            loss.backward()
        else:
            dist.send(result.detach(), rank + 1)
            gradient = torch.empty(shape)
            dist.recv(gradient, rank + 1)
            result.backward(gradient)
        if rank:
            dist.send(given.grad, rank - 1)
        optimizer.step()
        return None if loss is None else float(loss.detach())

    return Trainer(step, lambda: names_of(own, ranks))


VARIANTS: dict[str, Callable[[str, Order, int], Trainer]] = {
    "shardwright": shardwright, "torch": torch_pipelining, "naive": naive,
}  # fmt: skip


def single(case: str, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Trains on this rank alone; returns the losses and the weights."""
    model, inputs = make(case), batch(case)
    optimizer, losses = optimizer_of(model.parameters()), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(*inputs)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {n: p.detach() for n, p in model.named_parameters()}
