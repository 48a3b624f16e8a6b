"""Mixed precision: the dtypes and bits of a single device, half the bytes where that costs no bits, loss scaling, clipping.

Where bits are compared, weights and inputs are small whole numbers: in bfloat16 all their sums are exact, so that whatever
order or dtype they are taken in has to give the same.
"""

from __future__ import annotations

import copy
import math
import re
import runpy
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardwright as sw
from harness import compare, main, on_ranks, same_steps, simulated
from shardwright.errors import ArgumentTypeError, ShardwrightError
from shardwright.ir.graph import Graph
from shardwright.train import passes as compiling
from shardwright.world.current import current_world
from shardwright.world.simulated.world import SimulatedWorld

BF16, FP16 = torch.bfloat16, torch.float16


class Block(nn.Module):
    """Attention and a feed-forward part over tied embeddings; sizes that no number of ranks divides."""

    def __init__(self, size: int = 12, words: int = 11, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(words, size)
        self.norm = nn.LayerNorm(size)
        self.q, self.k, self.v = (nn.Linear(size, size) for _ in range(3))
        self.out = nn.Linear(size, size, bias=False)
        self.up, self.down = nn.Linear(size, 18), nn.Linear(18, size)
        self.head = nn.Linear(size, words, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, words, targets):
        x = self.embed(words)
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)) * self.scale
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def words(seed: int = 0, rows: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 11, (rows, 6), generator=generator) for _ in range(2))


def layouts() -> list[Callable[[sw.AutoParallel], sw.AutoParallel]]:
    """Data parallel, tensor parallel, stored split, and a mixture of them."""
    n = current_world().size
    line = sw.Layout((n,), ("tp",))
    columns = {"in_strategy": (line("None", "None", "None"),), "parameter_plan": {"weight": line("tp", "None")}}
    rows = {"in_strategy": (line("None", "None", "tp"),), "parameter_plan": {"weight": line("None", "tp")}}
    tensor = {name: columns for name in ("q", "k", "v", "up")} | {name: rows for name in ("out", "down")}
    found = [
        lambda net: net,
        lambda net: net.shard(tensor),
        lambda net: net.hsdp(threshold=0),
        lambda net: net.shard({"embed.weight": (n, 1), "up.weight": (n, 1), "down.weight": (1, n), "up.bias": (n,)}),
    ]
    if n == 4:
        grid = sw.Layout((2, 2), ("dp", "tp"))
        up = {"in_strategy": (grid("dp", "None", "None"),), "parameter_plan": {"weight": grid("tp", "dp")}}
        down = {"in_strategy": (grid("dp", "None", "tp"),), "parameter_plan": {"weight": grid(("dp", "tp"), "None")}}
        found.append(lambda net: net.shard({"up": up, "down": down}).hsdp(threshold=0))
    return found


