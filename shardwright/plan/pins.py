"""Pins: an operator's layouts as a plan file says them, turned into the very choice that has them.

A strategy says how an operator's inputs are cut and leaves sums to their operator. A pin says all of a choice: inputs that
are read with sums still pending, outputs that are handed on with them, or with them scattered, orders of axes, pieces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from shardwright.capture.graph import Graph, Node
from shardwright.capture.marks import Mark
from shardwright.errors import LayoutError, Problems
from shardwright.layout import Layout, chunk_pieces
from shardwright.mesh import Mesh
from shardwright.plan.choice import Choice, make_choice
from shardwright.rules.operator import Operator, TensorMeta
from shardwright.rules.signature import Signature, Split


@dataclass(frozen=True)
class Pin:
    """How an operator is to run.

    Args:
        inputs: the layout in which it reads each input, pending sums included.
        outputs: the layout in which it hands each output on; ``None``: as these inputs make it, its sums done.
        source: ``file:line`` that says so.
        what: how to name the entry in a message.
    """

    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...] | None
    source: str
    what: str


def pinned_graph(graph: Graph, pins: Mapping[str, Pin], full_batch: bool) -> Graph:
    """The graph whose pinned nodes bear a mark, so that planners and readers know that somebody asked for it.

    Nodes of which every rank can make any piece bear none: a mark would have them planned as if they could not.
    """
    if not pins:
        return graph
    from shardwright.plan.formulation import ready_values  # here: the modes that do not search need none of it

    ready, nodes = ready_values(graph, full_batch), []
    for node in graph.nodes:
        pin = pins.get(node.name)
        if pin is not None and not all(v in ready for v in node.outputs):
            count, old = len(pin.inputs), node.mark or Mark("")
            mark = replace(old, in_strategy=pin.inputs, out_strategy=pin.outputs, source=pin.source, is_pin=False)
            node = replace(node, mark=mark, mark_positions=tuple(range(count)), mark_count=count)
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def check_pin(node: Node, pin: Pin, world_size: int, problems: Problems) -> bool:
    """Whether a pin has a layout for each tensor of its operator, of its dims and over the ranks of the world."""
    outputs = node.op.outputs if pin.outputs is not None else ()
    fine = _check_count("inputs", len(pin.inputs), len(node.op.inputs), pin.what, problems)
    fine &= _check_count("outputs", len(pin.outputs or ()), len(outputs), pin.what, problems)
    if not fine:
        return False
    tensors = [*zip(pin.inputs, node.op.inputs), *zip(pin.outputs or (), outputs)]
    names = [f"input {i}" for i in range(len(pin.inputs))] + [f"output {i}" for i in range(len(outputs))]
    return all([check_fits(la, meta, world_size, f"{pin.what} {name}", problems) for name, (la, meta) in zip(names, tensors)])


def _check_count(kind: str, given: int, wanted: int, what: str, problems: Problems) -> bool:
    if given != wanted:
        problems.add(f"{what}: {given} layouts for {wanted} {kind}; give one for each")
    return given == wanted


def check_fits(layout: Layout, meta: TensorMeta, world_size: int, what: str, problems: Problems) -> bool:
    """Whether a layout has a tensor's dims, pieces that add up, and all ranks of the world."""
    if layout.dims is None or layout.ndim != len(meta.shape):
        count = 0 if layout.dims is None else layout.ndim
        problems.add(f"{what}: the layout has {count} entries for a tensor {list(meta.shape)}; give {len(meta.shape)}")
        return False
    if layout.mesh.size != world_size or sorted(layout.mesh.ranks) != list(range(world_size)):
        problems.add(f"{what}: the mesh {layout.mesh} does not have the ranks 0..{world_size - 1}; give it all of them")
        return False
    try:
        for dim, size in enumerate(meta.shape):
            layout.pieces(dim, size)
    except LayoutError as error:
        problems.add(f"{what}: {error}")
        return False
    return True


