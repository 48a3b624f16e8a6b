"""Float16 computation, float32 weights, loss scaling and clipping, on data and tensor parallel ranks.

python examples/mixed_precision.py                                8 simulated ranks
torchrun --nproc-per-node 4 examples/mixed_precision.py           4 processes
"""

import argparse
import copy
import os

import torch
from torch import nn

import shardwright as sw


def train(model, net, steps, clip, around):
    """Losses and loss scales of some steps; the fourth batch is far too large for float16."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=4)
    for step in range(steps):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        x = x * 1e4 if step == 3 else x
        optimizer.zero_grad()
        with around:
            loss = net(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        yield loss.item(), scaler.get_scale()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=9)
    steps = parser.parse_args().steps
    world = sw.init() if "RANK" in os.environ else sw.init(devices=8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))
    plain = copy.deepcopy(model)
    net = sw.AutoParallel(model).mixed_precision(torch.float16).hsdp(threshold=0)
    with sw.record_communication() as log:
        ours = list(train(model, net, steps, sw.clip_grad_norm_, torch.autocast("cpu", enabled=False)))
    theirs = list(train(plain, plain, steps, nn.utils.clip_grad_norm_, torch.autocast("cpu", torch.float16)))
    if world.rank == 0:
        for step, ((loss, scale), (expected, expected_scale)) in enumerate(zip(ours, theirs)):
            print(f"step {step}: loss {loss:.4g}, scale {scale:g}; single device: {expected:.4g}, {expected_scale:g}")
        for kind in ("all_gather", "reduce_scatter"):
            dtypes = {str(e.dtype).removeprefix("torch.") for e in log.events if e.kind == kind}
            print(f"{kind} in {', '.join(sorted(dtypes))}")
    error = max((sw.full_value(a) - b).abs().max().item() for a, b in zip(model.parameters(), plain.parameters()))
    assert error < 2e-3, error


if __name__ == "__main__":
    main()
