"""Every algorithm of every collective, in real gloo processes: bit for bit what the simulated world computes."""

from __future__ import annotations

import gc
import itertools
import os
import time
import warnings
from datetime import timedelta
from functools import partial

import jobs
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shardwright.base.process_groups import backend_of
from shardwright.cost.algorithms import ALGORITHMS, Calibration
from shardwright.errors import WorldError
from shardwright.redistribute.links import Links
from shardwright.world.distributed import messages as point_to_point
from shardwright.world.distributed.links import Link
from shardwright.world.execute.summation import prepare_reduce, reduce

DTYPES = (torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32)
DTYPES += (torch.float64, torch.complex64, torch.float8_e4m3fn)
PIECES = (3, 0, 1000, 5)  # sizes of the first members' pieces


# -- jobs --------------------------------------------------------------------------------------------------------------


def work(rank, size, port, scenarios):
    """What each process of a job does."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    link = Link(range(size), dist.group.WORLD, "gloo")
    for scenario in scenarios:
        scenario(link)
    link.close()
    dist.barrier()
    dist.destroy_process_group()


def run_job(size, *scenarios):
    """Runs the scenarios, one after the other, on every rank of one job; raises what a rank raises."""
    jobs.context()
    mp.start_processes(work, (size, jobs.free_port(), scenarios), nprocs=size, start_method="forkserver")


# -- values and comparisons --------------------------------------------------------------------------------------------


def tensors(link, count, dtype=torch.float32, seed=0):
    """A tensor for each member, the same on every rank; of floats whose sum depends on the order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(link.size, count, generator=generator) * torch.randint(1, 999, (link.size, 1), generator=generator)
    if dtype.is_complex:
        return list(torch.complex(values, values.flip(1)).to(dtype))
    if dtype.is_floating_point:
        return list((values / 100).to(dtype))
    return list(values.long().to(dtype))


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def bits(x):
    return x.contiguous().view(-1).view(torch.uint8)


def orders(size):
    return [tuple(range(size)), tuple(reversed(range(size))), (1, 0, *range(2, size)), (*range(1, size), 0)]


def ways(kind, prepare, dtype):
    """The operation by each algorithm that there is for it."""
    found = []
    for name in ALGORITHMS[kind]:
        operation = prepare(algorithm=name)
        if operation.is_possible(dtype):
            assert operation.algorithm(dtype) == name
            found.append((name, operation))
    return found


def check(name, operation, x, expected):
    """At once, and started twice and waited for in the wrong order; arguments stay."""
    before = x.clone()
    got = operation(x)
    assert same_bits(got, expected), f"{name}: got {got}, expected {expected}"
    first, second = operation.start(x), operation.start(x.clone())
    assert same_bits(second.wait(), expected), name
    assert same_bits(first.wait(), expected), name
    assert first.wait() is first.wait()
    assert same_bits(x, before), f"{name} changed its argument"


# -- scenarios: each runs on every rank --------------------------------------------------------------------------------


def all_reduces(link):
    cases = [(dtype, "sum", count) for dtype in DTYPES for count in (1, 3000)]
    cases += [(dtype, op, 7) for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.float32) for op in ("max", "min")]
    for dtype, op, count in cases:
        values = tensors(link, count, dtype)
        for order in orders(link.size) if dtype == torch.float32 else orders(link.size)[1:2]:
            expected = reduce([values[m] for m in order], op)
            for name, operation in ways("all_reduce", partial(link.prepare_all_reduce, count, op, order), dtype):
                check(f"{name} {op} of {dtype}, order {order}", operation, values[link.position], expected)


def all_reduces_in_place(link):
    for count, order in itertools.product((5, 2500), orders(link.size)):
        values = tensors(link, count)
        expected = reduce([values[m] for m in order], "sum")
        for name, operation in ways("all_reduce", partial(link.prepare_all_reduce, count, "sum", order, True), torch.float32):
            x = values[link.position].clone()
            result = operation(x)
            assert same_bits(result, expected), (name, order)
            assert result is x or name == "copies"
            started = [operation.start(values[link.position].clone()) for _ in range(3)]
            assert all(same_bits(handle.wait(), expected) for handle in reversed(started)), (name, order)


