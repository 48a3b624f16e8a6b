"""What convolutions cost: blocks of channels, a launch of their own, filters of one point, and machines found from times."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_compute import call, seconds, tensor

from shardwright.calibrate.operators import Sample, cases, fit_machine, price_of
from shardwright.cost.compute import local_seconds
from shardwright.cost.convolution import Channels, channels_of, kernels_of, padding
from shardwright.cost.machine_files import load_machine
from shardwright.cost.operations import flops
from shardwright.ir.machine import Machine
from shardwright.ir.mesh import Mesh
from shardwright.plan.choose.tables import choices_of
from shardwright.plan.problem.prices import Pricing
from shardwright.rules.registry import signature_of

aten = torch.ops.aten
H100 = load_machine("h100")
# Nothing but work takes time; blocks of 16.
BLOCKS = replace(H100, channel_block=16.0, operator_launch=0.0, memory_bandwidth=1e18)


def conv(n, read, made, side=16, kernel=3, groups=1, stride=1):
    pad = kernel // 2
    return call(
        aten.conv2d.default, tensor(n, read, side, side), tensor(made, read // groups, kernel, kernel), None,
        [stride, stride], [pad, pad], [1, 1], groups,
    )  # fmt: skip


@pytest.mark.parametrize(
    "channels, expected",
    [
        (Channels(16, 32), (1, 1, 1)),
        (Channels(4, 32), (4, 4, 4)),
        (Channels(20, 32), (1.6, 1.6, 1.6)),
        (Channels(32, 8), (1, 2, 2)),  # read as it is; its own gradient, and the weight's, in blocks
        (Channels(64, 3), (1, 16 / 3, 1)),  # a picture
        (Channels(1, 1, 64), (1, 1, 1)),  # depthwise
        (Channels(8, 8, 4), (4, 4, 4)),
        (Channels(16, 8, transposed=True), (2, 2, 2)),
        (Channels(0, 16), (16, 16, 16)),  # nothing is there, and nothing divides by it
    ],
)
def test_kernels_do_whole_blocks(channels, expected):
    assert padding(channels, 16) == pytest.approx(expected)
    assert padding(channels, 1) == pytest.approx((1, 1, 1))


def test_arrays_of_channels_are_padded_one_by_one():
    forward, of_input, of_weight = padding(Channels(np.array([64.0, 32.0, 8.0]), np.array([3.0, 4.0, 64.0])), 16)
    assert forward.tolist() == [1, 1, 2]
    assert of_input.tolist() == pytest.approx([16 / 3, 4, 2])
    assert of_weight.tolist() == [1, 4, 2]


def test_channels_are_those_of_a_group():
    assert channels_of(conv(2, 32, 64, groups=4)) == Channels(16, 8, 4)
    transposed = call(aten.conv_transpose2d.input, tensor(2, 12, 8, 8), tensor(12, 5, 3, 3))
    assert channels_of(transposed) == Channels(5, 12, 1, True)


def test_a_few_channels_take_as_long_as_a_block():
    few, block, more = (seconds(conv(8, 32, made), BLOCKS, (True, True)) for made in (4, 16, 17))
    assert few == pytest.approx(block)
    assert more == pytest.approx(tuple(2 * each for each in block))


def test_each_gradient_has_its_own_padding():
    picture = conv(8, 3, 64)
    whole = flops(picture) / BLOCKS.rate("conv", "float32")
    assert seconds(picture, BLOCKS, (False, False)) == pytest.approx((whole, 0.0))
    assert seconds(picture, BLOCKS, (False, True)) == pytest.approx((whole, whole))
    assert seconds(picture, BLOCKS, (True, False)) == pytest.approx((whole, 16 / 3 * whole))
    assert seconds(picture, BLOCKS, (True, True)) == pytest.approx((whole, 16 / 3 * whole + whole))


def test_a_machine_without_blocks_prices_the_operations_alone():
    large = conv(64, 20, 20, side=224)
    forward, backward = seconds(large, H100, (True, True))
    assert forward == pytest.approx(flops(large) / H100.rate("conv", "float32") + H100.operator_launch)
    assert backward == pytest.approx(2 * forward)


def test_convolutions_have_a_launch_of_their_own_but_points_are_products():
    slow = replace(H100, convolution_launch=1e-3, channel_block=16.0)
    tiny, point = conv(1, 16, 16, side=4), conv(64, 20, 20, side=64, kernel=1)
    assert seconds(tiny, slow, (True, True))[0] > 1e-3
    assert seconds(tiny, slow, (True, True))[1] > 2e-3
    product = flops(point) / H100.rate("matmul", "float32")
    assert seconds(point, replace(slow, memory_bandwidth=1e18), (True, True)) == pytest.approx(
        (product + H100.operator_launch, 2 * (product + H100.operator_launch))
    )


def test_depthwise_is_bound_by_memory():
    op = conv(8, 64, 64, side=64, groups=64)
    machine = replace(BLOCKS, rates={"conv": 1e9})
    moved = sum(meta.bytes for meta in (*op.inputs, *op.outputs))
    assert seconds(op, machine, (False, False))[0] == pytest.approx(moved / 1e9)


def test_a_bias_alone_needs_no_product():
    op = call(aten.conv2d.default, tensor(2, 16, 64, 64), tensor(16, 16, 3, 3), tensor(16), [1, 1], [1, 1])
    assert seconds(op, H100, (False, False, True))[1] < seconds(op, BLOCKS, (False, True, True))[1] + H100.operator_launch
    assert seconds(op, replace(BLOCKS, convolution_launch=1.0), (False, False, True))[1] < 1.0


def test_what_a_choice_splits_decides_how_much_is_padding():
    op, mesh = conv(8, 64, 16), Mesh(("a",), (4,))
    table = choices_of(op, signature_of(op), mesh)
    forward, _, _ = Pricing(BLOCKS, mesh).operator_parts(table, (True, True))
    cost = {}
    for row in range(len(table)):
        symbol = table.symbols[table.rows[row][0]]
        cost.setdefault(symbol.factor, float(forward[row]))
    whole = seconds(op, BLOCKS, (True, True))[0]
    assert cost["n"] == pytest.approx(whole / 4), "a share of the pictures"
    assert cost["c"] == pytest.approx(whole / 4), "16 of the channels that are read"
    assert cost["o"] == pytest.approx(whole), "4 features take as long as 16"


# -- from times -----------------------------------------------------------------------------------------------------------


def times_on(machine: Machine, noise: float = 0.0) -> list[Sample]:
    draw = np.random.default_rng(1)
    found = []
    for case in cases():
        sample = Sample(case.family, case.dtype, case.flops, case.traffic, 0.0, case.channels)
        taken = case.flops * machine.operator_launch if case.family == "launch" else price_of(machine, sample)
        found.append(sample._replace(seconds=taken * float(np.exp(noise * draw.standard_normal()))))
    return found


@pytest.mark.parametrize("block, launch", [(1.0, 0.0), (8.0, 3e-5), (16.0, 8e-5)])
def test_calibration_finds_blocks_and_launches(block, launch):
    truth = replace(
        load_machine("cpu-gloo"), channel_block=block, convolution_launch=launch, rates={"conv": 6e9},
        efficiency={"matmul": 0.5, "conv": 0.9, "conv_bfloat16": 0.4, "default": 0.2},
    )  # fmt: skip
    samples = [sample for sample in times_on(truth, 0.05) if sample.family in ("matmul", "conv", "launch")]
    found = fit_machine(load_machine("cpu-gloo"), samples)
    assert found.channel_block == block
    assert found.convolution_launch == pytest.approx(launch, rel=0.3, abs=1e-5)
    for dtype in ("float32", "bfloat16"):
        assert found.rate("conv", dtype) == pytest.approx(truth.rate("conv", dtype), rel=0.25)
    assert found.bandwidth_of("conv") == pytest.approx(6e9, rel=0.3)


def test_too_few_times_change_nothing():
    base = load_machine("cpu-gloo")
    samples = [sample for sample in times_on(base) if sample.channels][:3]
    assert fit_machine(base, samples).channel_block == base.channel_block
    assert fit_machine(base, samples).rate("conv", "float32") == base.rate("conv", "float32")


def test_of_blocks_that_fit_as_well_the_smallest_is_found():
    channels = [Channels(64, 64)] * 4
    work = np.array([1e6, 1e7, 1e8, 1e9])
    assert kernels_of(work, [1.0] * 4, 1e-5 + work / 1e11, channels).block == 1


def test_shares_come_with_their_channels():
    op = conv(8, 64, 64)
    inputs, outputs = (np.array([[float(m.bytes)] * 2 for m in metas]) for metas in (op.inputs, op.outputs))
    fraction, made = np.array([0.25, 0.125]), np.array([16.0, 8.0])
    forward, _ = local_seconds(op, BLOCKS, fraction, inputs, outputs, (True, True), Channels(made, np.array([64.0, 64.0])))
    assert forward[0] == pytest.approx(forward[1])
