"""Tensors whose size depends on values: what is computed of them is that of one device, for all sizes."""

from __future__ import annotations

import copy

import jobs
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardwright as sw


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function, self.kept = nn.Linear(4, 5), function, None
        self.norm = nn.BatchNorm1d(5)
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x, labels):
        return self.function(self, self.layer(x), labels)


def masked_loss(self, h, labels):
    keep = labels != 0
    return F.cross_entropy(h[keep], labels[keep])


def selected_norm(self, h, labels):
    return h.masked_select(h > 0).norm() + h[h[:, 0] > 0, 1:3].mean()


def written(self, h, labels):
    out = torch.zeros_like(h)
    out[labels > 1] = self.experts[0](h[labels > 1]).tanh()
    out[labels == 1] += h[labels == 1] * 2
    return out


def gathered(self, h, labels):
    (rows,) = torch.where(labels > 1)
    return h.index_add(0, rows, self.experts[1](h[rows]))


def places(self, h, labels):
    rows, columns = torch.nonzero(h > 0, as_tuple=True)
    return (h[rows, columns] * columns).sum() + h.detach().nonzero().sum()


def experts(self, h, labels):
    weights, top = h[:, :3].softmax(-1).topk(2)
    mask = F.one_hot(top, 3).permute(2, 1, 0)
    out = torch.zeros_like(h)
    for expert in range(3):
        place, token = torch.where(mask[expert])
        if token.numel() == 0:
            continue
        out.index_add_(0, token, self.experts[expert](h[token]) * weights[token, place, None])
    return out


def hit(self, h, labels):
    mask = F.one_hot(labels % 3, 3).T
    out = torch.zeros_like(h)
    for expert in (mask.sum(-1) > 0).nonzero():
        expert = expert[0]
        (token,) = torch.where(mask[expert])
        out.index_add_(0, token, self.experts[expert](h[token]))
    return out


def without_gradient(self, h, labels):
    with torch.no_grad():
        mean = h[labels > 0].mean(0)
    return h - mean


def of_lengths(self, h, labels):
    found = h[labels > 0]
    return found.reshape(1, found.shape[0], -1).sin().sum() / found.shape[0] if len(found.shape) == 2 else h.sum()


def both_ways(self, h, labels):
    found = h[labels > 0]
    largest, at = found.max(0)
    return largest.sum() + at.sum() + torch.cat([found, h]).std() + (found @ found.T).logsumexp((0, 1))


def covariance(self, h, labels):
    return torch.cov(h.T) + torch.corrcoef(h.T) + h.T.cov(correction=0, fweights=labels + 1)


FORMS = [
    masked_loss, selected_norm, written, gathered, places, experts, hit, without_gradient, of_lengths, both_ways, covariance,
]  # fmt: skip


def both(function, steps=4):
    torch.manual_seed(0)
    model = Net(function).double()
    single, net = copy.deepcopy(model), sw.AutoParallel(model, "data_parallel")
    for step in range(steps):
        x, labels = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,))
        labels[:3] = torch.tensor([1, 0, 2]) if step < 3 else 1
        found = []
        for call, own in ((net, model), (single, single)):
            own.zero_grad()
            result = call(x.clone(), labels)
            result.sin().sum().backward()
            found.append((result, [p.grad for p in own.parameters()], torch.get_rng_state()))
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("function", FORMS)
def test_each_step_is_that_of_one_device(function):
    sw.init(devices=3)
    both(function)


def _changed(self, h, labels):
    base = h * 1
    found = base[labels > 0] * base[0]
    base.add_(1)
    return found.sum()


REFUSED = {
    "a result": (lambda s, h, n: h[n > 0], "a result has a size that depends on values: it is made at test_ragged"),
    "an attribute": (
        lambda s, h, n: setattr(s, "kept", h[n > 0]) or h,
        "kept is given a tensor whose size depends on",
    ),
    "dropout": (lambda s, h, n: F.dropout(h[n > 0]).sum(), "draws random numbers"),
    "statistics": (lambda s, h, n: s.norm(h[n > 0]).sum(), "moves running statistics"),
    "in place": (lambda s, h, n: h[n > 0].mul_(2).sum(), "mul_ of a tensor cannot be captured"),
    "a number": (lambda s, h, n: h * h[n > 0].sum().item(), "reads a number"),
    "another size": (lambda s, h, n: h[n > 0].item(), "item of a tensor cannot be captured"),
    "written between": (_changed, "written to after something whose size depends on values"),
    "a view of it": (lambda s, h, n: _view(h[n > 0]), "in place of a tensor cannot be captured"),
}


def _view(found):
    row = found[:, 0]
    found += 1
    return row.sum()


@pytest.mark.whole
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name):
    function, message = REFUSED[name]
    sw.init(devices=2)
    model = Net(function)
    with pytest.raises(sw.errors.CaptureError, match=message):
        sw.AutoParallel(model)(torch.ones(4, 4), torch.tensor([0, 1, 2, 1]))
    assert model.kept is None


def _job(rank, folder):
    sw.init()
    for function in (masked_loss, experts, hit):
        both(function, 2)
        print(f"case {function.__name__}: as one device", flush=True)


@pytest.mark.long
def test_ranks_of_a_job(tmp_path):
    assert len(jobs.cases(tmp_path, _job)) == 3