@contextmanager
def autocast(dtype=BF16):
    with torch.autocast("cpu", dtype=dtype):
        yield


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: sw.full_value(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def errors(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    least = 1e-2 * max(float(g.norm()) for g in exact.values())  # some gradients are 0 but for rounding
    return {n: float((got[n].double() - exact[n]).norm()) / max(float(exact[n].norm()), least) for n in exact}


def as_near_as_a_single_device(dtype, prepare) -> None:
    """Loss and gradients are off the exact ones by no more than the single device's, but for a few roundings."""
    torch.manual_seed(3)
    model = Block()
    batch = words(1)
    exact = copy.deepcopy(model).double()
    exact(*batch).backward()
    single = copy.deepcopy(model)
    with autocast(dtype):
        expected = single(*batch)
    expected.backward()
    net = prepare(model)
    with autocast(dtype):
        loss = net(*batch)
    loss.backward()
    assert loss.dtype == expected.dtype
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        assert p.grad.dtype == q.grad.dtype == p.dtype
    limit = 4 * torch.finfo(dtype).eps
    truth = gradients(exact)
    ours, theirs = errors(gradients(model), truth), errors(gradients(single), truth)
    for name in truth:
        assert ours[name] <= 1.5 * theirs[name] + limit, (name, ours[name], theirs[name])
    assert abs(loss.item() - expected.item()) <= limit * abs(expected.item())


def autocast_around() -> None:
    for number, lay_out in enumerate(layouts()):
        for dtype in (BF16, FP16)[: 1 + (number == 2)]:
            as_near_as_a_single_device(dtype, lambda model, lay_out=lay_out: lay_out(sw.AutoParallel(model)))


# -- bits ---------------------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """Small whole numbers all the way: its bfloat16 computation is exact."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 7)
        self.scale = nn.Parameter(torch.ones(7))
        for p in self.parameters():
            with torch.no_grad():
                p.copy_(torch.randint(-1, 2, p.shape).to(p.dtype))

    def forward(self, x, c):
        return ((self.down(self.up(x).relu()) * self.scale) * c).sum()


def whole_batch():
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randint(-1, 2, (6, n), generator=generator).float() for n in (6, 7))


def whole_layouts() -> list[Callable[[sw.AutoParallel], sw.AutoParallel]]:
    n = current_world().size
    line = sw.Layout((n,), ("tp",))
    up = {"in_strategy": (line("None", "None"),), "parameter_plan": {"weight": line("tp", "None")}}
    down = {"in_strategy": (line("None", "tp"),), "parameter_plan": {"weight": line("None", "tp")}}
    return [
        lambda net: net,
        lambda net: net.hsdp(threshold=0),
        lambda net: net.shard({"up.weight": (n, 1), "down.weight": (1, n), "down.bias": (n,), "scale": (n,)}),
        lambda net: net.shard({"up": up, "down": down}),
        lambda net: net.shard({"up": up, "down": down}).hsdp(threshold=0, optimizer_level="level3"),
    ]


SETTINGS = (
    lambda net: net,
    lambda net: net.disable_gradient_fp32_sync(),
    lambda net: net.enable_fp32_communication(),
    lambda net: net.mixed_precision(None, reduce_dtype=BF16),
    lambda net: net.mixed_precision(None, reduce_dtype=torch.float64),
)


def same_bits(prepare, half: bool, lay_out, micro: bool = False) -> None:
    torch.manual_seed(2)
    model = Whole()
    model = model.to(BF16) if half else model
    batch = whole_batch()
    batch = tuple(x.to(BF16) for x in batch) if half else batch
    single = copy.deepcopy(model)
    net = prepare(lay_out(sw.AutoParallel(sw.GradAccumulation(model, 2, "sum") if micro else model)))
    with torch.autocast("cpu", dtype=BF16, enabled=not half):
        expected, got = single(*batch), net(*batch)
    expected.backward()
    got.backward()
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    compare(single, model, "whole numbers", 0.0)
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        assert p.dtype == q.dtype
        assert p.grad.dtype == q.grad.dtype


def every_setting_has_the_bits_of_exact_sums() -> None:
    for prepare in SETTINGS:
        for half in (False, True):
            same_bits(prepare, half, whole_layouts()[-1])
    for lay_out in whole_layouts():
        same_bits(lambda net: net.disable_gradient_fp32_sync(), False, lay_out)
    for lay_out in whole_layouts()[:2]:
        same_bits(lambda net: net.disable_gradient_fp32_sync(), False, lay_out, micro=True)


def casts_before_moves_change_no_bits() -> None:
    """Random numbers, with casts before gathers and without: the same bits, sums of gradients apart."""
    for lay_out in layouts():
        results = []
        for wires in (compiling.with_wires, lambda program, *_, **__: program):
            kept, compiling.with_wires = compiling.with_wires, wires
            try:
                torch.manual_seed(3)
                model = Block()
                net = lay_out(sw.AutoParallel(model)).enable_fp32_communication()
                with autocast():
                    loss = net(*words(1))
                loss.backward()
                results.append((loss.detach(), gradients(model)))
            finally:
                compiling.with_wires = kept
        (loss, found), (plain_loss, plain) = results
        assert torch.equal(loss, plain_loss)
        for name, gradient in plain.items():
            assert torch.allclose(found[name], gradient, rtol=2**-7, atol=2**-10), name


# -- bytes --------------------------------------------------------------------------------------------------------------


def sent(prepare, phase: str, kinds: tuple[str, ...], half: bool = False, cast: bool = True) -> int:
    n = current_world().size
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4 * n, 8 * n, bias=False), nn.ReLU(), nn.Linear(8 * n, 4 * n, bias=False))
    x = torch.ones(4 * n, 4 * n)
    model, x = (model.to(BF16), x.to(BF16)) if half else (model, x)
    net = prepare(sw.AutoParallel(model).hsdp(threshold=0))
    with sw.record_communication() as log:
        with torch.autocast("cpu", dtype=BF16, enabled=cast):
            loss = net(x).float().square().mean()
        loss.backward()
    return sum(e.bytes for e in log.events if e.phase == phase and e.kind in kinds)


