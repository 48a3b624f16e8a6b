"""Habits of models: adapters, masks, norms of weights, draws, quantisers, policies, and derivatives by hand."""

from __future__ import annotations

import random
import warnings
from itertools import pairwise

import torch
from common import batches, classes, habit, mlp, refused, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune


@habit
def masks_by_hand(parallel):
    net = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    net(batches()[0][0])
    masks = {n: (p.detach().abs() > 0.1).to(p.dtype) for n, p in net.named_parameters() if p.ndim == 2}
    for x, y in batches():
        yield step(optimizer, F.mse_loss(net(x), y))
        with torch.no_grad():
            for n, p in net.named_parameters():
                if n in masks:
                    p.mul_(masks[n])
    yield from net.parameters()


@habit
def pruning(parallel):
    model = mlp(5, 8, 3)
    prune.l1_unstructured(model[0], "weight", 0.3)
    prune.random_structured(model[2], "weight", 0.3, dim=0)
    net = parallel(model)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, y in batches():
        yield step(optimizer, F.mse_loss(net(x), y))
    yield from net.parameters()


@habit
def pruning_between_steps(parallel):
    model = mlp(5, 8, 3)
    net = parallel(model)
    for number, (x, y) in enumerate(batches(4)):
        if number == 1:
            prune.l1_unstructured(model[0], "weight", 0.3)
        if number == 3:
            prune.remove(model[0], "weight")
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        yield step(optimizer, F.mse_loss(net(x), y))
    yield from net.parameters()


@habit
def norms_of_weights(parallel):
    for wrap in (nn.utils.weight_norm, nn.utils.spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm):
        model = mlp(5, 8, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the first of them is deprecated
            wrap(model[0])
        net = parallel(model)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for x, y in batches(2):
            yield step(optimizer, F.mse_loss(net(x), y))
        yield from net.parameters()
        yield from net.buffers()


@habit
def orthogonal(parallel):
    model = mlp(5, 8, 3)
    parametrizations.orthogonal(model[0], orthogonal_map="cayley")
    net = parallel(model)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, y in batches(2):
        yield step(optimizer, F.mse_loss(net(x), y))


class Stochastic(nn.Module):
    """Residual layers of which each sample skips some."""

    def __init__(self, draw):
        super().__init__()
        self.layers, self.draw = nn.ModuleList(mlp(5, 8, 5) for _ in range(3)), draw

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.draw(layer(x))
        return x


@habit
def stochastic_depth(parallel):
    def by_sample(h):
        return h * (torch.rand(len(h), 1) < 0.7).to(h.dtype) / 0.7

    def by_batch(h):
        return torch.where(torch.rand(()) < 0.5, torch.zeros_like(h), h)

    for draw in (by_sample, by_batch, lambda h: h * torch.bernoulli(torch.full((len(h), 1), 0.7).double())):
        net = parallel(Stochastic(draw))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for x, _ in batches(2):
            yield step(optimizer, net(x).square().mean())


@refused("random")
def stochastic_depth_by_python(parallel):
    net = parallel(Stochastic(lambda h: h if random.random() < 0.5 else 0 * h))
    yield net(batches()[0][0])


class Vae(nn.Module):
    """A variational autoencoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = mlp(5, 8, 4), mlp(2, 8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(z), mean, log_variance


@habit
def vae(parallel):
    net = parallel(Vae())
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for x, _ in batches():
        out, mean, log_variance = net(x)
        apart = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
        yield step(optimizer, F.mse_loss(out, x) + 0.1 * apart)


class VqVae(nn.Module):
    """An autoencoder with a codebook that follows what it encodes."""

    def __init__(self, words: int = 7):
        super().__init__()
        self.encoder, self.decoder = mlp(5, 8, 4), mlp(4, 8, 5)
        self.register_buffer("book", torch.randn(words, 4).double())
        self.register_buffer("counts", torch.ones(words).double())
        self.register_buffer("sums", self.book.clone())

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        index = torch.cdist(z, self.book).argmin(-1)
        hot = F.one_hot(index, len(self.book)).to(z.dtype)
        q = F.embedding(index, self.book)
        if self.training:
            with torch.no_grad():
                self.counts.mul_(0.9).add_(hot.sum(0), alpha=0.1)
                self.sums.mul_(0.9).add_(hot.t() @ z, alpha=0.1)
                self.book.copy_(self.sums / self.counts.clamp(min=1e-3)[:, None])
        out = self.decoder(z + (q - z).detach())
        return F.mse_loss(out, x) + 0.25 * F.mse_loss(z, q.detach())


@habit
def vq_vae(parallel):
    net = parallel(VqVae())
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for x, _ in batches():
        yield step(optimizer, net(x))
    net.eval()
    yield net(batches()[0][0])
    yield from net.buffers()


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, by):
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.by * gradient, None


class Backwards(nn.Module):
    """Layers between which stands a function with a backward of its own."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.between = mlp(5, 8), mlp(8, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x).tanh()))


@habit
def straight_through_and_reversal(parallel):
    for between in (
        Rounded.apply,
        lambda h: h + ((h * 4).round() / 4 - h).detach(),
        lambda h: Reversed.apply(h, 0.5),
        lambda h: F.gumbel_softmax(h, hard=True),
    ):
        net = parallel(Backwards(between))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for x, y in batches(2):
            yield step(optimizer, F.mse_loss(net(x), y))
        yield from net.parameters()


@habit
def reinforce(parallel):
    policy = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.Adam(policy.parameters(), 0.01)
    baseline = 0.0
    for x, _ in batches():
        chosen = torch.distributions.Categorical(logits=policy(x))
        action = chosen.sample()
        reward = (action == 1).double() + 0.1 * x[:, 0]
        yield step(optimizer, -(chosen.log_prob(action) * (reward - baseline)).mean() - 0.01 * chosen.entropy().mean())
        baseline = 0.9 * baseline + 0.1 * reward.mean().item()


class Actor(nn.Module):
    """A policy and a value on a common trunk."""

    def __init__(self):
        super().__init__()
        self.trunk, self.policy, self.value = mlp(5, 8), nn.Linear(8, 3).double(), nn.Linear(8, 1).double()

    def forward(self, x: Tensor) -> tuple[torch.distributions.Distribution, Tensor]:
        h = self.trunk(x).tanh()
        return self.policy(h), self.value(h).squeeze(-1)


@habit
def ppo(parallel):
    net = parallel(Actor())
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for x, _ in batches(2, rows=8):
        with torch.no_grad():
            logits, value = net(x)
            before = torch.distributions.Categorical(logits=logits)
            action = before.sample()
            was, gains = before.log_prob(action), x.sum(1) - value
            returns = gains + value
            gains = (gains - gains.mean()) / (gains.std() + 1e-8)
        for part in torch.randperm(8).split(4):
            logits, value = net(x[part])
            chosen = torch.distributions.Categorical(logits=logits)
            ratio = (chosen.log_prob(action[part]) - was[part]).exp()
            gain = torch.min(ratio * gains[part], ratio.clamp(0.8, 1.2) * gains[part])
            loss = -gain.mean() + 0.5 * F.smooth_l1_loss(value, returns[part]) - 0.01 * chosen.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            yield loss


class Recurrent(nn.Module):
    """An LSTM that carries its state from call to call."""

    def __init__(self):
        super().__init__()
        self.cells, self.out = nn.LSTM(5, 6, num_layers=2, batch_first=True), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None):
        h, state = self.cells(x, state)
        return self.out(h), state


