"""A program of one rank: each multiplies its columns of x by its rows of w, and the products are summed.

On two ranks, simulated or started with ``torchrun --nproc-per-node 2``, x (32, 256) times w (256, 128) and an all-reduce is
x (32, 512) times w (512, 128). Then the same weights are trained, each rank by its part of the batch as well.
"""

import os

import torch
from torch import nn

import shardwright as sw
from shardwright import collectives


class Product(nn.Module):
    """This rank's rows of a weight; what it computes is a part of a sum over ``mp``."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = collectives.own(weight, "mp", dim=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mine = x.chunk(collectives.size("mp"), 1)[collectives.rank("mp")]
        return collectives.all_reduce(mine @ self.weight, "mp")


def main() -> None:
    world = sw.init(None if "RANK" in os.environ else 4)
    torch.manual_seed(0)
    x, weight = torch.randn(32, 512, dtype=torch.float64), torch.randn(512, 128, dtype=torch.float64)
    mp = 2 if world.size % 2 == 0 else 1
    with collectives.over(sw.Mesh(("dp", "mp"), (world.size // mp, mp))):
        model = Product(weight)
        net = sw.AutoParallel(model, "hybrid_parallel")
        matches = sw.verify(net, x)
    product = net(x)
    product.square().mean().backward()
    expected = weight.clone().requires_grad_()
    (x @ expected).square().mean().backward()
    gradient = sw.full_value(model.weight.grad)
    if world.rank == 0:
        print(net.program)
        print(f"the product differs by {float((product.detach() - x @ weight).abs().max()):.1e}")
        print(f"the gradient differs by {float((gradient - expected.grad).abs().max()):.1e}")
        print(matches)


if __name__ == "__main__":
    main()
