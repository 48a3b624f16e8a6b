"""Memory: what one rank needs over a training step, operator by operator, reckoned without running.

The local program of one rank, the first, which has the largest pieces, is made as the partitioner makes it and played
through on shapes: the forward makes tensors and frees what nobody reads any more and autograd does not keep; the backward
goes the other way, makes gradients, and frees what was kept; the optimizer comes last. What a local call makes, keeps and
needs meanwhile is found by running it, once for all calls like it, on fake tensors.

Memory is counted by storages, so that views, slices and moves of nothing cost nothing, and keep their base alive.
"""

from __future__ import annotations

import io
import math
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardwright.capture.graph import Graph, Node
from shardwright.capture.torch_private import FakeTensorMode, TorchDispatchMode
from shardwright.cost.memory import Choose, StepMemory, local_bytes, local_shape, step_memory
from shardwright.cost.saved import frozen
from shardwright.layout import Layout
from shardwright.partition.partitioner import _Local, _Partitioner
from shardwright.partition.program import Call, Instruction, Move, Start, Together
from shardwright.partition.schedule import Schedule, schedule
from shardwright.plan.choice import Choice
from shardwright.plan.plan import Plan
from shardwright.redistribute.planner import Options
from shardwright.redistribute.step import Step
from shardwright.rules.lowering import PerRank, Ref
from shardwright.rules.operator import OpOverload, Slot
from shardwright.rules.signature import Signature
from shardwright.world import calibration

PARTS = ("parameters", "optimizer", "gradients", "activations", "transient")

# Bytes of state a byte of parameter, and of temporaries a byte of the largest parameter, while it is updated.
_OPTIMIZERS = {"adamw": (2.0, 2.0), "adam": (2.0, 2.0), "sgd": (0.0, 0.0)}


@dataclass(frozen=True)
class Point:
    """Bytes in use at most while one operator runs. ``phase``: ``forward``, ``backward`` or ``optimizer``."""

    phase: str
    node: str
    total: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class MemoryTimeline:
    """Bytes that a rank uses over a step, from the second on.

    Args:
        points: in the order things run.
        largest: what is kept for the backward, the largest first: ``(value, module, bytes)``.
        by_parameter: bytes of each parameter's piece, the largest first: ``(name, bytes)``.
        guessed: operators that could not be played through, and are taken to keep all they might.
    """

    points: tuple[Point, ...]
    largest: tuple[tuple[str, str, float], ...] = ()
    by_parameter: tuple[tuple[str, float], ...] = ()
    guessed: tuple[str, ...] = ()

    @property
    def highest(self) -> Point:
        """The point at which most is in use."""
        return max(self.points, key=lambda p: p.total)

    @property
    def peak(self) -> float:
        """Bytes at the highest point."""
        return self.highest.total

    @property
    def at(self) -> tuple[str, str]:
        """Phase and operator of the highest point."""
        return self.highest.phase, self.highest.node

    @property
    def parts(self) -> Mapping[str, float]:
        """What is in use at the highest point."""
        return self.highest.parts

    def __str__(self) -> str:
        from shardwright.plan.table import bytes_text

        out = io.StringIO()
        phase, node = self.at
        shares = ", ".join(f"{name} {bytes_text(int(size))}" for name, size in self.parts.items() if size)
        out.write(f"{bytes_text(int(self.peak))} a rank, in the {phase} at {node}: {shares}")
        for value, module, size in self.largest[:5]:
            out.write(f"\n  kept: {value} of {module or 'the model'}, {bytes_text(int(size))}")
        return out.getvalue()


def memory_of(
    graph: Graph,
    choices: Mapping[str, Choice],
    signatures: Mapping[str, Signature],
    input_layouts: Mapping[str, Layout],
    optimizer: str | float | None = 2.0,
    device: str = "cpu",
    options: Options | None = None,
) -> MemoryTimeline:
    """The memory of the rank with the largest pieces over a step: forward, backward, optimizer, gradients set to None.

    Args:
        optimizer: ``"adamw"``, ``"sgd"``, or bytes of optimizer state a byte of parameter; ``None``: no training, only
            the forward.
        device: the kind of device, which decides what kernels keep and, the CPU having gloo, what collectives need.
        options: what redistributions may use, as the partitioner is given them.
    """
    mesh = next((c.mesh for c in choices.values()), None) or next(iter(input_layouts.values())).mesh
    plan = Plan(graph, mesh, dict(choices), dict(signatures), dict(input_layouts))
    instructions = _OneRank(graph, plan, options or Options()).instructions_of()
    states, temporary = _OPTIMIZERS[optimizer] if isinstance(optimizer, str) else (optimizer, 2.0)
    play = _Play(graph, input_layouts, instructions, states, temporary, device, hub=True)
    timeline = play.run()
    if play.choose is not None and any(isinstance(i, Start) for i in instructions[0]):
        # what the others send to the first rank stays until they wait for the result
        other = _Play(graph, input_layouts, instructions, states, temporary, device, hub=False).run()
        timeline = max(timeline, other, key=lambda t: t.peak)
    return timeline


# -- the local program of one rank ---------------------------------------------------------------------------------------


