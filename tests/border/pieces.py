"""Pieces of modules that stand at the border of capture: each does something that operators alone do not tell.

A piece takes and returns ``(batch, WIDTH)`` in float64. ``EQUAL`` holds those that must train as on one device, ``REFUSED``
those that must be refused. ``EVENTS`` are what users do to a model between two steps.
"""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 6
SCALE = 1.5  # a global that forwards read
CACHE: dict[int, Tensor] = {}

EQUAL: dict[str, Callable[[], nn.Module]] = {}
REFUSED: dict[str, Callable[[], nn.Module]] = {}


class Piece(nn.Module):
    """A linear layer, and a function of the module and of what the layer gives."""

    factor = 1.25

    def __init__(self, function: Callable[[Any, Tensor], Tensor], set_up: Callable[[Any], None] | None = None):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.scale, self.config = 0.75, types.SimpleNamespace(gain=1.0)
        self.function = function
        if set_up is not None:
            set_up(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.layer(x))


def equal(function: Callable[[Any, Tensor], Tensor], set_up: Callable[[Any], None] | None = None) -> Any:
    EQUAL[function.__name__] = functools.partial(Piece, function, set_up)
    return function


def refused(function: Callable[[Any, Tensor], Tensor], set_up: Callable[[Any], None] | None = None) -> Any:
    REFUSED[function.__name__] = functools.partial(Piece, function, set_up)
    return function


def _buffer(self: Any) -> None:
    self.register_buffer("kept", torch.ones(WIDTH))


def _batch_norm(self: Any) -> None:
    self.norm = nn.BatchNorm1d(WIDTH)


def _second(self: Any) -> None:
    self.second = nn.Linear(WIDTH, WIDTH)


def _frozen(self: Any) -> None:
    self.slow = nn.Parameter(torch.ones(WIDTH), requires_grad=False)


def _attributes(self: Any) -> None:
    self.calls, self.seen, self.features, self.held = 0, None, [], None


def _generator(self: Any) -> None:
    self.numbers = random.Random(3)


def _numpy_generator(self: Any) -> None:
    self.numbers = np.random.default_rng(3)


