"""The distributed world against the simulated one, in real gloo processes."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import jobs
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shardwright.errors import WorldError
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.step import Step
from shardwright.partition.partitioner import partition
from shardwright.redistribute.steps import steps_between
from shardwright.rules.registry import signature_of
from shardwright.testing import rules as testing
from shardwright.testing.difference import difference
from shardwright.world.distributed.groups import Groups
from shardwright.world.distributed.steps import prepare, prepare_steps
from shardwright.world.distributed.world import DistributedWorld
from shardwright.world.execute.log import record_communication
from shardwright.world.job.torchrun import read_environment
from shardwright.world.simulated.steps import run_steps
from shardwright.world.simulated.world import SimulatedWorld

ROOT = Path(__file__).resolve().parents[2]
ONE_ROUND = 1 << 16  # elements; about where the algorithms for small tensors end
DTYPES = (torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64)
DTYPES += (torch.complex64, torch.float8_e4m3fn)


# -- jobs --------------------------------------------------------------------------------------------------------------


def work(rank, size, port, scenarios):
    """What each process of a job does."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = DistributedWorld.from_environment()
    assert (world.rank, world.size, world.device, world.is_simulated) == (rank, size, torch.device("cpu"), False)
    for scenario in scenarios:
        scenario(world)
    world.close()
    assert not dist.is_initialized()
    world.close()


def run_job(size, *scenarios):
    """Runs the scenarios, one after the other, on every rank of one job; raises what a rank raises."""
    jobs.context()
    mp.start_processes(work, (size, jobs.free_port(), scenarios), nprocs=size, start_method="forkserver")


# -- layouts and what ranks hold ---------------------------------------------------------------------------------------


def layouts(mesh, ndim, pending=True):
    """Every layout: each axis replicated, splitting a dim (in every order), or partial."""
    places = [None, *range(ndim), *(["sum"] if pending else [])]
    for chosen in itertools.product(places, repeat=len(mesh.axes)):
        at = dict(zip(mesh.axes, chosen, strict=True))
        partial = [(a, "sum") for a in mesh.axes if at[a] == "sum"]
        seen = set()
        for order in itertools.permutations(mesh.axes):
            dims = tuple(tuple(a for a in order if at[a] == d) for d in range(ndim))
            if dims not in seen:
                seen.add(dims)
                yield Layout.of(mesh, dims, partial)


def held(layout, shape, dtype=torch.float64, seed=0):
    """What every rank holds: small whole numbers, so that sums are exact, in whatever order and dtype."""
    mesh, slices = layout.mesh, layout.slices(shape)
    parts = {}
    values = [None] * mesh.size
    for rank in mesh.ranks:
        coords = mesh.coordinates(rank)
        key = tuple(coords[a] for a in layout.partial_axes)
        if key not in parts:
            generator = torch.Generator().manual_seed(seed + 7 * len(parts))
            parts[key] = torch.randint(0, 3, shape, generator=generator).to(dtype)
        values[rank] = parts[key][slices[rank]].clone()
    return values


def same(a, b):
    """Equal in shape, dtype and value; float8 has no comparison of its own."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.float(), b.float()) if a.dtype.itemsize == 1 and a.is_floating_point() else torch.equal(a, b)


def check_steps(world, groups, steps, values, shape, **kwargs):
    """The steps on this rank's value equal the simulated ones; the argument is as it was."""
    expected = run_steps(values, steps, shape)[world.rank]
    groups.make(steps)
    run = prepare_steps(steps, shape, world.rank, groups, **kwargs)
    value = values[world.rank]
    before = value.clone()
    got = run(value)
    what = f"rank {world.rank}, {list(shape)} {value.dtype}: {' + '.join(map(str, steps))}, {steps[0].source}"
    assert same(got, expected), f"{what}\ngot {got}\nexpected {expected}"
    assert same(value, before), f"{what} changed its argument"
    return got


class NotGloo(Groups):
    """Groups that are not known to be gloo's: every step goes by the collective of its name, as with NCCL."""

    def __init__(self, *args):
        super().__init__(*args)
        self.by_messages = False

    def make(self, steps):
        super().make(steps)
        for link in self._links.values():
            link.engine, link.by_messages = "other", False


def check_pairs(world, mesh, shape, targets_of=None, dtype=torch.float64, most=100, kind=Groups):
    """Redistributions between layouts of a mesh, or from it to another mesh."""
    groups = kind(world.rank, world.size)
    pairs = [
        (a, b)
        for a in layouts(mesh, len(shape))
        for b in layouts(targets_of or mesh, len(shape), pending=targets_of is None)
        if set(b.partial) <= set(a.partial)
    ]
    chooser = random.Random(str((mesh.sizes, shape)))
    for source, target in chooser.sample(pairs, min(most, len(pairs))):
        steps = steps_between(source, target, shape)
        if steps:
            check_steps(world, groups, steps, held(source, shape, dtype), shape)
    groups.close(destroy=True)


