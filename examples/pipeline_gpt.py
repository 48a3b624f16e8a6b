"""A small GPT with tied embeddings in two stages of two devices each: four schedules, the same losses, their bubbles.

python examples/pipeline_gpt.py
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import shardwright as sw


class Block(nn.Module):
    def __init__(self, width, heads=4):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.drop = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.drop(self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    def __init__(self, words=64, width=32, layers=4, length=16):
        super().__init__()
        self.embed, self.place = nn.Embedding(words, width), nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight  # read by the first and by the last stage

    def forward(self, ids):
        x = self.embed(ids) + self.place
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(target, model, batches):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for step, ids in enumerate(batches):
        torch.manual_seed(step)
        loss = target(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main():
    sw.init(devices=4)
    torch.manual_seed(0)
    model, batches = GPT().double(), [torch.randint(64, (size, 16)) for size in (10, 10, 7)]  # 4 micro-batches: 3, 3, 3, 1
    for block, stage in zip(model.blocks, (0, 0, 1, 1)):
        block.pipeline_stage = stage
    single = copy.deepcopy(model)
    expected = train(single, single, batches)
    print("single device   ", *(f"{loss:.6f}" for loss in expected))
    for schedule, slices in (("gpipe", 1), ("1f1b", 1), ("zero_bubble_h1", 1), ("seqpipe", 2)):
        own = copy.deepcopy(model)
        net = sw.AutoParallel(sw.PipelineCell(own, 4)).pipeline(stages=2, scheduler=schedule, slices=slices)
        losses = train(net, own, batches)
        idle = f"idle {net.plan.timeline.bubble:.0%}, {max(net.plan.timeline.peak_memory) / 1e3:.0f} kB of activations"
        print(f"{schedule:16}", *(f"{loss:.6f}" for loss in losses), f"  ranks {idle}")
        assert all(abs(a - b) < 1e-9 for a, b in zip(losses, expected))
    print(net.plan.schedule)


if __name__ == "__main__":
    main()