def choice_of_layouts(
    op: Operator,
    signature: Signature,
    inputs: Sequence[Layout],
    outputs: Sequence[Layout] | None,
    needs_grad: Sequence[bool],
    what: str,
    problems: Problems,
) -> Choice | None:
    """The choice of an operator that reads and hands on these layouts.

    Args:
        outputs: ``None``: as computed, with its sums done.
        what: how to name the operator in a message.

    Returns:
        The choice; ``None`` where there is none, and then ``problems`` says why.
    """
    found = _Splits(op, signature, what, problems)
    mesh = found.mesh_of([*inputs, *(outputs or ())])
    if mesh is None or not found.read(inputs, outputs or ()):
        return None
    pending = found.pending(inputs)
    if pending is None:
        return None
    choice = make_choice(op, signature, mesh, found.split, needs_grad, pending)
    settled = [layout.without_partial() for layout in choice.computed]
    if outputs is not None:
        settled = [layout.normal(meta.shape) for layout, meta in zip(outputs, op.outputs)]
        if not found.can_give(choice.computed, settled):
            return None
    choice = make_choice(op, signature, mesh, found.split, needs_grad, pending, settled)
    return choice if found.is_told(choice, inputs, settled) else None


@dataclass
class _Splits:
    """Reads an operator's splits off its layouts, and says what does not go together."""

    op: Operator
    signature: Signature
    what: str
    problems: Problems
    split: dict[str, Split] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)  # factor -> the dim that said how it is split, or that it is not

    def refuse(self, why: str) -> bool:
        self.problems.add(f"{self.what}: {why}")
        return False

    def mesh_of(self, layouts: Sequence[Layout]) -> Mesh | None:
        meshes = dict.fromkeys(layout.mesh for layout in layouts)
        if len(meshes) == 1:
            return next(iter(meshes))
        self.refuse(f"its layouts are over {len(meshes)} meshes ({' and '.join(map(str, meshes))}); use one for all of them")
        return None

    def read(self, inputs: Sequence[Layout], outputs: Sequence[Layout]) -> bool:
        """Notes how each factor is split. What inputs say comes first; outputs may have sums scattered over their dims."""
        rule, fine = self.signature, True
        metas = self.op.inputs
        for i, layout in enumerate(inputs):
            if i not in rule.late:  # those follow from the output
                fine &= all([self._dim(layout, metas[i], rule.inputs[i], d, f"input {i}") for d in range(layout.ndim)])
        read = set(self.seen)
        for i, layout in enumerate(outputs):
            for d, factors in enumerate(rule.outputs[i]):
                if rule.major(factors) not in read:
                    fine &= self._dim(layout, self.op.outputs[i], rule.outputs[i], d, f"output {i}")
        return fine

    def _dim(self, layout: Layout, meta: TensorMeta, factors: Sequence[tuple[str, ...]], dim: int, tensor: str) -> bool:
        axes, factor = layout.bound[dim], self.signature.major(factors[dim])
        here = f"dim {dim} of {tensor} ({layout.short()})"
        if not axes:
            if factor in self.split:
                told = self.seen[factor]
                return self.refuse(f"{told} is split and {here} is not, but they are the same dim; write both alike")
            if factor is not None:
                self.seen.setdefault(factor, here)
            return True
        if factor is None or not self.signature.splittable(factor):
            why = "has size 1 and is broadcast" if factor is None else "must stay whole for this operator"
            return self.refuse(f"{here} is split, but it {why}; write None there")
        own = self._own(layout, meta.shape[dim], factors[dim], factor, dim)
        if own is None:
            rest = meta.shape[dim] // self.signature.sizes[factor]
            why = f"is cut within runs of {rest} that must stay together; make each piece a multiple of {rest}"
            return self.refuse(f"{here} {why}")
        if self.split.get(factor, own) != own or (factor in self.seen and factor not in self.split):
            return self.refuse(f"{self.seen[factor]} and {here} are the same dim but are split differently; write both alike")
        taken = self.signature.taken(factor, axes, self.split)
        if taken is not None:
            return self.refuse(f"{self.seen[taken]} and {here} use one axis for different dims; an axis can split one of them")
        self.split[factor] = own
        self.seen.setdefault(factor, here)
        return True

    def _own(self, layout: Layout, size: int, factors: Sequence[str], factor: str, dim: int) -> Split | None:
        """How a dim's largest factor is split where the dim is; ``None`` where pieces end within one of its indices."""
        axes, mesh = layout.bound[dim], layout.mesh
        rest = math.prod(self.signature.sizes[f] for f in factors if f != factor)
        pieces = layout.pieces(dim, size)
        if rest and any(p % rest for p in pieces):
            return None
        own = tuple(p // max(1, rest) for p in pieces)
        usual = chunk_pieces(self.signature.sizes[factor], tuple(mesh.axis_size(a) for a in axes))
        return axes, None if own == usual else own

    def pending(self, inputs: Sequence[Layout]) -> dict[int, Layout] | None:
        """The inputs that are read with sums pending; ``None`` where the operator cannot pass them on."""
        held = {i: layout for i, layout in enumerate(inputs) if layout.partial}
        if not held:
            return {}
        groups = self.signature.linear
        if frozenset(held) not in groups:
            which = ", ".join(map(str, held))
            can = " or ".join(",".join(map(str, sorted(g))) for g in groups)
            fix = f"only inputs {can} can, together" if groups else "finish the sums before it"
            self.refuse(f"input {which} has a sum pending, which this operator cannot pass on; {fix}")
            return None
        sums = {layout.partial for layout in held.values()}
        if len(sums) > 1 or any(op != "sum" for _, op in next(iter(sums))):
            self.refuse("its inputs have different reductions pending; give all of them the same sums")
            return None
        used = {a for axes, _ in self.split.values() for a in axes}
        both = used & set(next(iter(held.values())).partial_axes)
        if both:
            self.refuse(f"{', '.join(sorted(both))} has a sum pending and splits a dim as well; an axis does one of the two")
            return None
        return held

    def can_give(self, computed: Sequence[Layout], wanted: Sequence[Layout]) -> bool:
        """Whether an operator can hand on what it computes as told: with sums pending, done, or scattered over a dim."""
        fine = True
        for i, (made, told) in enumerate(zip(computed, wanted)):
            if not _follows(made, told):
                done = made.without_partial().short()
                options = f"{done} or {made.short()}" if made.partial else done
                scattered = ", or done with their axes at the end of a dim" if made.partial else ""
                self.refuse(f"output {i} is {told.short()}, but these inputs make {options}{scattered}; write that, or change "
                            "the inputs")  # fmt: skip
                fine = False
        return fine

    def is_told(self, choice: Choice, inputs: Sequence[Layout], outputs: Sequence[Layout]) -> bool:
        """Whether a choice is what was asked for, late inputs included."""
        fine = True
        for i, (needed, told) in enumerate(zip(choice.inputs, inputs)):
            if needed != told.normal(self.op.inputs[i].shape):
                fine = self.refuse(f"input {i} is {told.short()}, but goes with the other tensors only as {needed.short()}; "
                                   "write that")  # fmt: skip
        for i, (made, told) in enumerate(zip(choice.outputs, outputs)):
            if made != told:
                fine = self.refuse(f"output {i} is {told.short()}, but this operator finishes its sums itself; write "
                                   f"{made.short()}")  # fmt: skip
        return fine


def _follows(made: Layout, told: Layout) -> bool:
    """Whether one layout is another with some of its pending sums done or scattered."""
    if made == told:
        return True
    sums = set(made.partial_axes)
    for dim, axes in enumerate(told.bound):
        kept = tuple(a for a in axes if a not in sums)
        if kept != made.bound[dim] or (kept == axes and made.sizes[dim] != told.sizes[dim]):
            return False
    return set(told.partial) <= set(made.partial)
