"""Habits around the optimizer's step: averages, clipping, schedules, freezing, accumulation."""

from __future__ import annotations

import copy

import torch
from common import batches, classes, habit, mlp, step
from torch import nn
from torch.nn import functional as F


@habit
def ema_of_a_copy(parallel):
    model = mlp(5, 8, 3)
    net = parallel(model)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(batches()[0][0])
    average = copy.deepcopy(model)
    for x, y in batches():
        yield step(optimizer, F.mse_loss(net(x), y))
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.mul_(0.9).add_(p, alpha=0.1)
    yield from average.parameters()


@habit
def ema_of_a_dictionary(parallel):
    net = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    shadow = {}
    for x, y in batches():
        yield step(optimizer, F.mse_loss(net(x), y))
        for name, p in net.named_parameters():
            shadow[name] = shadow[name].lerp(p.detach(), 0.1) if name in shadow else p.detach().clone()
    kept = {name: p.detach().clone() for name, p in net.named_parameters()}
    for name, p in net.named_parameters():  # evaluates with the average, and puts the weights back
        p.data.copy_(shadow[name])
    yield net(batches()[0][0])
    for name, p in net.named_parameters():
        p.data = kept[name]
    yield net(batches()[0][0])


@habit
def ema_of_a_net(parallel):
    net = parallel(mlp(5, 8, 3))
    average = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    average(batches()[0][0])
    for x, y in batches():
        yield step(optimizer, F.mse_loss(net(x), y))
        with torch.no_grad():
            for a, p in zip(average.parameters(), net.parameters(), strict=True):
                a.lerp_(p, 0.1)
    yield average(batches()[0][0])


@habit
def swa(parallel):
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    net = parallel(model)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    average = None
    for x, y in batches(4):
        yield step(optimizer, F.mse_loss(net(x), y))
        average = average or torch.optim.swa_utils.AveragedModel(net)
        average.update_parameters(net)
        scheduler.step()
    average.eval()
    yield average(batches()[0][0])
    yield from average.module.buffers()


@habit
def swa_with_statistics_anew(parallel):
    """``update_bn`` sets a momentum of ``None``, with which torch's module reads how many batches it has seen."""
    net = parallel(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)).double())
    torch.optim.swa_utils.update_bn([x for x, _ in batches(4)], net)
    yield net(batches()[0][0])


@habit
def ema_of_swa_utils(parallel):
    net = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(batches()[0][0])
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for x, y in batches():
        yield step(optimizer, F.mse_loss(net(x), y))
        average.update_parameters(net)
    yield average(batches()[0][0])


def _sam(parallel, perturb, restore):
    net = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for x, y in batches():
        F.mse_loss(net(x), y).backward()
        norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
        kept = [perturb(p, 0.05 * p.grad / (norm + 1e-12)) for p in net.parameters()]
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        for p, was in zip(net.parameters(), kept, strict=True):
            restore(p, was)
        optimizer.step()
        optimizer.zero_grad()
        yield loss
    yield from net.parameters()


@habit
def sam_in_place(parallel):
    def perturb(p, e):
        with torch.no_grad():
            p.add_(e)
        return e

    def restore(p, e):
        with torch.no_grad():
            p.sub_(e)

    yield from _sam(parallel, perturb, restore)


@habit
def sam_by_data(parallel):
    def perturb(p, e):
        was, p.data = p.data, p.data + e
        return was

    def restore(p, was):
        p.data = was

    yield from _sam(parallel, perturb, restore)


@habit
def sam_by_clones(parallel):
    def perturb(p, e):
        was = p.detach().clone()
        p.data.add_(e)
        return was

    def restore(p, was):
        p.data.copy_(was)

    yield from _sam(parallel, perturb, restore)


@habit
def lookahead(parallel):
    net = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    net(batches()[0][0])  # on real ranks parameters are distributed at the first call, and copies made before are not
    slow = [p.detach().clone() for p in net.parameters()]
    for number, (x, y) in enumerate(batches(4)):
        yield step(optimizer, F.mse_loss(net(x), y))
        if number % 2:
            for s, p in zip(slow, net.parameters(), strict=True):
                s.add_(p.detach() - s, alpha=0.5)
                p.data.copy_(s)
    yield from net.parameters()


