"""What a capture read from Python and that changed is planned again; what it left behind is undone or carried out."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import pickle
import random
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shardwright as sw
from shardwright.base.torch_private import FakeTensor
from shardwright.capture.python_state import PythonState

VALUES: dict[str, Any] = {
    "int": (1, 3), "float": (0.5, 2.0), "bool": (False, True), "none": (None, 2.0), "str": ("a", "b"),
    "tuple": ((1.0,), (2.0,)), "list": ([1.0], [4.0]), "dict": ({"a": 1.0}, {"a": 3.0}),
    "namespace": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
    "function": (torch.tanh, torch.sin), "tensor": (torch.ones(4).double(), torch.full((4,), 2.0).double()),
    "another shape": (torch.ones(4).double(), torch.ones(1).double() * 3),
}  # fmt: skip


def applied(value: Any, h: Tensor) -> Tensor:
    """A result that tells one value from another."""
    if callable(value):
        return value(h)
    if isinstance(value, Tensor):
        return h * value
    if isinstance(value, types.SimpleNamespace):
        return h * value.a
    if isinstance(value, dict):
        return h * value["a"]
    if isinstance(value, (list, tuple)):
        return h * value[0]
    return h * 7 if value in (None, "a") else h * 11 if isinstance(value, str) else h * value


class Reads(nn.Module):
    def __init__(self, value: Any = 1.0):
        super().__init__()
        self.layer, self.value, self.inner = nn.Linear(4, 4), value, None

    def forward(self, x: Tensor) -> Tensor:
        return applied(self.value, self.layer(x))


@pytest.fixture
def x() -> Tensor:
    sw.init(devices=2)
    torch.set_default_dtype(torch.float64)
    yield torch.randn(4, 4)
    torch.set_default_dtype(torch.float32)


def same(net: Any, model: Any, x: Tensor) -> None:
    torch.testing.assert_close(net(x), model(x))


@pytest.mark.parametrize("kind", VALUES)
def test_an_attribute_that_changes(kind, x):
    before, after = VALUES[kind]
    model = Reads(before)
    net = sw.AutoParallel(model)
    same(net, model, x)
    model.value = after
    same(net, model, x)
    model.value = before
    plans = len(net._bound_calls)
    same(net, model, x)
    assert len(net._bound_calls) == plans, "a state that was seen before costs nothing"


@pytest.mark.parametrize("kind", ["list", "dict", "namespace"])
def test_what_an_attribute_holds_changes_in_place(kind, x):
    model = Reads(copy.deepcopy(VALUES[kind][0]))
    net = sw.AutoParallel(model)
    same(net, model, x)
    if kind == "namespace":
        model.value.a = 5
    else:
        model.value[0 if kind == "list" else "a"] = 5.0
    same(net, model, x)


def _drop(model: nn.Sequential) -> None:
    del model[1]


CHANGES = {
    "replaced": lambda m: m.__setitem__(2, nn.Linear(8, 3)),
    "deleted": _drop,
    "appended": lambda m: m.append(nn.Tanh()),
    "inserted": lambda m: m.insert(0, nn.Tanh()),
    "added by name": lambda m: m.add_module("late", nn.Tanh()),
    "without bias": lambda m: setattr(m[0], "bias", None),
    "another parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(8, 4))),
    "frozen": lambda m: m[0].requires_grad_(False),
    "forward hook": lambda m: m[0].register_forward_hook(lambda module, given, result: result * 2),
    "forward pre hook": lambda m: m.register_forward_pre_hook(lambda module, given: (given[0] * 2,)),
    "another forward": lambda m: setattr(m[1], "forward", torch.sin),
    "eval": lambda m: m[1].eval(),
    "rate": lambda m: setattr(m[3], "p", 1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_modules_that_change(change, x):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Dropout(0.0))
    net = sw.AutoParallel(model)
    same(net, model, x)
    CHANGES[change](model)
    same(net, model, x)
    plain = copy.deepcopy(model)
    if any(p.requires_grad for p in model.parameters()):
        for module, call in ((model, net), (plain, plain)):
            module.zero_grad()
            call(x).square().sum().backward()
        for p, q in zip(model.parameters(), plain.parameters()):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad)


def test_a_hook_that_is_removed(x):
    model = nn.Sequential(nn.Linear(4, 4))
    handle = model[0].register_forward_hook(lambda module, given, result: result * 2)
    net = sw.AutoParallel(model)
    same(net, model, x)
    handle.remove()
    same(net, model, x)


FACTOR, LAYER, TABLE = 2.0, nn.Linear(4, 4).double(), torch.ones(4).double()


def helper(h: Tensor) -> Tensor:
    return h * FACTOR


def test_globals_and_closures_that_change(x, monkeypatch):
    inner = 1.0

    def function(x: Tensor) -> Tensor:
        return helper(LAYER(x)) * inner + TABLE

    net = sw.AutoParallel(function)
    same(net, function, x)
    monkeypatch.setitem(globals(), "FACTOR", 5.0)
    same(net, function, x)
    inner = 3.0
    same(net, function, x)
    monkeypatch.setitem(globals(), "LAYER", nn.Linear(4, 4))
    same(net, function, x)
    monkeypatch.setitem(globals(), "TABLE", torch.full((4,), 9.0))
    same(net, function, x)
    monkeypatch.setitem(globals(), "helper", lambda h: h - 1)
    same(net, function, x)


class OfClass(nn.Module):
    factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_attributes_of_classes_that_change(x, monkeypatch):
    net = sw.AutoParallel(OfClass())
    same(net, OfClass(), x)
    monkeypatch.setattr(OfClass, "factor", 3.0)
    same(net, OfClass(), x)
    monkeypatch.setattr(OfClass, "forward", lambda self, x: x - 1)
    same(net, OfClass(), x)


class ByMode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if torch.is_grad_enabled() else x * 3


def test_the_grad_mode_is_part_of_the_signature(x):
    net, model = sw.AutoParallel(ByMode()), ByMode()
    same(net, model, x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            same(net, model, x)
    same(net, model, x)
    assert len(net._bound_calls) == 2


def test_the_default_dtype_is_part_of_the_signature(x):
    net = sw.AutoParallel(lambda x: x + torch.ones(4))
    x = x.float()
    assert net(x).dtype == torch.float64
    torch.set_default_dtype(torch.float32)
    assert net(x).dtype == torch.float32


def test_the_log_says_what_changed(x, caplog):
    model = Reads(1.0)
    net = sw.AutoParallel(model)
    net(x)
    model.value = 2.0
    with caplog.at_level(logging.WARNING, "shardwright"):
        net(x)
        with torch.no_grad():
            net(x)
        net(x[:2])
        model.eval()
        net(x)
    said = [record.getMessage() for record in caplog.records if record.name == "shardwright"]
    assert "value: 1.0 -> 2.0" in said[0]
    assert "gradients are off" in said[1]
    assert "new inputs (shapes (2, 4))" in said[2]
    assert "eval() of 2 modules" in said[3]


def test_versions_are_those_of_equal_states():
    model = Reads(1.0)
    state = PythonState(model)
    first = state.version()
    model.value = 2.0
    assert state.version() != first
    model.value = 1.0
    assert state.version() == first


# -- what a capture leaves behind ------------------------------------------------------------------------------------------


class Leaves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls, self.seen, self.held, self.many = nn.Linear(4, 4), 0, None, None, {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.layer(x)
        if self.held is None:
            self.held = torch.arange(4.0)
        self.seen, self.many["last"] = h.square().mean(), [h, self.calls]
        return h * self.calls + self.held


def test_what_forward_assigns_is_assigned(x):
    model = Leaves()
    plain, net = copy.deepcopy(model), sw.AutoParallel(model)
    for _ in range(3):
        same(net, plain, x)
        assert model.calls == plain.calls
        torch.testing.assert_close(model.seen, plain.seen)
        torch.testing.assert_close(model.many["last"], plain.many["last"])
    (net(x).sum() + model.seen).backward()
    (plain(x).sum() + plain.seen).backward()
    torch.testing.assert_close(model.layer.weight.grad, plain.layer.weight.grad)


@functools.lru_cache
def cosines(size: int) -> Tensor:
    return torch.arange(float(size)).cos()


STORE: dict[int, Tensor] = {}


def stored(size: int) -> Tensor:
    if size not in STORE:
        STORE[size] = torch.arange(float(size))
    return STORE[size]


@pytest.mark.parametrize("cached", [cosines, stored])
def test_caches_hold_no_tensors_without_values(cached, x):
    cosines.cache_clear()
    STORE.clear()
    layer = nn.Linear(4, 4)

    def function(x: Tensor) -> Tensor:
        return layer(x) * cached(4)

    net = sw.AutoParallel(function)
    for rows in (4, 2, 4):
        same(net, function, x[:rows])
        assert not isinstance(cached(4), FakeTensor)


def test_containers_are_the_same_objects_after_a_capture(x):
    model = Reads([1.0])
    kept = model.value
    net = sw.AutoParallel(model)
    net(x)
    assert model.value is kept
    assert vars(model).keys() == vars(Reads()).keys()


def test_tensors_that_others_capture_left_are_refused(x):
    with torch._subclasses.FakeTensorMode():
        left = torch.ones(4)
    with pytest.raises(sw.errors.CaptureError, match="without values"):
        sw.AutoParallel(lambda x: x * left)(x)


def test_a_leaf_that_is_an_attribute_gets_its_gradient(x):
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = torch.ones(4, requires_grad=True)

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.prompt).square().sum()

    model = Prompted()
    sw.AutoParallel(model)(x).backward()
    got, model.prompt.grad = model.prompt.grad, None
    model(x).backward()
    torch.testing.assert_close(got, model.prompt.grad)


def _python() -> float:
    return random.random()


def _numpy() -> float:
    return float(np.random.rand())


def _seed() -> float:
    torch.manual_seed(1)
    return 1.0


@pytest.mark.parametrize("draw", [_python, _numpy, _seed])
def test_random_numbers_beside_torch_are_refused_and_undone(draw, x):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(sw.errors.CaptureError, match=r"at test_python_state.py:\d+: "):
        sw.AutoParallel(lambda x: x * draw())(x)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


# -- parallel modules within others ----------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A module with a net in the place of a part of it."""

    def __init__(self, wrap: Any = sw.AutoParallel):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.inner = wrap(Counts())
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(self.first(x).relu())


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.calls, self.gain = nn.Linear(6, 4), nn.BatchNorm1d(4), 0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(self.layer(x)) * self.gain * self.calls


