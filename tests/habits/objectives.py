"""Habits of losses: several nets, several views, losses over the whole batch, frozen teachers."""

from __future__ import annotations

import copy

import torch
from common import batches, classes, habit, mlp, step
from torch import Tensor, nn
from torch.nn import functional as F


class Tokens(nn.Module):
    """A language model of two matrices."""

    def __init__(self, words: int = 11, width: int = 6):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, words)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.mix(self.embedding(ids))[0])


def _log_probability(model, ids):
    return model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)


def _ids(count=3, rows=4, length=6):
    draw = torch.Generator().manual_seed(7)
    return [torch.randint(11, (rows, length), generator=draw) for _ in range(count)]


@habit
def dpo_with_two_nets(parallel):
    policy = Tokens()
    reference = parallel(copy.deepcopy(policy).eval().requires_grad_(False))
    policy = parallel(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), 0.01)
    for chosen, rejected in zip(_ids(), reversed(_ids())):
        with torch.no_grad():
            known = _log_probability(reference, chosen) - _log_probability(reference, rejected)
        own = _log_probability(policy, chosen) - _log_probability(policy, rejected)
        yield step(optimizer, -F.logsigmoid(0.5 * (own - known)).mean())


class Preferences(nn.Module):
    """Direct preference optimization with policy and reference in one module."""

    def __init__(self):
        super().__init__()
        self.policy = Tokens()
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)

    def forward(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        with torch.no_grad():
            known = _log_probability(self.reference, chosen) - _log_probability(self.reference, rejected)
        own = _log_probability(self.policy, chosen) - _log_probability(self.policy, rejected)
        return -F.logsigmoid(0.5 * (own - known)).mean()


@habit
def dpo_with_one_net(parallel):
    net = parallel(Preferences())
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 0.01)
    for chosen, rejected in zip(_ids(), reversed(_ids())):
        yield step(optimizer, net(chosen, rejected))


@habit
def gan_with_two_optimizers(parallel):
    generator, critic = parallel(mlp(4, 8, 5)), parallel(mlp(5, 8, 1, of=nn.SiLU))
    of_generator = torch.optim.Adam(generator.parameters(), 0.01)
    of_critic = torch.optim.Adam(critic.parameters(), 0.01)
    bce = F.binary_cross_entropy_with_logits
    for real, _ in batches():
        noise = torch.randn(len(real), 4).double()
        made = generator(noise)
        right, wrong = critic(real), critic(made.detach())
        yield step(of_critic, bce(right, torch.ones_like(right)) + bce(wrong, torch.zeros_like(wrong)))
        fooled = critic(made)
        yield step(of_generator, bce(fooled, torch.ones_like(fooled)))


@habit
def siamese(parallel):
    net = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for number, (a, b) in enumerate(zip(batches(), reversed(batches()))):
        left, right = net(a[0]), net(b[0])
        same = torch.full((len(left),), 1.0 if number % 2 else -1.0).double()
        yield step(optimizer, F.cosine_embedding_loss(left, right, same, margin=0.1))


