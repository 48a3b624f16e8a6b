"""A Wasserstein GAN with a gradient penalty on points in the plane, which are drawn around eight places on a ring.

Generator and critic are data parallel; the penalty, a derivative of a derivative, is that of the whole batch.

    python examples/gan_penalty.py                                        4 simulated devices
    python -m shardwright run --devices 8 examples/gan_penalty.py         8 simulated devices
    torchrun --nproc-per-node 2 examples/gan_penalty.py                   2 processes
"""

import copy
import math
import os

import torch
from torch import Tensor, nn

import shardwright as sw

STEPS, BATCH, NOISE, WEIGHT = 30, 64, 8, 10.0


def network(inputs: int, outputs: int) -> nn.Sequential:
    layers = nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)
    return nn.Sequential(*layers).double()


def ring(draw: torch.Generator) -> Tensor:
    """Points around one of eight places each."""
    angles = torch.randint(8, (BATCH,), generator=draw) * (math.pi / 4)
    noise = torch.randn(BATCH, 2, dtype=torch.float64, generator=draw)
    return torch.stack([angles.cos(), angles.sin()], 1) + 0.05 * noise


def penalty(critic: nn.Module, real: Tensor, made: Tensor, draw: torch.Generator) -> Tensor:
    """How far the critic's gradients between real and generated points are from norm 1."""
    share = torch.rand(BATCH, 1, dtype=torch.float64, generator=draw)
    between = (share * real + (1 - share) * made).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().mean()


def train(generator: nn.Module, critic: nn.Module) -> list[tuple[float, float]]:
    """Returns the losses of the critic and of the generator."""
    of_generator = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.9))
    of_critic = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.5, 0.9))
    draw, losses = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        real, noise = ring(draw), torch.randn(BATCH, NOISE, dtype=torch.float64, generator=draw)
        made = generator(noise).detach()
        critic_loss = critic(made).mean() - critic(real).mean() + WEIGHT * penalty(critic, real, made, draw)
        of_critic.zero_grad()
        critic_loss.backward()
        of_critic.step()

        generator_loss = -critic(generator(noise)).mean()
        of_generator.zero_grad()
        generator_loss.backward()
        of_generator.step()
        losses.append((critic_loss.item(), generator_loss.item()))
    return losses


def main() -> None:
    world = sw.init(None if {"RANK", "SHARDWRIGHT_DEVICES"} & set(os.environ) else 4)
    torch.manual_seed(0)
    generator, critic = network(NOISE, 2), network(2, 1)
    single = copy.deepcopy(generator), copy.deepcopy(critic)
    losses = train(sw.AutoParallel(generator), sw.AutoParallel(critic))
    weights = [sw.full_value(p).detach() for p in critic.parameters()]
    if world.rank == 0:
        for step in range(0, STEPS, 5):
            print("step {:2}: critic {:.6f}, generator {:.6f}".format(step, *losses[step]))
        train(*single)
        difference = max((a - b).abs().max().item() for a, b in zip(weights, single[1].parameters(), strict=True))
        print(f"largest difference of the critic's weights to a single device's: {difference:.1e}")
        assert difference < 1e-9


if __name__ == "__main__":
    main()