# -- scenarios: each runs on every rank --------------------------------------------------------------------------------


def pairs_on_one_axis(world):
    mesh = Mesh(("a",), (world.size,))
    for shape in [(8, 12), (5, 3), (1, 7), (0, 4), (3, 2, 5)]:
        check_pairs(world, mesh, shape)


def pairs_on_two_axes(world):
    mesh = Mesh(("a", "b"), (2, 2))
    for shape in [(4, 8), (5, 3), (1, 6)]:
        check_pairs(world, mesh, shape)
    check_pairs(world, mesh, (4, 3, 4), most=40)


def shuffled(world):
    """A mesh whose ranks are in no particular order."""
    ranks = tuple(random.Random(1).sample(range(world.size), world.size))
    assert ranks != tuple(range(world.size))
    sizes = (2, 2) if world.size == 4 else (world.size,)
    return Mesh(("a", "b")[: len(sizes)], sizes, ranks)


def other_backends(world):
    """The collectives that backends other than gloo are asked for, on gloo, which has them too."""
    for shape, mesh in itertools.product([(12, 12), (5, 3), (3, 2, 4)], [Mesh(("a",), (world.size,)), shuffled(world)]):
        check_pairs(world, mesh, shape, dtype=torch.float32, most=50, kind=NotGloo)
        check_pairs(world, mesh, shape, dtype=torch.int16, most=10, kind=NotGloo)


def permuted_ranks(world):
    mesh = shuffled(world)
    sizes = mesh.sizes
    plain = Mesh(("c", "d")[: len(sizes)], sizes)
    for shape in [(4, 12), (5, 3)]:
        check_pairs(world, mesh, shape, most=80)
        check_pairs(world, mesh, shape, targets_of=plain, most=30)
        check_pairs(world, plain, shape, targets_of=Mesh(("e",), (world.size,)), most=30)


def explicit_sizes(world):
    """Pieces of every size, empty ones too."""
    n = world.size
    mesh = Mesh(("a",), (n,))
    uneven = tuple([5, 0, 1, 2][:n])
    shape = (sum(uneven), 4)
    groups = Groups(world.rank, world.size)
    cut = Layout.of(mesh, (("a",), ()), (), (uneven, None))
    other = Layout.of(mesh, (("a",), ()), (), (uneven[::-1], None))
    choices = [cut, other, Layout.of(mesh, (("a",), ())), Layout.of(mesh, ((), ("a",))), Layout.replicated(mesh, 2)]
    pending = Layout.of(mesh, ((), ()), [("a", "sum")])
    for source, target in itertools.permutations([*choices, pending], 2):
        if not target.partial:
            steps = steps_between(source, target, shape)
            check_steps(world, groups, steps, held(source, shape), shape)


def every_dtype(world):
    mesh = Mesh(("a",), (world.size,))
    whole, rows, columns = (Layout.of(mesh, d) for d in (((), ()), (("a",), ()), ((), ("a",))))
    pending = whole.with_partial(("a",))
    other = Layout.of(Mesh(("b",), (world.size,), tuple(reversed(range(world.size)))), (("b",), ()))
    pairs = [(rows, whole), (columns, whole), (rows, columns), (columns, rows), (pending, whole), (pending, rows)]
    pairs += [(pending, columns), (rows, other), (columns, other)]
    groups = Groups(world.rank, world.size)
    for dtype, shape in itertools.product(DTYPES, [(12, 12), (5, 3)]):
        for source, target in pairs:
            steps = steps_between(source, target, shape)
            values = held(source, shape, dtype)
            if dtype.itemsize == 1 and dtype.is_floating_point and source.partial:
                expected = run_steps([v.float() for v in values], steps, shape)[world.rank].to(dtype)
                groups.make(steps)
                assert same(prepare_steps(steps, shape, world.rank, groups)(values[world.rank]), expected)
            else:
                check_steps(world, groups, steps, values, shape)


def reductions_and_scalars(world):
    mesh = Mesh(("a",), (world.size,))
    groups = Groups(world.rank, world.size)
    for op, shape, dtype in itertools.product(
        ("sum", "max", "min"), [(), (3,), (4, 5), (0,)], [torch.float32, torch.int64, torch.int16, torch.bool]
    ):
        whole = Layout.replicated(mesh, len(shape))
        steps = steps_between(whole.with_partial(("a",), op), whole, shape)
        check_steps(world, groups, steps, held(steps[0].source, shape, dtype), shape)
    other = Mesh(("b",), (world.size,), tuple(reversed(range(world.size))))
    scalar = Step("exchange", (), Layout.replicated(mesh, 0), Layout.replicated(other, 0))
    got = check_steps(world, groups, (scalar,), [torch.tensor(True)] * world.size, ())
    assert got.shape == ()


