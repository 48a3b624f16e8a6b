"""Writes: every in-place overload gives the single device's value, dtype and gradient, or is refused with its place."""

from __future__ import annotations

import warnings

import pytest
import torch
from faults.generated import fresh, overloads, runs, some
from torch import Tensor, nn
from torch.nn import functional as F

import shardwright as sw
from shardwright.errors import CaptureError

aten = torch.ops.aten
_NOT_CALLED = ("_foreach", "_fused", "_amp", "_cudnn", "_mkldnn", "sparse", "_coalesced", "_resize_output", "set_", "resize")


def _writes(target):
    return [a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def _is_in_place(target):
    name = target.overloadpacket.__name__
    has_tensor = str(target._schema.arguments[0].type) == "Tensor" if target._schema.arguments else False
    return bool(_writes(target)) and has_tensor and name.endswith("_") and not any(n in name for n in _NOT_CALLED)


def _is_out(target):
    written = [a for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    name = target.overloadpacket.__name__
    if name.startswith("_") or "backward" in name:
        return False  # kernels that trust their caller read beyond made-up arguments
    return bool(written) and all(a.kwarg_only and str(a.type) == "Tensor" for a in written)


def _same(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    return torch.allclose(got, expected, equal_nan=True) if expected.is_floating_point() else torch.equal(got, expected)


def _compared(function, args):
    """The function on one device and on two ranks, on tensors of their own: results, what was written, and None if refused."""
    one, two = fresh(args), fresh(args)
    torch.manual_seed(1)
    expected = function(*[a for a in one if isinstance(a, Tensor)])
    sw.init(devices=2)
    net = sw.AutoParallel(function)
    torch.manual_seed(1)
    try:
        got = net(*[a for a in two if isinstance(a, Tensor)])
    except CaptureError as error:
        message = str(error)
    else:
        return expected, got, one, two
    assert " at " in message or "cannot be captured as a graph" in message, message
    return None


def _filled(target, args, kwargs):
    """The overload as a function of its tensors."""

    def call(*tensors):
        left = iter(tensors)
        return target(*[next(left) if isinstance(a, Tensor) else a for a in args], **kwargs)

    return call


@pytest.mark.parametrize("target", overloads(_is_in_place), ids=str)
def test_every_in_place_overload(target):
    found = runs(target, target)
    if found is None:
        pytest.skip("the made-up arguments do not fit it")
    args, kwargs = found
    call = _filled(target, args, kwargs)

    def on_a_copy(first, *rest):
        return call(first.clone(), *rest)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for function in (on_a_copy, call):
            compared = _compared(function, args)
            if compared is None:
                continue
            expected, got, one, two = compared
            assert _same(got, expected)
            assert all(_same(b, a) for a, b in zip(one, two, strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize("target", some(overloads(_is_out), 12), ids=str)
def test_overloads_that_write_to_out(target):
    """Into tensors of the right shape and of another dtype, where the single device takes that."""
    plain = target._overloadname.removesuffix("out").rstrip("_") or "default"
    base = getattr(target.overloadpacket, plain, None)
    found = runs(base, base) if base is not None else None
    if found is None:
        pytest.skip("the made-up arguments do not fit it")
    args, kwargs = found
    results = base(*fresh(args), **kwargs)
    results = results if isinstance(results, (tuple, list)) else [results]
    names = _writes(target)
    if len(results) != len(names) or not all(isinstance(r, Tensor) for r in results):
        pytest.skip("the overloads differ")
    given = [a for a in args if isinstance(a, Tensor)]

    def write(*tensors):
        left = iter(tensors)
        filled = [next(left) if isinstance(a, Tensor) else a for a in args]
        outs = {name: torch.zeros_like(r) for name, r in zip(names, results, strict=True)}
        target(*filled, **kwargs, **outs)
        return tuple(outs.values())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compared = _compared(write, given)
        except (RuntimeError, NotImplementedError, TypeError):
            pytest.skip("the single device does not take it")
        if compared is not None:
            assert all(_same(got, expected) for expected, got in zip(compared[0], compared[1], strict=True))


def test_an_out_of_another_shape_is_refused():
    def write(x):
        out = torch.empty(3)
        return torch.add(x, x, out=out)

    sw.init(devices=2)
    with pytest.raises(CaptureError, match=r"shape \[6, 4\] to one of \[3\]"):
        sw.AutoParallel(write)(torch.ones(6, 4))


# -- gradients ----------------------------------------------------------------------------------------------------------


def _gradients(function, *inputs):
    layer = nn.Linear(4, 4)
    results = []
    for devices in (0, 2, 3):
        args = [i.clone() for i in inputs]
        layer.zero_grad()

        def run(*args):
            return function(layer, *args)

        if devices:
            sw.init(devices=devices)
        torch.manual_seed(1)
        out = (sw.AutoParallel(run) if devices else run)(*args)
        out.square().sum().backward()
        results.append((out.detach(), layer.weight.grad.clone(), *args))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected, equal_nan=True)


X = torch.linspace(-1.0, 2.0, 24).view(6, 4)


_SAVING = ["mul_", "div_", "add_", "sub_", "atan2_", "fmod_", "remainder_", "copysign_", "hypot_", "xlogy_", "pow_", "clamp_"]


@pytest.mark.parametrize("name", _SAVING)
def test_an_input_that_autograd_saved_may_be_written(name):
    _gradients(lambda layer, v, x: getattr(v, name)(layer(x)), X.abs() + 1, X)
    _gradients(lambda layer, v, x: getattr(v[1:3], name)(layer(x)[1:3]), X.abs() + 1, X)


@pytest.mark.parametrize("name", ["gt_", "ge_", "lt_", "le_", "eq_", "ne_"])
def test_a_written_value_without_gradient_has_one_of_zeros(name):
    _gradients(lambda layer, x: getattr(layer(x), name)(0.5) + 0 * layer(x), X)
    _gradients(lambda layer, x: getattr(layer(x), name)(0.5), X)


_OVERWRITES = [lambda h, x: h.copy_(x), lambda h, x: h.zero_(), lambda h, x: h.uniform_(), lambda h, x: h.fill_(2)]


@pytest.mark.parametrize("write", _OVERWRITES)
def test_what_is_overwritten_has_a_gradient_of_zeros(write):
    _gradients(lambda layer, x: write(layer(x), x) * x, X)


def test_a_move_that_a_reader_without_gradient_asks_for_first_carries_the_gradient_of_others():
    def run(layer, x):
        h = layer(x).relu()
        with torch.no_grad():
            scale = h.cumsum(0).sum() * 0 + 2
        return h.cumsum(0) * scale

    _gradients(run, X)


# -- writes that change the shape ---------------------------------------------------------------------------------------

_VIEWS = {
    "unsqueeze_": lambda t: t.unsqueeze_(1),
    "squeeze_": lambda t: t.squeeze_(),
    "t_": lambda t: t.t_(),
    "transpose_": lambda t: t.transpose_(0, 1),
    "swapaxes_": lambda t: t.swapaxes_(0, 1),
    "swapdims_": lambda t: t.swapdims_(0, 1),
}


@pytest.mark.parametrize("name", _VIEWS)
def test_views_in_place(name):
    def run(layer, x):
        h = layer(x)
        row = h[0]
        _VIEWS[name](h)
        h.add_(1)
        row.mul_(3)  # writes to what h is a view of now
        return h * (h.sum() + row.sum())

    _gradients(run, X)


@pytest.mark.parametrize("name", _VIEWS)
def test_views_in_place_of_an_input_are_refused(name):
    sw.init(devices=2)
    with pytest.raises(CaptureError, match="changes the shape of an input|cannot be captured"):
        sw.AutoParallel(lambda x: _VIEWS[name](x) * 2)(torch.ones(6, 4))


def test_a_buffer_that_grows_is_refused_with_its_line():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.zeros(3))

        def forward(self, x):
            self.table = torch.arange(float(x.shape[0]))
            return x * self.table[:, None]

    sw.init(devices=2)
    with pytest.raises(CaptureError, match=r"table, \[3\] .*is given a tensor of \[6\] .*self.table = torch.arange"):
        sw.AutoParallel(Cache())(torch.ones(6, 4))


# -- running statistics -------------------------------------------------------------------------------------------------

_NORMS = {
    "batch_norm": lambda x, m, v: F.batch_norm(x, m, v, training=True, momentum=0.3),
    "instance_norm": lambda x, m, v: F.instance_norm(x, m, v, momentum=0.3),
    "native_batch_norm": lambda x, m, v: torch.native_batch_norm(x, None, None, m, v, True, 0.3, 1e-5)[0],
    "_native_batch_norm_legit": lambda x, m, v: aten._native_batch_norm_legit(x, None, None, m, v, True, 0.3, 1e-5)[0],
}


@pytest.mark.parametrize("strategy", ["full_batch", "data_parallel"])
@pytest.mark.parametrize("name", _NORMS)
def test_running_statistics_that_are_inputs_are_moved(name, strategy):
    sw.init(devices=3)
    x = torch.randn(6, 6, 5)
    one, two = [[x.clone(), torch.zeros(6), torch.ones(6)] for _ in range(2)]
    expected = _NORMS[name](*one)
    got = sw.AutoParallel(_NORMS[name]).dataset_strategy(strategy)(*two)
    for mine, theirs in zip((got, *two), (expected, *one), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", _NORMS)
def test_running_statistics_that_are_intermediate_values_are_moved(name):
    def run(x, m, v):
        m, v = m * 2, v * 2
        y = _NORMS[name](x, m, v)
        return y, m + 1, v

    sw.init(devices=3)
    args = [torch.randn(6, 6, 5), torch.ones(6), torch.ones(6)]
    for mine, theirs in zip(sw.AutoParallel(run)(*fresh(args)), run(*fresh(args)), strict=True):
        torch.testing.assert_close(mine, theirs)


# -- names --------------------------------------------------------------------------------------------------------------


_TAKEN = ["i0", "i1", "many", "each", "_run", "torch", "_torch", "_many", "_each", "_i0", "t0", "lanes", "list", "slice"]


@pytest.mark.parametrize("name", _TAKEN)
def test_inputs_may_be_called_like_the_names_of_a_program(name):
    scope: dict = {}
    exec(f"def run(self, {name}, i1x): return (self.e({name}) * self.e(i1x)).tanh()", scope)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(12, 4)
            self.register_buffer("i", torch.ones(1))

        forward = scope["run"]

    sw.init(devices=4)
    model, ids = Model(), torch.arange(8)
    net = sw.AutoParallel(model).shard({"e.weight": sw.Layout((4,), ("tp",))("tp", "None")}).recompute("e")
    torch.testing.assert_close(net(ids, ids), model(ids, ids))


@pytest.mark.parametrize("packet", [torch.i0, torch.special.i1, torch.special.i0e])
def test_operators_may_be_called_like_the_names_of_a_program(packet):
    sw.init(devices=2)
    x = torch.rand(6, 4)
    torch.testing.assert_close(sw.AutoParallel(lambda x: packet(x) * 2 + packet(x))(x), packet(x) * 3)
