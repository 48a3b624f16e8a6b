"""A trainer that multiplies losses by the number of ranks, where they are those of all ranks already, is refused."""

import re

import jobs
import torch
from torch import nn
from torch.nn import functional as F

import shardwright as sw


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, y, num_items_in_batch=None):
        return F.cross_entropy(self.layer(x), y, reduction="sum") / (num_items_in_batch or len(x))


def calls(rank):
    world = sw.init()
    scope = {"__name__": "transformers.trainer"}  # the module whose Trainer calls nets so
    exec("def compute_loss(net, *args, **kwargs):\n    return net(*args, **kwargs)", scope)
    x, y = torch.ones(2, 4), torch.tensor([0, 2])
    for name, strategy, call, items in (
        ("by hand", "data_parallel", lambda net, *a, **k: net(*a, **k), {"num_items_in_batch": 4}),
        ("without a count", "data_parallel", scope["compute_loss"], {}),
        ("whole batches", "full_batch", scope["compute_loss"], {"num_items_in_batch": 2}),
        ("parts", "data_parallel", scope["compute_loss"], {"num_items_in_batch": 4}),
    ):
        torch.manual_seed(0)
        model = Net()
        expected = F.cross_entropy(model.layer(x), y).item()
        net = sw.AutoParallel(model, "data_parallel").dataset_strategy(strategy)
        try:
            found = "right" if abs(call(net, x, y, **items).item() - expected) < 1e-6 else "wrong"
        except sw.errors.ShardwrightError as error:
            found = str(error).splitlines()[-1].strip()
        print(f"case {name}: {found}", flush=True)
    assert world.size == 2


def test_on_two_ranks(tmp_path):
    for ended in jobs.run(tmp_path, 2, calls):
        found = dict(re.findall(r"^case (.*?): (.*)$", ended.text, re.M))
        assert ended.code == 0, ended.text
        assert found.pop("parts") == "Write trainer.model_accepts_loss_kwargs = False before trainer.train()"
        assert found == dict.fromkeys(("by hand", "without a count", "whole batches"), "right")