def large_tensors(world):
    """The algorithms for tensors too large for one round; strided arguments."""
    n = world.size
    mesh = Mesh(("a",), (n,))
    shape = (4 * n, ONE_ROUND // 8)
    whole = Layout.replicated(mesh, 2)
    rows, columns, pending = Layout.of(mesh, (("a",), ())), Layout.of(mesh, ((), ("a",))), whole.with_partial(("a",))
    groups = Groups(world.rank, world.size)
    for source, target in [(rows, whole), (columns, whole), (pending, whole), (pending, columns), (columns, rows)]:
        steps = steps_between(source, target, shape)
        for dtype in (torch.float32, torch.int16):
            values = held(source, shape, dtype)
            check_steps(world, groups, steps, values, shape)
            check_steps(world, groups, steps, [v.t().contiguous().t() for v in values], shape)


def what_prepare_promises(world):
    mesh = Mesh(("a",), (world.size,))
    shape = (4 * world.size, ONE_ROUND)
    whole = Layout.replicated(mesh, 2)
    rows = Layout.of(mesh, (("a",), ()))
    groups = Groups(world.rank, world.size)
    reduce, split = steps_between(whole.with_partial(("a",)), whole, shape), steps_between(whole, rows, shape)
    groups.make((*reduce, *split))
    value = torch.ones(shape)
    run = prepare(reduce[0], shape, world.rank, groups, inplace=True)
    assert run(value) is value
    assert bool((value == world.size).all())
    assert prepare_steps(split, shape, world.rank, groups)(value)._base is value
    assert prepare_steps(split, shape, world.rank, groups, compact=True)(value)._base is None
    with pytest.raises(WorldError, match="takes no part"):
        prepare(reduce[0], shape, world.size, groups)
    groups.close(destroy=True)
    with pytest.raises(WorldError, match="closed"):
        run(value)


def cases(functions, mesh):
    """A captured function, with every choice of its first operator that has a rule."""
    for function, *args in functions:
        graph = testing._captured(function, args, {})
        node = next(n for n in graph.nodes if signature_of(n.op) is not None)
        signature = signature_of(node.op)
        for choice in testing._spread(list(testing._choices(graph, node, signature, mesh)), 24):
            yield function, args, graph, testing._plan(graph, node, signature, mesh, choice)


def whole_programs(world):
    """Outputs, gradients and recorded collectives equal those of the simulated world."""
    generator = torch.Generator().manual_seed(0)

    def random_tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    functions = [
        (torch.matmul, random_tensor(4, 6), random_tensor(6, 8)),
        (torch.matmul, random_tensor(5, 3), random_tensor(3, 2)),
        (lambda x, w: torch.relu(torch.matmul(x, w)).sum() + x.mean(), random_tensor(3, 4), random_tensor(4, 7)),
        (torch.nn.functional.linear, random_tensor(2, 3, 4), random_tensor(5, 4), random_tensor(5)),
    ]
    meshes = [Mesh(("x",), (world.size,))] + [Mesh(("x", "y"), (2, 2))] * (world.size == 4)
    for mesh in meshes:
        for _, args, graph, plan in cases(functions, mesh):
            program = partition(graph, plan)
            results = []
            for own in (SimulatedWorld(world.size), world):
                bound = own.bind(program)

                def run(leaves, bound=bound, inputs=program.inputs):
                    return bound(*(leaves[i.target] for i in inputs))[0]

                with record_communication() as log:
                    results.append((testing._values_and_gradients(run, list(args), 1), log.events))
            (expected, events), (got, own_events) = results
            for e, g in zip(expected, got, strict=True):
                assert difference(e, g, 1e-12) is None, f"rank {world.rank}\n{program}"
            assert [vars(e) for e in own_events] == [vars(e) for e in events], str(program)


def stored_pieces(world):
    """Inputs that are stored split: a rank gives its pieces and gets the gradients of its pieces."""
    n = world.size
    mesh = Mesh(("x",), (n,))
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=generator, dtype=torch.float64) for s in [(n + 1, 6), (6, 5)])
    for _, _, graph, plan in cases([(torch.matmul, x, w)], mesh):
        for dim in (0, 1):
            stored = {i.value: Layout.of(mesh, [("x",) if d == dim else () for d in range(2)]) for i in graph.inputs}
            program = partition(graph, type(plan)(plan.graph, mesh, plan.choices, plan.signatures, stored))
            pieces = [i.layout.slices(i.meta.shape)[world.rank] for i in program.inputs]
            local = [t[p].clone().requires_grad_() for t, p in zip((x, w), pieces, strict=True)]
            bound = world.bind(program)
            (y,), _ = bound(*local)
            full = [t.clone().requires_grad_() for t in (x, w)]
            expected = torch.matmul(*full)
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            y.square().sum().backward()
            expected.square().sum().backward()
            for t, whole, piece in zip(local, full, pieces, strict=True):
                torch.testing.assert_close(t.grad, whole.grad[piece], rtol=1e-12, atol=1e-12)
                assert t.grad.untyped_storage().nbytes() == t.grad.nbytes, "a gradient keeps a larger tensor alive"
            with torch.no_grad():
                torch.testing.assert_close(bound(*local)[0][0], expected.detach(), rtol=1e-12, atol=1e-12)