def long_chains(link):
    """More chunks than a member is sent ahead."""
    point_to_point._CHUNK = 4096
    try:
        for count, order, inplace in itertools.product((12345, 99999), orders(link.size), (False, True)):
            values = tensors(link, count)
            operation = link.prepare_all_reduce(count, "sum", order, inplace, "chain")
            expected = reduce([values[m] for m in order], "sum")
            assert same_bits(operation(values[link.position].clone()), expected)
            assert same_bits(operation.start(values[link.position].clone()).wait(), expected)
    finally:
        point_to_point._CHUNK = 2 << 20


def large_pieces(link):
    """More parts of a piece than are asked for at once, and not all pieces of as many parts."""
    point_to_point._PART = point_to_point._LEAST_PART = 4096
    try:
        for count, order in itertools.product((4100 * link.size, 12345), orders(link.size)[:4]):
            values = tensors(link, count)
            expected = reduce([values[m] for m in order], "sum")
            for inplace in (False, True):
                operation = link.prepare_all_reduce(count, "sum", order, inplace, "pieces")
                assert same_bits(operation(values[link.position].clone()), expected)
                started = [operation.start(values[link.position].clone()) for _ in range(3)]
                assert all(same_bits(handle.wait(), expected) for handle in reversed(started))
            sizes = [1, *[0] * (link.size - 2), count - 1]
            operation = link.prepare_reduce_scatter(sizes, "sum", order, "direct")
            started = [operation.start(values[link.position]) for _ in range(3)]
            mine = expected.split(sizes)[link.position]
            assert all(same_bits(handle.wait(), mine) for handle in reversed(started))
            assert same_bits(operation(values[link.position]), mine)
    finally:
        point_to_point._PART, point_to_point._LEAST_PART = 6 << 20, 1 << 20