class Reverse(torch.autograd.Function):
    """A backward of its own: gradient reversal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Round(torch.autograd.Function):
    """A straight-through estimator, in the style with ``setup_context``."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Scaled(torch.autograd.Function):
    """Two results and a constant; a gradient for two of its three arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: float, w: Tensor) -> tuple[Tensor, int, Tensor]:
        ctx.save_for_backward(x, w)
        ctx.a = a
        return x * a * w, x.shape[1], x.sum()

    @staticmethod
    def backward(ctx: Any, of_result: Tensor, _: None, of_total: Tensor) -> tuple[Tensor, None, Tensor]:
        x, w = ctx.saved_tensors
        return of_result * ctx.a * w + of_total, None, (of_result * x * ctx.a).sum(0)


bound_apply = Reverse.apply  # taken long before anything is captured


@functools.lru_cache
def table(width: int) -> Tensor:
    return torch.arange(width, dtype=torch.float64).cos()


# -- what must be equal ----------------------------------------------------------------------------------------------------


@equal
def data_is_read(self: Any, h: Tensor) -> Tensor:
    return h * h.data.sign()


@equal
def data_of_a_weight(self: Any, h: Tensor) -> Tensor:
    return h + F.linear(h, self.layer.weight + (self.layer.weight.data.sign() - self.layer.weight).detach())


@equal
def function_without_gradients(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        sign = Reverse.apply(h)
    return h + sign


@equal
def branch_on_grad_mode(self: Any, h: Tensor) -> Tensor:
    return h * 2 if torch.is_grad_enabled() else h * 3


@equal
def branch_on_training(self: Any, h: Tensor) -> Tensor:
    return h * 2 if self.training else h + 1


@equal
def reads_attributes(self: Any, h: Tensor) -> Tensor:
    return h * self.scale * self.config.gain * type(self).factor


@equal
def reads_a_global(self: Any, h: Tensor) -> Tensor:
    return h * SCALE


@equal
def draws(self: Any, h: Tensor) -> Tensor:
    return F.dropout(h, 0.3, self.training) + 0.1 * torch.rand_like(h)


@equal
def checkpointed(self: Any, h: Tensor) -> Tensor:
    return checkpoint(lambda t: torch.tanh(t) * 2, h, use_reentrant=False)


@equal
def checkpointed_reentrant(self: Any, h: Tensor) -> Tensor:
    return checkpoint(lambda t: torch.tanh(t) * 2, h, use_reentrant=True)


@equal
def checkpoints_within(self: Any, h: Tensor) -> Tensor:
    def inner(t: Tensor) -> Tensor:
        return checkpoint(torch.tanh, t * 2, use_reentrant=False)

    return checkpoint(inner, h, use_reentrant=False) + h


@equal
def cached_by_arguments(self: Any, h: Tensor) -> Tensor:
    return h * table(WIDTH)


@equal
def writes_in_place(self: Any, h: Tensor) -> Tensor:
    h = h * 2
    h[:, 0] = 0.5
    h.mul_(1.5).clamp_(min=-1)
    return h


@equal
def restricted_to_no_grad(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        peak = h.abs().amax()
    return h / (1 + peak)


def running_mean(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.kept.mul_(0.9).add_(h.mean(0), alpha=0.1)
    return h + self.kept.clone()


def running_mean_by_data(self: Any, h: Tensor) -> Tensor:
    self.kept.data.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    return h - self.kept.clone()


def assigned_buffer(self: Any, h: Tensor) -> Tensor:
    self.kept = 0.5 * self.kept + 0.5 * h.detach().mean(0)
    return h * self.kept


def momentum_of_a_frozen_one(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.slow.mul_(0.9).add_(h.mean(0), alpha=0.1)
    return h * self.slow.clone()


def batch_normed(self: Any, h: Tensor) -> Tensor:
    return self.norm(h)


def counts_its_calls(self: Any, h: Tensor) -> Tensor:
    self.calls += 1
    return h * self.calls


def leaves_a_value(self: Any, h: Tensor) -> Tensor:
    self.seen = h.square().mean()
    return h + self.seen


def leaves_features(self: Any, h: Tensor) -> Tensor:
    self.features.clear()
    self.features.append(h * 2)
    return h + self.features[0]


def caches_in_a_global(self: Any, h: Tensor) -> Tensor:
    if WIDTH not in CACHE:
        CACHE[WIDTH] = torch.ones(WIDTH, dtype=h.dtype)
    return h * CACHE[WIDTH]


def carries_a_state(self: Any, h: Tensor) -> Tensor:
    h = h if self.held is None else h + self.held
    self.held = h.detach()
    return h


def caches_in_an_attribute(self: Any, h: Tensor) -> Tensor:
    if self.held is None:
        self.held = torch.ones(WIDTH, dtype=h.dtype)
    return h * self.held


def collects(self: Any, h: Tensor) -> Tensor:
    self.features.append(h.detach())
    return h * len(self.features)


for _function, _set_up in (
    (caches_in_a_global, None), (carries_a_state, _attributes), (caches_in_an_attribute, _attributes), (collects, _attributes),
    (running_mean, _buffer), (running_mean_by_data, _buffer), (assigned_buffer, _buffer), (momentum_of_a_frozen_one, _frozen),
    (batch_normed, _batch_norm), (counts_its_calls, _attributes), (leaves_a_value, _attributes), (leaves_features, _attributes),
):  # fmt: skip
    equal(_function, _set_up)


@equal
def own_backward(self: Any, h: Tensor) -> Tensor:
    return Reverse.apply(h)


@equal
def own_backward_bound(self: Any, h: Tensor) -> Tensor:
    return bound_apply(h)


@equal
def own_backward_with_context(self: Any, h: Tensor) -> Tensor:
    return Round.apply(h)


@equal
def own_backward_in_a_checkpoint(self: Any, h: Tensor) -> Tensor:
    return checkpoint(Reverse.apply, h, use_reentrant=False)


@equal
def hooked(self: Any, h: Tensor) -> Tensor:
    h.register_hook(lambda gradient: gradient * 2)
    return h * 1


@equal
def writes_to_data(self: Any, h: Tensor) -> Tensor:
    h.data.clamp_(min=0)
    return h * 1


@equal
def writes_without_grad(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        h.mul_(2)
    return h.square()


@equal
def writes_to_detached(self: Any, h: Tensor) -> Tensor:
    h.detach().mul_(2)
    return h.square()


@equal
def writes_to_a_detached_row(self: Any, h: Tensor) -> Tensor:
    h.detach()[0].zero_()
    return h.square()


def hooked_module(self: Any, h: Tensor) -> Tensor:
    return self.second(h)


def _second_with_hook(self: Any) -> None:
    _second(self)
    self.second.register_full_backward_hook(lambda module, given, got: (given[0] * 0,))


def pre_hooked_module(self: Any, h: Tensor) -> Tensor:
    return self.second(h)


def _second_with_pre_hook(self: Any) -> None:
    _second(self)
    self.second.register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * 0,))


equal(hooked_module, _second_with_hook)
equal(pre_hooked_module, _second_with_pre_hook)


@equal
def hooked_late(self: Any, h: Tensor) -> Tensor:
    result = h.sin() + h[:, :1]
    h.register_hook(lambda gradient: gradient * 2)
    h.register_hook(lambda gradient: gradient + 0.5)
    return result * h


@equal
def hooked_and_removed(self: Any, h: Tensor) -> Tensor:
    with h.register_hook(lambda gradient: gradient * 2):
        return h * 1


@equal
def keeps_its_gradient(self: Any, h: Tensor) -> Tensor:
    h.register_hook(lambda gradient: setattr(self, "got", gradient.norm().item()))
    return h * 1


@equal
def own_backward_of_two(self: Any, h: Tensor) -> Tensor:
    result, count, total = Scaled.apply(h, 0.5, self.layer.bias)
    return (result * count + total).tanh()


@equal
def writes_to_a_view_without_grad(self: Any, h: Tensor) -> Tensor:
    row = h[:, :2]
    with torch.no_grad():
        row.mul_(2)
    return (h * 3).tanh() + row.sum(1, keepdim=True)


def clamps_a_parameter(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.second_scale.clamp_(-0.2, 0.4)
    return h * self.second_scale


def _scale(self: Any) -> None:
    self.second_scale = nn.Parameter(torch.linspace(-1, 1, WIDTH))


equal(clamps_a_parameter, _scale)


@equal
def writes_to_a_parameter(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.layer.bias.mul_(0.5)
    return h + self.layer.bias


@equal
def retains(self: Any, h: Tensor) -> Tensor:
    h.retain_grad()
    return h * 1


@equal
def derives(self: Any, h: Tensor) -> Tensor:
    return torch.autograd.grad(h.square().sum(), h, create_graph=True)[0]


@equal
def derives_once(self: Any, h: Tensor) -> Tensor:
    return h * torch.autograd.grad(h.tanh().square().sum(), h, retain_graph=True)[0]


@equal
def derives_a_loss(self: Any, h: Tensor) -> Tensor:
    return h + torch.autograd.grad(F.mse_loss(h.sin(), h) + F.huber_loss(h, h.cos()), h, create_graph=True)[0]


@equal
def derives_attention(self: Any, h: Tensor) -> Tensor:
    heads = h.view(1, 1, *h.shape)
    value = F.scaled_dot_product_attention(heads, heads.sin(), heads)
    return h + torch.autograd.grad(value.square().sum(), h)[0]


@equal
def derives_twice(self: Any, h: Tensor) -> Tensor:
    first = torch.autograd.grad(h.sigmoid().pow(3).sum(), h, create_graph=True)[0]
    return h + torch.autograd.grad(first.sum(), h, create_graph=True)[0]


@equal
def derives_by_a_leaf(self: Any, h: Tensor) -> Tensor:
    leaf = (h * 0.5).detach().requires_grad_()
    loss = self.layer(leaf).softmax(1).square()
    return h + torch.autograd.grad(loss, leaf, torch.ones_like(loss), create_graph=True)[0]


@equal
def steps_within(self: Any, h: Tensor) -> Tensor:
    weight = self.layer.weight
    loss = F.mse_loss(F.linear(h, weight), h.detach().cos())
    return F.linear(h, weight - 0.1 * torch.autograd.grad(loss, weight, create_graph=True)[0])


@equal
def derives_past_a_function(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        weight = h.abs()
    return h + torch.autograd.grad((Reverse.apply(h).tanh() * weight).sum(), h, create_graph=True)[0]


@equal
def derives_what_is_written(self: Any, h: Tensor) -> Tensor:
    rows = torch.zeros_like(h)
    rows[:, 1:] = h[:, :-1] * h[:, 1:]
    return h + torch.autograd.grad(rows.mul_(2).sigmoid().sum(), h, create_graph=True)[0]


@equal
def vectorises(self: Any, h: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: self.layer(row).sin() * row.sum())(h)


@equal
def gradients_of_samples(self: Any, h: Tensor) -> Tensor:
    def loss(weight: Tensor, row: Tensor) -> Tensor:
        return F.linear(row, weight).tanh().square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(self.layer.weight, h)
    return h + gradients.flatten(1).norm(dim=1, keepdim=True)


@equal
def derives_forward(self: Any, h: Tensor) -> Tensor:
    value, tangent = torch.func.jvp(lambda x: self.layer(x).tanh(), (h,), (torch.ones_like(h),))
    return value + tangent


@equal
def pulls_back(self: Any, h: Tensor) -> Tensor:
    value, pull = torch.func.vjp(lambda x: self.layer(x).square(), h)
    return h + pull(value.cos())[0]


@equal
def hessians(self: Any, h: Tensor) -> Tensor:
    return h + torch.func.vmap(torch.func.hessian(lambda row: self.layer(row).tanh().square().sum()))(h).sum(1)


def momentum_by_data(self: Any, h: Tensor) -> Tensor:
    self.slow.data = self.slow.data * 0.9 + h.detach().mean(0) * 0.1
    return h * self.slow.clone()


equal(momentum_by_data, _frozen)


@refused
def gives_other_data_late(self: Any, h: Tensor) -> Tensor:
    rows, before = h[:, :2], h.sin()
    h.data = h.data.abs()
    return (before + h).tanh() + rows.sum(1, keepdim=True)


@refused
def reads_the_data_of_before(self: Any, h: Tensor) -> Tensor:
    before = self.layer.bias.data
    self.layer.bias.data = before * 0.5
    return h + before


def shares_data(self: Any, h: Tensor) -> Tensor:
    self.slow.data = self.layer.bias.data
    return h * self.slow.clone()


refused(shares_data, _frozen)


def writes_the_data_it_gave(self: Any, h: Tensor) -> Tensor:
    value = h.detach().mean(0)
    self.slow.data = value
    value.add_(1)
    return h * self.slow.clone()


refused(writes_the_data_it_gave, _frozen)


@refused
def keeps_a_parameter(self: Any, h: Tensor) -> Tensor:
    if not hasattr(self, "late"):
        self.late = nn.Parameter(torch.ones(WIDTH, dtype=h.dtype))
    return h * self.late


@equal
def calls_functionally(self: Any, h: Tensor) -> Tensor:
    halved = {name: 0.5 * p for name, p in self.layer.named_parameters()}
    return torch.func.functional_call(self.layer, halved, (h,))


# -- what must be refused --------------------------------------------------------------------------------------------------


@refused
def hooked_by_node(self: Any, h: Tensor) -> Tensor:
    h.grad_fn.register_prehook(lambda gradients: (gradients[0] * 2,))
    return h * 1


@refused
def hooked_many(self: Any, h: Tensor) -> Tensor:
    torch.autograd.graph.register_multi_grad_hook((h,), lambda gradients: None)
    return h * 1


@refused
def saved_otherwise(self: Any, h: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 0, lambda t: t):
        return h.exp()


@refused
def gives_other_data(self: Any, h: Tensor) -> Tensor:
    h.data = h.data * 2
    return h * 1


@equal
def makes_a_parameter(self: Any, h: Tensor) -> Tensor:
    return h * nn.Parameter(torch.ones(WIDTH))


@equal
def makes_a_layer(self: Any, h: Tensor) -> Tensor:
    return nn.Linear(WIDTH, WIDTH, dtype=h.dtype)(h)


@refused
def draws_in_python(self: Any, h: Tensor) -> Tensor:
    return h * random.random()


@refused
def draws_in_numpy(self: Any, h: Tensor) -> Tensor:
    return h * float(np.random.rand())


@refused
def seeds(self: Any, h: Tensor) -> Tensor:
    torch.manual_seed(3)
    return F.dropout(h, 0.5)


@refused
def draws_from_a_generator(self: Any, h: Tensor) -> Tensor:
    return h + torch.rand(h.shape, generator=torch.default_generator, dtype=h.dtype)


@refused
def takes_an_item(self: Any, h: Tensor) -> Tensor:
    return h / h.detach().norm().item()


@equal
def has_sizes_of_values(self: Any, h: Tensor) -> Tensor:
    return h + h[h > 0].sum()


@refused
def counts_by_sizes_of_values(self: Any, h: Tensor) -> Tensor:
    return h * len(torch.unique(h.detach().round()))


@refused
def asks_for_gradients_of_its_input(self: Any, h: Tensor) -> Tensor:
    self.layer.weight.requires_grad_(False)
    return h * 1


@refused
def derives_what_draws(self: Any, h: Tensor) -> Tensor:
    return h + torch.autograd.grad(F.dropout(h, 0.5).square().sum(), h, create_graph=True)[0]


@refused
def derives_by_duals(self: Any, h: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(torch.autograd.forward_ad.make_dual(h, torch.ones_like(h)).sin())[1]


@refused
def transforms_an_own_backward(self: Any, h: Tensor) -> Tensor:
    return torch.func.grad(lambda x: Round.apply(x).square().sum())(h)


@refused
def goes_backward(self: Any, h: Tensor) -> Tensor:
    leaf = h.detach().requires_grad_()
    leaf.square().sum().backward()
    return h * leaf.grad


def draws_from_its_own(self: Any, h: Tensor) -> Tensor:
    return h * self.numbers.random()


refused(draws_from_its_own, _generator)


def draws_from_numpys_own(self: Any, h: Tensor) -> Tensor:
    return h * float(self.numbers.random())


refused(draws_from_numpys_own, _numpy_generator)


@refused
def writes_what_the_backward_reads(self: Any, h: Tensor) -> Tensor:
    result = h.square()
    h.data.mul_(2)
    return result


@refused
def writes_what_the_operator_before_saved(self: Any, h: Tensor) -> Tensor:
    h = torch.tanh(h)
    h.data.mul_(2)
    return h * 1


# -- what users do between steps -------------------------------------------------------------------------------------------

Chain = nn.Sequential


def change_an_attribute(chain: Chain) -> None:
    chain[0].scale = 2.5


def change_the_configuration(chain: Chain) -> None:
    chain[-1].config.gain = 3.0


def change_a_class(chain: Chain) -> None:
    Piece.factor = 0.5


def change_a_global(chain: Chain) -> None:
    globals()["SCALE"] = 0.25


def evaluate(chain: Chain) -> None:
    chain.eval()


def freeze(chain: Chain) -> None:
    chain[0].layer.bias.requires_grad_(False)


def append(chain: Chain) -> None:
    chain.append(nn.Tanh())


def remove(chain: Chain) -> None:
    del chain[-1]


def replace_a_function(chain: Chain) -> None:
    chain[0].function = branch_on_training


def hook_forward(chain: Chain) -> None:
    chain[0].register_forward_hook(lambda module, given, result: result * 2)


def hook_forward_before(chain: Chain) -> None:
    chain.register_forward_pre_hook(lambda module, given: (given[0] * 3,))


def replace_forward(chain: Chain) -> None:
    chain[-1].forward = torch.tanh


EVENTS = (
    change_an_attribute, change_the_configuration, change_a_class, change_a_global, evaluate, freeze, append, remove,
    replace_a_function, hook_forward, hook_forward_before, replace_forward,
)  # fmt: skip


def reset() -> None:
    """Makes globals, classes and caches as they are at first."""
    globals()["SCALE"] = 1.5
    Piece.factor = 1.25
    CACHE.clear()
    table.cache_clear()
