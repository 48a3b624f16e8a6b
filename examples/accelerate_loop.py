"""A loop of Accelerate around a small GPT-2, with random weights and data, equal to a single device.

python -m shardwright run --devices 4 examples/accelerate_loop.py                  # 4 simulated devices
python -m shardwright run --devices 2 --distributed examples/accelerate_loop.py    # 2 processes
"""

import copy
import os

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import shardwright as sw

STEPS, BATCH, WORDS, LENGTH = 6, 8, 64, 16


def sentences() -> list[Tensor]:
    """Words that count up, each sentence from a start of its own."""
    return [(torch.arange(LENGTH) + 7 * start) % WORDS for start in range(STEPS * BATCH)]


def main() -> None:
    world = sw.init(None if {"RANK", "SHARDWRIGHT_DEVICES"} & set(os.environ) else 4)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).double().eval()  # without dropout, to compare step by step
    single = copy.deepcopy(model)

    # Accelerate deals out each batch among the processes, and the net is told so. The model is not prepared: no DDP.
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    net = sw.AutoParallel(model, "data_parallel").dataset_strategy("data_parallel")
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    loader, optimizer = accelerator.prepare(DataLoader(sentences(), BATCH), optimizer)

    of_single = torch.optim.AdamW(single.parameters(), 1e-2)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(of_single, STEPS)
    for step, (ids, whole) in enumerate(zip(loader, DataLoader(sentences(), BATCH), strict=True)):
        loss = net(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        expected = single(input_ids=whole, labels=whole).loss
        expected.backward()
        torch.nn.utils.clip_grad_norm_(single.parameters(), 0.5)
        of_single.step()
        slower.step()
        of_single.zero_grad()
        accelerator.print(f"step {step}: {len(ids)} sentences, loss {loss:.6f}, of a single device {expected:.6f}")
        assert abs(loss.item() - expected.item()) < 1e-5  # GPT2LMHeadModel computes its loss in float32
    difference = max((sw.full_value(a) - b).abs().max() for a, b in zip(net.parameters(), single.parameters(), strict=True))
    if world.rank == 0:
        print(f"largest difference of the weights to a single device's: {difference:.1e}")
    assert difference < 1e-9


if __name__ == "__main__":
    main()