def not_numbers(link):
    """NaN wins every comparison, and gives a sum; of two zeros the first is kept as torch keeps it."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.0])
    values = [special.roll(m) for m in range(link.size)]
    for op in ("sum", "max", "min"):
        expected = reduce(values, op)
        for _, operation in ways("all_reduce", partial(link.prepare_all_reduce, 6, op), torch.float32):
            torch.testing.assert_close(operation(values[link.position]), expected, rtol=0, atol=0, equal_nan=True)


def reduce_scatters(link):
    for sizes, dtype in itertools.product((PIECES[: link.size], (40,) * link.size), DTYPES):
        values = tensors(link, sum(sizes), dtype)
        for order in orders(link.size)[: 4 if dtype == torch.float32 else 1]:
            expected = reduce([values[m] for m in order], "sum").split(sizes)[link.position]
            for name, operation in ways("reduce_scatter", partial(link.prepare_reduce_scatter, sizes, "sum", order), dtype):
                check(f"{name} of {dtype}, {sizes}, order {order}", operation, values[link.position], expected)


def all_gathers(link):
    for sizes, dtype in itertools.product((PIECES[: link.size], (40,) * link.size), DTYPES):
        whole = tensors(link, sum(sizes), dtype)[0]
        for name, operation in ways("all_gather", partial(link.prepare_all_gather, sizes), dtype):
            check(f"{name} of {dtype}, {sizes}", operation, whole.split(sizes)[link.position].clone(), whole)


def exchanges(link):
    members = range(link.size)
    even = {(a, b): 20 for a in members for b in members}
    uneven = {(a, b): (a * 7 + b * 3) % 5 for a in members for b in members}
    ring = {(m, (m + 1) % link.size): 300 for m in members}
    one = {(0, 1): 11, (1, 1): 4}
    for counts, dtype in itertools.product((even, uneven, ring, one), DTYPES):
        rows = [[counts.get((a, b), 0) for b in members] for a in members]
        values = [v[: sum(row)] for v, row in zip(tensors(link, 2000, dtype), rows)]
        expected = torch.cat([v.split(row)[link.position] for v, row in zip(values, rows)])
        for name, operation in ways("exchange", partial(link.prepare_exchange, counts), dtype):
            check(f"{name} of {dtype}, {counts}", operation, values[link.position], expected)


def nothing_at_all(link):
    zeros, x = [0] * link.size, torch.ones(0)
    for operation in (
        link.prepare_all_reduce(0),
        link.prepare_reduce_scatter(zeros),
        link.prepare_all_gather(zeros),
        link.prepare_exchange({}),
    ):
        assert operation(x).numel() == operation.start(x).wait().numel() == 0
    kept = link.prepare_exchange({(m, m): 3 for m in range(link.size)})
    assert kept(torch.arange(3)).tolist() == [0, 1, 2]


def many_at_once(link):
    """All operations under way together, beside others that run at once, and waited for in any order."""
    n, me = link.size, link.position
    values = [tensors(link, 60 * n, seed=seed) for seed in range(12)]
    started = []
    for number, each in enumerate(values):
        name = ("hub", "pieces", "chain", "copies")[number % 4]
        total = reduce(each, "sum")
        started.append((link.prepare_all_reduce(60 * n, algorithm=name).start(each[me].view(n, 60)), total.view(n, 60)))
        started.append((link.prepare_reduce_scatter([60] * n, algorithm="hub").start(each[me]), total.split(60)[me]))
        started.append((link.prepare_all_gather([60 * n] * n, algorithm="hub").start(each[me]), torch.cat(each)))
        at_once = link.prepare_all_reduce(60 * n, algorithm=name)(each[me])
        assert same_bits(at_once, total)
        each[me] = None
        gc.collect()
        torch.full((60 * n,), -1.0)  # over what nobody holds any more
    for at in torch.randperm(len(started), generator=torch.Generator().manual_seed(me)).tolist():
        handle, expected = started[at]
        assert same_bits(handle.wait(), expected)


def odd_tensors(link):
    """Strides, conjugates, negatives; tensors made in inference mode."""
    n, me = link.size, link.position
    for name in ("hub", "pieces", "copies", "chain"):
        strided = [v.view(10, 30).t()[::2] for v in tensors(link, 300)]
        check(name, link.prepare_all_reduce(150, algorithm=name), strided[me], reduce(strided, "sum"))
        conjugate = [v.conj() for v in tensors(link, 30, torch.complex64)]
        expected = reduce(conjugate, "sum").resolve_conj()
        assert torch.equal(link.prepare_all_reduce(30, algorithm=name)(conjugate[me]), expected)
        negative = [v.imag for v in conjugate]
        assert torch.equal(link.prepare_all_reduce(30, algorithm=name)(negative[me]), reduce(negative, "sum"))
        with torch.inference_mode():
            values = tensors(link, 100_000)
            operation = link.prepare_all_reduce(100_000, algorithm=name)
            handles = [operation.start(values[me]) for _ in range(3)]
            assert all(torch.equal(h.wait(), reduce(values, "sum")) for h in handles)
        assert torch.equal(operation(values[me]), reduce(values, "sum"))
        values = tensors(link, 100_000)
        assert torch.equal(link.prepare_all_reduce(100_000, "sum", None, True, name)(values[me].clone()), reduce(values, "sum"))
    for name in ("direct", "hub"):
        pieces = [v[::2] for v in tensors(link, 20)]
        assert torch.equal(link.prepare_all_gather([10] * n, name)(pieces[me]), torch.cat(pieces))


def subgroups(link):
    """Several groups at a time, whose ranks are not their members' numbers."""
    ranks = (*range(1, link.size),)
    group = dist.new_group(list(ranks))
    whole = link.prepare_all_reduce(3000, algorithm="pieces")
    values = tensors(link, 3000)
    handles = [whole.start(values[link.position])]
    if link.position:
        part = Link(ranks, group, backend_of(group, "cpu"))
        assert (part.engine, part.position, part.size) == ("gloo", link.position - 1, link.size - 1)
        mine = part.prepare_all_reduce(3000, "sum", tuple(reversed(range(part.size))), algorithm="pieces")
        inner = [mine.start(values[link.position]) for _ in range(2)]
        handles.append(whole.start(values[link.position]))
        expected = reduce(values[:0:-1], "sum")
        for handle in inner[::-1]:
            assert same_bits(handle.wait(), expected)
        part.close()
        part.close()
        with pytest.raises(WorldError, match="closed"):
            mine(values[link.position])
    else:
        handles.append(whole.start(values[0]))
    for handle in handles:
        assert same_bits(handle.wait(), reduce(values, "sum"))
    dist.barrier()
    if link.position:
        dist.destroy_process_group(group)


def other_backends(link):
    """The collectives that a backend other than gloo is asked for, on gloo, which has them too."""
    other = Link(link.ranks, link.group, engine="other")
    n, me = link.size, link.position
    for dtype, count in itertools.product(DTYPES, (1, 40)):
        values = [torch.ones(n * count).to(dtype)] * n  # exact in whatever order
        total = reduce(values, "sum")
        check("all_reduce", other.prepare_all_reduce(n * count), values[me], total)
        check("reduce_scatter", other.prepare_reduce_scatter([count] * n), values[me], total[:count])
        check("all_gather", other.prepare_all_gather([count] * n), values[me][:count].clone(), values[0])
        for sizes in (PIECES[:n],):
            long = torch.ones(sum(sizes)).to(dtype)
            expected = reduce([long] * n, "sum").split(sizes)[me]
            check("uneven", other.prepare_reduce_scatter(sizes), long, expected)
            check("uneven", other.prepare_all_gather(sizes), long.split(sizes)[me].clone(), long)
        check(
            "exchange", other.prepare_exchange({(0, 1): count}), values[me][: count * (me == 0)], values[0][: count * (me == 1)]
        )


