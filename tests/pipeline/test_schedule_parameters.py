"""Gathers of parameters and sums of their gradients as actions of a schedule: their place, their price, exact results."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.errors import PipelineError
from shardwright.pipeline.schedules.actions import Action
from shardwright.pipeline.schedules.bound import lower_bound
from shardwright.pipeline.schedules.check import check_schedule
from shardwright.pipeline.schedules.clock import StageTimes, run_clock
from shardwright.pipeline.schedules.named import make_schedule, schedule_names
from shardwright.pipeline.schedules.parameters import with_parameters, with_parameters_in_time
from shardwright.pipeline.schedules.schedule import Schedule

PER_RANK = {"interleaved_1f1b": 2, "zero_bubble_v": 2}


def made(name: str, ranks: int, micro: int) -> Schedule:
    return make_schedule(name, ranks, micro, PER_RANK.get(name, 1), 2 if name == "seqpipe" else 1)


@pytest.mark.parametrize("name", schedule_names())
def test_every_stage_gathers_before_its_work_and_adds_up_after_it(name):
    for ranks, micro, early, late in product((2, 3), (6, 8), (False, True), (False, True)):
        schedule = made(name, ranks, micro)
        every = range(schedule.stage_count)
        found = with_parameters(schedule, every, every, early, late)
        check_schedule(found)
        assert found.compute_only() == schedule
        assert with_parameters(found, every, every) == found
        for stage in every:
            own = [a.kind for a in found.rows[found.row_of_stage[stage]] if a.stage == stage]
            assert (own[0], own[-2:]) == ("UNSHARD", ["RESHARD", "REDUCE_GRAD"])
            assert own.count("UNSHARD") == own.count("RESHARD") == own.count("REDUCE_GRAD") == 1


def test_none_takes_less_time_than_the_bound_and_the_choice_is_the_least():
    draw = random.Random(0)
    for _ in range(60):
        name = draw.choice([n for n in schedule_names() if n != "seqpipe"])
        ranks = draw.randint(2, 4)
        schedule = made(name, ranks, 2 * ranks + draw.randint(0, 3))
        numbers = [[draw.uniform(0, 3) for _ in range(schedule.stage_count)] for _ in range(5)]
        times = StageTimes(*numbers[:3], unshard=numbers[3], reduce=numbers[4])
        every = range(schedule.stage_count)
        chosen = run_clock(with_parameters_in_time(schedule, every, every, times), times).seconds
        others = [
            run_clock(with_parameters(schedule, every, every, *w), times).seconds for w in product((False, True), repeat=2)
        ]
        assert chosen == min(others)
        assert chosen >= lower_bound(times, schedule.micro_count, schedule.row_of_stage) * (1 - 1e-12)
        assert chosen >= run_clock(schedule, replace(times, unshard=(), reduce=())).seconds * (1 - 1e-12)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ("0F0 0UNSHARD 0B0", "0UNSHARD stands behind 0F0 on rank 0; put it before that"),
        ("0UNSHARD 0F0 0REDUCE_GRAD 0B0", "0REDUCE_GRAD stands before 0B0 on rank 0; put it behind that, once"),
        ("0F0 0B0 0REDUCE_GRAD 0REDUCE_GRAD", "0REDUCE_GRAD stands 2 times on rank 0; it has to stand there once"),
    ],
)
def test_what_stands_in_the_wrong_place_is_refused(rows, why):
    schedule = Schedule("mine", (tuple(map(Action.parse, rows.split())),), 1, 1)
    with pytest.raises(PipelineError, match=why):
        check_schedule(schedule)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(5))
        self.first = self.layers[0]

    def forward(self, x, y):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return nn.functional.mse_loss(self.first(x), y)


@pytest.mark.parametrize("level", ["level1", "level2", "level3"])
@pytest.mark.parametrize("scheduler", ["1f1b", "zero_bubble_v", "given"])
def test_parameters_of_stages_stored_split_train_equal_and_their_moves_follow_the_schedule(scheduler, level, tmp_path):
    sw.init(devices=6)
    torch.manual_seed(0)
    model = Net().double()
    single, interleave = copy.deepcopy(model), scheduler != "zero_bubble_v"
    x, y = torch.randn(10, 12).double(), torch.randn(10, 12).double()
    if scheduler == "given":  # gathers twice and frees between, as torch's files do
        rows = with_parameters(made("interleaved_1f1b", 2, 4), range(4), range(4)).rows
        first = list(rows[0])
        at = first.index(Action(0, "B", 0))
        first[at:at] = [Action(0, "RESHARD"), Action(0, "UNSHARD")]
        Schedule("given", (tuple(first), rows[1]), 4, 4).to_csv(tmp_path / "given.csv")
        scheduler = Schedule.from_csv(tmp_path / "given.csv")
    net = sw.AutoParallel(sw.PipelineCell(model, 4)).pipeline(stages=2, scheduler=scheduler, interleave=interleave)
    net.hsdp(threshold=0, optimizer_level=level)
    optimizers = [torch.optim.AdamW(own.parameters(), 1e-2) for own in (model, single)]
    for _ in range(2):
        with sw.record_communication() as log:
            losses = [net(x, y), single(x, y)]
            for optimizer, loss in zip(optimizers, losses, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    for ours, theirs in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-10, atol=1e-12)
    kinds = [action.kind for row in net.plan.schedule.rows for action in row]
    assert 1 <= kinds.count("REDUCE_GRAD") <= 4 <= kinds.count("UNSHARD")
    moves = [event.kind for event in log.events]
    assert moves.count("all_gather")
    assert moves.count("reduce_scatter")
    with torch.no_grad():
        torch.testing.assert_close(net(x, y), single(x, y), rtol=1e-12, atol=0)