class _OneRank(_Partitioner):
    """The partitioner's decisions for the first rank, without the proof that looks at every rank."""

    def instructions_of(self) -> tuple[Sequence[Instruction], list[str]]:
        """The scheduled instructions, and the values that are returned."""
        for i in self.graph.inputs:
            self._input(i)
        for node in self.graph.nodes:
            self._node(node)
        self.node = None
        returned = [self._whole(o, "output") for o in self.graph.outputs if isinstance(o, str)]
        returned += [self._whole(value, name) for name, value in self.graph.updates]
        return schedule(self.instructions, Schedule()), returned

    def _node(self, node: Node) -> None:
        self.node = node
        choice, signature = self.plan.choices[node.name], self.plan.signatures[node.name]
        refs = tuple(
            Ref(self.value_in(value, layout, gradient, node.name))
            for value, layout, gradient in zip(node.inputs, choice.inputs, choice.partial_gradient)
        )
        local = _LocalOfOne(self, node, choice, signature, refs)
        results = signature.lowering(local) if signature.lowering else local.same_call()
        results = (results,) if isinstance(results, Ref) else tuple(results)
        for position, (value, ref) in enumerate(zip(node.outputs, results)):
            computed, settled, meta = choice.computed[position], choice.outputs[position], node.op.outputs[position]
            self.layouts[ref.name] = (settled if signature.late else computed).normal(meta.shape)
            self.place[value] = ref.name
            if not signature.late and computed != settled:
                self.place[value] = self.emit_move(ref.name, meta.shape, computed, settled, (), meta.dtype, node.name)


class _LocalOfOne(_Local):
    """What a lowering writes to: sizes are those of the first rank."""

    def _emit(self, function: Callable[..., Any], args: Any, kwargs: Any, count: int, sequence: bool) -> tuple[Ref, ...]:
        parent, hint = self.parent, self.node.outputs[0] if self.node.outputs else self.node.name
        names = []
        for _ in range(count):
            name = hint if hint not in parent.lanes and count == 1 else parent.new_name(hint)
            names.append(name)
            parent.lanes[name] = ()
        node = self.node
        parent.instructions.append(
            Call(function, args, kwargs, tuple(names), sequence, node.name, (), node.autocast, node.grad)
        )
        return tuple(map(Ref, names))

    def local_size(self, tensor_is_output: bool, index: int, dim: int) -> int:
        meta = (self.op.outputs if tensor_is_output else self.op.inputs)[index]
        layout = (self.output_layouts if tensor_is_output else self.input_layouts)[index]
        return local_shape(layout, meta.shape)[dim]

    def offset(self, tensor_is_output: bool, index: int, dim: int) -> PerRank:
        return PerRank(lambda rank: 0)


# -- what one call needs -------------------------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    """A local tensor as a call sees it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    needs: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Where(NamedTuple):
    """Whose memory a tensor lies in: the ``index``-th ``input``, ``gradient`` (of an output), or ``new`` memory."""

    kind: str
    index: int


@dataclass(frozen=True)
class _Forward:
    """What a call makes and keeps: bytes of new memory, and of that at most meanwhile."""

    outputs: tuple[tuple[_Tensor, _Where], ...]
    sizes: tuple[float, ...]
    kept: frozenset[_Where]
    extra: float
    peak: float
    guessed: bool = False


@dataclass(frozen=True)
class _Backward:
    """What the backward of a call makes.

    ``owned``: bytes at most meanwhile, with the gradients it is given and what only this call kept; ``shared``: without
    the gradients, where somebody else holds them.
    """

    gradients: tuple[tuple[tuple[int, ...], _Where] | None, ...]
    sizes: tuple[float, ...]
    owned: float
    shared: float


# What kernels of the CPU need meanwhile, or keep in a result that is smaller than its memory, which shapes do not tell:
# by operator, bytes from arguments and results. Found by profiling single calls; see tests/plan/test_memory.py.
def _like_all(args: Sequence[Any], results: Sequence[Tensor]) -> float:
    return float(sum(t.nbytes for t in (*args[:3], *results[:1]) if isinstance(t, Tensor)))


def _convolved(args: Sequence[Any], results: Sequence[Tensor]) -> float:
    return _like_all(args[:2], results) if args[6] else float(results[0].nbytes)


def _normed_back(args: Sequence[Any], results: Sequence[Tensor]) -> float:
    """A second tensor like the input, where gradient and input lie in memory alike."""
    return float(args[1].nbytes) if args[0].stride() == args[1].stride() else 0.0


_WORKSPACE: dict[str, Callable[[Sequence[Any], Sequence[Tensor]], float]] = {
    "aten.convolution.default": _convolved,
    "aten.convolution_backward.default": lambda args, results: _like_all(args, ()),
    "aten.native_batch_norm_backward.default": _normed_back,
    "aten.logsumexp.default": lambda args, results: float(args[0].nbytes),
}
_WHOLE_RESULT = frozenset({"aten.mse_loss.default", "aten.smooth_l1_loss.default", "aten.huber_loss.default"})
# Fake tensors take these out of place in backward formulas, real ones in place.
_IN_PLACE = frozenset({"aten.index_add.default", "aten.scatter_add.default"})