class Contrast(nn.Module):
    """Losses that compare every sample with every other."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.image, self.text = mlp(5, 8, 4), mlp(3, 8, 4)
        self.scale = nn.Parameter(torch.tensor(2.0).double())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = F.normalize(self.image(x), dim=-1), F.normalize(self.text(y), dim=-1)
        own = torch.arange(len(a))
        if self.kind == "clip":
            scores = self.scale.exp() * a @ b.t()
            return (F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)) / 2
        if self.kind == "infonce":
            return F.cross_entropy(a @ b.t() / 0.1, own)
        if self.kind == "ntxent":
            both = torch.cat([a, b])
            scores = both @ both.t() / 0.5
            scores = scores.masked_fill(torch.eye(len(both), dtype=torch.bool), -1e9)
            return F.cross_entropy(scores, torch.cat([own + len(a), own]))
        distance = torch.cdist(a, b)  # the hardest of the batch
        others = distance + 10 * torch.eye(len(a)).double()
        return (distance.diagonal() - others.min(1).values + 0.2).relu().mean()


@habit
def contrastive_losses(parallel):
    for kind in ("clip", "infonce", "ntxent", "triplet"):
        net = parallel(Contrast(kind))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for x, y in batches(2):
            loss = net(x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss
            yield from [p.grad for p in net.parameters() if p.grad is not None]


@habit
def contrast_outside_of_the_net(parallel):
    net = parallel(mlp(5, 8, 4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, y in classes(rows=8):
        features = F.normalize(net(x), dim=-1)
        distance = torch.cdist(features, features)
        same = y[:, None] == y[None]
        near = distance.masked_fill(same, 10.0).min(1).values
        far = distance.masked_fill(~same, 0.0).max(1).values
        yield step(optimizer, (far - near + 0.3).relu().mean())


@habit
def curriculum_of_lengths(parallel):
    net = parallel(Tokens())
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for length in (3, 5, 3, 8):
        ids = _ids(1, 4, length)[0]
        yield step(optimizer, F.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))


@habit
def distillation(parallel):
    teacher = parallel(mlp(5, 16, 3).eval().requires_grad_(False))
    student = parallel(mlp(5, 4, 3))
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for x, y in classes():
        with torch.no_grad():
            told = (teacher(x) / 2).softmax(-1)
        out = student(x)
        yield step(optimizer, 4 * F.kl_div((out / 2).log_softmax(-1), told, reduction="batchmean") + F.cross_entropy(out, y))


@habit
def mean_teacher(parallel):
    student = parallel(nn.Sequential(mlp(5, 8), nn.Dropout(0.3), mlp(8, 3)))
    teacher = copy.deepcopy(student)
    for p in teacher.parameters():
        p.requires_grad = False
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for x, _ in batches():
        out = student(x)
        with torch.no_grad():
            told = teacher(x + 0.1 * torch.randn_like(x))
        yield step(optimizer, F.mse_loss(out.softmax(-1), told.softmax(-1)))
        with torch.no_grad():
            for a, b in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True):
                a.mul_(0.9).add_(b, alpha=0.1)
    yield from teacher.parameters()


@habit
def r_drop(parallel):
    net = parallel(nn.Sequential(mlp(5, 8), nn.Dropout(0.3), mlp(8, 3)))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, y in classes():
        first, second = net(x), net(x)
        p, q = first.log_softmax(-1), second.log_softmax(-1)
        apart = F.kl_div(p, q, log_target=True, reduction="batchmean") + F.kl_div(q, p, log_target=True, reduction="batchmean")
        yield step(optimizer, F.cross_entropy(first, y) + F.cross_entropy(second, y) + apart)


@habit
def mixup_and_cutmix(parallel):
    net = parallel(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).double())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, y in classes(width=36):
        x = x.view(-1, 1, 6, 6)
        share = torch.distributions.Beta(0.4, 0.4).sample().item()
        order = torch.randperm(len(x))
        mixed = net(share * x + (1 - share) * x[order])
        yield step(optimizer, share * F.cross_entropy(mixed, y) + (1 - share) * F.cross_entropy(mixed, y[order]))
        cut = x.clone()
        cut[:, :, 1:4, 2:5] = x[order, :, 1:4, 2:5]
        hot = 0.75 * F.one_hot(y, 3) + 0.25 * F.one_hot(y[order], 3)
        yield step(optimizer, F.cross_entropy(net(cut), hot.double()))


@habit
def label_smoothing(parallel):
    net = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 0.5]).double(), ignore_index=2)
    for x, y in classes():
        yield step(optimizer, loss(net(x), y))
        out = net(x).log_softmax(-1)
        yield step(optimizer, -(0.9 * out.gather(1, y[:, None]).squeeze(1) + 0.1 * out.mean(-1)).mean())


class Byol(nn.Module):
    """Online encoder with a predictor, and a target encoder that follows it."""

    def __init__(self):
        super().__init__()
        self.online = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
        self.predictor = mlp(4, 8, 4)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            told = self.target(b)
        return 2 - 2 * F.cosine_similarity(self.predictor(self.online(a)), told, dim=-1).mean()

    @torch.no_grad()
    def follow(self, share: float) -> None:
        for t, o in zip(self.target.parameters(), self.online.parameters(), strict=True):
            t.data = share * t.data + (1 - share) * o.data


@habit
def byol(parallel):
    model = Byol()
    net = parallel(model)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    for x, _ in batches():
        a, b = x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)
        yield step(optimizer, net(a, b) + net(b, a))
        net.follow(0.9)
    yield from model.target.parameters()


class MoCo(nn.Module):
    """Keys of a momentum encoder, with a queue of earlier ones."""

    def __init__(self, size: int = 12):
        super().__init__()
        self.query, self.size = mlp(5, 8, 4), size
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(size, 4).double(), dim=1))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        q = F.normalize(self.query(a), dim=1)
        with torch.no_grad():
            k = F.normalize(self.key(b), dim=1)
        scores = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone().detach().t()], 1) / 0.2
        places = (self.at + torch.arange(len(k))) % self.size
        self.queue.index_copy_(0, places, k)
        self.at.copy_((self.at + len(k)) % self.size)
        return F.cross_entropy(scores, torch.zeros(len(q), dtype=torch.long))


@habit
def moco(parallel):
    model = MoCo()
    net = parallel(model)
    optimizer = torch.optim.SGD(model.query.parameters(), 0.1)
    for x, _ in batches():
        yield step(optimizer, net(x, x + 0.1 * torch.randn_like(x)))
        with torch.no_grad():
            for k, q in zip(model.key.parameters(), model.query.parameters(), strict=True):
                k.mul_(0.9).add_(q, alpha=0.1)
    yield model.queue
    yield model.at