def bytes_that_travel() -> None:
    gathers, sums = ("all_gather",), ("reduce_scatter", "all_reduce")
    plain = [sent(lambda n: n, p, k, cast=False) for p, k in (("forward", gathers), ("backward", sums))]
    assert min(plain) > 0
    for prepare, gathered, summed in (
        (lambda net: net, 0.5, 1.0),
        (lambda net: net.disable_gradient_fp32_sync(), 0.5, 0.5),
        (lambda net: net.enable_fp32_communication(), 0.5, 1.0),
        (lambda net: net.disable_gradient_fp32_sync().enable_fp32_communication(), 0.5, 1.0),
        (lambda net: net.mixed_precision(None, reduce_dtype=FP16), 0.5, 0.5),
        (lambda net: net.mixed_precision(BF16), 0.5, 1.0),
    ):
        assert sent(prepare, "forward", gathers) == gathered * plain[0]
        assert sent(prepare, "backward", sums) == summed * plain[1]
    assert sent(lambda net: net, "backward", sums, half=True, cast=False) == plain[1] / 2  # added in float32 all the same
    assert sent(lambda net: net.enable_fp32_communication(), "backward", sums, half=True, cast=False) == plain[1]
    assert sent(lambda net: net.disable_gradient_fp32_sync(), "backward", sums, half=True, cast=False) == plain[1] / 2


# -- the setting --------------------------------------------------------------------------------------------------------


def the_setting_is_autocast() -> None:
    """mixed_precision(dtype) computes what autocast around the call does, to the bit, also for steps of an optimizer."""
    for dtype in (BF16, FP16):
        results = []
        for by_setting in (True, False):
            torch.manual_seed(3)
            model = Block()
            net = sw.AutoParallel(model)
            if by_setting:
                net.mixed_precision(dtype)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            losses = []
            for number in range(3):
                with torch.autocast("cpu", dtype=dtype, enabled=not by_setting):
                    loss = net(*words(number))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            assert all(p.dtype == torch.float32 for p in model.parameters())
            results.append((losses, {n: sw.full_value(p) for n, p in model.named_parameters()}))
        for left, right in zip(results[0][0], results[1][0], strict=True):
            assert torch.equal(left, right)
        for name, value in results[0][1].items():
            assert torch.equal(value, results[1][1][name]), name


def in_float64_settings_change_nothing() -> None:
    torch.manual_seed(3)
    model = Block().double()
    batches = [words(n) for n in range(3)]
    for prepare in SETTINGS[:3]:
        same_steps(copy.deepcopy(model), batches, lambda m, p=prepare: p(sw.AutoParallel(m)))


# -- loss scaling -------------------------------------------------------------------------------------------------------