@pytest.mark.parametrize("outer", [True, False], ids=["within another", "alone"])
def test_a_module_that_holds_a_net_is_as_one_that_holds_its_target(outer, x):
    torch.manual_seed(0)
    holder = Holder().double()
    plain = Holder(lambda module: module).double()
    assert list(holder.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in holder.named_modules()] == [n for n, _ in plain.named_modules()]
    plain.load_state_dict(holder.state_dict())
    net = sw.AutoParallel(holder) if outer else holder
    nets = (net, plain)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (holder, plain)]
    x = x.double()
    for step in range(4):
        if step == 2:
            holder.eval()
            plain.eval()
        if step == 3:
            holder.inner.gain = plain.inner.gain = 0.5  # an attribute of the target
        for call, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            call(x).square().sum().backward()
            optimizer.step()
    assert (holder.inner.calls, holder.inner.training) == (plain.inner.calls, False) == (4, False)
    for (name, a), (_, b) in zip(holder.state_dict().items(), plain.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_net_is_a_module(x):
    model = Holder(lambda module: module)
    net = sw.AutoParallel(model)
    assert isinstance(net, nn.Module)
    assert list(net.state_dict()) == list(model.state_dict())
    assert list(inspect.signature(net.forward).parameters) == ["x"]
    seen: list[Any] = []
    handle = net.register_forward_hook(lambda module, given, result: seen.append((module, result.shape)))
    net.register_full_backward_hook(lambda module, given, got: seen.append(got[0].shape))
    net(x.requires_grad_()).sum().backward()
    assert seen == [(net, x.shape), x.shape]
    handle.remove()
    twin = copy.deepcopy(net.eval())
    assert not twin.training
    assert twin.first.weight is not model.first.weight
    torch.testing.assert_close(twin(x), net(x) / net.inner.calls * twin.inner.calls)
    with pytest.raises(sw.errors.ShardwrightError, match="state_dict"):
        pickle.dumps(net)
    net.double()
    assert model.first.weight.dtype == torch.float64
    net.register_buffer("kept", torch.ones(1))
    net.register_parameter("more", nn.Parameter(torch.ones(1)))
    assert model.kept is net.kept
    assert model.more is net.more
    with pytest.raises(sw.errors.ShardwrightError, match="the model itself"):
        torch.nn.utils.parametrizations.weight_norm(net, "more")
    applied: list[Any] = []
    net.apply(applied.append)
    assert applied[-1] is model
    net.head = nn.Linear(2, 2)
    assert model.head is net.head
    assert "head.weight" in net.state_dict()


def test_a_net_within_another_has_gradients_or_is_refused(x):
    inner = sw.AutoParallel(nn.Linear(4, 4))

    class Outer(nn.Module):
        def __init__(self, has: bool):
            super().__init__()
            self.own = nn.Linear(4, 4)
            if has:
                self.model = inner.target

        def forward(self, x: Tensor) -> Tensor:
            return self.own(inner(x))

    with pytest.raises(sw.errors.CaptureError, match="within another AutoParallel"):
        sw.AutoParallel(Outer(False))(x)
    outer = Outer(True)
    sw.AutoParallel(outer)(x).sum().backward()
    assert all(p.grad is not None for p in outer.parameters())


# -- what raises while capturing -------------------------------------------------------------------------------------------

RAISES = {
    "nonzero": lambda x: torch.nonzero(x > 0),
    "mask": lambda x: x[x > 0].sum(),
    "unique": lambda x: torch.unique(x),
    "item": lambda x: x * x.sum().item(),
    "float": lambda x: x * float(x.sum()),
    "branch": lambda x: x if x.sum() > 0 else -x,
    "numpy": lambda x: torch.from_numpy(x.numpy() * 2),
    "tolist": lambda x: x * x.tolist()[0][0],
    "resize_": lambda x: (x * 2).resize_(2, 2),
    "set_": lambda x: (x * 2).set_(x),
    "branch in vmap": lambda x: torch.func.vmap(lambda row: row if row.sum() > 0 else -row)(x),
    "type error": lambda x: x + "a",
    "shape": lambda x: x @ torch.ones(3, 3),
    "generator": lambda x: x + torch.rand(4, generator=torch.default_generator),
}


@pytest.mark.parametrize("name", RAISES)
def test_whatever_raises_while_capturing_is_a_capture_error_with_the_line(name, x):
    layer = nn.Linear(4, 4)
    function = RAISES[name]
    with pytest.raises(sw.errors.CaptureError) as raised:
        sw.AutoParallel(lambda x: function(layer(x)))(x)
    assert "test_python_state.py:" in str(raised.value) or name == "set_"
    assert torch.is_grad_enabled()
    assert not torch._C._are_functorch_transforms_active()
    assert type(layer.weight) is nn.Parameter
    assert nn.Linear(3, 3).double()(torch.ones(1, 3)).requires_grad


# -- models of Hugging Face --------------------------------------------------------------------------------------------------


def test_a_decoder_of_transformers_runs_as_it_comes():
    transformers = pytest.importorskip("transformers")
    sw.init(devices=2)
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM"
    )
    model = transformers.GPT2LMHeadModel(config).double()
    plain, ids = copy.deepcopy(model), torch.randint(0, 40, (4, 6))
    results = []
    for call, module in ((sw.AutoParallel(model), model), (plain, plain)):
        torch.manual_seed(0)
        result = call(input_ids=ids, labels=ids)
        result.loss.backward()
        results.append((result, [p.grad for p in module.parameters()]))
    (ours, our_gradients), (theirs, gradients) = results
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(our_gradients, gradients)
    assert type(ours.past_key_values) is type(theirs.past_key_values)
    torch.testing.assert_close(ours.past_key_values.layers[1].keys, theirs.past_key_values.layers[1].keys)
    with pytest.raises(sw.errors.CaptureError, match="handed in"):
        sw.AutoParallel(model)(input_ids=ids[:, :1], past_key_values=ours.past_key_values)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_a_model_save_memory(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Block(nn.Module):
        def __init__(self, checkpoints: bool):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
            self.checkpoints = checkpoints

        def forward(self, x: Tensor) -> Tensor:
            return x + (checkpoint(self.layers, x, use_reentrant=reentrant) if self.checkpoints else self.layers(x))

    kept = []
    for checkpoints in (True, False):
        net = sw.AutoParallel(nn.Sequential(nn.Linear(8, 8), *(Block(checkpoints) for _ in range(4)))).compile(
            torch.ones(64, 8)
        )
        kept.append(sum(size for _, _, size in net.plan.memory.largest))
    assert kept[0] < kept[1] / 4


def test_an_attribute_with_the_name_of_a_global_is_none(x, caplog):
    """A script's ``loss = net(x)`` is not what ``self.loss`` reads."""
    scope = {"nn": nn, "loss": 0}
    exec("class Model(nn.Module):\n  def forward(self, x):\n    return self.loss(x)", scope)
    model = scope["Model"]()
    model.loss = nn.Linear(4, 4)
    net = sw.AutoParallel(model)
    with caplog.at_level(logging.WARNING, "shardwright"):
        for _ in range(3):
            scope["loss"] = net(x)
    assert caplog.records == []