def refusals(world):
    mesh = Mesh(("x",), (world.size,))
    x, w = torch.ones(4, 6), torch.ones(6, 8)
    _, _, graph, plan = next(iter(cases([(torch.matmul, x, w)], mesh)))
    bound = world.bind(partition(graph, plan))
    with pytest.raises(WorldError, match=r"rank \d was given .*input 0 is \[2, 6\], expected \[4, 6\]"):
        bound(x[:2], w)
    bound(x, w)
    _, _, graph, plan = next(iter(cases([(torch.matmul, x, w)], Mesh(("x",), (world.size + 1,)))))
    with pytest.raises(WorldError, match=f"for {world.size + 1} ranks, this job has {world.size}"):
        world.bind(partition(graph, plan))
    again = DistributedWorld.from_environment()  # takes the job as it is, and does not end it
    again.close()
    assert dist.is_initialized()


SCENARIOS = (pairs_on_one_axis, explicit_sizes, every_dtype, reductions_and_scalars, large_tensors)
SCENARIOS += (what_prepare_promises, whole_programs, stored_pieces, refusals)


# -- tests -------------------------------------------------------------------------------------------------------------


def test_two_ranks():
    run_job(2, *SCENARIOS)


def test_three_ranks():
    run_job(3, *SCENARIOS, permuted_ranks, other_backends)


@pytest.mark.long
def test_four_ranks():
    run_job(4, *SCENARIOS, pairs_on_two_axes, permuted_ranks, other_backends)


def torchrun(directory, body, *arguments):
    """Runs a script under torchrun on two ranks."""
    script = directory / "script.py"
    script.write_text(textwrap.dedent(body))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(jobs.free_port()), str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    begin = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done, time.monotonic() - begin


SCRIPT = """
    import sys, time, torch
    from shardwright.ir.layout import Layout
    from shardwright.ir.mesh import Mesh
    from shardwright.redistribute.steps import steps_between
    from shardwright.world.distributed.world import DistributedWorld
    from shardwright.world.distributed.steps import prepare_steps

    world = DistributedWorld.from_environment()
    whole = Layout.replicated(Mesh(("x",), (2,)), 1)
    steps = steps_between(whole.with_partial(("x",)), whole, (3,))
    world._groups.make(steps)
    run = prepare_steps(steps, (3,), world.rank, world._groups)
    print(f"sum {run(torch.ones(3)).tolist()}\\n", end="", flush=True)
    if "fail" in sys.argv and world.rank == 1:
        raise ValueError("the model is broken here")
    print(f"sum {run(torch.ones(3)).tolist()}\\n", end="", flush=True)
"""


def test_a_job_under_torchrun_ends_quietly(tmp_path):
    done, _ = torchrun(tmp_path, SCRIPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum [2.0, 2.0, 2.0]") == 4
    assert done.stderr == ""


def test_a_rank_that_raises_ends_the_job_with_its_message(tmp_path):
    done, seconds = torchrun(tmp_path, SCRIPT, "fail")
    assert done.returncode != 0
    assert "ValueError: the model is broken here" in done.stderr
    assert done.stdout.count("sum") == 2
    assert seconds < 60, "the rank that raised waited for the other"


def test_no_job_to_join():
    job = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name in job:
        with pytest.raises(WorldError, match=f"lacks {name}.*torchrun"):
            read_environment({k: v for k, v in job.items() if k != name})
    with pytest.raises(WorldError, match="WORLD_SIZE is 'two': it must be a whole number"):
        read_environment({**job, "WORLD_SIZE": "two"})
    with pytest.raises(WorldError, match="RANK is 2 and WORLD_SIZE 2"):
        read_environment({**job, "RANK": "2"})
    with pytest.raises(WorldError, match="not initialised"):
        DistributedWorld()