class _Watch(TorchDispatchMode):
    """Adds up the memory of tensors that are made, and takes off that of those that are gone."""

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.backward = False
        self.sizes: dict[int, float] = {}
        self.live = self.given = self.peak = self.peak_with = 0.0
        self.giving = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(t, Tensor)]
        if self.backward and str(function) in _IN_PLACE and self.sizes.get(args[0].untyped_storage()._cdata):
            self.leave_out(args[0].untyped_storage()._cdata)
        whole = self.on_cpu and str(function) in _WHOLE_RESULT and not tensors[0].shape
        for tensor in tensors:
            self.see(tensor, args[0].nbytes if whole else None)
        need = _WORKSPACE.get(str(function)) if self.on_cpu else None
        if need is not None:
            more = need(args, tensors)
            self.peak, self.peak_with = max(self.peak, self.live + more), max(self.peak_with, self.live + self.given + more)
        return result

    def see(self, tensor: Tensor, size: float | None = None) -> None:
        """Counts a tensor's memory, or so many bytes, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        size = float(storage.nbytes()) if size is None else size
        self.sizes[key] = size
        if self.giving:
            self.given += size
        else:
            self.live += size
        self.peak, self.peak_with = max(self.peak, self.live), max(self.peak_with, self.live + self.given)
        weakref.finalize(storage, self._gone, key, self.giving)

    def _gone(self, key: int, given: bool) -> None:
        size = self.sizes.pop(key)
        if given:
            self.given -= size
        else:
            self.live -= size

    def leave_out(self, key: int) -> float:
        """Counts this memory no more; returns what it had."""
        size, self.sizes[key] = self.sizes[key], 0.0
        self.live -= size
        return size


class _Seed(torch.autograd.Function):
    """Hands a gradient to the backward as the engine would: nobody else has it."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], output: Tensor) -> Tensor:
        ctx.make = make
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, Tensor]:
        return None, ctx.make()


class _Fused(torch.autograd.Function):
    """Stands for a kernel that CPUs do not have: it keeps its tensors, its result where asked, and a number a row."""

    @staticmethod
    def forward(ctx: Any, keeps_result: bool, *tensors: Tensor | None) -> Tensor:
        first = tensors[0]
        assert first is not None
        last = tensors[2] if keeps_result and tensors[2] is not None else first
        result = first.new_empty((*first.shape[:-1], last.shape[-1]))
        rows = first.new_empty(first.shape[:-1], dtype=torch.float32)
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors, rows, *([result] if keeps_result else []))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors[: ctx.count]
        return None, *(t.new_empty(t.shape) if t is not None and t.requires_grad else None for t in tensors)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *given: Any, **named: Any) -> Any:
    return _Fused.apply(True, query, key, value, named.get("attn_mask", mask))  # type: ignore[no-untyped-call]


def _fused_norm(x: Tensor, shape: Any, weight: Tensor | None = None, *given: Any, **named: Any) -> Any:
    return _Fused.apply(False, x, named.get("weight", weight))  # type: ignore[no-untyped-call]


# Local calls run on fake CPU tensors; these are what other devices do in one kernel.
_FUSED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: _fused_attention,
    torch.ops.aten.rms_norm.default: _fused_norm,
}


@dataclass(frozen=True)
class _LocalCall:
    """A call with its tensors described: what :class:`_Forward` and :class:`_Backward` depend on."""

    call: Call
    tensors: tuple[_Tensor, ...]
    arguments: tuple[Any, Any]  # Slots of `tensors` in them
    device: str

    def forward(self) -> _Forward:
        watch = _Watch(self.device == "cpu")
        try:
            with ExitStack() as stack:
                inputs, results, kept = self._run(stack, watch)
                known = {t.untyped_storage()._cdata: _Where("input", i) for i, t in reversed(list(enumerate(inputs)))}
                sizes, outputs = [], []
                for tensor in results:
                    key = tensor.untyped_storage()._cdata
                    if key not in known:
                        known[key] = _Where("new", len(sizes))
                        sizes.append(watch.leave_out(key))
                    described = _Tensor(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)
                    outputs.append((described, known[key]))
                found = frozenset(known[key] for key in kept if key in known)
                del tensor
                return _Forward(tuple(outputs), tuple(sizes), found, watch.live, watch.peak)
        except Exception:  # whatever an operator may raise on fake tensors
            return self._guess()

    def backward(self, strides: tuple[tuple[int, ...] | None, ...]) -> _Backward:
        """The backward for gradients with these strides; ``None`` for outputs that get none."""
        watch = _Watch(self.device == "cpu")
        with ExitStack() as stack:
            inputs, results, _ = self._run(stack, watch)
            known = {t.untyped_storage()._cdata: _Where("input", i) for i, t in reversed(list(enumerate(inputs)))}
            for tensor in results:
                if tensor.untyped_storage()._cdata not in known:
                    watch.leave_out(tensor.untyped_storage()._cdata)
            wanted = [i for i, t in enumerate(inputs) if t.requires_grad]
            seeds = []
            for at, (tensor, stride) in enumerate(zip(results, strides)):
                if stride is not None:
                    seeds.append(_Seed.apply(self._giver(watch, known, at, tensor, stride), tensor))
            for seed in seeds:
                watch.leave_out(seed.untyped_storage()._cdata)
            leaves = [inputs[i] for i in wanted]
            del results, tensor
            watch.peak, watch.peak_with, watch.backward = watch.live, watch.live, True
            got = torch.autograd.grad(seeds, leaves, [torch.ones_like(s) for s in seeds], allow_unused=True)
            return _gradients(len(inputs), wanted, got, known, watch)

    def _giver(self, watch: _Watch, known: dict[int, _Where], at: int, like: Tensor, stride: Any) -> Callable[[], Tensor]:
        shape, dtype = tuple(like.shape), like.dtype

        def make() -> Tensor:
            watch.giving = True
            made = torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
            watch.giving = False
            known[made.untyped_storage()._cdata] = _Where("gradient", at)
            return made

        return make

    def _run(self, stack: ExitStack, watch: _Watch) -> tuple[list[Tensor], list[Tensor], set[int]]:
        call, kept = self.call, set()

        def keep(tensor: Tensor) -> Tensor:
            kept.add(tensor.untyped_storage()._cdata)
            return tensor

        stack.enter_context(_fake())
        inputs = [
            torch.empty_strided(t.shape, t.stride, dtype=t.dtype, device="cpu").requires_grad_(t.needs) for t in self.tensors
        ]
        for tensor in inputs:
            watch.see(tensor, 0.0)
        stack.enter_context(watch)
        with ExitStack() as inner:
            inner.enter_context(torch.set_grad_enabled(call.grad))
            inner.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t))
            if call.autocast is not None:
                _, dtype, enabled, _ = call.autocast
                inner.enter_context(torch.autocast("cpu", dtype, enabled, False))
            args, kwargs = _filled(self.arguments, inputs, "cpu")
            function = call.function if self.device == "cpu" else _FUSED.get(call.function, call.function)
            result = function(*args, **kwargs)
        del args, kwargs
        return inputs, list(result) if call.sequence else [result], kept

    def guess_back(self, strides: tuple[Any, ...], made: _Forward) -> _Backward:
        """A gradient as large as each tensor that needs one."""
        found: list[Any] = [None] * len(self.tensors)
        sizes: list[float] = []
        for i, tensor in enumerate(self.tensors):
            if tensor.needs:
                found[i] = _contiguous(tensor.shape), _Where("new", len(sizes))
                sizes.append(float(tensor.bytes))
        given = sum(t.bytes for (t, _), stride in zip(made.outputs, strides) if stride is not None)
        return _Backward(tuple(found), tuple(sizes), sum(sizes) + given + made.extra, sum(sizes) + made.extra)

    def _guess(self) -> _Forward:
        like = max(self.tensors, key=lambda t: t.bytes, default=_Tensor((), (), torch.float32, False))
        needs = call_needs = self.call.grad and any(t.needs for t in self.tensors)
        outputs = tuple((like._replace(needs=needs), _Where("new", i)) for i in range(len(self.call.outputs)))
        size = float(like.bytes)
        kept = {_Where("input", i) for i, t in enumerate(self.tensors) if t.dtype.is_floating_point}
        kept |= {_Where("new", i) for i in range(len(outputs))}
        return _Forward(outputs, (size,) * len(outputs), frozenset(kept if call_needs else ()), 0.0, size * len(outputs), True)