class Overflowing(nn.Module):
    """The gradient of one column of the second weight overflows where the input is large; that of the first never does."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(9))
        self.weight = nn.Parameter(torch.randn(3, 9) / 10)

    def forward(self, x):
        return F.linear(x, self.weight).sum() + self.shift.sum() * 0.1


def scaled_steps(optimizer_of, clip: bool, unscale: bool = True) -> None:
    n = current_world().size
    torch.manual_seed(7)
    model = Overflowing()
    single = copy.deepcopy(model)
    net = sw.AutoParallel(model).shard({"weight": (1, n)})
    runs = []
    for run, module in ((single, single), (net, model)):
        optimizer = optimizer_of(module.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
        scales = []
        for number in range(9):
            x = torch.randn(4, 9, generator=torch.Generator().manual_seed(number))
            if number in (1, 2, 6):
                x[1, {1: 8, 2: 0, 6: 4}[number]] = 1e35
            optimizer.zero_grad()
            scaler.scale(run(x)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            if clip:
                (sw.clip_grad_norm_ if module is model else nn.utils.clip_grad_norm_)(module.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        runs.append(scales)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 2
    compare(single, model, "scaled", 1e-5, gradients=False)


def the_scale_is_that_of_a_single_device() -> None:
    for clip in (False, True):
        scaled_steps(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), clip)
        scaled_steps(lambda p: torch.optim.AdamW(p, 0.1), clip)
        scaled_steps(lambda p: torch.optim.AdamW(p, 0.1, fused=True), clip)
    scaled_steps(lambda p: torch.optim.AdamW(p, 0.1, fused=True), False, unscale=False)
    scaled_steps(lambda p: torch.optim.Adam(p, 0.1, foreach=True), False, unscale=False)


# -- clipping -----------------------------------------------------------------------------------------------------------


def clipped(ours: bool, lay_out, cases, dtype=torch.float64) -> None:
    torch.manual_seed(3)
    model = Block().to(dtype)
    model.norm.bias.requires_grad_(False)
    single = copy.deepcopy(model)
    net = lay_out(sw.AutoParallel(model))
    clip = sw.clip_grad_norm_ if ours else nn.utils.clip_grad_norm_
    for order, foreach in cases:
        for run in (single, net):
            for parameter in run.parameters():
                parameter.grad = None
            run(*words(2)).backward()
        expected = nn.utils.clip_grad_norm_(single.parameters(), 0.01, order, foreach=foreach)
        total = sw.full_value(clip(model.parameters(), 0.01, order, foreach=foreach))
        exact = dtype == torch.float64
        assert math.isclose(total.item(), expected.item(), rel_tol=1e-9 if exact else 2e-2)
        compare(single, model, f"order {order}", 1e-9 if exact else 5e-2)


def clipping_counts_every_element_once() -> None:
    for lay_out in layouts():
        clipped(True, lay_out, [(1.0, None), (2.0, False), (2.0, True), (3.0, None), (math.inf, False), (math.inf, None)])
    clipped(True, layouts()[2], [(2.0, None)], BF16)


def torch_clips_right_too() -> None:
    for lay_out in layouts()[1:]:
        clipped(False, lay_out, [(1.0, None), (2.0, False), (2.0, True)])


def clipping_communicates_once() -> None:
    for number, lay_out in enumerate(layouts()):
        model = Block()
        lay_out(sw.AutoParallel(model))(*words(2)).backward()
        with mock.patch("torch.distributed.all_reduce", wraps=torch.distributed.all_reduce) as reduce:
            total = sw.clip_grad_norm_(model.parameters(), 1.0)
        assert type(total) is torch.Tensor
        assert reduce.call_count == (0 if current_world().is_simulated or number == 0 else 1)


def half_models_train() -> None:
    """Parameters, gradients and states in bfloat16, as on a single device, whatever the optimizer's implementation."""
    for kind, lay_out in zip(({"foreach": True}, {"fused": True}, {"foreach": False}), layouts(), strict=False):
        torch.manual_seed(3)
        model = Block().to(BF16)
        single = copy.deepcopy(model)
        net = lay_out(sw.AutoParallel(model))
        runs = [(run, torch.optim.AdamW(m.parameters(), 1e-2, **kind)) for run, m in ((single, single), (net, model))]
        for number in range(3):
            losses = []
            for run, optimizer in runs:
                loss = run(*words(number))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert math.isclose(*losses, rel_tol=2e-2)
        left, right = (list(optimizer.state.values()) for _, optimizer in runs)
        for one, other in zip(left, right, strict=True):
            assert {k: v.dtype for k, v in one.items()} == {k: v.dtype for k, v in other.items()}
            assert one["exp_avg"].shape == other["exp_avg"].shape


def clipping_by_value() -> None:
    torch.manual_seed(3)
    model = Block().double()
    single = copy.deepcopy(model)
    net = layouts()[1](sw.AutoParallel(model))
    for run, module in ((single, single), (net, model)):
        run(*words(2)).backward()
        nn.utils.clip_grad_value_(module.parameters(), 1e-3)
    compare(single, model, "by value")


