"""What operators cost: their families, operations and seconds; and machines made of times."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardwright.calibrate.operators import (
    Sample,
    cases,
    errors_of,
    fit_machine,
    operator_case,
    save_machine,
    time_operators,
)
from shardwright.cost.compute import local_seconds, optimizer_seconds
from shardwright.cost.machine_files import load_machine
from shardwright.cost.operations import flops
from shardwright.ir.operator import Operator, Slot, TensorMeta
from shardwright.redistribute.links import Links
from shardwright.rules.registry import registered
from shardwright.rules.traits import family

aten = torch.ops.aten
FAMILIES = {
    "matmul", "attention", "conv", "norm", "softmax", "index", "sort", "random", "reduce", "copy", "create", "view",
    "pointwise",
}  # fmt: skip


def call(target, *arguments, **keywords):
    """The operator of a call on tensors of the meta device."""
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    flat = [t for a in arguments if isinstance(a, list) for t in a if isinstance(t, torch.Tensor)]
    numbers = iter(range(len(tensors) + len(flat)))
    slots = tuple(
        Slot(next(numbers)) if isinstance(a, torch.Tensor)
        else [Slot(next(numbers)) for _ in a] if isinstance(a, list) and flat and a and isinstance(a[0], torch.Tensor)
        else a
        for a in arguments
    )  # fmt: skip
    result = target(*arguments, **keywords)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)

    def meta(t):
        return TensorMeta(tuple(t.shape), t.dtype, tuple(t.stride()))

    return Operator(target, slots, keywords, tuple(map(meta, [*tensors, *flat])), tuple(map(meta, outputs)))


def tensor(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def seconds(op, machine, needs_grad, fraction=1.0):
    inputs, outputs = (np.array([[m.bytes * fraction] for m in metas]) for metas in (op.inputs, op.outputs))
    forward, backward = local_seconds(op, machine, np.array([fraction]), inputs, outputs, needs_grad)
    return float(forward[0]), float(backward[0])


@pytest.mark.parametrize("name", [*registered(), "nobody.has_seen_this"])
def test_every_rule_has_a_family(name):
    def target():
        """Stands for an operator of this name."""

    target.__name__ = name
    assert family(Operator(target, (), {}, (), ())) in FAMILIES


def test_families():
    x = tensor(4, 6)
    assert family(call(aten.linear.default, x, tensor(8, 6))) == "matmul"
    assert family(call(aten.layer_norm.default, x, [6])) == "norm"
    assert family(call(aten.transpose.int, x, 0, 1)) == "view"
    assert family(call(aten.reshape.default, x, [24])) == "view"
    assert family(call(aten.reshape.default, x.t(), [24])) == "copy"
    assert family(call(aten.to.dtype, x, torch.float32)) == "view"
    assert family(call(aten.to.dtype, x, torch.bfloat16)) == "copy"
    assert family(call(aten.dropout.default, x, 0.1, True)) == "random"
    assert family(call(aten.dropout.default, x, 0.1, False)) == "view"
    assert family(call(aten.gelu.default, x)) == "pointwise"


@pytest.mark.parametrize(
    "op, expected",
    [
        (call(aten.linear.default, tensor(3, 5, 16), tensor(7, 16), tensor(7)), 2 * 15 * 16 * 7),
        (call(aten.bmm.default, tensor(3, 4, 5), tensor(3, 5, 6)), 2 * 3 * 4 * 5 * 6),
        (call(aten.matmul.default, tensor(5), tensor(5)), 2 * 5),
        (call(aten.addmm.default, tensor(6), tensor(4, 5), tensor(5, 6)), 2 * 4 * 5 * 6),
        (call(aten.einsum.default, "bqhd,bkhd->bhqk", [tensor(2, 3, 4, 5), tensor(2, 6, 4, 5)]), 2 * 2 * 4 * 3 * 6 * 5),
        (call(aten.einsum.default, "ij,jk", [tensor(2, 3), tensor(3, 4)]), 2 * 2 * 3 * 4),
        (call(aten.einsum.default, "i...,i->...", [tensor(3, 4, 5), tensor(3)]), 2 * 3 * 4 * 5),
        (call(aten.bilinear.default, tensor(2, 3), tensor(2, 4), tensor(5, 3, 4)), 2 * 2 * 3 * 4 * 5),
        (call(aten.tensordot.default, tensor(2, 3, 4), tensor(3, 4, 5), [1, 2], [0, 1]), 2 * 2 * 12 * 5),
        (call(aten.conv2d.default, tensor(2, 4, 8, 8), tensor(6, 2, 3, 3), None, [1, 1], [1, 1], [1, 1], 2),
         2 * 2 * 6 * 64 * 2 * 9),
        (call(aten.scaled_dot_product_attention.default, *[tensor(2, 4, 16, 8)] * 3), 4 * 2 * 4 * 16 * 16 * 8),
        (call(aten.gelu.default, tensor(4, 4)), 0),
    ],
)  # fmt: skip
def test_operations(op, expected):
    assert flops(op) == pytest.approx(expected)


def test_causal_attention_counts_half():
    q = tensor(2, 4, 16, 8)
    whole = call(aten.scaled_dot_product_attention.default, q, q, q)
    causal = Operator(whole.target, whole.args, {"is_causal": True}, whole.inputs, whole.outputs)
    assert flops(causal) == flops(whole) / 2


def test_products_take_a_product_for_each_gradient():
    h100 = load_machine("h100")
    big = tensor(8192, 8192, dtype=torch.bfloat16)
    op = call(aten.linear.default, big, big)
    forward, both = seconds(op, h100, (True, True))
    assert forward == pytest.approx(2 * 8192**3 / h100.rate("matmul", "bfloat16") + h100.operator_launch)
    assert both == pytest.approx(2 * forward)
    assert seconds(op, h100, (False, True))[1] == pytest.approx(forward)
    assert seconds(op, h100, (False, False))[1] == 0.0


def test_small_products_are_bound_by_memory():
    h100 = load_machine("h100")
    op = call(aten.linear.default, tensor(1, 8192), tensor(8192, 8192))
    assert seconds(op, h100, (False, False))[0] == pytest.approx(8192 * 8192 * 4 / h100.memory_bandwidth, rel=0.1)


def test_seconds_fall_with_the_share_of_the_work():
    h100 = load_machine("h100")
    x = tensor(64, 1024, 1024)
    for op in (call(aten.gelu.default, x), call(aten.softmax.int, x, -1), call(aten.matmul.default, x, x)):
        grads = (True,) * len(op.inputs)
        whole, half = seconds(op, h100, grads), seconds(op, h100, grads, 0.5)
        assert all(b < a < 2.001 * b for a, b in zip(whole, half))


def test_views_are_free_but_gradients_of_parts_are_not():
    h100, x = load_machine("h100"), tensor(1024, 1024)
    assert seconds(call(aten.transpose.int, x, 0, 1), h100, (True,)) == (0.0, 0.0)
    forward, backward = seconds(call(aten.slice.Tensor, x, 0, 0, 10), h100, (True,))
    assert forward == 0.0
    assert backward > x.numel() * 4 / h100.memory_bandwidth


def test_lookups_read_only_their_rows():
    h100 = load_machine("h100")
    op = call(aten.embedding.default, tensor(100_000, 1024), tensor(16, dtype=torch.int64))
    forward, backward = seconds(op, h100, (True, False))
    assert forward < 2 * h100.operator_launch
    assert backward > 100_000 * 1024 * 4 / h100.memory_bandwidth


def test_sums_of_two_hand_their_gradients_on():
    h100, x = load_machine("h100"), tensor(4096, 4096)
    assert seconds(call(aten.add.Tensor, x, x), h100, (True, True))[1] == pytest.approx(h100.operator_launch)
    assert seconds(call(aten.add.Tensor, x, tensor(4096)), h100, (True, True))[1] > x.numel() * 4 / h100.memory_bandwidth


def test_the_optimizer_reads_and_writes_its_states():
    h100 = load_machine("h100")
    assert optimizer_seconds(np.array([1e9, 2e9]), 2.0, h100) == pytest.approx(np.array([7e9, 14e9]) / h100.memory_bandwidth)


# -- calibration ----------------------------------------------------------------------------------------------------------


def test_a_fit_finds_the_machine_that_the_times_are_of():
    base, truth = load_machine("cpu-gloo"), load_machine("a100")
    samples = [Sample("launch", "float32", 32.0, 0.0, 32 * truth.operator_launch)]
    for case in cases():
        if case.family != "launch":
            work = case.flops / truth.rate(case.family, case.dtype)
            moved = case.traffic / truth.bandwidth_of(case.family)
            taken = 100 * max(work, moved)
            samples.append(Sample(case.family, case.dtype, case.flops, case.traffic, taken, case.channels))
    fitted = fit_machine(base, samples, Links(1e-5, 2e-5, 3e9), "made up")
    assert fitted.operator_launch == pytest.approx(truth.operator_launch)
    assert fitted.memory_bandwidth == pytest.approx(truth.memory_bandwidth / 100, rel=0.3)
    assert (fitted.collective_launch, fitted.levels[0].latency, fitted.levels[0].bandwidth) == (1e-5, 2e-5, 3e9)
    assert fitted.flops["float64"] == base.flops["float64"], "what was not timed stays"
    assert fitted.description == "made up"
    off = errors_of(fitted, samples)
    assert max(off.values()) < 1.7, off


def test_operators_are_timed_and_a_file_keeps_the_machine(tmp_path, monkeypatch):
    few = [
        operator_case(aten.mm.default, [tensor(64, 64)] * 2),
        operator_case(aten.clone.default, [tensor(256, 256)]),
        next(cases()),
    ]
    monkeypatch.setattr("shardwright.calibrate.operators.cases", lambda: iter(few))
    met, done = [], []
    samples = time_operators(0.03, lambda: met.append(1), lambda own: max(own, 1e-5), done.append)
    assert [s.family for s in samples] == ["matmul", "copy", "launch"]
    assert (len(met), done[-1]) == (3, 1.0)
    assert all(s.seconds >= 1e-5 for s in samples)
    fitted = fit_machine(load_machine("cpu-gloo"), samples)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SHARDWRIGHT_MACHINE", raising=False)
    assert load_machine("cpu-gloo") != fitted
    assert save_machine(fitted) == tmp_path / "shardwright" / "cpu-gloo.toml"
    assert load_machine("cpu-gloo") == fitted
    assert [p.name for p in (tmp_path / "shardwright").iterdir()] == ["cpu-gloo.toml"]
