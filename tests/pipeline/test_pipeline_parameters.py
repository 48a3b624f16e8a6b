"""Parameters of a pipeline on real ranks, each on the ranks of its stage, behave as the whole ones in all that users do."""

from __future__ import annotations

import logging
import warnings

import jobs
import parameter_models
import pytest
import test_whole_parameters as whole
import torch
from tensor_methods import method_cases

import shardwright as sw


class Net(parameter_models.Net):
    """A model whose samples do not meet."""

    def forward(self, x):
        return self.b(self.a(x).tanh())


class Tied(parameter_models.Net):
    """A model of which two stages read a weight."""

    def forward(self, x):
        return self.b(self.a(x).tanh()) + self.a(x).sum(1, keepdim=True)


def job(rank, is_tied, count, folder):
    warnings.simplefilter("ignore")
    logging.disable()
    sw.init()
    whole.Net = Tied if is_tied else Net
    whole.MODES["stages"] = lambda m: sw.AutoParallel(sw.PipelineCell(m, 2)).pipeline(stages=torch.distributed.get_world_size())

    def case(name, said):
        print(f"case {name}: {said}", flush=True)

    start, cases = method_cases()
    whole.methods("stages", case, rank, start, cases[::count])
    whole.writes("stages", case)
    whole.short_way("stages", case)
    whole.beside("stages", case)
    whole.copies_from_before("stages", case)
    whole.before_the_first_call("stages", case)
    whole.handed_to_net("stages", case)


def check(folder, is_tied, count):
    found = jobs.run(folder, 2, job, is_tied, count, str(folder), seconds=300)
    assert [e.code for e in found] == [0, 0], found[0].text[-4000:] + found[1].text[-2000:]
    lines = [line for line in found[0].text.splitlines() if line.startswith("case ")]
    assert len(lines) > 40
    assert [line for line in lines if not line.endswith("right")] == []


@pytest.mark.whole
def test_tied(tmp_path):
    check(tmp_path, True, 20)


@pytest.mark.long
@pytest.mark.parametrize("is_tied", [False, True])
def test_all(tmp_path, is_tied):
    check(tmp_path, is_tied, 1)