def not_finite_on_one_rank() -> None:
    """A value that is not finite on one rank is seen by all: nan, inf, and an error on every rank."""
    n = current_world().size
    for bad in (math.nan, math.inf):
        for order in (1.0, 2.0, math.inf):
            model = Overflowing()
            net = sw.AutoParallel(model).shard({"weight": (1, n)})
            x = torch.ones(4, 9)
            x[0, 8] = bad
            net(x).backward()
            before = gradients(model)
            with pytest.raises(RuntimeError, match="norm of order"):
                sw.clip_grad_norm_(model.parameters(), 1.0, order, error_if_nonfinite=True)
            compared = gradients(model)
            assert all(torch.equal(before[k].nan_to_num(), compared[k].nan_to_num()) for k in before)
            total = float(sw.clip_grad_norm_(model.parameters(), 1.0, order))
            assert math.isnan(total) if math.isnan(bad) else total == math.inf


PROGRAMS = (
    autocast_around, every_setting_has_the_bits_of_exact_sums, casts_before_moves_change_no_bits, bytes_that_travel,
    the_setting_is_autocast, in_float64_settings_change_nothing, the_scale_is_that_of_a_single_device,
    clipping_counts_every_element_once, clipping_communicates_once, torch_clips_right_too, clipping_by_value,
    not_finite_on_one_rank, half_models_train,
)  # fmt: skip


def test_the_example_has_the_losses_and_scales_of_a_single_device(monkeypatch, capsys):
    monkeypatch.setattr("shardwright.world.current._current", [])
    monkeypatch.setattr("sys.argv", ["mixed_precision.py", "--steps", "5"])
    example = Path(__file__).resolve().parents[2] / "examples" / "mixed_precision.py"
    assert len(example.read_text("utf-8").splitlines()) < 60
    runpy.run_path(str(example), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["all_gather in float16", "reduce_scatter in float32"]
    for line in lines[:-2]:
        ours, theirs = re.findall(r"([\d.e+]+), (?:scale )?([\d.]+)", line)
        assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-2)
        assert ours[1] == theirs[1]
    assert {line.split()[5].rstrip(";") for line in lines[:-2]} == {"16384", "8192"}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("devices", [3])
def test_simulated(program, devices):
    simulated(program, devices)


@pytest.mark.parametrize("ranks", [4])
def test_on_real_ranks(ranks):
    on_ranks(__file__, ranks, PROGRAMS)


# -- in one process -----------------------------------------------------------------------------------------------------


def a(*shape: int) -> torch.Tensor:
    return torch.rand(shape) + 0.1


