"""What stands around the graph: hidden modules, shared memory, swallowed refusals, generators, classes, arguments."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shardwright as sw

Forward = Callable[..., Tensor]


class Made(nn.Module):
    """A linear layer and a forward that a test gives."""

    def __init__(self, function: Forward, set_up: Callable[[Any], Any] = lambda self: None):
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function
        set_up(self)

    def forward(self, *args: Any) -> Tensor:
        return self.function(self, *args)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    sw.init(devices=3)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def x() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(2))


HIDDEN_MODULE, HIDDEN_PARAMETER = nn.Linear(4, 4).double(), nn.Parameter(torch.ones(4).double())


def _many(made: Any) -> Callable[[Any], None]:
    return lambda self: setattr(self, "many", made())


HIDDEN = {
    "module in a list": (lambda self, x: self.many[0](self.layer(x)), _many(lambda: [nn.Linear(4, 4)])),
    "module in a dict": (lambda self, x: self.many["a"](self.layer(x)), _many(lambda: {"a": nn.Linear(4, 4)})),
    "global module": (lambda self, x: HIDDEN_MODULE(self.layer(x)), None),
    "global parameter": (lambda self, x: HIDDEN_PARAMETER * self.layer(x), None),
    "parameter in a list": (lambda self, x: self.many[0] * self.layer(x), _many(lambda: [nn.Parameter(torch.ones(4))])),
    "parameter among others": (lambda self, x: torch.stack([HIDDEN_PARAMETER, self.layer(x)[0]]), None),
    "parameter by keyword": (lambda self, x: torch.mul(input=self.layer(x), other=HIDDEN_PARAMETER), None),
    "buffers only": (lambda self, x: self.many[0](x), _many(lambda: [nn.BatchNorm1d(4, affine=False)])),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_the_target_does_not_have_is_refused(name):
    function, set_up = HIDDEN[name]
    with pytest.raises(sw.errors.CaptureError, match="does not have it"):
        sw.AutoParallel(Made(function, set_up or (lambda self: None)))(x())


def test_an_object_with_call_is_a_target():
    class Callable_:
        def __init__(self) -> None:
            self.layer = nn.Linear(4, 4)

        def __call__(self, x: Tensor) -> Tensor:
            return self.layer(x).sum()

    target = Callable_()
    sw.AutoParallel(target)(x()).backward()
    got, target.layer.weight.grad = target.layer.weight.grad, None
    target(x()).backward()
    torch.testing.assert_close(got, target.layer.weight.grad)


def _views(self: Any) -> None:
    self.register_buffer("one", torch.zeros(4))
    self.register_buffer("other", self.one.view(2, 2).view(4))


def _same_twice() -> tuple[Tensor, ...]:
    given = x()
    return given, given


def _overlapping() -> tuple[Tensor, ...]:
    whole = torch.randn(8, 4)
    return whole[:6], whole[2:]


SHARED = {
    "an input twice": (lambda self, x, y: (x.add_(1), self.layer(x) + y)[1], None, _same_twice),
    "overlapping inputs": (lambda self, x, y: (x.add_(1), self.layer(x) + y)[1], None, _overlapping),
    "buffers": (lambda self, x: (self.one.add_(1), self.layer(x) + self.other)[1], _views, lambda: (x(),)),
}


@pytest.mark.parametrize("name", SHARED)
def test_writes_to_shared_memory_are_refused(name):
    function, set_up, inputs = SHARED[name]
    with pytest.raises(sw.errors.CaptureError, match="share their memory"):
        sw.AutoParallel(Made(function, set_up or (lambda self: None)))(*inputs())


def test_shared_memory_that_is_only_read_is_fine():
    model = Made(lambda self, x, y: self.layer(x) + y)
    given = x()
    torch.testing.assert_close(sw.AutoParallel(model)(given, given), model(given, given))


def _swallowing(attempt: Callable[[Tensor], Any]) -> Forward:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.layer(x)
        with contextlib.suppress(Exception):
            attempt(h)
            h = h * 2
        return h

    return forward


SWALLOWED = {
    "item": lambda h: h.sum().item() > 0 or None,
    "float": lambda h: float(h.sum()),
    "numpy": lambda h: h.detach().numpy(),
    "tolist": lambda h: h.tolist(),
    "hook": lambda h: torch.autograd.graph.register_multi_grad_hook((h,), lambda gradients: None),
    "derivative": lambda h: torch.autograd.grad(nn.functional.dropout(h).sum(), h),
    "generator": lambda h: torch.rand(4, generator=torch.default_generator),
    "data": lambda h: setattr(h, "data", h.data[:1]),
}


@pytest.mark.parametrize("name", SWALLOWED)
def test_a_refusal_that_is_swallowed_is_still_one(name):
    model = Made(_swallowing(SWALLOWED[name]))
    with pytest.raises(sw.errors.CaptureError, match=r"test_around_the_graph.py:\d+"):
        sw.AutoParallel(model)(x())


def test_an_error_of_the_single_device_may_be_caught():
    model = Made(_swallowing(lambda h: h + torch.ones(3)))
    torch.testing.assert_close(sw.AutoParallel(model)(x()), model(x()))


OF_NUMPY, OF_PYTHON = np.random.default_rng(3), random.Random(3)
DRAWN = {
    "fork_rng": lambda: torch.random.fork_rng().__enter__(),
    "get_rng_state": lambda: torch.set_rng_state(torch.get_rng_state()),
    "initial_seed": lambda: torch.initial_seed(),
    "generator of NumPy": lambda: OF_NUMPY.random(),
    "generator of Python": lambda: OF_PYTHON.random(),
}


@pytest.mark.parametrize("name", DRAWN)
def test_states_of_generators_are_refused(name):
    def forward(self: Any, x: Tensor) -> Tensor:
        DRAWN[name]()
        return self.layer(x)

    with pytest.raises(sw.errors.CaptureError, match=r"test_around_the_graph.py:\d+"):
        sw.AutoParallel(Made(forward))(x())


class Settings:
    factor, nested, calls, last = 1.0, {"a": [1.0]}, 0, None
    instance: Any = None


class Scheduler:
    def __init__(self) -> None:
        self.rate = 1.0

    def __call__(self) -> float:
        return self.rate


Settings.instance = Scheduler()
ARRAY = np.ones(1)


def scaled(h: Tensor, by: Any = [1.0]) -> Tensor:  # noqa: B006
    return h * by[0]


def _raise_rate() -> None:
    Settings.instance.rate += 1


def _raise_factor() -> None:
    Settings.factor += 1


def _raise_nested() -> None:
    Settings.nested["a"][0] += 1


READ: dict[str, tuple[Forward, Callable[[], Any]]] = {
    "class": (lambda self, x: self.layer(x) * Settings.factor, _raise_factor),
    "in a class": (lambda self, x: self.layer(x) * Settings.nested["a"][0], _raise_nested),
    "singleton": (lambda self, x: self.layer(x) * Settings.instance.rate, _raise_rate),
    "object with call": (lambda self, x: self.layer(x) * Settings.instance(), _raise_rate),
    "default": (lambda self, x: scaled(self.layer(x)), lambda: scaled.__defaults__[0].__setitem__(0, 5.0)),
    "array": (lambda self, x: self.layer(x) * float(ARRAY[0]), lambda: ARRAY.__setitem__(0, ARRAY[0] + 1)),
}


@pytest.mark.parametrize("name", READ)
def test_python_values_of_many_kinds_are_watched(name):
    function, change = READ[name]
    model = Made(function)
    net = sw.AutoParallel(model)
    for _ in range(3):
        torch.testing.assert_close(net(x()), model(x()))
        change()


def test_hooks_of_all_modules_are_watched():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    net = sw.AutoParallel(model)
    net(x())
    double = lambda module, given, result: result * 2 if isinstance(module, nn.ReLU) else None  # noqa: E731
    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        torch.testing.assert_close(net(x()), model(x()))
    finally:
        handle.remove()
    torch.testing.assert_close(net(x()), model(x()))


def test_buffers_that_come_later_are_seen():
    model = Made(lambda self, x: self.layer(x) + sum(self.buffers()))
    net = sw.AutoParallel(model)
    net(x())
    model.register_buffer("late", torch.full((4,), 2.0))
    torch.testing.assert_close(net(x()), model(x()))


def test_classes_that_forward_writes_to():
    def forward(self: Any, x: Tensor) -> Tensor:
        Settings.calls += 1
        h = self.layer(x)
        Settings.last = h.detach()
        return h * Settings.calls

    model = Made(forward)
    for call in (model, sw.AutoParallel(model)):
        Settings.calls = 0
        results = [call(x()) for _ in range(3)]
        assert Settings.calls == 3
        assert type(Settings.last) is Tensor
        torch.testing.assert_close(results[2], 3 * results[0])


def test_arguments_that_forward_changes_are_refused():
    def forward(self: Any, batch: dict[str, Tensor]) -> Tensor:
        batch["hidden"] = self.layer(batch["x"])
        return batch["hidden"]

    with pytest.raises(sw.errors.CaptureError, match="changes an argument"):
        sw.AutoParallel(Made(forward))({"x": x()})


def test_strides_of_inputs_are_part_of_the_signature():
    model = Made(lambda self, x: self.layer(x) if x.is_contiguous() else self.layer(x) * 2)
    net = sw.AutoParallel(model)
    for given in (x(), x().t().contiguous().t()):
        torch.testing.assert_close(net(given), model(given))


def test_attributes_set_on_the_net_are_the_targets():
    model = Made(lambda self, x: self.layer(x) * self.scale, lambda self: setattr(self, "scale", 1.0))
    net = sw.AutoParallel(model)
    net(x())
    net.scale = 5.0
    assert model.scale == 5.0
    torch.testing.assert_close(net(x()), model(x()))