@habit
def gradient_surgery_by_grad(parallel):
    net = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, y in batches():
        out = net(x)
        losses = [F.mse_loss(out[:, i], y[:, i]) for i in range(3)]
        weights = list(net.parameters())
        each = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
        flat = [torch.cat([g.flatten() for g in gradients]) for gradients in each]
        kept = [f.clone() for f in flat]
        for i, mine in enumerate(kept):
            for j, other in enumerate(flat):
                dot = (mine * other).sum()
                if i != j and dot < 0:
                    kept[i] = mine = mine - dot / other.square().sum() * other
        total, at = sum(kept), 0
        for p in weights:
            p.grad = total[at : at + p.numel()].view_as(p).clone()
            at += p.numel()
        optimizer.step()
        yield sum(losses)


@habit
def gradient_surgery_by_backward(parallel):
    net = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, y in batches():
        out, each = net(x), []
        for i in range(2):
            optimizer.zero_grad()
            F.mse_loss(out[:, i], y[:, i]).backward(retain_graph=True)
            each.append([p.grad.clone() for p in net.parameters()])
        dot = sum((a * b).sum() for a, b in zip(*each))
        size = sum(b.square().sum() for b in each[1])
        share = torch.where(dot < 0, dot / size, torch.zeros_like(dot))
        for p, a, b in zip(net.parameters(), *each):
            p.grad = a + b - share * b
        optimizer.step()
        yield out


@habit
def accumulation_with_an_uneven_last_batch(parallel):
    net = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    (x, y), rows = batches(1, 17)[0], 17
    for _ in range(2):
        optimizer.zero_grad()
        for a, b in zip(x.split(5), y.split(5)):
            loss = F.mse_loss(net(a), b) * (len(a) / rows)
            loss.backward()
            yield loss
        optimizer.step()
    yield from net.parameters()


@habit
def gradient_noise(parallel):
    net = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, y in batches():
        F.mse_loss(net(x), y).backward()
        for p in net.parameters():
            p.grad.add_(torch.randn_like(p), alpha=0.01)
        optimizer.step()
        optimizer.zero_grad()
    yield from net.parameters()


@habit
def clipping(parallel):
    net = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for number, (x, y) in enumerate(batches(4)):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        if number == 0:
            nn.utils.clip_grad_value_(net.parameters(), 0.01)
        elif number == 1:
            yield nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        elif number == 2:
            for p in net.parameters():
                p.grad.clamp_(-0.01, 0.01)
        else:
            total = torch.sqrt(sum(p.grad.square().sum() for p in net.parameters()))
            for p in net.parameters():
                p.grad.mul_((0.1 / total).clamp(max=1))
        yield from [p.grad for p in net.parameters()]
        optimizer.step()
    yield from net.parameters()


@habit
def adaptive_clipping(parallel):
    net = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for x, y in batches():
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        for p in net.parameters():
            dims = tuple(range(1, p.ndim)) or None
            largest = p.detach().norm(dim=dims, keepdim=True).clamp(min=1e-3) * 0.1
            size = p.grad.norm(dim=dims, keepdim=True).clamp(min=1e-6)
            p.grad.copy_(torch.where(size > largest, p.grad * (largest / size), p.grad))
        optimizer.step()
    yield from net.parameters()


@habit
def freezing_and_unfreezing(parallel):
    model = mlp(5, 8, 8, 3)
    net = parallel(model)
    for p in model[:2].parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 0.05)
    for number, (x, y) in enumerate(batches(5)):
        if number == 2:
            for p in model[:2].parameters():
                p.requires_grad_(True)
            optimizer.add_param_group({"params": list(model[:2].parameters()), "lr": 0.01})
        if number == 4:
            model[4].requires_grad_(False)
        yield step(optimizer, F.mse_loss(net(x), y))
    yield from net.parameters()


@habit
def schedulers(parallel):
    for make in (
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=4),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
    ):
        net = parallel(mlp(5, 3))
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.5)
        scheduler = make(optimizer)
        for x, y in batches(4):
            loss = step(optimizer, F.mse_loss(net(x), y))
            scheduler.step(*([loss] if "Plateau" in type(scheduler).__name__ else []))
            yield optimizer.param_groups[0]["lr"]
        yield from net.parameters()


@habit
def one_backward_per_loss(parallel):
    net = parallel(mlp(5, 8, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, y in classes():
        optimizer.zero_grad()
        out = net(x)
        F.cross_entropy(out, y).backward(retain_graph=True)
        out.square().mean().backward()
        net(x).abs().sum().backward()
        sum(p.abs().sum() for p in net.parameters()).mul(1e-3).backward()
        yield from [p.grad for p in net.parameters()]
        optimizer.step()