# Functions by how autocast treats them: in half precision, in float32, in the widest dtype, as their inputs are.
FUNCTIONS = {
    "linear": (F.linear, (a(8, 8), a(4, 8), a(4)), ((1, 4), (1, 4), (1,))),
    "matmul": (torch.matmul, (a(8, 8), a(8, 4)), ((1, 4), (4, 1))),
    "addmm": (torch.addmm, (a(8, 4), a(8, 8), a(8, 4)), ((1, 1), (1, 4), (4, 1))),
    "baddbmm": (torch.baddbmm, (a(4, 8, 4), a(4, 8, 8), a(4, 8, 4)), ((4, 1, 1), (4, 1, 1), (4, 1, 1))),
    "conv2d": (F.conv2d, (a(4, 8, 6, 6), a(4, 8, 3, 3), a(4)), ((1, 4, 1, 1), (1, 4, 1, 1), (1,))),
    "attention": (F.scaled_dot_product_attention, (a(2, 4, 6, 8),) * 3, ((1, 4, 1, 1),) * 3),
    "softmax": (lambda x: F.softmax(x, -1), (a(8, 8),), ((1, 4),)),
    "log_softmax": (lambda x: F.log_softmax(x, -1), (a(8, 8),), ((1, 4),)),
    "mse_loss": (F.mse_loss, (a(8, 8), a(8, 8)), ((2, 2), (2, 2))),
    "l1_loss": (F.l1_loss, (a(8, 8), a(8, 8)), ((2, 2), (2, 2))),
    "layer_norm": (lambda x: F.layer_norm(x, (8,)), (a(8, 8),), ((4, 1),)),
    "mean": (lambda x: x.mean(0), (a(8, 8),), ((4, 1),)),
    "prod": (lambda x: x.prod(1), (a(8, 8),), ((4, 1),)),
    "cat": (lambda x, y: torch.cat([x, y], 1), (a(8, 8), a(8, 4)), ((4, 1), (4, 1))),
    "gelu": (F.gelu, (a(8, 8),), ((2, 2),)),
    "addbmm": (torch.addbmm, (a(8, 4), a(4, 8, 8), a(4, 8, 4)), ((1, 1), (4, 1, 1), (4, 1, 1))),
    "einsum": (lambda x, y: torch.einsum("ij,jk->ik", x, y), (a(8, 8), a(8, 4)), ((1, 4), (4, 1))),
    "mv": (torch.mv, (a(8, 8), a(8)), ((1, 4), (4,))),
    "conv_transpose2d": (F.conv_transpose2d, (a(4, 8, 6, 6), a(8, 4, 3, 3)), ((4, 1, 1, 1), (1, 1, 1, 1))),
    "prelu": (F.prelu, (a(8, 8) - 0.5, a(8)), ((1, 4), (4,))),
    "cross_entropy": (lambda x: F.cross_entropy(x, torch.arange(8)), (a(8, 8),), ((1, 4),)),
    "cross_entropy rows": (lambda x: F.cross_entropy(x, torch.arange(8)), (a(8, 8),), ((4, 1),)),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, (a(8, 8), a(8, 8)), ((2, 2), (2, 2))),
    "kl_div": (lambda x, y: F.kl_div(x, y, reduction="sum"), (a(8, 8), a(8, 8)), ((2, 2), (2, 2))),
    "smooth_l1_loss": (F.smooth_l1_loss, (a(8, 8), a(8, 8)), ((2, 2), (2, 2))),
    "batch_norm": (lambda x: F.batch_norm(x, None, None, training=True), (a(8, 4, 6),), ((4, 1, 1),)),
    "group_norm": (lambda x: F.group_norm(x, 2), (a(4, 8, 6),), ((4, 1, 1),)),
    "rms_norm": (lambda x: F.rms_norm(x, (8,)), (a(8, 8),), ((4, 1),)),
    "std": (lambda x: x.std(1), (a(8, 8),), ((4, 1),)),
    "norm": (lambda x: x.norm(dim=1), (a(8, 8),), ((4, 1),)),
    "sum of all": (lambda x: x.sum(), (a(8, 8),), ((2, 2),)),
    "stack": (lambda x, y: torch.stack([x, y]), (a(8, 8), a(8, 8)), ((4, 1), (4, 1))),
    "cumsum": (lambda x: x.cumsum(1), (a(8, 8),), ((4, 1),)),
}


