"""Losses that run as they are keep their reduction: the Python entry of an operator has the schema's defaults."""

from __future__ import annotations

import pytest
import torch

import shardwright as sw
from shardwright.ir.instructions import Call, Ref
from shardwright.world.execute.source import SourceWriter, python_entry

aten = torch.ops.aten


def _reducing():
    """Every overload of aten that may reduce its result, and that does so by default."""
    for name in dir(aten):
        packet = getattr(aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            target = getattr(packet, overload)
            reductions = [a for a in target._schema.arguments if a.name == "reduction" and a.has_default_value()]
            if reductions and not name.startswith("_") and not target._schema.is_mutable:
                yield pytest.param(target, reductions[0].default_value, id=str(target))


def _text(target, count):
    """The call that a program makes of an overload on ``count`` tensors."""
    writer = SourceWriter("test", [f"t{i}" for i in range(count)])
    call = Call(target, tuple(Ref(f"t{i}") for i in range(count)), {}, ("out",), False, "test", (0,))
    return writer, writer.call(call.function, call.args, call.kwargs, lambda name: name, lambda leaf: "")


@pytest.mark.parametrize(("target", "default"), list(_reducing()))
def test_every_entry_is_told_the_reduction_of_the_schema(target, default):
    tensors = [a for a in target._schema.arguments if str(a.type) == "Tensor"]
    _, text = _text(target, len(tensors))
    assert python_entry(target) is target or f"reduction={default}" in text


# What each loss takes besides predictions of shape (6, 4), all of the same shape where nothing is said.
_SIGNS = torch.tensor([1.0, -1.0]).repeat(3)
_OPERANDS = {
    "binary_cross_entropy": lambda x: (x.sigmoid(), torch.rand(6, 4)),
    "binary_cross_entropy_with_logits": lambda x: (x, torch.rand(6, 4)),
    "cosine_embedding_loss": lambda x: (x, torch.randn(6, 4), _SIGNS),
    "cross_entropy_loss": lambda x: (x, torch.randint(4, (6,))),
    "hinge_embedding_loss": lambda x: (x, _SIGNS[:, None].expand(6, 4).clone()),
    "kl_div": lambda x: (x.log_softmax(1), torch.rand(6, 4)),
    "margin_ranking_loss": lambda x: (x, torch.randn(6, 4), _SIGNS[:, None].expand(6, 4).clone()),
    "multi_margin_loss": lambda x: (x, torch.randint(4, (6,))),
    "multilabel_margin_loss": lambda x: (x, torch.tensor([[1, -1, 0, 0]]).repeat(6, 1)),
    "nll_loss": lambda x: (x.log_softmax(1), torch.randint(4, (6,))),
    "nll_loss_nd": lambda x: (x.log_softmax(1), torch.randint(4, (6,))),
    "nll_loss2d": lambda x: (x.view(6, 4, 1, 1).log_softmax(1), torch.randint(4, (6, 1, 1))),
    "triplet_margin_loss": lambda x: (x, torch.randn(6, 4), torch.randn(6, 4)),
    "soft_margin_loss": lambda x: (x, _SIGNS[:, None].expand(6, 4).clone()),
    "ctc_loss": None,  # cannot be captured
}


@pytest.mark.parametrize("mode", ["semi_auto", "auto"])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("name", sorted({p.values[0].overloadpacket.__name__ for p in _reducing()}))
def test_every_loss_is_reduced_by_default(name, devices, mode):
    operands = _OPERANDS.get(name, lambda x: (x, torch.randn(6, 4)))
    if operands is None or name.endswith(("_forward", "_backward")):
        pytest.skip("not a loss that a model calls")
    sw.init(devices=devices)
    layer = torch.nn.Linear(4, 4)
    x = torch.randn(6, 4)
    tensors = operands(layer(x))[1:]
    packet = getattr(aten, name)

    def loss(x):
        return packet(operands(layer(x))[0], *tensors)

    expected = loss(x)
    (wanted,) = torch.autograd.grad(expected.sum(), [layer.weight])
    got = sw.AutoParallel(loss, mode)(x)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), [layer.weight])[0], wanted)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("variance", ["same", "narrow", "one", "number", "tiny"])
def test_gaussian_loss_with_every_kind_of_variance(variance, full, reduction):
    """Torch looks whether a variance is negative: a decision by values within torch itself."""
    sw.init(devices=3)
    torch.manual_seed(0)
    layer, target = torch.nn.Linear(4, 4).double(), torch.randn(6, 4).double()
    kinds = {
        "same": lambda s: s, "narrow": lambda s: s.mean(1), "one": lambda s: s.mean(1, keepdim=True), "number": lambda s: 0.5,
        "tiny": lambda s: s * 1e-9,
    }  # fmt: skip

    def loss(x):
        mean = layer(x)
        spread = kinds[variance](torch.nn.functional.softplus(mean) if variance != "tiny" else mean.square())
        return torch.nn.functional.gaussian_nll_loss(mean, target, spread, full=full, reduction=reduction).sum()

    x = torch.randn(6, 4).double()
    expected = torch.autograd.grad(loss(x), layer.parameters())
    value = loss(x)
    net = sw.AutoParallel(loss, "data_parallel")
    found = net(x)
    torch.testing.assert_close(found, value)
    found.backward()
    for parameter, wanted in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)


def test_gaussian_loss_of_a_negative_variance_raises_as_on_one_device():
    sw.init(devices=2)
    net = sw.AutoParallel(lambda x, v: torch.nn.functional.gaussian_nll_loss(x, x, v))
    assert net(torch.ones(4), torch.ones(4)) == 0
    with pytest.raises(ValueError, match="negative"):
        net(torch.ones(4), torch.tensor([1.0, 1.0, 1.0, -1.0]))
    assert net(torch.ones(4), torch.ones(4)) == 0
