"""Habits of low-rank adapters: switched off, merged and unmerged between steps; by hand and by PEFT."""

from __future__ import annotations

import torch
from common import batches, habit, mlp, step
from torch import Tensor, nn
from torch.nn import functional as F


class Adapted(nn.Module):
    """A frozen matrix with a low-rank update that can be switched off or merged."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features).double() / 3)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank).double())
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + x @ self.down.t() @ self.up.t() if self.enabled else y

    @torch.no_grad()
    def merge(self, sign: float = 1.0) -> None:
        self.base.weight.add_(self.up @ self.down, alpha=sign)
        self.enabled = sign < 0


@habit
def lora_by_hand(parallel):
    model = mlp(5, 8, 3)
    model[0] = Adapted(model[0])
    net = parallel(model)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 0.05)
    for number, (x, y) in enumerate(batches(4)):
        if number == 2:
            model[0].enabled = False
            yield net(x)
            model[0].enabled = True
        if number == 3:
            model[0].merge()
            yield net(x)
            model[0].merge(-1.0)
        yield step(optimizer, F.mse_loss(net(x), y))
    yield from net.parameters()


@habit
def lora_by_peft(parallel):
    import peft  # takes seconds, which every test process would wait

    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"], lora_dropout=0.1)
    model = peft.get_peft_model(mlp(5, 8, 3), config)
    net = parallel(model)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 0.05)
    for number, (x, y) in enumerate(batches(4)):
        yield step(optimizer, F.mse_loss(net(x), y))
        if number == 1:
            with model.disable_adapter():
                yield net(x)
        if number == 2:
            model.merge_adapter()
            model.eval()
            yield net(x)
            model.train()
            model.unmerge_adapter()
    yield from net.parameters()
