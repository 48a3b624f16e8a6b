"""Packed sequences, recurrent networks on them and the CTC loss: each step is that of one device, for all lengths."""

from __future__ import annotations

import copy
import functools
import itertools
import random

import jobs
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import shardwright as sw

LONGEST, BATCH = 6, 4


class Recurrent(nn.Module):
    def __init__(
        self, kind, batch_first=True, is_sorted=False, total=None, padding=0.0, gives_state=False, second=False, **options
    ):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.network = getattr(nn, kind)(4, 5, batch_first=batch_first, **options)
        width = (self.network.proj_size or 5) * (2 if self.network.bidirectional else 1)
        self.second = getattr(nn, kind)(width, width, batch_first=batch_first) if second else None
        self.out = nn.Linear(width, 2)
        self.batch_first, self.is_sorted, self.gives_state = batch_first, is_sorted, gives_state
        self.total, self.padding = total, padding

    def state(self, x):
        if not self.gives_state:
            return None
        count = self.network.num_layers * (2 if self.network.bidirectional else 1)
        state = torch.linspace(-1, 1, count * BATCH * 5, dtype=x.dtype).view(count, BATCH, 5)
        return (state, state.sin()) if isinstance(self.network, nn.LSTM) else state

    def forward(self, x, lengths):
        x = x if self.batch_first else x.transpose(0, 1)
        packed = pack_padded_sequence(self.embed(x), lengths, self.batch_first, self.is_sorted)
        packed, state = self.network(packed, self.state(x))
        if self.second is not None:
            packed, _ = self.second(packed)
        h, found = pad_packed_sequence(packed, self.batch_first, self.padding, self.total)
        return self.out(h), sum(s.sin().sum() for s in (state if isinstance(state, tuple) else (state,))), found


def recurrent():
    """One net per kind and some of its options."""
    rng = random.Random(0)
    options = {
        "batch_first": (True, False), "is_sorted": (True, False), "total": (None, 8), "padding": (0.0, 0.5),
        "gives_state": (True, False), "second": (True, False), "bidirectional": (True, False), "num_layers": (1, 2),
        "dropout": (0.0, 0.3),
    }  # fmt: skip
    found = {}
    for kind, _ in itertools.product(("LSTM", "GRU", "RNN"), range(4)):
        chosen = {name: rng.choice(values) for name, values in options.items()}
        chosen["dropout"] *= chosen["num_layers"] > 1
        name = " ".join([kind, *(f"{k}={v}" for k, v in chosen.items() if v)])
        found[name] = functools.partial(Recurrent, kind, **chosen)
    found["LSTM projected"] = functools.partial(Recurrent, "LSTM", proj_size=3)
    found["RNN relu"] = functools.partial(Recurrent, "RNN", nonlinearity="relu")
    return found


class Aligned(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(3, 5), function

    def forward(self, x, lengths):
        log_probs = self.layer(x).log_softmax(-1).transpose(0, 1)
        targets = 1 + torch.arange(2 * BATCH).view(BATCH, 2) % 4
        of_targets = (lengths + 1) // 4 + 1
        return self.function(log_probs, targets, lengths, of_targets), lengths.clone()


def selected(log_probs, targets, lengths, of_targets):
    mask = torch.arange(2)[None] < of_targets[:, None]
    return F.ctc_loss(log_probs, targets.masked_select(mask), lengths, of_targets, zero_infinity=True)


def reduced(how, *args):
    return F.ctc_loss(*args, reduction=how, zero_infinity=True)


NETS = {
    **recurrent(),
    **{f"CTC {how}": lambda how=how: Aligned(functools.partial(reduced, how)) for how in ("mean", "sum", "none")},
    "CTC of constants": lambda: Aligned(lambda p, t, n, k: F.ctc_loss(p, t, (LONGEST,) * BATCH, (2, 1, 2, 1)) + n.sum() * 0),
    "CTC of selected": lambda: Aligned(selected),
    "CTC module": lambda: Aligned(nn.CTCLoss(zero_infinity=True)),
    "lengths alone": lambda: Alone(),
}  # fmt: skip


class Alone(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, x, lengths):
        return pad_packed_sequence(pack_padded_sequence(self.layer(x), lengths, True, False), True)


def both(make, steps=4):
    torch.manual_seed(0)
    model = make().double()
    single, net = copy.deepcopy(model), sw.AutoParallel(model, "data_parallel")
    for step in range(steps):
        x = torch.randn(BATCH, LONGEST, 3, dtype=torch.float64)
        lengths = torch.randint(2, LONGEST, (BATCH,))
        lengths[step % BATCH] = LONGEST if step < 3 else 4
        if getattr(model, "is_sorted", False):
            lengths = lengths.sort(descending=True).values
        found = []
        for call, own in ((net, model), (single, single)):
            torch.manual_seed(step)
            own.zero_grad()
            result = call(x, lengths)
            sum(leaf.sin().sum() for leaf in result if leaf.is_floating_point()).backward()
            found.append((result, [p.grad for p in own.parameters()], torch.rand(1)))
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_each_step_is_that_of_one_device(name):
    sw.init(devices=3)
    both(NETS[name])


WRONG = {
    "not sorted": (Recurrent("GRU", is_sorted=True), [2, 3, 4, 6]),
    "an empty one": (Recurrent("GRU"), [2, 0, 4, 6]),
    "too long": (Recurrent("LSTM"), [2, 7, 4, 6]),
    "longer than the total length": (Recurrent("LSTM", total=5), [2, 6, 4, 6]),
    "without a network": (Alone(), [2, 7, 4, 6]),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", WRONG)
def test_errors_are_those_of_one_device(name):
    model, lengths = WRONG[name]
    sw.init(devices=2)
    net, x = sw.AutoParallel(model), torch.randn(BATCH, LONGEST, 3)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError)) as expected:
            copy.deepcopy(model)(x, torch.tensor(lengths))
        with pytest.raises(type(expected.value)) as found:
            net(x, torch.tensor(lengths))
        if max(lengths) <= LONGEST:  # else torch's kernels say different things
            assert str(found.value) == str(expected.value)


REFUSED = {
    "data": lambda p, x: pad_packed_sequence(nn.utils.rnn.PackedSequence(p.data * 2, p.batch_sizes))[0],
    "batch sizes": lambda p, x: x * p.batch_sizes.sum(),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_size_is_refused(name):
    function = REFUSED[name]
    sw.init(devices=2)
    with pytest.raises(sw.errors.CaptureError, match="its size depends on values, at test_sequences.py"):
        sw.AutoParallel(lambda x, n: function(pack_padded_sequence(x, n, True), x))(torch.ones(2, 3, 4), torch.tensor([3, 2]))


def _job(rank, folder):
    sw.init()
    for name in ("LSTM projected", "CTC of selected"):
        both(NETS[name], 3)
        print(f"case {name}: as one device", flush=True)


@pytest.mark.long
def test_ranks_of_a_job(tmp_path):
    assert len(jobs.cases(tmp_path, _job)) == 2