@habit
def truncated_backpropagation(parallel):
    net = parallel(Recurrent())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x = batches(1, rows=4 * 9)[0][0].view(4, 9, 5)
    state = None
    for part in x.split(3, 1):
        out, state = net(part, state)
        yield step(optimizer, out.square().mean())
        state = tuple(s.detach() for s in state)
    yield from state


class Flow(nn.Module):
    """Euler steps of a differential equation whose right side is a network."""

    def __init__(self):
        super().__init__()
        self.field = mlp(6, 8, 5)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        for t, after in pairwise(times):
            x = x + (after - t) * self.field(torch.cat([x, t.expand(len(x), 1)], 1))
        return x


@habit
def neural_ode(parallel):
    net = parallel(Flow())
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for x, _ in batches():
        yield step(optimizer, net(x, torch.linspace(0, 1, 5).double()).square().mean())


class Equilibrium(nn.Module):
    """A fixed number of iterations to a fixed point, of which only the last is differentiated."""

    def __init__(self):
        super().__init__()
        self.inner, self.inject = nn.Linear(8, 8).double(), nn.Linear(5, 8).double()

    def forward(self, x: Tensor) -> Tensor:
        inject = self.inject(x)
        z = torch.zeros_like(inject)
        with torch.no_grad():
            for _ in range(6):
                z = (self.inner(z) + inject).tanh()
        return (self.inner(z) + inject).tanh()


@habit
def deep_equilibrium(parallel):
    net = parallel(Equilibrium())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, _ in batches():
        yield step(optimizer, net(x).square().mean())


@habit
def curvature(parallel):
    net = parallel(mlp(5, 8, 3))
    x, y = batches()[0]
    loss = F.mse_loss(net(x), y)
    weights = list(net.parameters())
    first = torch.autograd.grad(loss, weights, create_graph=True)
    for _ in range(2):  # Hutchinson's estimate of the trace
        signs = [torch.randint_like(p, 2) * 2 - 1 for p in weights]
        products = torch.autograd.grad(first, weights, signs, retain_graph=True)
        yield from products
        yield sum((s * v).sum() for s, v in zip(signs, products))
    x.requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
    yield from [p.grad for p in weights if p.grad is not None]
    yield x.grad


@habit
def input_gradients(parallel):
    """Adversarial training: samples moved along the sign of their gradient."""
    net = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, y in classes():
        x = x.clone().requires_grad_()
        F.cross_entropy(net(x), y).backward()
        moved = (x + 0.1 * x.grad.sign()).detach()
        yield step(optimizer, F.cross_entropy(net(moved), y))
