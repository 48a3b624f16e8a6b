"""Memory: what one rank needs over a training step, operator by operator, reckoned without running.

The step is played through on the bytes of local pieces: the forward makes tensors and frees what nobody reads any more and
autograd does not keep; the backward goes the other way, makes gradients, and frees what was kept; the optimizer comes
last. A value moved to another layout is a new tensor; where only a slice is taken, or nothing moves, it is the same one.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shardwright.capture.graph import Graph, Node
from shardwright.cost.memory import local_bytes
from shardwright.cost.saved import NOTHING, Saved, saved_by
from shardwright.layout import Layout
from shardwright.plan.choice import Choice
from shardwright.plan.choices import is_slice
from shardwright.rules.signature import Signature

PARTS = ("parameters", "optimizer", "gradients", "activations", "transient")

# Where the gradient of a sum goes back as it is, without a copy.
_PASSES_GRADIENTS = ("aten.add", "aten.sub")

# What is alive: a value of the graph, as laid out. Slices and views share the key of what they are slices of.
Key = tuple[str, str]


@dataclass(frozen=True)
class Point:
    """Bytes in use while one operator runs. ``phase``: ``forward``, ``backward`` or ``optimizer``."""

    phase: str
    node: str
    total: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class MemoryTimeline:
    """Bytes that a rank uses over a step.

    Args:
        points: in the order things run.
        largest: what is kept for the backward, the largest first: ``(value, module, bytes)``.
    """

    points: tuple[Point, ...]
    largest: tuple[tuple[str, str, float], ...] = ()

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
    optimizer: float | None = 2.0,
    device: str = "cpu",
) -> MemoryTimeline:
    """The memory of the rank with the largest pieces.

    Args:
        optimizer: bytes of optimizer state a byte of parameter; ``None``: no training, only the forward.
        device: the kind of device; see :func:`shardwright.cost.saved.saved_by`.
    """
    return _Play(graph, choices, input_layouts, optimizer, device).run()


@dataclass
class _Play:
    """One step, played through."""

    graph: Graph
    choices: Mapping[str, Choice]
    input_layouts: Mapping[str, Layout]
    optimizer: float | None
    device: str
    sizes: dict[Key, float] = field(default_factory=dict)
    home: dict[str, tuple[Layout, Key]] = field(default_factory=dict)
    users: Counter[Key] = field(default_factory=Counter)
    kept_by: dict[int, list[Key]] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)

    def run(self) -> MemoryTimeline:
        self.parts = dict.fromkeys(PARTS, 0.0)
        self._store()
        reads = self._reads()
        for at, node in enumerate(self.graph.nodes):
            self._forward(at, node, reads)
        largest = self._largest()
        if self.optimizer is not None:
            self._backward()
            temporary = 2 * max(self.stored.values(), default=0.0)
            self._point("optimizer", "step", temporary)
        return MemoryTimeline(tuple(self.points), largest)

    def _point(self, phase: str, node: str, transient: float) -> None:
        parts = {**self.parts, "transient": self.parts["transient"] + transient}
        self.points.append(Point(phase, node, sum(parts.values()), parts))

    def _store(self) -> None:
        self.stored: dict[str, float] = {}
        for i in self.graph.inputs:
            layout = self.input_layouts[i.value]
            size = local_bytes(layout, i.meta.shape, i.meta.dtype.itemsize)
            key = (i.value, "")
            self.home[i.value] = (layout, key)
            self.users[key] += 1  # whoever handed it in
            self.sizes[key] = size
            self.parts["parameters" if i.kind in ("parameter", "buffer") else "activations"] += size
            if i.kind == "parameter" and i.value in self.graph.needs_grad:
                self.stored[i.value] = size
        self.parts["optimizer"] = (self.optimizer or 0.0) * sum(self.stored.values())

    def _reads(self) -> Counter[Key]:
        """How often each value is still to be read, by value and layout."""
        reads: Counter[Key] = Counter()
        for node in self.graph.nodes:
            for value, layout in zip(node.inputs, self.choices[node.name].inputs):
                reads[value, layout.short()] += 1
        for name in [*self.graph.outputs, *(v for _, v in self.graph.updates)]:
            if isinstance(name, str):
                reads[name, "output"] += 1
        return reads

    # -- forward ----------------------------------------------------------------------------------------------------

    def _forward(self, at: int, node: Node, reads: Counter[Key]) -> None:
        choice = self.choices[node.name]
        inputs = [self._read(value, layout) for value, layout in zip(node.inputs, choice.inputs)]
        saved = self._saved(node)
        outputs = self._make(node, choice, saved, inputs)
        kept = {inputs[i] for i in saved.inputs if i < len(inputs)} | {outputs[o] for o in saved.outputs if o < len(outputs)}
        if saved.extra:
            share = _share(node, choice)
            key = (node.name, "kept")
            self._allocate(key, saved.extra * share)
            kept.add(key)
        self.kept_by[at] = list(kept)
        for key in kept:
            self.users[key] += 1
        self._point("forward", node.name, self._settling(node, choice))
        for value, layout in zip(node.inputs, choice.inputs):
            reads[value, layout.short()] -= 1
            self._finish(value, reads)
        for value in node.outputs:
            self._finish(value, reads)

    def _settling(self, node: Node, choice: Choice) -> float:
        """Bytes of outputs before the operator's own reduction changed their layout."""
        metas = node.op.outputs
        pairs = zip(choice.computed, choice.outputs, metas)
        return sum(local_bytes(a, m.shape, m.dtype.itemsize) for a, b, m in pairs if a.bound != b.bound)

    def _saved(self, node: Node) -> Saved:
        if not node.grad or self.optimizer is None:
            return NOTHING
        return saved_by(node.op, tuple(v in self.graph.needs_grad for v in node.inputs), self.device)

    def _read(self, value: str, layout: Layout) -> Key:
        """The tensor that holds a value in a layout; a new one where it has to move."""
        source, key = self.home[value]
        if is_slice(source, layout):
            return key
        moved = (value, layout.short())
        if moved not in self.sizes:
            meta = self.graph.metas[value]
            self._allocate(moved, local_bytes(layout, meta.shape, meta.dtype.itemsize))
            self.users[moved] += 1  # until its last reader
        return moved

    def _make(self, node: Node, choice: Choice, saved: Saved, inputs: list[Key]) -> list[Key]:
        made = []
        for position, (value, meta, layout) in enumerate(zip(node.outputs, node.op.outputs, choice.outputs)):
            shared = saved.aliases.get(position)
            if shared is not None:
                key = inputs[shared]
                self.users[key] += 1
            else:
                key = (value, "")
                self._allocate(key, local_bytes(layout, meta.shape, meta.dtype.itemsize))
                self.users[key] += 1
            self.home[value] = (layout, key)
            made.append(key)
        return made

    def _allocate(self, key: Key, size: float) -> None:
        self.sizes[key] = size
        self.parts["activations"] += size

    def _release(self, key: Key) -> None:
        self.users[key] -= 1
        if self.users[key] == 0:
            self.parts["activations"] -= self.sizes.pop(key, 0.0)

    def _finish(self, value: str, reads: Counter[Key]) -> None:
        """Frees what holds a value where nobody reads it any more."""
        source, key = self.home[value]
        left = [layout for (name, layout), count in self._of(value, reads) if count > 0]
        for (name, layout), count in self._of(value, reads):
            if count == 0 and (name, layout) in self.sizes and layout:
                reads[name, layout] = -1
                self._release((name, layout))
        if not left and value not in self._gone:
            self._gone.add(value)
            if value not in self.input_layouts:
                self._release(key)

    @property
    def _gone(self) -> set[str]:
        if not hasattr(self, "_gone_values"):
            self._gone_values: set[str] = set()
        return self._gone_values

    def _of(self, value: str, reads: Counter[Key]) -> Sequence[tuple[Key, int]]:
        if not hasattr(self, "_keys"):
            self._keys: dict[str, list[Key]] = {}
            for key in reads:
                self._keys.setdefault(key[0], []).append(key)
        return [(key, reads[key]) for key in self._keys.get(value, ())]

    def _largest(self) -> tuple[tuple[str, str, float], ...]:
        modules = {value: node.module for node in self.graph.nodes for value in node.outputs}
        names = {i.value for i in self.graph.inputs if i.kind != "input"}
        kept = {key for keys in self.kept_by.values() for key in keys if key in self.sizes and (key[1] or key[0] not in names)}
        found = [(key[0], modules.get(key[0], ""), self.sizes[key]) for key in kept]
        return tuple(sorted(found, key=lambda item: (-item[2], item[0]))[:20])

    # -- backward ---------------------------------------------------------------------------------------------------

    def _backward(self) -> None:
        gradients: dict[str, float] = {}  # of values, as their producers hold them
        passed: dict[str, str] = {}  # gradients that are another's memory
        for at in range(len(self.graph.nodes) - 1, -1, -1):
            node = self.graph.nodes[at]
            if not node.grad or not any(v in self.graph.needs_grad for v in node.outputs):
                for key in self.kept_by[at]:
                    self._release(key)
                continue
            self._node_backward(at, node, gradients, passed)

    def _node_backward(self, at: int, node: Node, gradients: dict[str, float], passed: dict[str, str]) -> None:
        choice = self.choices[node.name]
        saved = self._saved(node)
        shares = bool(saved.aliases) or node.op.name in _PASSES_GRADIENTS
        transient = 0.0
        for value, meta, layout in zip(node.outputs, node.op.outputs, choice.computed):
            if value in self.graph.needs_grad and value not in gradients:
                gradients[value] = local_bytes(layout.without_partial(), meta.shape, meta.dtype.itemsize)
                self.parts["transient"] += gradients[value]  # the seed, or zeros for an output nobody read
        for value, layout, partial in zip(node.inputs, choice.inputs, choice.partial_gradient):
            if value not in self.graph.needs_grad:
                continue
            transient += self._give(value, layout, bool(partial), shares, gradients)
        self._point("backward", node.name, transient)
        for value in node.outputs:
            self.parts["transient"] -= gradients.pop(value, 0.0)
        for key in self.kept_by[at]:
            self._release(key)

    def _give(self, value: str, layout: Layout, partial: bool, shares: bool, gradients: dict[str, float]) -> float:
        """Adds the gradient that one reader sends back; returns bytes that are needed only meanwhile."""
        meta = self.graph.metas[value]
        own = local_bytes(layout.without_partial(), meta.shape, meta.dtype.itemsize)
        if value in self.stored:
            first = value not in gradients
            gradients.setdefault(value, self.stored[value])
            if first:
                self.parts["gradients"] += self.stored[value]
                return own if own != self.stored[value] else 0.0
            return own
        home, _ = self.home[value]
        size = local_bytes(home.without_partial(), meta.shape, meta.dtype.itemsize)
        if value in gradients:
            return own
        gradients[value] = 0.0 if shares and own == size else size
        self.parts["transient"] += gradients[value]
        return own if own != size else 0.0


def _share(node: Node, choice: Choice) -> float:
    """The share of an operator's work that a rank does, by its largest tensor."""
    op = node.op
    pairs = [*zip(choice.inputs, op.inputs), *zip(choice.computed, op.outputs)]
    layout, meta = max(pairs, key=lambda pair: pair[1].numel)
    return local_bytes(layout, meta.shape, 1) / max(1, meta.numel)