def _gradients(
    count: int, wanted: Sequence[int], got: Iterable[Tensor | None], known: dict[int, _Where], watch: _Watch
) -> _Backward:
    sizes: list[float] = []
    found: list[tuple[tuple[int, ...], _Where] | None] = [None] * count
    for i, gradient in zip(wanted, got):
        if gradient is not None:
            key = gradient.untyped_storage()._cdata
            if key not in known:
                known[key] = _Where("new", len(sizes))
                sizes.append(watch.sizes.get(key, float(gradient.nbytes)))
            found[i] = gradient.stride(), known[key]
    return _Backward(tuple(found), tuple(sizes), watch.peak_with, watch.peak)


_modes: list[Any] = []


def _fake() -> Any:
    if not _modes:
        _modes.append(FakeTensorMode(allow_non_fake_inputs=True))
    return _modes[0]


def _filled(value: Any, tensors: Sequence[Tensor], device: str) -> Any:
    """The arguments with tensors in their places."""
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, torch.device):
        return torch.device(device)
    if isinstance(value, (list, tuple)):
        filled = [_filled(v, tensors, device) for v in value]
        return tuple(filled) if isinstance(value, tuple) else filled
    if isinstance(value, dict):
        return {k: _filled(v, tensors, device) for k, v in value.items()}
    return value


_forwards: dict[Hashable, tuple[_LocalCall, _Forward]] = {}
_backwards: dict[Hashable, _Backward] = {}
_MOST = 20_000


# -- playing the step ----------------------------------------------------------------------------------------------------


class _Storage:
    """Memory that several tensors may share; gone when nobody holds it."""

    __slots__ = ("label", "part", "size", "users")

    def __init__(self, size: float, part: str, label: str):
        self.size, self.part, self.label, self.users = size, part, label, 0


class _Value(NamedTuple):
    storage: _Storage
    tensor: _Tensor


@dataclass
class _UnderWay:
    """What a move under way holds besides its result: memory, and bytes of a buffer that is kept for the next."""

    storages: list[_Storage]
    scratch: float


class _Gradient(NamedTuple):
    storage: _Storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Memory:
    """What is in use, by part, and the points so far."""

    def __init__(self) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.total = 0.0
        self.points: list[Point] = []
        self.phase = "forward"
        self.scratch = 0.0  # the buffer that collectives keep for the next time

    def make(self, size: float, part: str, label: str) -> _Storage:
        return _Storage(size, part, label)

    def hold(self, storage: _Storage) -> _Storage:
        if storage.users == 0:
            self.parts[storage.part] += storage.size
            self.total += storage.size
        storage.users += 1
        return storage

    def drop(self, storage: _Storage) -> None:
        storage.users -= 1
        if storage.users == 0:
            self.parts[storage.part] -= storage.size
            self.total -= storage.size

    def becomes(self, storage: _Storage, part: str) -> None:
        if storage.users:
            self.parts[storage.part] -= storage.size
            self.parts[part] += storage.size
        storage.part = part

    def point(self, node: str, more: float, part: str = "transient") -> None:
        parts = dict(self.parts)
        parts[part] += more
        self.points.append(Point(self.phase, node, self.total + more, parts))

    def take(self, size: float) -> float:
        """Takes a buffer out of what is kept; returns its size, which is counted as transient until it is given."""
        if 0.0 < self.scratch < size:
            self._count(-self.scratch)
            self.scratch = 0.0
        if self.scratch:
            size, self.scratch = self.scratch, 0.0
        else:
            self._count(size)
        return size

    def give(self, size: float) -> None:
        if size > self.scratch and _LEAST_KEPT <= size <= _MOST_KEPT:
            size, self.scratch = self.scratch, size
        self._count(-size)

    def _count(self, size: float) -> None:
        self.parts["transient"] += size
        self.total += size


