"""Writes to a parameter ``p``: with an ordinary tensor ``m`` of its shape, or with its gradient ``q`` beside."""

from __future__ import annotations

import torch
from torch import nn

WRITES = {
    "row": lambda p, m: p[0].fill_(7),
    "set row": lambda p, m: p.__setitem__(0, 0.0),
    "set slice": lambda p, m: p.__setitem__((slice(2, 5), 1), m[2:5, 0]),
    "set mask": lambda p, m: p.__setitem__(p > 0.3, 1.0),
    "set plain mask": lambda p, m: p.__setitem__(m > 0.5, 2.0),
    "view": lambda p, m: p.view(-1)[5].add_(3),
    "view of views": lambda p, m: p.t()[1:3].t().mul_(2),
    "diagonal": lambda p, m: p.diagonal().fill_(1),
    "unbind": lambda p, m: [row.mul_(i) for i, row in enumerate(p)],
    "split": lambda p, m: p.split(2)[1].zero_(),
    "view kept": lambda p, m: (lambda view: (p.add_(1), view.mul_(2), p.add_(view.sum())))(p[1]),
    "data": lambda p, m: p.data[1].copy_(m[0]),
    "copy": lambda p, m: p.copy_(m),
    "copy broadcast": lambda p, m: p.copy_(m[0]),
    "mask": lambda p, m: p.data.mul_(m > 0.5),
    "add": lambda p, m: p.add_(m, alpha=0.5),
    "lerp": lambda p, m: p.lerp_(m, 0.25),
    "clamp": lambda p, m: p.clamp_(m - 0.5, m),
    "where": lambda p, m: p.copy_(torch.where(m > 0.5, p, m)),
    "out": lambda p, m: torch.add(m, 1, out=p),
    "plain": lambda p, m: p.copy_(m.clone().mul_(p).sub_(p.t().t())),
    "lists": lambda p, m: (torch._foreach_mul_([p, p.data], [m, m]), torch._foreach_add_([m, p], [p, m.clone()])),
    "vectors": lambda p, m: nn.utils.vector_to_parameters(nn.utils.parameters_to_vector([p, p * 2]) + 1, [p, p]),
    "sort": lambda p, m: p.copy_(p.sort(0).values.flip(1)),
    "renorm": lambda p, m: p.renorm_(2, 0, 0.5),
    "qr": lambda p, m: p.copy_(torch.linalg.qr(p)[0]),
}

# Tensors that lie alike on every rank, and some that only seem to.
SHORT = {
    "foreach": lambda p, q, m: torch._foreach_lerp_([p, q], [q, p], 0.25),
    "foreach one twice": lambda p, q, m: torch._foreach_add_([p, p], [q, q]),
    "foreach data": lambda p, q, m: torch._foreach_add_([p, p.data], [q, q]),
    "foreach new": lambda p, q, m: p.copy_(torch._foreach_sqrt([q.abs(), p.abs()])[1]),
    "foreach norm of all": lambda p, q, m: torch._foreach_mul_([p, q], p.norm() / (q.norm() + 1)),
    "foreach numbers": lambda p, q, m: torch._foreach_mul_([p, q], [torch.tensor(0.5).double(), p.sum()]),
    "foreach plain beside": lambda p, q, m: torch._foreach_add_([p, q], [m, p]),
    "foreach rows": lambda p, q, m: torch._foreach_mul_([p[0], q], [p[1], q]),
    "norms": lambda p, q, m: [p.mul_(n) for _ in range(2) for n in torch._foreach_norm([p, q, q - p])],
    "norms of a view": lambda p, q, m: [p.mul_(n) for _ in range(2) for n in torch._foreach_norm([p[0], p.data, q])],
    "norms of order 1": lambda p, q, m: [p.mul_(n) for n in torch._foreach_norm([p, q, q - p], 1)],
    "stacked norms": lambda p, q, m: p.mul_(torch.stack([p.norm(), q.norm(1), p.sum(), q.norm()]).norm()),
    "number": lambda p, q, m: p.mul_(q.sum()).addcmul_(q, p, value=0.1),
    "number of a piece": lambda p, q, m: q.mul_((p.sum() * p).sum()),
    "number written": lambda p, q, m: p.mul_(p.sum().add_(1)),
    "row beside": lambda p, q, m: p.mul_(q[0]).add_(q[:, :1]),
    "compared": lambda p, q, m: p.mul_(p > q).add_((q > 0) & (p < 1)),
    "cast": lambda p, q, m: p.copy_(q.float() * 2 + p),
    "order in memory": lambda p, q, m: p.copy_((torch.empty_like(q).copy_(p).t().contiguous().t() + p) * q),
}
