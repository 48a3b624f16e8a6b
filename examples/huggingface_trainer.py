"""The Trainer of Hugging Face around a small GPT-2, with random weights and data, equal to a single device.

python -m shardwright run --devices 4 examples/huggingface_trainer.py                  # 4 simulated devices
python -m shardwright run --devices 2 --distributed examples/huggingface_trainer.py    # 2 processes
"""

import copy
import os
import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, ProgressCallback, Trainer, TrainingArguments

import shardwright as sw

STEPS, BATCH, WORDS, LENGTH = 6, 8, 64, 16


class ParallelTrainer(Trainer):
    """A Trainer that runs the net: without DDP around the model, and with the whole batch on every process."""

    mode = "data_parallel"
    net: Any = None

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.net = self.net or sw.AutoParallel(model, self.mode)
        return self.net

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_data_loader = lambda loader, **_: loader


class SingleTrainer(ParallelTrainer):
    mode = "stand_alone"


class Sentences(Dataset):
    """Words that count up, each sentence from a start of its own."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(LENGTH) + 7 * index) % WORDS
        return {"input_ids": ids, "labels": ids}


def train(model: nn.Module, trainer: type[Trainer]) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=BATCH // 2, gradient_accumulation_steps=2, learning_rate=1e-2,
            logging_steps=1, max_grad_norm=0.5, use_cpu=True, report_to="none", save_strategy="no",
        )  # fmt: skip
        run = trainer(model, arguments, train_dataset=Sentences())
        for quiet in (ProgressCallback, PrinterCallback):
            run.remove_callback(quiet)
        run.train()
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def main() -> None:
    world = sw.init(None if {"RANK", "SHARDWRIGHT_DEVICES"} & set(os.environ) else 4)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).double()
    single = copy.deepcopy(model)
    losses = train(model, ParallelTrainer)
    weights = [sw.full_value(p) for p in model.parameters()]
    train(single, SingleTrainer)
    difference = max((a - b).abs().max().item() for a, b in zip(weights, single.parameters(), strict=True))
    if world.rank == 0:
        print("losses", " ".join(f"{loss:.6f}" for loss in losses))
        print(f"largest difference of the weights to a single device's: {difference:.1e}")
    assert difference < 1e-9


if __name__ == "__main__":
    main()