@pytest.mark.parametrize(("dtype", "given"), [(BF16, torch.float32), (BF16, FP16), (FP16, torch.float32)], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_have_the_dtype_of_a_single_device(name, dtype, given, four):
    """What a function returns under autocast, its inputs' gradients, and all values on the way."""
    function, inputs, strategy = FUNCTIONS[name]
    inputs = [x.to(given).requires_grad_() for x in inputs]
    with torch.autocast("cpu", dtype=dtype):
        try:
            expected = function(*inputs)
        except RuntimeError:  # not to be had on a single device either
            return
        net = sw.AutoParallel(sw.shard(function, in_strategy=strategy))
        got = net(*inputs)
    assert got.dtype == expected.dtype
    tolerance = 8 * torch.finfo(min((dtype, given, expected.dtype), key=lambda d: -torch.finfo(d).eps)).eps
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    left = torch.autograd.grad(expected.float().square().sum(), inputs)
    right = torch.autograd.grad(got.float().square().sum(), inputs)
    for x, y in zip(left, right, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(y, x, rtol=4 * tolerance, atol=4 * tolerance * max(float(x.abs().max()), 1.0))
    dtypes_are_those_of(net.latest.graph, net.program, dict(enumerate(inputs)))


def dtypes_are_those_of(graph: Graph, program, tensors) -> None:
    """Every value of the local program has the dtype that its value of the graph has."""
    values = [tensors[i.target].detach() for i in graph.inputs]
    names = list(program.places.items())
    run = SimulatedWorld(program.world_size).bind(program, keep=tuple(dict.fromkeys(local for _, local in names)))
    found = dict(zip(dict.fromkeys(local for _, local in names), run(*values), strict=True))
    for value, local in names:
        assert found[local][0].dtype == graph.metas[value].dtype, value


def test_every_value_of_a_model_has_the_dtype_of_a_single_device(four):
    model = Block()
    for lay_out in layouts():
        net = lay_out(sw.AutoParallel(model)).mixed_precision(BF16)
        batch = words(1)
        net.compile(*batch)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers()) | dict(enumerate(batch))
        assert {m.dtype for m in net.latest.graph.metas.values()} >= {BF16, torch.float32}
        dtypes_are_those_of(net.latest.graph, net.program, tensors)


def test_the_program_says_what_travels_in_which_dtype(four):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    net = sw.AutoParallel(model).hsdp(threshold=0).mixed_precision()
    net(torch.ones(8, 8))
    text = net.program.text()
    assert text.count("'float32 -> ") == 0
    assert text.count("'bfloat16 -> bfloat16 | float32'") == 2
    plain = sw.AutoParallel(model).hsdp(threshold=0)
    plain(torch.ones(8, 8))
    assert "float" not in plain.program.text()


def test_a_plan_counts_the_bytes_that_travel(four):
    model = nn.Linear(8, 8, bias=False)
    texts = []
    for prepare in (lambda net: net, lambda net: net.mixed_precision()):
        net = prepare(sw.AutoParallel(model).hsdp(threshold=0))
        net(torch.ones(8, 8))
        texts.append(str(net.plan))
    assert "all_gather" in texts[0]
    assert texts[0] != texts[1]


def test_verify_knows_the_setting(four):
    torch.manual_seed(0)
    model = Block()
    assert sw.verify(sw.AutoParallel(model).mixed_precision(), *words(1))


def test_stand_alone_computes_in_it_too(four):
    model = nn.Linear(4, 4)
    assert sw.AutoParallel(model, "stand_alone").mixed_precision(FP16)(torch.ones(2, 4)).dtype == FP16
    assert sw.AutoParallel(model, "stand_alone")(torch.ones(2, 4)).dtype == torch.float32


def test_train_steps_compute_in_it(four):
    model = nn.Linear(4, 4)
    seen = []

    def step(x):
        grad = sw.value_and_grad(lambda y: seen.append(model(y).dtype) or model(y).float().sum(), None, model.parameters())
        return grad(x)

    _, (weight, _) = sw.AutoParallel(step).mixed_precision(FP16)(torch.ones(2, 4))
    assert set(seen) == {FP16}
    assert weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda net: net.mixed_precision(torch.float64), ShardwrightError, "torch.float16, torch.bfloat16"),
        (lambda net: net.mixed_precision("bf16"), ArgumentTypeError, "'bf16'"),
        (lambda net: net.mixed_precision(BF16, reduce_dtype=torch.int64), ShardwrightError, "reduce_dtype"),
        (lambda net: net.mixed_precision(reduce_dtype=BF16).disable_gradient_fp32_sync(), ShardwrightError, "drop one"),
        (lambda net: net.disable_gradient_fp32_sync().mixed_precision(reduce_dtype=BF16), ShardwrightError, "drop one"),
    ],
)
def test_wrong_settings_are_refused(call, kind, says):
    net = sw.AutoParallel(nn.Linear(2, 2))
    before = net.settings.precision
    with pytest.raises(kind, match=says):
        call(net)
    assert net.settings.precision.dtype is before.dtype or "drop one" in says


@pytest.mark.parametrize("level", [None, "level1", "level3"])
@pytest.mark.parametrize("reduce_dtype", [None, torch.bfloat16, torch.float32])
def test_prices_know_the_dtypes_that_travel(level, reduce_dtype):
    sw.init(devices=4)
    net = sw.AutoParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)), "data_parallel")
    net.mixed_precision(torch.bfloat16, reduce_dtype=reduce_dtype)
    if level is not None:
        net.hsdp(optimizer_level=level, threshold=0)
    with sw.record_communication() as log:
        net(torch.randn(8, 64)).sum().backward()
    price = net.plan.price
    assert price.bytes == log.bytes()
    assert price.seconds == pytest.approx(sum(price.parts.values()))


if __name__ == "__main__":
    main(PROGRAMS)