_LEAST_KEPT, _MOST_KEPT = 1 << 18, 1 << 26  # as collectives keep buffers


class _Play:
    """One step of one rank, played through."""

    def __init__(
        self, graph: Graph, layouts: Mapping[str, Layout], instructions: tuple[Sequence[Instruction], list[str]],
        states: float | None, temporary: float, device: str, hub: bool,
    ):  # fmt: skip
        self.graph, self.layouts, self.states, self.temporary = graph, layouts, states, temporary
        self.instructions, self.returned = instructions
        self.device, self.hub = device, hub
        self.choose: Choose | None = calibration.load().choose if device == "cpu" else None
        self.memory = _Memory()
        self.values: dict[str, _Value] = {}  # what the program still has
        self.described: dict[str, _Value] = {}  # what it ever had
        self.gradients: dict[str, _Gradient] = {}
        self.tape: list[Callable[[], None]] = []
        self.kept: dict[_Storage, None] = {}
        self.guessed: dict[str, None] = {}
        self.parameters: dict[str, float] = {}
        self.travelling: dict[str, tuple[_Storage, _UnderWay]] = {}
        self.ending = _UnderWay([], 0.0)
        self.refs = [_refs_of(i) for i in self.instructions]
        self.makers = {o: i for i in self.instructions for o in i.outputs}
        self.reads: Counter[str] = Counter(name for refs in self.refs for name in refs)

    def run(self) -> MemoryTimeline:
        self._store()
        for instruction, dying in zip(self.instructions, self._dying()):
            self._forward(instruction, dying)
            for name in dying:
                self._forget(name)
        largest = self._largest()
        if self.states is not None:
            self.memory.phase = "backward"
            self._backward()
            self.memory.phase = "optimizer"
            self.memory.point("step", self._updating())
        names = {i.value: str(i.target) for i in self.graph.inputs}
        pieces = sorted(((names[v], size) for v, size in self.parameters.items()), key=lambda item: (-item[1], item[0]))
        return MemoryTimeline(tuple(self.memory.points), largest, tuple(pieces), tuple(self.guessed))

    def _updating(self) -> float:
        """Bytes that the optimizer needs meanwhile: for a parameter, and half of that still of the one before."""
        sizes = [0.0, *self.parameters.values()]
        return max((self.temporary * (now + before / 2) for before, now in pairwise(sizes)), default=0.0)

    # -- forward ----------------------------------------------------------------------------------------------------

    def _store(self) -> None:
        for i in self.graph.inputs:
            layout, meta = self.layouts[i.value].normal(i.meta.shape), i.meta
            shape = local_shape(layout, meta.shape)
            stride = meta.stride if layout.is_replicated and len(meta.stride) == len(shape) else _contiguous(shape)
            part = "parameters" if i.kind in ("parameter", "buffer") else "activations"
            storage = self.memory.make(float(math.prod(shape) * meta.dtype.itemsize), part, i.value)
            needs = i.requires_grad and self.states is not None
            self.memory.hold(storage)  # for whoever handed it in
            self._name(i.value, storage, _Tensor(shape, stride, meta.dtype, needs))
            if i.kind == "parameter" and i.requires_grad:
                self.parameters[i.value] = storage.size
        optimizer = self.memory.make((self.states or 0.0) * sum(self.parameters.values()), "optimizer", "")
        self.memory.hold(optimizer)
        if self.choose is not None:
            kept = [size for size in map(self._scratch_of, self.instructions) if _LEAST_KEPT <= size <= _MOST_KEPT]
            self.memory.give(self.memory.take(max(kept, default=0.0)))  # since the step before

    def _scratch_of(self, instruction: Instruction) -> float:
        """Bytes of the largest buffer that a move takes, forward or backward."""
        if not isinstance(instruction, Move):
            return 0.0
        plan = instruction.redistribution
        steps = [*plan.forward, *(plan.backward if instruction.needs_grad and self.states is not None else ())]
        return max((self._step(s, instruction).scratch for s in steps), default=0.0)

    def _step(self, step: Step, move: Move, contiguous: bool = True, inplace: bool = False) -> StepMemory:
        shape, size = move.redistribution.shape, move.dtype.itemsize
        return step_memory(step, shape, size, self.choose, contiguous, inplace, self.hub)

    def _dying(self) -> list[tuple[str, ...]]:
        """For every instruction, the values that nothing reads after it."""
        seen, result = set(self.returned), []
        for instruction, refs in zip(reversed(self.instructions), reversed(self.refs)):
            dying = tuple(dict.fromkeys(name for name in (*refs, *instruction.outputs) if name not in seen))
            seen.update(dying)
            result.append(dying)
        return result[::-1]

    def _name(self, name: str, storage: _Storage, tensor: _Tensor) -> None:
        self.values[name] = _Value(self.memory.hold(storage), tensor)
        self.described[name] = self.values[name]

    def _forget(self, name: str) -> None:
        value = self.values.pop(name, None)
        if value is not None:
            self.memory.drop(value.storage)

    def _keep(self, storages: Iterable[_Storage]) -> list[_Storage]:
        """Holds what autograd keeps; returns it, to be let go of."""
        found = list(dict.fromkeys(storages))
        for storage in found:
            self.memory.hold(storage)
            self.kept.setdefault(storage)
        return found

    def _forward(self, instruction: Instruction, dying: Sequence[str]) -> None:
        if isinstance(instruction, Call):
            self._call(instruction)
        elif isinstance(instruction, Start):
            self._start(instruction.move)
        elif isinstance(instruction, Together):
            self._together(instruction)
        elif instruction.started:
            self._end(instruction)
        else:
            self._move(instruction, instruction.source in dying)

    def _call(self, call: Call) -> None:
        refs: list[str] = []
        key = (call.function, _described(call.args, refs, self.values), _described(call.kwargs, refs, self.values),
               call.autocast, call.grad, call.sequence, self.device)  # fmt: skip
        found = _forwards.get(key)
        if found is None:
            if len(_forwards) > _MOST:
                _forwards.clear()
                _backwards.clear()
            tensors = tuple(self.values[name].tensor for name in refs)
            positions = iter(range(len(refs)))
            local = _LocalCall(call, tensors, _slotted((list(call.args), dict(call.kwargs)), positions), self.device)
            found = _forwards[key] = local, local.forward()
        local, made = found
        memory = self.memory
        memory.point(call.cause, made.peak, "activations")
        inputs = [self.values[name].storage for name in refs]
        new = [memory.make(size, "activations", call.cause) for size in made.sizes]
        for name, (tensor, where) in zip(call.outputs, made.outputs):
            self._name(name, inputs[where.index] if where.kind == "input" else new[where.index], tensor)
        if made.guessed:
            self.guessed.setdefault(call.cause)
        if not any(tensor.needs for tensor, _ in made.outputs):
            return
        kept = self._keep(inputs[w.index] if w.kind == "input" else new[w.index] for w in made.kept)
        kept += self._keep([memory.make(made.extra, "activations", call.cause)] if made.extra else [])
        self.tape.append(partial(self._call_back, key, local, call, refs, kept, made))

    def _move(self, move: Move, source_dies: bool) -> None:
        source, maker = self.values[move.source], self.makers.get(move.source)
        inplace = self.reads[move.source] == 1 and move.source not in self.returned and _result_is_free(maker)
        plan = move.redistribution
        contiguous = source.tensor.stride == _contiguous(source.tensor.shape)
        size, peak, _ = self._steps(move, plan.forward, contiguous, inplace, maker is not None and source_dies)
        self.memory.point(move.cause, peak)
        self._moved(move, source, self.memory.make(size, "activations", move.source) if size else None)
        if self.values[move.output].tensor.needs:
            self.tape.append(partial(self._move_back, move))

    def _moved(self, move: Move, source: _Value, made: _Storage | None) -> None:
        """Names the result of a move: in this memory, or in that of its source."""
        shape = local_shape(move.redistribution.target, move.redistribution.shape)
        stride = source.tensor.stride if made is None else _contiguous(shape)
        needs = source.tensor.needs and move.needs_grad and move.grad
        self._name(move.output, made or source.storage, _Tensor(shape, stride, source.tensor.dtype, needs))

    def _steps(
        self, move: Move, steps: Sequence[Step], contiguous: bool, inplace: bool, compact: bool
    ) -> tuple[float, float, list[StepMemory]]:
        """Bytes of new memory of the result, bytes at most meanwhile, and what each step needs."""
        made, peak, is_view, needs = 0.0, 0.0, False, []
        own = inplace
        for step in steps:
            need = self._step(step, move, contiguous, own)
            needs.append(need)
            buffer = max(0.0, need.scratch - self.memory.scratch) if need.scratch else 0.0
            peak = max(peak, made + need.result + need.workspace + buffer)
            made = need.result or made
            is_view = step.kind == "slice"
            contiguous = not is_view or (contiguous and not any(step.dims))
            own = own or not is_view
        if is_view and (compact or own):
            piece = local_bytes(steps[-1].target, move.redistribution.shape, move.dtype.itemsize)
            made, peak = piece, max(peak, made + piece)
        return made, peak, needs

    def _start(self, move: Move) -> None:
        source = self.values[move.source]
        plan = move.redistribution
        size, peak, needs = self._steps(move, plan.forward, True, False, move.source in self.makers)
        self.memory.point(move.cause, peak)
        self.travelling[move.output] = self._under_way(needs, size, source.storage, move.source)
        if source.tensor.needs and move.needs_grad and move.grad:
            self.tape.append(partial(self._start_back, move))

    def _under_way(self, needs: Sequence[StepMemory], size: float, given: _Storage, label: str) -> tuple[_Storage, _UnderWay]:
        """What a started move holds until somebody waits for it: its result comes first.

        A thread ends moves that others depend on; it is taken to be done with one when the next starts.
        """
        memory = self.memory
        self._done_with(self.ending)
        part = "activations" if memory.phase == "forward" else "transient"
        result = memory.hold(memory.make(size, part, label))
        if any(need.result for need in needs):
            needed = [memory.hold(given), memory.hold(memory.make(sum(n.workspace for n in needs), "transient", label))]
            more = _UnderWay(needed, memory.take(max(n.scratch for n in needs)))
            if not any(need.holds for need in needs):
                self.ending = more
            return result, more
        return result, _UnderWay([], 0.0)

    def _done_with(self, under_way: _UnderWay) -> None:
        for storage in under_way.storages:
            self.memory.drop(storage)
        under_way.storages.clear()
        self.memory.give(under_way.scratch)
        under_way.scratch = 0.0

    def _waited(self, output: str) -> _Storage:
        """Ends what was under way; returns the memory of its result, which the caller holds already."""
        result, more = self.travelling.pop(output)
        self._done_with(more)
        return result

    def _end(self, move: Move) -> None:
        result = self._waited(move.output)
        self._moved(move, self.values[move.source], result if result.size else None)
        self.memory.drop(result)
        if self.values[move.output].tensor.needs:
            self.tape.append(partial(self._end_back, move))

    def _together(self, together: Together) -> None:
        moves = together.moves
        sizes, peak = self._shared(moves, [m.redistribution.forward for m in moves])
        self.memory.point(together.cause, peak)
        for move, size in zip(moves, sizes):
            self._moved(move, self.values[move.source], self.memory.make(size, "activations", move.source) if size else None)
        if any(self.values[name].tensor.needs for name in together.outputs):
            self.tape.append(partial(self._together_back, together))

    def _shared(self, moves: Sequence[Move], steps: Sequence[Sequence[Step]]) -> tuple[list[float], float]:
        """New memory of each result of moves that share a collective, and bytes at most meanwhile."""
        if not steps or not steps[0]:
            return [0.0] * len(moves), 0.0
        sizes, given = [], 0.0
        for move, (step,) in zip(moves, steps):
            shape, itemsize = move.redistribution.shape, move.dtype.itemsize
            given += local_bytes(step.source, shape, itemsize)
            sizes.append(local_bytes(step.target, shape, itemsize))
        made = sum(sizes)
        gathers = steps[0][0].kind == "all_gather"
        return sizes, max(given + made, 2 * made + (made if gathers else 0.0))

    def _largest(self) -> tuple[tuple[str, str, float], ...]:
        modules = {node.name: (node.outputs[0], node.module) for node in self.graph.nodes if node.outputs}
        modules |= {value: (value, node.module) for node in self.graph.nodes for value in node.outputs}
        given = {i.value for i in self.graph.inputs if i.kind == "input"}
        found = []
        for storage in self.kept:
            if storage.users and storage.part == "activations" and storage.label not in given:
                value, module = modules.get(storage.label, (storage.label, ""))
                found.append((value, module, storage.size))
        return tuple(sorted(found, key=lambda item: (-item[2], item[0]))[:20])

    # -- backward ---------------------------------------------------------------------------------------------------

    def _backward(self) -> None:
        for name in self._losses():
            tensor = self.values[name].tensor
            self._give(name, self.memory.make(float(tensor.bytes), "transient", name), tensor.shape, tensor.stride)
        for step in reversed(self.tape):
            step()
        self.tape.clear()
        self._hand_over()

    def _losses(self) -> list[str]:
        """What the backward starts from: scalars that are returned, or all that is."""
        found = [n for n in dict.fromkeys(self.returned) if self.values[n].tensor.needs]
        return [n for n in found if not self.values[n].tensor.shape] or found

    def _give(self, name: str, storage: _Storage, shape: tuple[int, ...], stride: tuple[int, ...], cause: str = "") -> None:
        """Hands a value its gradient, or adds to the one it has: in place where nobody else has that."""
        memory = self.memory
        memory.hold(storage)
        before = self.gradients.get(name)
        if before is not None:
            if before.storage.users == 1 and before.stride == _contiguous(shape):
                memory.drop(storage)
                return
            total = memory.make(float(math.prod(shape)) * self._itemsize(name), "transient", name)
            memory.point(cause, total.size)
            memory.hold(total)
            memory.drop(storage)
            memory.drop(before.storage)
            storage = total
            stride = _contiguous(shape)
        self.gradients[name] = _Gradient(storage, shape, stride)
        if name in self.parameters:
            memory.becomes(storage, "gradients")

    def _itemsize(self, name: str) -> int:
        return self.described[name].tensor.dtype.itemsize

    def _call_back(
        self, key: Hashable, local: _LocalCall, call: Call, refs: Sequence[str], kept: Sequence[_Storage], made: _Forward
    ) -> None:
        given = [self.gradients.pop(name, None) for name in call.outputs]
        memory = self.memory
        if any(given):
            strides = tuple(g.stride if g is not None else None for g in given)
            back = self._back(key, local, strides, made)
            storages = {id(g.storage): g.storage for g in given if g is not None}
            own = sum(s.size for s in storages.values())
            alone = all(s.users == 1 for s in storages.values())
            more = back.owned - own if alone else back.shared
            memory.point(call.cause, more - made.extra)
            inputs = self._inputs_of(refs)
            new = [memory.make(size, "transient", call.cause) for size in back.sizes]
            found = []
            for name, gradient in zip(refs, back.gradients):
                if gradient is not None:
                    stride, where = gradient
                    storage = new[where.index] if where.kind == "new" else None
                    if where.kind == "gradient":
                        storage = given[where.index].storage  # type: ignore[union-attr]
                    found.append((name, storage or inputs[where.index], stride))
            for _, storage, _ in found:
                memory.hold(storage)
            self._let_go(kept, given)
            for name, storage, stride in found:
                self._give(name, storage, self.described[name].tensor.shape, stride, call.cause)
                memory.drop(storage)
        else:
            self._let_go(kept, given)

    def _inputs_of(self, refs: Sequence[str]) -> list[_Storage]:
        return [self.described[name].storage for name in refs]

    def _let_go(self, kept: Iterable[_Storage], given: Iterable[_Gradient | None]) -> None:
        for gradient in given:
            if gradient is not None:
                self.memory.drop(gradient.storage)
        for storage in kept:
            self.memory.drop(storage)

    def _back(self, key: Hashable, local: _LocalCall, strides: tuple[Any, ...], made: _Forward) -> _Backward:
        full = (key, strides)
        if full not in _backwards:
            try:
                if made.guessed:
                    raise ValueError
                _backwards[full] = local.backward(strides)
            except Exception:  # whatever the backward of an operator may raise on fake tensors
                self.guessed.setdefault(local.call.cause)
                _backwards[full] = local.guess_back(strides, made)
        return _backwards[full]

    def _move_back(self, move: Move) -> None:
        gradient = self.gradients.pop(move.output, None)
        if gradient is None:
            return
        contiguous = gradient.stride == _contiguous(gradient.shape)
        size, peak, _ = self._steps(move, move.redistribution.backward, contiguous, False, True)
        self.memory.point(move.cause, peak)
        self._moved_back(move, gradient, self.memory.hold(self.memory.make(size, "transient", move.source)) if size else None)

    def _moved_back(self, move: Move, gradient: _Gradient, made: _Storage | None) -> None:
        """Hands the source of a move its gradient, in this memory or in that of the result's gradient."""
        shape = local_shape(move.redistribution.source, move.redistribution.shape)
        stride = gradient.stride if made is None else _contiguous(shape)
        if made is None:
            made = gradient.storage
        else:
            self.memory.drop(gradient.storage)
        self._give(move.source, made, shape, stride, move.cause)
        self.memory.drop(made)

    def _end_back(self, move: Move) -> None:
        """Where a started move was waited for its gradient starts to travel."""
        gradient = self.gradients.pop(move.output, None)
        if gradient is None:
            return
        contiguous = gradient.stride == _contiguous(gradient.shape)
        size, peak, needs = self._steps(move, move.redistribution.backward, contiguous, False, True)
        self.memory.point(move.cause, peak)
        if not size:
            self.gradients[f"{move.output} under way"] = gradient
            return
        result, _ = self.travelling[move.output] = self._under_way(needs, size, gradient.storage, move.source)
        self.memory.drop(gradient.storage)
        self.gradients[f"{move.output} under way"] = gradient._replace(storage=result)

    def _start_back(self, move: Move) -> None:
        gradient = self.gradients.pop(f"{move.output} under way", None)
        if gradient is None:
            return
        if move.output in self.travelling:
            result = self._waited(move.output)
            shape = local_shape(move.redistribution.source, move.redistribution.shape)
            self._give(move.source, result, shape, _contiguous(shape), move.cause)
            self.memory.drop(result)
        else:
            self._moved_back(move, gradient, None)

    def _together_back(self, together: Together) -> None:
        known = [move for move in together.moves if move.output in self.gradients]
        sizes, peak = self._shared(known, [m.redistribution.backward for m in known])
        self.memory.point(together.cause, peak)
        given = [self.gradients.pop(move.output) for move in known]
        for move, gradient, size in zip(known, given, sizes):
            made = self.memory.hold(self.memory.make(size, "transient", move.source)) if size else None
            self._moved_back(move, gradient, made)

    def _hand_over(self) -> None:
        """Gradients become the parameters' own: contiguous, and nobody else's."""
        for name in self.parameters:
            gradient = self.gradients.pop(name, None)
            if gradient is None:
                continue
            storage = gradient.storage
            if storage.users > 1 or gradient.stride != _contiguous(gradient.shape):
                copy = self.memory.make(self.parameters[name], "gradients", name)
                self.memory.point(name, copy.size)
                self.memory.hold(copy)
                self.memory.drop(storage)
            else:
                self.memory.becomes(storage, "gradients")
        for gradient in self.gradients.values():
            self.memory.drop(gradient.storage)
        self.memory.point("gradients", 0.0)


