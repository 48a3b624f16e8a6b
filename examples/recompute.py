"""A stack of attention blocks, with and without recomputation: what is held for the backward pass, and the same loss.

python examples/recompute.py
torchrun --nproc-per-node 2 examples/recompute.py
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import shardwright as sw


class Block(nn.Module):
    def __init__(self, dim=64, heads=4):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        scores = F.dropout(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1), 0.1)
        x = x + self.out((scores @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def step(net, x):
    """The loss of a step, the bytes that are held between its forward and its backward, and the gradients' norm."""
    torch.manual_seed(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = net(x).square().mean()
    held = sum(event.self_cpu_memory_usage for event in seen.key_averages())
    loss.backward()
    norm = torch.stack([sw.full_value(p.grad).norm() for p in net.parameters()]).norm()
    net.module.zero_grad()
    return loss.item(), held, norm.item()


def main():
    sw.init(devices=2)
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(10)))
    x = torch.randn(8, 64, 64)
    for name, net in (
        ("everything kept", sw.AutoParallel(model)),
        ("blocks recomputed", sw.AutoParallel(model).recompute("?")),
    ):
        net.compile(x)
        loss, held, norm = step(net, x)
        print(f"{name:18} loss {loss:.6f}, gradients' norm {norm:.6f}, held for the backward {held / 1e6:6.1f} MB")


if __name__ == "__main__":
    main()
