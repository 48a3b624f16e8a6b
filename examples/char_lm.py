"""A small GPT on real text, the sources of the Python standard library: data and tensor parallel.

The model is plain PyTorch. `strategies` says how it is split: the batch over `dp`; of each pair of products in a block
the first by columns and the second by rows over `tp`, so that a block needs two all-reduces forward and two backward.

    python examples/char_lm.py                                            8 simulated devices
    python -m shardwright run --devices 4 examples/char_lm.py             4 simulated devices
    torchrun --nproc-per-node 4 examples/char_lm.py                       4 processes
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardwright as sw

SEED = 1
MODULES = ["argparse", "calendar", "configparser", "difflib", "doctest", "inspect", "optparse", "pdb", "shutil"]
LENGTH, BATCH_SIZE, LEARNING_RATE = 64, 16, 2e-3
CHECKED_STEPS, TOLERANCE = 5, 1e-4


# -- the model: plain PyTorch -----------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.head_dim = dim // heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(project(x)) for project in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder whose head shares its weight with the embedding."""

    def __init__(self, vocabulary: int, dim: int = 128, heads: int = 4, blocks: int = 2):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(LENGTH, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# -- how it is split --------------------------------------------------------------------------------------------------


def strategies(layout: sw.Layout) -> dict[str, Any]:
    """Name pattern -> where it is; the rest follows from these."""
    column, row, across = layout("tp", "None"), layout("None", "tp"), layout("tp")
    return {
        "model": {"in_strategy": (layout("dp", "None"),)},  # the batch
        "*.query.weight": column, "*.query.bias": across,
        "*.key.weight": column, "*.key.bias": across,
        "*.value.weight": column, "*.value.bias": across,
        "*.out.weight": row,
        "*.up.weight": column, "*.up.bias": across,
        "*.down.weight": row,
    }  # fmt: skip


# -- training ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a small GPT on the sources of the Python standard library.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plan", action="store_true", help="print the whole plan")
    options = parser.parse_args()

    started = {"RANK", "SHARDWRIGHT_DEVICES"} & set(os.environ)
    world = sw.init() if started else sw.init(devices=8)
    print_once = print if world.rank == 0 else lambda *args, **kwargs: None

    text = Text()
    tp = math.gcd(world.size, 4)  # 4 heads
    layout = sw.Layout((world.size // tp, tp), ("dp", "tp"))
    torch.manual_seed(SEED)
    with sw.no_init_parameters():
        model = GPT(len(text.characters))
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)

    def forward_fn(ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())

    grad_fn = sw.value_and_grad(forward_fn, None, model.parameters())

    def train_step(ids: Tensor, targets: Tensor) -> Tensor:
        loss, grads = grad_fn(ids, targets)
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        return loss

    parallel_step = sw.AutoParallel(train_step, parallel_mode="semi_auto").shard(strategies(layout))

    losses: list[float] = []
    for step, (ids, targets) in enumerate(text.batches(options.steps)):
        if step == 0:
            with sw.record_communication() as log:
                losses.append(parallel_step(ids, targets).item())
            gradients = [sw.full_value(parameter.grad).cpu().clone() for parameter in model.parameters()]
            summarise(parallel_step.plan, log, options.plan, print_once)
            start = time.perf_counter()
        else:
            losses.append(parallel_step(ids, targets).item())
        if step % 20 == 0 or step == options.steps - 1:
            speed = step * ids.numel() / (time.perf_counter() - start)
            loss = sum(losses[-20:]) / len(losses[-20:])
            print_once(f"step {step:3}, mean loss is {loss:.4f}" + (f", {speed:,.0f} tokens/s" if step else ""))

    @sw.AutoParallel
    def logits_fn(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(ids)

    print_once("generated:", repr(generate(logits_fn.shard(strategies(layout)), text, "    def ")))
    if world.rank == 0:
        check(text, losses[:CHECKED_STEPS], gradients)


class Text:
    """Characters of some modules of the standard library, as ids."""

    def __init__(self) -> None:
        folder = Path(sysconfig.get_path("stdlib"))
        text = "".join((folder / f"{name}.py").read_text("utf-8") for name in MODULES)
        self.characters = sorted(set(text))
        self.ids = self.encode(text)

    def encode(self, text: str) -> Tensor:
        position = {c: i for i, c in enumerate(self.characters)}
        return torch.tensor([position[c] for c in text])

    def decode(self, ids: Tensor) -> str:
        return "".join(self.characters[i] for i in ids.tolist())

    def batches(self, count: int) -> Any:
        """Random windows and the same moved on by one: the same ones on every rank and in every run."""
        generator = torch.Generator().manual_seed(SEED)
        for _ in range(count):
            starts = torch.randint(len(self.ids) - LENGTH, (BATCH_SIZE, 1), generator=generator)
            windows = self.ids[starts + torch.arange(LENGTH + 1)]
            yield windows[:, :-1], windows[:, 1:]


def summarise(plan: Any, log: Any, everything: bool, print_once: Callable[..., None]) -> None:
    """The plan's first line and totals, and what one step communicates."""
    lines = str(plan).splitlines()
    totals = next(i for i, line in enumerate(lines) if line.startswith("forward:"))
    print_once("\n".join(lines if everything else [lines[0], *lines[totals:]]))
    counts = Counter((e.phase, e.kind, ",".join(e.axes)) for e in log.events)
    for (phase, kind, axes), count in sorted(counts.items(), reverse=True):
        sent = sum(e.bytes for e in log.events if (e.phase, e.kind, ",".join(e.axes)) == (phase, kind, axes))
        print_once(f"  {phase:8} {count:3} x {kind} over {axes or 'all'}, {sent / 1e3:,.1f} kB")


def generate(logits_fn: Callable[[Tensor], Tensor], text: Text, prompt: str) -> str:
    """One line that goes on from the prompt. The window has one size, so there is one plan; ids see none after them."""
    generator = torch.Generator().manual_seed(SEED)
    ids = text.encode(prompt)
    while len(ids) < LENGTH and text.decode(ids[-1:]) != "\n":
        window = F.pad(ids, (0, LENGTH - len(ids))).unsqueeze(0)
        logits = logits_fn(window)[0, len(ids) - 1].float().cpu()
        ids = torch.cat([ids, torch.multinomial((logits / 0.5).softmax(-1), 1, generator=generator)])
    return text.decode(ids)


def check(text: Text, losses: list[float], gradients: list[Tensor]) -> None:
    """Repeats the first steps on a single device, without shardwright; exits with 1 if they differ."""
    torch.manual_seed(SEED)
    model = GPT(len(text.characters))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    of_loss = of_gradients = 0.0
    for step, (ids, targets) in enumerate(text.batches(len(losses))):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        loss.backward()
        if step == 0:
            expected = [p.grad for p in model.parameters() if p.grad is not None]
            size = torch.stack([g.norm() for g in expected]).norm()
            of_gradients = max(((a - b).norm() / size).item() for a, b in zip(gradients, expected, strict=True))
        optimizer.step()
        of_loss = max(of_loss, abs(loss.item() - losses[step]) / loss.item())
    sizes = f"loss of {len(losses)} steps {of_loss:.1e}, first gradients {of_gradients:.1e}"
    if not max(of_loss, of_gradients) <= TOLERANCE:
        sys.exit(f"DIFFERS from single device: largest relative difference: {sizes}; {TOLERANCE:.0e} may be rounding")
    print(f"matches single device: largest relative difference: {sizes}")


if __name__ == "__main__":
    main()