def choices(link):
    """The calibration says which algorithm is used; one that cannot be used gives way to the next."""
    table = {"all_reduce": {link.size: ((4000.0, ("backend", "copies")), (float("inf"), ("chain", "pieces")))}}
    chosen = Link(link.ranks, link.group, "gloo", Calibration(table, Links(1.0, 1.0, 1.0), 1))
    assert chosen.prepare_all_reduce(1000).algorithm() == ("backend" if link.size == 2 else "copies")
    assert chosen.prepare_all_reduce(1000).algorithm(torch.int64) == "chain"
    assert chosen.prepare_all_reduce(900).algorithm(torch.int32) == "backend"
    assert chosen.prepare_all_reduce(1000, "max").algorithm() == "copies"
    assert chosen.prepare_all_reduce(1001).algorithm() == "chain"
    assert chosen.prepare_all_reduce(5000).algorithm(torch.float8_e4m3fn) == "pieces"
    assert chosen.prepare_all_reduce(100 << 20, algorithm=None).algorithm() == "chain"
    if link.size > 2:
        with pytest.raises(WorldError, match="all_reduce of 9 torch.float32 .* no algorithm 'backend': chain, copies"):
            chosen.prepare_all_reduce(9, algorithm="backend")(torch.ones(9))


def silent_peer(link):
    """Who waits for a rank that does nothing is told so, and does not wait forever."""
    for name in ("hub", "pieces"):
        dist.barrier()  # to make a group has the same time limit
        group = dist.new_group(list(link.ranks), timeout=timedelta(seconds=1.5))
        own = Link(link.ranks, group, "gloo")
        operation = own.prepare_all_reduce(100, algorithm=name)
        if link.position != 1:
            begin = time.monotonic()
            with pytest.raises(RuntimeError):
                operation.start(torch.ones(100)).wait()
            assert time.monotonic() - begin < 10
        own.close()
        dist.barrier()


SCENARIOS = (all_reduces, all_reduces_in_place, long_chains, large_pieces, not_numbers, reduce_scatters, all_gathers, exchanges)
SCENARIOS += (nothing_at_all, many_at_once, odd_tensors, other_backends, choices)


# -- tests -------------------------------------------------------------------------------------------------------------


def test_two_ranks():
    run_job(2, *SCENARIOS, silent_peer)


@pytest.mark.long
def test_three_ranks():
    run_job(3, *SCENARIOS, subgroups)


@pytest.mark.long
def test_four_ranks():
    run_job(4, *SCENARIOS, subgroups)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_sums_as_parts_arrive_are_the_sums_of_all(count, dtype):
    parts = [(torch.randn(50) * 10**i).to(dtype) for i in range(count)]
    expected = reduce(parts, "sum")
    assert expected.dtype == dtype
    for own in range(count):
        held = [p.clone() for p in parts]
        out = held[own]
        assert prepare_reduce(dtype, "sum", count, own)(iter(held), out) is out
        assert same_bits(out, expected)
    assert same_bits(prepare_reduce(dtype, "sum", count)(iter(parts), torch.empty_like(parts[0])), expected)


def test_half_precision_is_rounded_once():
    parts = [torch.tensor([v], dtype=torch.bfloat16) for v in (256.0, 1.0, 1.0)]
    assert (parts[0] + parts[1] + parts[2]).item() == 256.0
    assert reduce(parts, "sum").item() == 258.0
    assert reduce([torch.tensor([v], dtype=torch.float8_e4m3fn) for v in (16.0, 1.0, 1.0)], "sum").item() == 18.0


def test_a_reduction_leaves_its_parts_and_can_be_differentiated():
    parts = [torch.randn(4, requires_grad=True) for _ in range(3)]
    before = [p.detach().clone() for p in parts]
    for op in ("sum", "max"):
        reduce(parts, op).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(parts, before))
    assert reduce(parts[:1], "sum") is parts[0]
