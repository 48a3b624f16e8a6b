"""Operators: times operators, and fits the machine's numbers to the times.

:func:`time_operators` runs in all processes simultaneously, so that ranks that share cores and memory are measured as they
will compute: the processes meet before each case and agree on its time. :func:`fit_machine` turns the times into the numbers
that :mod:`shardwright.cost.compute` prices with. Nothing here depends on how processes find each other.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shardwright.cost.compute import optimizer_seconds, traffic_seconds
from shardwright.cost.convolution import Channels, channels_of, kernels_of, padding
from shardwright.cost.machine_files import calibrated
from shardwright.cost.operations import flops
from shardwright.ir.machine import Level, Machine
from shardwright.ir.operator import Operator, Slot, TensorMeta
from shardwright.redistribute.links import Links
from shardwright.rules.traits import family

aten = torch.ops.aten

# Bytes of the tensors that memory-bound operators are timed on: within a core's cache, within all of it, beyond it.
SIZES = (1 << 19, 1 << 21, 1 << 23)
_LAUNCHES = "launch"  # the family of the samples that show the time per call
_STATES = 2.0  # Adam's
_LEAST_CALLS = 3
_LEAST_CONVOLUTIONS = 4  # samples that determine the four numbers of convolutions


class Sample(NamedTuple):
    """A measured time of one operator.

    Args:
        family: see :func:`~shardwright.rules.traits.family`; also ``optimizer``, and ``launch`` for tiny tensors.
        dtype: the name of its dtype.
        flops: operations. ``traffic``: bytes as the cost model counts them, in all passes.
        seconds: seconds per call.
        channels: the :class:`~shardwright.cost.convolution.Channels` of a convolution.
    """

    family: str
    dtype: str
    flops: float
    traffic: float
    seconds: float
    channels: Sequence[Any] = ()


@dataclass(frozen=True)
class Case:
    """One operator to time: a :class:`Sample` without its time, and a function that makes the call."""

    family: str
    dtype: str
    flops: float
    traffic: float
    prepare: Callable[[], Callable[[], Any]]
    channels: Sequence[Any] = ()


# A machine on which traffic costs one second per byte.
_UNIT = Machine("unit", "", {"float32": 1.0}, {}, 0.0, 1.0, 0.0, 0.0, (Level("all", 0, 0.0, 1.0),))


def operator_case(target: Any, arguments: Sequence[Any], **keywords: Any) -> Case:
    """Builds the case of one operator on such tensors. They may be on the meta device.

    >>> case = operator_case(aten.mm.default, [torch.empty(64, 32, device="meta"), torch.empty(32, 16, device="meta")])
    >>> case.family, case.flops
    ('matmul', 65536.0)
    """
    metas = [torch.empty_like(a, device="meta") if isinstance(a, Tensor) else a for a in arguments]
    result = target(*metas, **keywords)
    outputs = [result] if isinstance(result, Tensor) else [r for r in result if isinstance(r, Tensor)]
    inputs = [a for a in metas if isinstance(a, Tensor)]
    numbers = iter(range(len(inputs)))
    slots = tuple(Slot(next(numbers)) if isinstance(a, Tensor) else a for a in metas)
    op = Operator(target, slots, keywords, tuple(map(_meta, inputs)), tuple(map(_meta, outputs)))
    before, after = (np.array([[float(m.bytes)] for m in metas]) for metas in (op.inputs, op.outputs))
    traffic = float(traffic_seconds(op, _UNIT, before, after)[0])

    def prepare() -> Callable[[], Any]:
        made = [_filled(a) if isinstance(a, Tensor) else a for a in metas]
        return lambda: target(*made, **keywords)

    kind, dtype = family(op), str(op.inputs[0].dtype).removeprefix("torch.")
    return Case(kind, dtype, flops(op), traffic, prepare, channels_of(op) if kind == "conv" else ())


def _meta(tensor: Tensor) -> TensorMeta:
    return TensorMeta(tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()))


def _filled(like: Tensor) -> Tensor:
    if like.dtype.is_floating_point:
        return torch.linspace(-1, 1, like.numel()).to(like.dtype).reshape(like.shape)
    return torch.arange(like.numel(), dtype=like.dtype).reshape(like.shape) * 7 % 1000


def cases() -> Iterator[Case]:
    """Lists what is timed: the operators that most of a training step consists of, in sizes that a rank may have."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for _ in range(2):
        yield _launch_case()
    for dtype in (torch.float32, torch.bfloat16):
        for m, k, n in ((256, 256, 256), (512, 512, 1024), (2048, 512, 512), (64, 1024, 1024)):
            yield operator_case(aten.linear.default, [meta(m, k, dtype=dtype), meta(n, k, dtype=dtype)])
    for length in (128, 512):
        heads = meta(2, 4, length, 64)
        yield operator_case(aten.scaled_dot_product_attention.default, [heads] * 3, is_causal=True)
    yield from convolution_cases()
    for nbytes in SIZES:
        rows = meta(nbytes // 2048, 512)
        yield operator_case(aten.add.Tensor, [rows, rows])
        yield operator_case(aten.gelu.default, [rows])
        yield operator_case(aten.softmax.int, [rows, -1])
        yield operator_case(aten.layer_norm.default, [rows, [512], meta(512), meta(512)])
        yield operator_case(aten.sum.dim_IntList, [rows, [-1]])
        yield operator_case(aten.clone.default, [rows])
        ids = meta(nbytes // 2048, dtype=torch.int64)
        yield operator_case(aten.embedding.default, [meta(max(1001, 2 * nbytes // 2048), 512), ids])
        yield operator_case(aten.dropout.default, [rows, 0.1, True])
        yield optimizer_case(nbytes)


def convolution_cases() -> Iterator[Case]:
    """Lists convolutions to time: large ones, tiny ones, on pictures, with few channels, depthwise."""

    def case(n: int, read: int, made: int, side: int, groups: int = 1, dtype: torch.dtype = torch.float32) -> Case:
        x = torch.empty(n, read, side, side, dtype=dtype, device="meta")
        filters = torch.empty(made, read // groups, 3, 3, dtype=dtype, device="meta")
        return operator_case(aten.conv2d.default, [x, filters, None, [1, 1], [1, 1], [1, 1], groups])

    for n, read, made, side in ((4, 32, 64, 28), (8, 64, 64, 14), (4, 64, 64, 56)):
        yield case(n, read, made, side)
    yield case(4, 64, 64, 56, dtype=torch.bfloat16)
    for n, side in ((1, 8), (2, 8), (2, 16)):
        yield case(n, 16, 16, side)
    for read, made in ((3, 32), (32, 4), (32, 20), (32, 40), (8, 32)):
        yield case(8, read, made, 24)
    for channels, side in ((64, 28), (128, 14)):
        yield case(8, channels, channels, side, groups=channels)


def optimizer_case(nbytes: int) -> Case:
    """Builds a step of AdamW over parameters of so many bytes in eight tensors."""

    def prepare() -> Callable[[], Any]:
        tensors = [torch.nn.Parameter(torch.ones(max(1, nbytes // 32))) for _ in range(8)]
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        return torch.optim.AdamW(tensors, foreach=True).step

    traffic = float(optimizer_seconds(np.array(float(nbytes)), _STATES, _UNIT))
    return Case("optimizer", "float32", 0.0, traffic, prepare)


def _launch_case() -> Case:
    """Builds one call among many small ones that autograd records. Half of it is forward and half backward."""
    count = 16

    def prepare() -> Callable[[], Any]:
        x, w = torch.ones(8, requires_grad=True), torch.ones(8)

        def call() -> None:
            y = x
            for _ in range(count):
                y = y * w
            y.backward(w)

        return call

    return Case(_LAUNCHES, "float32", 2.0 * count, 0.0, prepare)


# -- times ----------------------------------------------------------------------------------------------------------------


def time_operators(
    seconds: float = 6.0,
    meet: Callable[[], object] = lambda: None,
    agree: Callable[[float], float] = lambda own: own,
    progress: Callable[[float], None] = lambda done: None,
) -> list[Sample]:
    """Times every case in this process.

    Args:
        seconds: seconds in all; each case takes at least three calls.
        meet: waits until all ranks are here, so that all time the same case at the same time.
        agree: returns the common number of all ranks' numbers, such as the largest. Called once per case on every rank.
        progress: is called with the fraction that is done.
    """
    todo = list(cases())
    samples = []
    for at, case in enumerate(todo):
        call = case.prepare()
        with torch.enable_grad() if case.family == _LAUNCHES else torch.no_grad():
            call()  # the first call allocates buffers
            meet()
            taken = agree(_seconds_a_call(call, seconds / len(todo)))
        samples.append(Sample(case.family, case.dtype, case.flops, case.traffic, taken, case.channels))
        progress((at + 1) / len(todo))
    return samples


def _seconds_a_call(call: Callable[[], Any], seconds: float) -> float:
    """Measures the mean seconds per call, over so many seconds.

    It is not the median: if ranks share cores, most calls run undisturbed, but the number of calls done is what counts.
    """
    start = time.perf_counter()
    call()
    batch = max(1, min(100, int(1e-3 / max(1e-7, time.perf_counter() - start))))
    done, begin = 0, time.perf_counter()
    while True:
        for _ in range(batch):
            call()
        done += batch
        taken = time.perf_counter() - begin
        if done >= _LEAST_CALLS and taken >= seconds:
            return taken / done


# -- the machine ----------------------------------------------------------------------------------------------------------


def fit_machine(base: Machine, samples: Sequence[Sample], links: Links | None = None, description: str = "") -> Machine:
    """Fits the machine that the samples were timed on. Numbers that they do not determine are those of ``base``.

    Peaks are the fastest products of a dtype; a family that is faster than products has an efficiency above 1. Efficiencies and
    bytes per second of a family are means of logarithms: prices are too high as often, and by as much, as too low.

    Args:
        base: where to start.
        samples: the timed operators.
        links: links measured among the same ranks, for the innermost level, and for all levels if there is only one. A
            launch of 0, which two ranks cannot tell from messages, stays as in ``base``.
        description: of the machine.

    >>> from shardwright.cost.machine_files import load_machine
    >>> samples = [Sample("launch", "float32", 2, 0, 1e-5), Sample("matmul", "float32", 1e9, 1e6, 0.1)]
    >>> fitted = fit_machine(load_machine("h100"), samples)
    >>> fitted.operator_launch, round(fitted.peak("float32") / 1e9)
    (5e-06, 10)
    """
    launches = [sample.seconds / sample.flops for sample in samples if sample.family == _LAUNCHES]
    launch = statistics.median(launches) if launches else base.operator_launch
    worked, moved = defaultdict(list), defaultdict(list)
    for sample in samples:
        net = max(sample.seconds - launch, sample.seconds / 2)  # calls that autograd does not record take less time
        if sample.channels:
            continue
        if sample.flops and sample.family != _LAUNCHES:
            worked[sample.family, sample.dtype].append(sample.flops / net)
        elif sample.traffic:
            moved[sample.family].append(sample.traffic / net)
    peaks = {dtype: max(rates) for (kind, dtype), rates in worked.items() if kind == "matmul"}
    measured = replace(base, flops={**base.flops, **peaks}, operator_launch=launch)
    measured = _fit_convolutions(measured, [sample for sample in samples if sample.channels])
    efficiency = dict(measured.efficiency)
    for kind in {kind for kind, _ in worked}:
        shares = [rate / measured.peak(dtype) for (other, dtype), rates in worked.items() if other == kind for rate in rates]
        efficiency[kind] = statistics.geometric_mean(shares)
    rates = {**measured.rates, **{kind: statistics.geometric_mean(each) for kind, each in moved.items()}}
    levels = base.levels
    if links is not None:
        levels = (replace(levels[0], latency=links.latency, bandwidth=links.bandwidth), *levels[1:])
    return replace(
        measured,
        device="cpu",
        description=description or base.description,
        efficiency=efficiency,
        rates=rates,
        memory_bandwidth=rates.get("copy", base.memory_bandwidth),
        collective_launch=(links.launch if links is not None else 0.0) or base.collective_launch,
        levels=levels,
    )


def _fit_convolutions(machine: Machine, samples: Sequence[Sample]) -> Machine:
    """Fits the numbers of convolutions. For dtypes other than float32 only their efficiency is fitted."""
    by_dtype = defaultdict(list)
    for sample in samples:
        by_dtype[sample.dtype].append(sample)
    known = by_dtype.pop("float32", [])
    if len(known) < _LEAST_CONVOLUTIONS:
        return machine
    found = kernels_of(*zip(*[(s.flops, s.traffic, s.seconds, Channels(*s.channels)) for s in known]))
    efficiency = {**machine.efficiency, "conv": found.rate / machine.peak("float32")}
    launch = max(found.launch, machine.operator_launch)
    for dtype, others in by_dtype.items():
        done = [s.flops * float(padding(Channels(*s.channels), found.block)[0]) for s in others]
        rates = [work / max(s.seconds - launch, s.seconds / 2) for work, s in zip(done, others)]
        efficiency[f"conv_{dtype}"] = statistics.geometric_mean(rates) / machine.peak(dtype)
    return replace(
        machine,
        efficiency=efficiency,
        rates={**machine.rates, "conv": found.bandwidth},
        convolution_launch=launch - machine.operator_launch,
        channel_block=float(found.block),
    )


def price_of(machine: Machine, sample: Sample) -> float:
    """Prices a timed operator on a machine, in seconds."""
    work, launch = sample.flops / machine.rate(sample.family, sample.dtype), machine.operator_launch
    if sample.channels:
        work *= float(padding(Channels(*sample.channels), machine.channel_block)[0])
        launch += machine.convolution_launch
    return max(work, sample.traffic / machine.bandwidth_of(sample.family)) + launch


def errors_of(machine: Machine, samples: Sequence[Sample]) -> dict[str, float]:
    """Computes by what factor prices are off, by family: the geometric mean of the larger over the smaller of price and time.

    >>> from shardwright.cost.machine_files import load_machine
    >>> h100 = load_machine("h100")
    >>> errors_of(h100, [Sample("copy", "float32", 0, 3.35e12, 1.0)])
    {'copy': 1.0}
    """
    found: dict[str, list[float]] = {}
    for sample in samples:
        if sample.family != _LAUNCHES:
            found.setdefault(sample.family, []).append(abs(math.log(price_of(machine, sample) / sample.seconds)))
    return {kind: round(math.exp(statistics.mean(each)), 2) for kind, each in found.items()}


def save_machine(machine: Machine, path: Path | None = None) -> Path:
    """Writes a machine to a file, completely or not at all. Default is where ``load_machine("cpu-gloo")`` looks first."""
    path = path or calibrated()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(machine.to_toml(), "utf-8")
    draft.replace(path)
    return path
