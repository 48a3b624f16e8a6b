"""The Trainer of Lightning around a small GPT-2, with random weights and data, equal to a single device.

python -m shardwright run --devices 4 examples/lightning_module.py                  # 4 simulated devices
python -m shardwright run --devices 2 --distributed examples/lightning_module.py    # 2 processes
"""

import copy
import os
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import shardwright as sw

STEPS, BATCH, WORDS, LENGTH = 6, 8, 64, 16


class LanguageModel(LightningModule):
    """A module whose ``net`` is a model, or a parallel one."""

    def __init__(self, net: Any):
        super().__init__()
        self.net, self.losses = net, []

    def training_step(self, ids: Tensor, number: int) -> Tensor:
        loss = self.net(input_ids=ids, labels=ids).loss
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), 1e-2)


def train(net: Any) -> list[float]:
    sentences = [(torch.arange(LENGTH) + 7 * start) % WORDS for start in range(STEPS * BATCH)]
    module = LanguageModel(net)
    trainer = Trainer(
        strategy=SingleDeviceStrategy("cpu"),  # every process is handed the whole batch; no DDP
        max_epochs=1, gradient_clip_val=0.5, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(sentences, BATCH // 2))
    return module.losses


def main() -> None:
    world = sw.init(None if {"RANK", "SHARDWRIGHT_DEVICES"} & set(os.environ) else 4)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).double()
    single = copy.deepcopy(model)
    losses = train(sw.AutoParallel(model, "data_parallel"))
    weights = [sw.full_value(p) for p in model.parameters()]
    train(single)
    difference = max((a - b).abs().max().item() for a, b in zip(weights, single.parameters(), strict=True))
    if world.rank == 0:
        print("losses", " ".join(f"{loss:.6f}" for loss in losses))
        print(f"largest difference of the weights to a single device's: {difference:.1e}")
    assert difference < 1e-9


if __name__ == "__main__":
    main()