# -- helpers -------------------------------------------------------------------------------------------------------------


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor that lies in memory in the order of its dims."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _refs_of(instruction: Instruction) -> tuple[str, ...]:
    """What an instruction reads."""
    if isinstance(instruction, Call):
        found: list[str] = []
        _collect((instruction.args, instruction.kwargs), found)
        return tuple(found)
    if isinstance(instruction, Together):
        return tuple(move.source for move in instruction.moves)
    return ((instruction.move if isinstance(instruction, Start) else instruction).source,)


def _collect(value: Any, found: list[str]) -> None:
    if isinstance(value, Ref):
        found.append(value.name)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)


def _described(value: Any, refs: list[str], values: Mapping[str, _Value]) -> Hashable:
    """Arguments as a key; tensors by what they look like. Their names are added to ``refs``."""
    if isinstance(value, Ref):
        refs.append(value.name)
        return values[value.name].tensor
    if isinstance(value, (list, tuple)):
        return (type(value), *[_described(v, refs, values) for v in value])
    if isinstance(value, dict):
        return tuple([(k, _described(v, refs, values)) for k, v in value.items()])
    return frozen(value.of(0) if isinstance(value, PerRank) else value)


def _slotted(value: Any, positions: Iterator[int]) -> Any:
    """Arguments with a slot for each tensor, in the order in which :func:`_described` meets them."""
    if isinstance(value, Ref):
        return Slot(next(positions))
    if isinstance(value, (list, tuple)):
        found = [_slotted(v, positions) for v in value]
        return tuple(found) if isinstance(value, tuple) else found
    if isinstance(value, dict):
        return {k: _slotted(v, positions) for k, v in value.items()}
    return value.of(0) if isinstance(value, PerRank) else value


# Operators whose result a reduction overwrites; as in the distributed world.
_RESULT_IS_FREE = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm"})


def _result_is_free(maker: Instruction | None) -> bool:
    function = maker.function if isinstance(maker, Call) else None
    return (
        isinstance(function, OpOverload)
        and function.namespace == "aten"
        and function.overloadpacket.__name__ in _RESULT_IS_FREE
    )
