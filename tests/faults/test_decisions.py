"""What Python decides by values of tensors: each call is that of one device, whichever way it goes, and so are its errors."""

from __future__ import annotations

import copy
import functools
import logging

import jobs
import pytest
import torch
from torch import distributions, nn

import shardwright as sw
from shardwright.capture import decisions

STEPS = 5


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.calls, self.seen, self.function = 0, [], function
        self.register_buffer("is_set", torch.zeros((), dtype=torch.bool))
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x):
        h = self.norm(self.layer(x))
        return self.function(self, x, h if self.function is of_gradients else self.dropout(h))


# -- what is decided by: of the batch, whose sign changes from step to step --------------------------------------------------

TRUTHS = {
    "a comparison": lambda x: x.sum() > 0,
    "all": lambda x: (x > -2).all(),
    "any": lambda x: (x < -2).any(),
    "a number": lambda x: x.sum().clamp(min=0),
    "one element": lambda x: x[:1, :1] > 0,
    "an integer": lambda x: (x > 1).sum() % 2,
    "item": lambda x: (x.sum() > 0).item(),
    "equal": lambda x: torch.equal(x, x.clamp(min=-2)),
    "allclose": lambda x: torch.allclose(x, x.clamp(min=-2)),
    "is_nonzero": lambda x: torch.is_nonzero(x.sum().clamp(min=0)),
    "contains": lambda x: 1 in (x > 1.5).sum(1),
    "not": lambda x: not (x.mean() > 0),
    "and": lambda x: x[0].sum() > 0 and x[-1].sum() > 0,
    "of NaN": lambda x: (x.sum() / 0).isnan() or x.sum().clamp(min=0) * float("nan") or x.sum() > 0,
    "a constant": lambda x: torch.tensor(3) > 2,
    "a maximum": lambda x: max(x[0].sum(), x[1].sum()) > 0,
}


def branches(truth, self, x, h):
    return h + 1 if truth(x) else h * 2


def counts(truth, self, x, h):
    self.calls += 1
    if truth(x):
        self.calls += 10
        self.seen = [*self.seen[-1:], self.calls]
        h = self.dropout(h)
    return h * self.calls


def writes(truth, self, x, h):
    if truth(x):
        self.shift.add_(h.detach().mean(0))
        h = self.norm(h)
    return h + self.shift


def raises(truth, self, x, h):
    self.calls += 1
    if truth(x):
        raise ValueError(f"bad: {x.sum():.3f}, in call {self.calls}")
    return self.dropout(h)


def asserts(truth, self, x, h):
    self.shift.copy_(h.detach()[0])
    assert truth(x), "not so"
    return self.dropout(h) + self.shift


def catches(truth, self, x, h):
    try:
        if truth(x):
            raise KeyError("positive")
    except KeyError as error:
        h = h + len(error.args[0])
    return h


USES = [branches, counts, writes, raises, asserts, catches]


def initialises(self, x, h):
    """As activation norms do: the first batch sets a buffer."""
    if not self.is_set:
        with torch.no_grad():
            self.shift.copy_(h.mean(0))
            self.is_set.fill_(True)
    return h - self.shift


def loops(self, x, h):
    self.calls = 0
    h = h + x
    while h.norm() > 4:
        h, self.calls = h / 2, self.calls + 1
    return h


def two_in_a_row(self, x, h):
    h = h + 1 if x.sum() > 0 else h.sin()
    return h * 3 if x[0].sum() > 0 else h.cos()


def of_parameters(self, x, h):
    return h if self.layer.weight.abs().max() < 100 else h.clamp(-1, 1)


def within_no_grad(self, x, h):
    with torch.no_grad():
        scale = 2.0 if x.sum() > 0 else 3.0
    return h * scale


def of_gradients(self, x, h):
    g = torch.autograd.grad(self.layer(x).sin().sum(), self.layer.weight, create_graph=True)[0]
    return h + g.sum() if g.sum() > 0 else h - g.sum()


def checkpointed(self, x, h):
    def inner(h):
        return h.sin() if h.sum() > 0 else h.cos()

    return torch.utils.checkpoint.checkpoint(inner, self.layer(x), use_reentrant=False) + h


def distributed(self, x, h):
    normal = distributions.Normal(h, self.layer(x).exp())
    of_prior = distributions.kl_divergence(normal, distributions.Normal(torch.zeros_like(h), torch.ones_like(h)))
    return normal.rsample() + of_prior + distributions.Categorical(logits=h).log_prob(torch.zeros(6)).unsqueeze(1)


def no_distribution(self, x, h):
    return distributions.Bernoulli(probs=x.sum().sign() / 2 + 0.5 * h.detach().sum().sign().abs()).log_prob(h.detach() * 0) + h


def guards(self, x, h):
    """What comes next would fail where the check does."""
    index = (x.sum() < 0).long() * 7
    if index >= 4:
        raise IndexError(f"no such column: {index}")
    return h.index_select(1, index.view(1))


