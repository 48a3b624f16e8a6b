"""Converter: converts an exported program to a ``Graph``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from shardwright.base import operators
from shardwright.base.opaque import FUNCTION, HOOK, OpaqueFunction, opaque_function
from shardwright.base.torch_private import pytree
from shardwright.base.user_code import _source
from shardwright.capture.emitter import Emitter, Placeholder, WrittenTensor
from shardwright.capture.functionalise import Tracked, is_mutation, named_arguments, updates_statistics
from shardwright.capture.fx_nodes import attribute_at, input_name, meta_of, module_path
from shardwright.capture.names import Names, numbered
from shardwright.capture.numbers import NUMBER, Formula
from shardwright.capture.own_backward import with_hooks
from shardwright.capture.resolve_marks import at_line, resolve_marks
from shardwright.capture.session import Session
from shardwright.capture.torch_functions import Watch
from shardwright.capture.writes import Writes
from shardwright.errors import CaptureError
from shardwright.ir.graph import Constant, Graph, GraphInput, Node
from shardwright.ir.operator import OpOverload


class Converter:
    """Turns an exported program into a ``Graph``. It lifts inputs, inlines regions and makes in-place operators functional.

    Args:
        module: what was captured.
        exported: the ``ExportedProgram``.
        now: the capture session, which knows the marked calls.
        flat_inputs: the leaves of the callable's arguments, as ``torch.utils._pytree`` flattens them.
        autocast: see :class:`~shardwright.capture.emitter.Emitter`.
        watch: what was seen of the callable besides its operators.
        formulas: those of the changing numbers that became tensors.
    """

    def __init__(
        self, module: nn.Module, exported: Any, now: Session, flat_inputs: list[Any], autocast: Any, watch: Watch,
        formulas: list[Formula],
    ):  # fmt: skip
        self.exported, self.session, self.flat_inputs = exported, now, flat_inputs
        self.module = module
        self.emitter = Emitter(autocast)
        self.writes = Writes(self.emitter, module, watch.saved)
        self.formulas = formulas
        self.made_to_require = watch.made_to_require
        self.numbers: dict[str, tuple[Any, Any]] = {}  # constants that are computed in every call: formula and dtype
        self.constants: dict[str, Any] = {}
        self.current: fx.Node | None = None  # what is being converted
        self.hooks: dict[str, list[OpaqueFunction]] = {}  # value -> hooks on its gradient, in order

    def graph(self) -> Graph:
        """Converts the exported program and returns the graph."""
        graph_module = self.exported.graph_module
        self._placeholders(graph_module.graph)
        placeholders = dict(self.emitter.env)
        result = self._run(graph_module)
        outputs = self._outputs(result)
        updates = tuple(
            (tracked.first, self.emitter.read(node))
            for node, tracked in ((n, t) for n, t in placeholders.items() if isinstance(t, Placeholder))
            if tracked.writes and self.emitter.read(node) != tracked.first
        )
        nodes, renamed = resolve_marks(self.emitter.nodes, self.emitter.calls, self.session)
        hooks = {renamed.get(value, value): found for value, found in self.hooks.items()}
        nodes, behind = with_hooks(nodes, hooks, self.emitter.names)
        renamed = {**behind, **{value: behind.get(new, new) for value, new in renamed.items()}}
        outputs = [renamed.get(o, o) if isinstance(o, str) else o for o in outputs]
        updates = tuple((name, renamed.get(value, value)) for name, value in updates)
        emitted = len(self.emitter.nodes)
        nodes, outputs = _drop_dead(nodes, outputs, updates)
        if len(nodes) < emitted:
            names = Names()
            names.taken = {i.value: 0 for i in self.emitter.inputs}
            nodes, known = numbered(nodes, names)
            outputs = [known.get(o, o) if isinstance(o, str) else o for o in outputs]
            updates = tuple((name, known.get(value, value)) for name, value in updates)
        return Graph(
            tuple(self.emitter.inputs), tuple(nodes), tuple(outputs), updates, self.exported.call_spec.out_spec, self.constants,
            impossible_marks=tuple(self.session.impossible), numbers=self.numbers,
        )  # fmt: skip

    def _placeholders(self, graph: fx.Graph) -> None:
        specs = self.exported.graph_signature.input_specs
        nodes = [n for n in graph.nodes if n.op == "placeholder"]
        by_name = dict(self.module.named_parameters(remove_duplicate=False))
        tied = {id(p): name for name, p in reversed(list(by_name.items()))}
        position = 0
        first: dict[str, Placeholder] = {}
        for node, spec in zip(nodes, specs, strict=True):
            kind = spec.kind.name
            value = node.meta.get("val")
            user = position
            if kind == "USER_INPUT":
                position += 1
            if not isinstance(value, Tensor):
                self.emitter.env[node] = value
                continue
            target: Any = spec.target
            requires = made = False
            if kind == "PARAMETER":
                target = tied.get(id(by_name.get(target)), target)
                requires = by_name[target].requires_grad
                if target in first:
                    self.emitter.env[node] = first[target]
                    continue
            elif kind == "USER_INPUT":
                target = user
                made = user in self.made_to_require
                requires = made or self.flat_inputs[user].requires_grad
            elif kind == "CONSTANT_TENSOR":
                self.constants[target] = self.exported.constants[target]
                requires = self.constants[target].requires_grad
            name = self.emitter.names.new(input_name(kind, target, node.name))
            named = {"PARAMETER": "parameter", "BUFFER": "buffer", "USER_INPUT": "input"}.get(kind, "constant")
            self.emitter.inputs.append(GraphInput(name, named, target, meta_of(value), requires, made))
            self.emitter.metas[name] = value
            placed = Placeholder(name, value, first=name)
            self.emitter.env[node] = placed
            if kind == "PARAMETER":
                first[target] = placed

    def _outputs(self, result: Any) -> list[Any]:
        specs = self.exported.graph_signature.output_specs
        outputs = []
        for spec, value in zip(specs, result, strict=True):
            if spec.kind.name != "USER_OUTPUT":
                continue
            outputs.append(value)
        return outputs

    def _run(self, graph_module: fx.GraphModule) -> list[Any]:
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                self.emitter.env[node] = attribute_at(graph_module, str(node.target))
                if isinstance(self.emitter.env[node], Tensor):
                    self.emitter.env[node] = self._constant(str(node.target), self.emitter.env[node])
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                return [self._value(a) for a in node.args[0]]
        raise AssertionError("a graph without an output")

    def _constant(self, name: str, value: Tensor) -> Tracked:
        value_name = self.emitter.names.new(f"c_{name}")
        self.constants[name] = value
        self.emitter.inputs.append(GraphInput(value_name, "constant", name, meta_of(value), value.requires_grad))
        self.emitter.metas[value_name] = value
        return Tracked(value_name, value)

    def _number(self, number: tuple[int, Any], value: Any) -> Tracked:
        """Adds the constant that stands for a changing number, which is this value at the moment."""
        at, dtype = number
        name = f"number_{at}"
        self.numbers[name] = (self.formulas[at], dtype)
        return self._constant(name, torch.full((), value, dtype=dtype))

    def _value(self, argument: Any) -> Any:
        """Returns the graph output for an argument: a value name, or a :class:`Constant`."""
        if isinstance(argument, fx.Node):
            entry = self.emitter.env[argument]
            return self.emitter.read(argument) if isinstance(entry, (Tracked, WrittenTensor)) else Constant(entry)
        return Constant(argument)

    def _call(self, node: fx.Node) -> None:
        self.current = node
        target: Any = node.target
        name = getattr(target, "__name__", str(target))
        if node.meta.get("val") is None and not node.users and getattr(getattr(target, "_schema", None), "returns", None):
            return  # it raised, and the user's code caught that
        number = (node.meta.get("custom") or {}).get(NUMBER)
        if number is not None and target is operators.FULL:
            self.emitter.env[node] = self._number(number, node.args[1])
        elif name == "getitem":
            whole, index = self.emitter.env[node.args[0]], node.args[1]  # type: ignore[index]
            self.emitter.env[node] = whole[index]
        elif "wrap_with_autocast" in str(target) or name == "wrap_with_autocast":
            device, dtype, enabled, cache, body, *rest = node.args
            self._inline(node, body, rest, ((device, dtype, enabled, cache), self.emitter.context[1]))
        elif "wrap_with_set_grad_enabled" in str(target) or name == "wrap_with_set_grad_enabled":
            enabled, body, *rest = node.args
            self._inline(node, body, rest, (self.emitter.context[0], bool(enabled)))
        elif target in (FUNCTION, HOOK):
            self._opaque(node)
        elif not isinstance(target, OpOverload):
            self.emitter.env[node] = self._fold(node)
        elif target.overloadpacket in operators.RENORMALISES_TABLE:
            raise CaptureError(
                f"embedding with max_norm at {_source(node) or module_path(node)} rewrites its table as it reads it, which "
                "cannot be sharded; renormalise the table outside and drop max_norm"
            )
        elif target.overloadpacket in operators.CHANGES_MEMORY:
            raise CaptureError(
                f"{target}{at_line(node)} changes a tensor's memory past the graph, which cannot be captured; make a new tensor"
            )
        elif target.overloadpacket in operators.CHECKS:
            self.emitter.env[node] = None
        elif is_mutation(target):
            self.writes.check_write(node)
            self.writes.mutate(node)
        elif updates_statistics(node) and not self.writes.is_buffer(named_arguments(node)["running_mean"]):
            self.writes.normalise(node)
        else:
            self.emitter.track_operator(node)

    def _fold(self, node: fx.Node) -> Any:
        """Computes a Python function of plain values, such as arithmetic on sizes."""
        args, kwargs = pytree.tree_map(lambda a: self.emitter.env[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs))
        is_plain = getattr(node.target, "__module__", None) in ("_operator", "operator", "math", "builtins", "torch")
        if not is_plain or any(isinstance(leaf, Tracked) for leaf in pytree.tree_leaves((args, kwargs))):
            name = getattr(node.target, "__name__", str(node.target))
            raise CaptureError(
                f"{name}{at_line(node)} cannot be sharded: only tensor operators can, not transformations as those of "
                "torch.func; take it out of the callable"
            )
        return node.target(*args, **kwargs)  # type: ignore[operator,misc]

    def _opaque(self, node: fx.Node) -> None:
        """Emits an opaque function as one operator; a hook waits until the graph stands."""
        tensors: Any = node.args[0]
        function = opaque_function(node.args[1])  # type: ignore[arg-type]
        if node.target == HOOK:
            self.hooks.setdefault(self.emitter.read(tensors), []).append(function)
        else:
            self.emitter.track_opaque(node, function, tensors)

    def _inline(self, node: fx.Node, body: Any, args: Any, context: tuple[Any, bool]) -> None:
        submodule = self.emitter.env[body]
        inner = [n for n in submodule.graph.nodes if n.op == "placeholder"]
        for placeholder, argument in zip(inner, args, strict=True):
            self.emitter.env[placeholder] = self.emitter.env[argument] if isinstance(argument, fx.Node) else argument
        before, self.emitter.context = self.emitter.context, context
        result: list[Any] = []
        for n in submodule.graph.nodes:
            if n.op == "call_function":
                self._call(n)
            elif n.op == "get_attr":
                self.emitter.env[n] = attribute_at(submodule, str(n.target))
            elif n.op == "output":
                result = [self.emitter.env[a] if isinstance(a, fx.Node) else a for a in n.args[0]]
        self.emitter.context = before
        self.emitter.env[node] = result


def _drop_dead(nodes: list[Node], outputs: list[Any], updates: Any) -> tuple[list[Node], list[Any]]:
    """Removes operators whose results nothing reads.

    Random ones stay, because they advance the generator; so do norms that move their statistics, and the user's collectives,
    for which other ranks wait.
    """
    needed = {o for o in outputs if isinstance(o, str)} | {v for _, v in updates}
    kept = []
    for node in reversed(nodes):
        called = getattr(node.op.target, "namespace", "") == "shardwright"
        acts = operators.may_draw(node.op.target) or node.op.moves_statistics or called
        if acts or any(v in needed for v in node.outputs) or not node.outputs:
            kept.append(node)
            needed.update(node.inputs)
    return kept[::-1], outputs
