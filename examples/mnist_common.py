"""What the three examples on handwritten digits share: the training, and the check against a single device.

`train` reads as an ordinary PyTorch script does. What makes it parallel are three things: the net and the optimizer are
built without their values, the gradient function comes from shardwright, and the train step is wrapped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn

import shardwright as sw
from digits import batches

BATCH_SIZE = 32
LEARNING_RATE = 1e-2
SEED = 1
# The check takes the first steps only. float32 rounds sums taken in another order differently: by 1e-7 at first, by
# more and more once a ReLU has an input so near to 0 that rounding decides on which side it falls.
CHECKED_STEPS = 50
TOLERANCE = 1e-4


def normal(*shape: int) -> nn.Parameter:
    """A parameter drawn from a normal distribution with deviation 0.01."""
    return nn.Parameter(torch.empty(shape).normal_(0, 0.01))


def main(network: Callable[[], nn.Module]) -> None:
    """Trains a network on the devices there are and checks it against a single device; exits with 1 if they differ."""
    parser = argparse.ArgumentParser(description="Trains on handwritten digits and checks against a single device.")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=None, help="stop after so many steps in all")
    options = parser.parse_args()

    started = {"RANK", "SHARDWRIGHT_DEVICES"} & set(os.environ)
    world = sw.init() if started else sw.init(devices=8)
    print_once = print if world.rank == 0 else lambda *args: None

    losses, weights = train(network, options.epochs, options.steps, print_once)
    if world.rank == 0:
        check(losses, weights)


def train(
    network: Callable[[], nn.Module], epochs: int, steps: int | None, print_once: Callable[..., None]
) -> tuple[list[float], list[Tensor]]:
    """Trains in parallel.

    Returns:
        The loss of every step, and the weights after the last step that is checked, whole.
    """
    torch.manual_seed(SEED)
    with sw.no_init_parameters():
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE)
    loss_fn = nn.CrossEntropyLoss()

    def forward_fn(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = net(images)
        return loss_fn(logits, labels), logits

    grad_fn = sw.value_and_grad(forward_fn, None, net.parameters(), has_aux=True)

    def train_step(images: Tensor, labels: Tensor) -> Tensor:
        (loss, _), grads = grad_fn(images, labels)
        for parameter, grad in zip(net.parameters(), grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        return loss

    parallel_step = sw.AutoParallel(train_step, parallel_mode="semi_auto")

    losses: list[float] = []
    for epoch, step, images, labels in data(epochs, steps):
        loss = parallel_step(images, labels)
        if not losses:
            print_once(parallel_step.plan)
        if step % 10 == 0:
            print_once(f"epoch: {epoch} step: {step}, loss is {loss.item():.7f}")
        losses.append(loss.item())
        if len(losses) == CHECKED_STEPS:
            weights = snapshot(net)
    if len(losses) < CHECKED_STEPS:
        weights = snapshot(net)
    return losses, weights


def data(epochs: int, steps: int | None) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Epoch, step, images and labels: the same ones on every rank and in every run."""
    epochs_of_batches = (batches(BATCH_SIZE, epochs=1, seed=SEED + epoch) for epoch in range(epochs))
    every = ((e, s, *batch) for e, epoch in enumerate(epochs_of_batches) for s, batch in enumerate(epoch))
    return islice(every, steps)


def snapshot(net: nn.Module) -> list[Tensor]:
    """A copy of the weights, whole: in a distributed job each process holds its pieces."""
    return [sw.full_value(parameter).cpu().clone() for parameter in net.parameters()]


# -- the single device --------------------------------------------------------------------------------------------


class PlainNetwork(nn.Module):
    """The same network in plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight1 = normal(28 * 28, 512)
        self.weight2 = normal(512, 512)
        self.weight3 = normal(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = torch.relu(x @ self.weight1)
        x = torch.relu(x @ self.weight2)
        return x @ self.weight3


def check(losses: list[float], weights: list[Tensor]) -> None:
    """Trains a plain network on the same batches, without shardwright; prints how far they are apart."""
    losses = losses[:CHECKED_STEPS]
    torch.manual_seed(SEED)
    net = PlainNetwork()
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE)
    loss_fn = nn.CrossEntropyLoss()
    expected = []
    for _, _, images, labels in data(epochs=len(losses), steps=len(losses)):
        optimizer.zero_grad()
        loss = loss_fn(net(images), labels)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())

    of_loss = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    of_weights = max(relative(a, b.detach()) for a, b in zip(weights, net.parameters(), strict=True))
    text = f"largest relative difference over {len(losses)} steps: loss {of_loss:.1e}, weights {of_weights:.1e}"
    if not max(of_loss, of_weights) <= TOLERANCE:
        sys.exit(f"DIFFERS from single device: {text}; at most {TOLERANCE:.0e} is rounding")
    print(f"matches single device: {text}")


def relative(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()