def slices(self, x, h):
    """Integers that Python reads are decisions."""
    count = (x > 0.5).sum(0).max()
    return h[:, : int(count) % 3 + 1].sum(1) + sum(h[:, at].sum() for at in range(count % 2))


PAIRS = [(name, use) for name in TRUTHS for use in (USES if name == "a comparison" else USES[:1])]
OTHERS = [
    initialises, loops, two_in_a_row, of_parameters, within_no_grad, of_gradients, checkpointed, distributed, no_distribution,
    guards, slices,
]  # fmt: skip
FORMS = [
    *(pytest.param(functools.partial(use, TRUTHS[name]), id=f"{use.__name__}-{name}") for name, use in PAIRS),
    *(pytest.param(function, id=function.__name__) for function in OTHERS),
]


def outcome(call, own, x):
    """What a call gives and leaves behind."""
    own.zero_grad()
    try:
        result = call(x)
        result.sum().backward()
    except (ValueError, AssertionError, IndexError) as error:
        result = (type(error).__name__, str(error).partition("\n")[0])
    gradients = [p.grad for p in own.parameters()]
    return result, gradients, dict(own.state_dict()), (own.calls, own.seen), torch.rand(2)


def both(function, steps=STEPS, devices=None, mode="data_parallel"):
    """Compares some steps of a net with those of one device; returns the net and whether one raised."""
    if devices is not None:
        sw.init(devices=devices)
    torch.manual_seed(0)
    model = Net(function).double()
    single, net = copy.deepcopy(model), sw.AutoParallel(model, mode)
    raised = False
    for step in range(steps):
        x = torch.randn(6, 4, dtype=torch.float64).abs() * (-1) ** (step // 2) + 0.3 * torch.randn(6, 4, dtype=torch.float64)
        found = []
        for call, own in ((net, model), (single, single)):
            torch.manual_seed(step)
            found.append(outcome(call, own, x))
        if isinstance(found[1][0], tuple):
            raised = True
            assert found[0][0] == found[1][0]
            found = [rest for _, *rest in found]
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)
    return net, raised


@pytest.mark.parametrize("function", FORMS)
def test_each_call_is_that_of_one_device(function):
    both(function, devices=3)


def test_a_way_is_planned_once(caplog):
    net, _ = both(two_in_a_row, 12, 2, "semi_auto")
    kept = [bound for found in net._bound_calls.values() for bound in found]
    assert len(kept) <= 4
    assert len({tuple(bound.decisions.taken) for bound in kept}) == len(kept)
    with caplog.at_level(logging.WARNING, "shardwright"):
        both(two_in_a_row, 4, 2, "auto")
    assert any("decided" in record.getMessage() and "x.sum() > 0" in record.getMessage() for record in caplog.records)


def test_a_net_of_many_decisions_is_refused(monkeypatch):
    monkeypatch.setattr(decisions, "MOST", 5)

    def forever(self, x, h):
        while True:
            if (h.abs() < 0).all():
                return h
            h = h + 1

    sw.init(devices=2)
    model = Net(forever)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(sw.errors.CaptureError, match="more than 5 times"):
        sw.AutoParallel(model)(torch.ones(4, 4))
    torch.testing.assert_close(dict(model.state_dict()), dict(before))
    assert model.calls == 0


class Logged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        LOG.append(1)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


LOG: list = []
REFUSED = {
    "a function with effects": (lambda s, x, h: Logged.apply(h) if x.sum() > 0 else h, "reads or changes objects outside"),
    "a text": (lambda s, x, h: h * len(f"{x.sum()}"), "makes a text of the values"),
    "a number": (lambda s, x, h: h * float(x.sum()), "reads a number of a tensor"),
    "within vmap": (lambda s, x, h: torch.func.vmap(lambda r: r if r.sum() > 0 else -r)(h), "data-dependent|reads a number"),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_and_leaves_nothing(name):
    function, message = REFUSED[name]
    sw.init(devices=2)
    model = Net(function)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    drawn = torch.get_rng_state()
    with pytest.raises(sw.errors.CaptureError, match=message):
        sw.AutoParallel(model)(torch.ones(4, 4))
    torch.testing.assert_close(dict(model.state_dict()), dict(before))
    assert torch.equal(torch.get_rng_state(), drawn)


JOBS = [
    functools.partial(counts, TRUTHS["a comparison"]),
    functools.partial(raises, TRUTHS["a comparison"]),
]


def _job(rank, folder):
    sw.init()
    for at, function in enumerate(JOBS):
        _, raised = both(function, 3)
        print(f"case {at}: as one device{', with errors' if raised else ''}", flush=True)


@pytest.mark.long
def test_ranks_of_a_job_decide_alike(tmp_path):
    found = jobs.cases(tmp_path, _job)
    assert len(found) == len(JOBS)
