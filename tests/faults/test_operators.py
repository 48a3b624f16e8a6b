"""Operators at the edges of shapes: tensors of no dims, sums over nothing, dims of size 1 that are new."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardwright as sw
from shardwright.errors import CaptureError
from shardwright.ir.operator import Operator, Slot, TensorMeta
from shardwright.rules.registry import registered, signature_of

aten = torch.ops.aten


# -- tensors of no dims -------------------------------------------------------------------------------------------------


def _of_one_tensor():
    """Every overload with a rule that takes a tensor and otherwise numbers, with numbers that may fit a tensor of no dims."""
    for name in registered():
        packet = getattr(aten, name.removeprefix("aten."), None) if name.startswith("aten.") else None
        for overload in packet.overloads() if packet is not None else ():
            target = getattr(packet, overload)
            types = [str(a.type) for a in target._schema.arguments if not a.has_default_value() and not a.kwarg_only]
            if types[:1] == ["Tensor"] and "Tensor" not in types[1:] and not target._schema.is_mutable:
                yield target


def _numbers(target):
    """Choices of the arguments after the tensor: small numbers, and lists of none or one."""
    choices = {"int": (0, 1), "number": (1,), "float": (0.5,), "bool": (False,), "List[int]": ([], [0], [3], [1, 1])}
    types = [str(a.type) for a in target._schema.arguments if not a.has_default_value() and not a.kwarg_only][1:]
    yield from itertools.islice(itertools.product(*(choices.get(t, (None,)) for t in types)), 12)


@pytest.mark.parametrize("target", list(_of_one_tensor()), ids=str)
def test_every_rule_takes_a_tensor_of_no_dims(target):
    sw.init(devices=2)
    tried = 0
    for x, rest in itertools.product((torch.tensor(1.5), torch.tensor(3), torch.tensor(True)), list(_numbers(target))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                torch.manual_seed(1)
                expected = target(x, *rest)
                assert isinstance(expected, torch.Tensor)
            except Exception:
                continue
            torch.manual_seed(1)
            try:
                got = sw.AutoParallel(lambda x, rest=rest: target(x.clone(), *rest))(x)
            except CaptureError:
                continue
        tried += 1
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        if "empty" not in str(target):
            torch.testing.assert_close(got, expected, equal_nan=True)
    if not tried:
        pytest.skip("it takes no tensor of no dims")


_EVERYDAY = {
    "mean": lambda t: t.mean(),
    "sum": lambda t: t.sum(),
    "squeeze": lambda t: t.squeeze(),
    "unsqueeze": lambda t: t.unsqueeze(0),
    "[None]": lambda t: t[None],
    "max": lambda t: t.max(),
    "max of dim": lambda t: t.max(0)[0],
    "softmax": lambda t: t.softmax(0),
    "all": lambda t: (t > 0).all(),
    "norm": lambda t: t.norm(),
    "repeat": lambda t: t.repeat(3),
    "expand": lambda t: t.expand(3, 2),
    "new_zeros": lambda t: t.new_zeros(()) + t,
    "cumsum": lambda t: t.cumsum(0),
    "sort": lambda t: t.sort()[0],
    "stack": lambda t: torch.stack([t, t]),
}


@pytest.mark.parametrize("mode", ["semi_auto", "auto", "data_parallel"])
@pytest.mark.parametrize("name", _EVERYDAY)
def test_what_is_done_to_a_loss(name, mode):
    sw.init(devices=2)
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(0, 3, (6,))

    def step(x, y):
        return _EVERYDAY[name](F.cross_entropy(model(x), y))

    expected, got = step(x, y), sw.AutoParallel(step, mode)(x, y)
    torch.testing.assert_close(got, expected)
    if expected.requires_grad:
        (a,), (b,) = (torch.autograd.grad(t.sum(), [model.weight]) for t in (expected, got))
        torch.testing.assert_close(b, a)


# -- sums over nothing --------------------------------------------------------------------------------------------------

_ADDS = {
    "addmm": ((4, 5), (4, 0), (0, 5)),
    "addmv": ((4,), (4, 0), (0,)),
    "addbmm": ((4, 5), (2, 4, 0), (2, 0, 5)),
    "addbmm of no matrices": ((4, 5), (0, 4, 3), (0, 3, 5)),
    "baddbmm": ((2, 4, 5), (2, 4, 0), (2, 0, 5)),
    "addmm of no rows": ((0, 5), (0, 3), (3, 5)),
    "addr": ((4, 5), (4,), (5,)),
}


@pytest.mark.parametrize("devices", [1, 2, 3, 7])
@pytest.mark.parametrize("name", _ADDS)
def test_what_is_added_to_a_product_of_nothing_stays(name, devices):
    sw.init(devices=devices)
    tensors = [torch.randn(shape, requires_grad=True) for shape in _ADDS[name]]
    function = getattr(torch, name.partition(" ")[0])
    for mode in ("semi_auto", "auto"):
        expected = function(*tensors, beta=0.5)
        got = sw.AutoParallel(lambda *t: function(*t, beta=0.5), mode)(*tensors)
        torch.testing.assert_close(got, expected)
        for a, b in zip(*(torch.autograd.grad(t.sum(), tensors) for t in (expected, got)), strict=True):
            torch.testing.assert_close(b, a)


_REDUCTIONS = ["var", "std", "var_mean", "std_mean", "mean", "sum", "prod", "amax", "logsumexp", "linalg_vector_norm"]


@pytest.mark.parametrize("name", _REDUCTIONS)
def test_reductions_of_nothing_that_make_something(name):
    function = torch.linalg.vector_norm if name == "linalg_vector_norm" else getattr(torch, name)
    x = torch.randn(0, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = function(x, dim=0)
        except (IndexError, RuntimeError):
            pytest.skip("the single device refuses it too")
        sw.init(devices=4)
        got = sw.AutoParallel(lambda x: function(x, dim=0))(x)
    torch.testing.assert_close(got, expected, equal_nan=True)


# -- new dims of size 1 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(1, 3, 2), (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2, 1)])
@pytest.mark.parametrize("function", [torch.Tensor.repeat, torch.tile])
def test_repeats_of_new_dims(function, counts):
    layout = sw.Layout((2,), ("a",))
    shape = torch.arange(2.0).repeat(*counts).shape
    for dim in range(len(counts)):
        sw.init(devices=2)
        p = nn.Parameter(torch.arange(2.0))
        entries = ["a" if d == dim else "None" for d in range(len(counts))]
        relu = sw.shard(torch.relu, in_strategy=(layout(*entries),))

        def run(x, p=p, relu=relu):
            return relu(function(p, counts) + 0 * x.sum()) + 1

        x = torch.ones(4)
        got = sw.AutoParallel(run)(x)
        assert got.shape == shape
        torch.testing.assert_close(got, run(x))


def test_no_rule_splits_an_output_dim_that_no_input_carries_and_no_lowering_makes():
    """A repeat of a dim that only the output has is made whole on every rank."""
    meta = TensorMeta((2,), torch.float32)
    for counts in ((1, 2), (1, 1, 3)):
        out = TensorMeta((*counts[:-1], 2 * counts[-1]), torch.float32)
        signature = signature_of(Operator(aten.repeat.default, (Slot(0), list(counts)), {}, (meta,), (out,)))
        assert signature is not None
        assert all(not factors for factors, count in zip(signature.outputs[0], counts[:-1]) if count == 1)
