"""Converter: an exported program as a graph of ours."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from shardwright.base import operators
from shardwright.base.torch_private import FakeTensorMode, pytree
from shardwright.base.user_code import _source
from shardwright.capture.functionalise import (
    Form,
    Tracked,
    diagonal_mask,
    functional_form,
    is_mutation,
    moved_statistics,
    named_arguments,
    scatter_back,
    updates_statistics,
    view_of,
)
from shardwright.capture.names import Names, numbered
from shardwright.capture.resolve_marks import _at, _resolve_marks
from shardwright.capture.session import BATCH, COPY, RECOMPUTE, Session
from shardwright.capture.strides import strides_made
from shardwright.errors import CaptureError
from shardwright.ir.graph import Constant, Graph, GraphInput, NeedsGradient, Node
from shardwright.ir.operator import Operator, OpOverload, Slot, TensorMeta


class _Converter:
    """Turns an exported program into a Graph: lifts inputs, inlines regions, makes in-place operators functional."""

    def __init__(self, module: nn.Module, exported: Any, now: Session, flat_inputs: list[Any], autocast: Any):
        self.exported, self.session, self.flat_inputs = exported, now, flat_inputs
        self.module = module
        self.inputs: list[GraphInput] = []
        self.nodes: list[Node] = []
        self.constants: dict[str, Any] = {}
        self.env: dict[fx.Node, Any] = {}  # fx node -> Tracked, list of Tracked, or a plain value
        self.names = Names()
        self.metas: dict[str, Tensor] = {}
        self.described: dict[str, TensorMeta] = {}  # value -> what rules see of it
        self.operators: dict[Any, Operator] = {}
        self.needing = NeedsGradient()
        self.restrided: set[str] = set()  # values whose strides are not those that export gives them
        self.calls: dict[str, Any] = {}  # node name -> custom meta
        self.current: fx.Node | None = None  # what is being converted
        self.context: tuple[Any, bool] = (autocast, torch.is_grad_enabled())
        self.trains = self.context[1]  # whether there are gradients at all

    def graph(self) -> Graph:
        graph_module = self.exported.graph_module
        self._placeholders(graph_module.graph)
        placeholders = dict(self.env)
        result = self._run(graph_module)
        outputs = self._outputs(result)
        updates = tuple(
            (tracked.first, self.read(node))
            for node, tracked in ((n, t) for n, t in placeholders.items() if isinstance(t, _Placed))
            if tracked.writes and self.read(node) != tracked.first
        )
        nodes, renamed = _resolve_marks(self.nodes, self.calls, self.session)
        outputs = [renamed.get(o, o) if isinstance(o, str) else o for o in outputs]
        updates = tuple((name, renamed.get(value, value)) for name, value in updates)
        emitted = len(self.nodes)
        nodes, outputs = _drop_dead(nodes, outputs, updates)
        if len(nodes) < emitted:
            names = Names()
            names.taken = {i.value: 0 for i in self.inputs}
            nodes, known = numbered(nodes, names)
            outputs = [known.get(o, o) if isinstance(o, str) else o for o in outputs]
            updates = tuple((name, known.get(value, value)) for name, value in updates)
        return Graph(
            tuple(self.inputs), tuple(nodes), tuple(outputs), updates, self.exported.call_spec.out_spec, self.constants,
            impossible_marks=tuple(self.session.impossible),
        )  # fmt: skip

    # -- inputs and outputs -----------------------------------------------------------------------------------------

    def _placeholders(self, graph: fx.Graph) -> None:
        specs = self.exported.graph_signature.input_specs
        nodes = [n for n in graph.nodes if n.op == "placeholder"]
        by_name = dict(self.module.named_parameters(remove_duplicate=False))
        tied = {id(p): name for name, p in reversed(list(by_name.items()))}
        position = 0
        first: dict[str, _Placed] = {}
        for node, spec in zip(nodes, specs, strict=True):
            kind = spec.kind.name
            value = node.meta.get("val")
            user = position
            if kind == "USER_INPUT":
                position += 1
            if not isinstance(value, Tensor):
                self.env[node] = value
                continue
            target: Any = spec.target
            requires = False
            if kind == "PARAMETER":
                target = tied.get(id(by_name.get(target)), target)
                requires = by_name[target].requires_grad
                if target in first:
                    self.env[node] = first[target]
                    continue
            elif kind == "USER_INPUT":
                target = user
                requires = self.flat_inputs[user].requires_grad
            elif kind == "CONSTANT_TENSOR":
                self.constants[target] = self.exported.constants[target]
                requires = self.constants[target].requires_grad
            name = self.names.new(_input_name(kind, target, node.name))
            named = {"PARAMETER": "parameter", "BUFFER": "buffer", "USER_INPUT": "input"}.get(kind, "constant")
            self.inputs.append(GraphInput(name, named, target, _meta(value), requires))
            self.metas[name] = value
            placed = _Placed(name, value, first=name)
            self.env[node] = placed
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

    # -- nodes ------------------------------------------------------------------------------------------------------

    def _run(self, graph_module: fx.GraphModule) -> list[Any]:
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                self.env[node] = _attribute(graph_module, str(node.target))
                if isinstance(self.env[node], Tensor):
                    self.env[node] = self._constant(str(node.target), self.env[node])
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                return [self._value(a) for a in node.args[0]]
        raise AssertionError("a graph without an output")

    def _constant(self, name: str, value: Tensor) -> Tracked:
        value_name = self.names.new(f"c_{name}")
        self.constants[name] = value
        self.inputs.append(GraphInput(value_name, "constant", name, _meta(value), value.requires_grad))
        self.metas[value_name] = value
        return Tracked(value_name, value)

    def _value(self, argument: Any) -> Any:
        """Returns a graph output: a value name, or a constant."""
        if isinstance(argument, fx.Node):
            entry = self.env[argument]
            return self.read(argument) if isinstance(entry, (Tracked, _Alias)) else Constant(entry)
        return Constant(argument)

    def _call(self, node: fx.Node) -> None:
        self.current = node
        target: Any = node.target
        name = getattr(target, "__name__", str(target))
        if node.meta.get("val") is None and not node.users and getattr(getattr(target, "_schema", None), "returns", None):
            return  # it raised, and the user's code caught that
        if name == "getitem":
            whole, index = self.env[node.args[0]], node.args[1]  # type: ignore[index]
            self.env[node] = whole[index]
        elif "wrap_with_autocast" in str(target) or name == "wrap_with_autocast":
            device, dtype, enabled, cache, body, *rest = node.args
            self._inline(node, body, rest, ((device, dtype, enabled, cache), self.context[1]))
        elif "wrap_with_set_grad_enabled" in str(target) or name == "wrap_with_set_grad_enabled":
            enabled, body, *rest = node.args
            self._inline(node, body, rest, (self.context[0], bool(enabled)))
        elif not isinstance(target, OpOverload):
            self.env[node] = self._fold(node)
        elif target.overloadpacket in operators.RENORMALISES_TABLE:
            raise CaptureError(
                f"embedding with max_norm at {_source(node) or _module_path(node)} rewrites its table as it reads it, which "
                "cannot be sharded; renormalise the table outside and drop max_norm"
            )
        elif target.overloadpacket in operators.CHANGES_MEMORY:
            raise CaptureError(
                f"{target}{_at(node)} changes a tensor's memory past the graph, which cannot be captured; make a new tensor"
            )
        elif target.overloadpacket in operators.CHECKS:
            self.env[node] = None
        elif is_mutation(target):
            self._check_write(node)
            self._mutate(node)
        elif updates_statistics(node) and not self._is_buffer(named_arguments(node)["running_mean"]):
            self._normalise(node)
        else:
            self._operator(node)

    def _fold(self, node: fx.Node) -> Any:
        """Returns a Python function of plain values, such as arithmetic on sizes."""
        args, kwargs = pytree.tree_map(lambda a: self.env[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs))
        is_plain = getattr(node.target, "__module__", None) in ("_operator", "operator", "math", "builtins", "torch")
        if not is_plain or any(isinstance(leaf, Tracked) for leaf in pytree.tree_leaves((args, kwargs))):
            name = getattr(node.target, "__name__", str(node.target))
            raise CaptureError(
                f"{name}{_at(node)} cannot be sharded: only tensor operators can, not transformations as those of torch.func; "
                "take it out of the callable"
            )
        return node.target(*args, **kwargs)  # type: ignore[operator,misc]

    def _inline(self, node: fx.Node, body: Any, args: Any, context: tuple[Any, bool]) -> None:
        submodule = self.env[body]
        inner = [n for n in submodule.graph.nodes if n.op == "placeholder"]
        for placeholder, argument in zip(inner, args, strict=True):
            self.env[placeholder] = self.env[argument] if isinstance(argument, fx.Node) else argument
        before, self.context = self.context, context
        result: list[Any] = []
        for n in submodule.graph.nodes:
            if n.op == "call_function":
                self._call(n)
            elif n.op == "get_attr":
                self.env[n] = _attribute(submodule, str(n.target))
            elif n.op == "output":
                result = [self.env[a] if isinstance(a, fx.Node) else a for a in n.args[0]]
        self.context = before
        self.env[node] = result

    def _operator(self, node: fx.Node) -> None:
        metas = node.meta["val"]
        sequence = isinstance(metas, (tuple, list))
        args, kwargs = _with_dense_gradient(node)
        outputs = self.emit_node(node, node.target, args, kwargs, list(metas) if sequence else [metas])
        parent = self._viewed(node, metas[0] if sequence and metas else metas)
        tracked: list[Any] = []
        for i, (value, meta) in enumerate(zip(outputs, metas if sequence else [metas], strict=True)):
            entry = Tracked(value, meta)
            if parent is not None:
                entry.parent, entry.version = parent, self._tracked(parent).writes
                entry.remake = (node, node.args, node.kwargs, i if sequence else None)
            tracked.append(entry)
        self.env[node] = tracked if sequence else tracked[0]

    def _viewed(self, node: fx.Node, meta: Any) -> fx.Node | None:
        """Returns the input that an operator's output shares its memory with."""
        if not isinstance(meta, Tensor) or node.target == operators.LIFTS_COPY:
            return None
        for argument in pytree.tree_leaves((node.args, node.kwargs)):
            if isinstance(argument, fx.Node):
                shares = isinstance(self.env.get(argument), (Tracked, _Alias))
                if shares and _storage(self._tracked(argument).meta) == _storage(meta):
                    return argument
        return None

    def _check_write(self, node: fx.Node) -> None:
        """Refuses a write that autograd does not see: the gradient of what was there would be lost with its value."""
        target: Any = node.target
        for argument, value in named_arguments(node).items():
            schema = next(a for a in target._schema.arguments if a.name == argument)
            if schema.alias_info is not None and schema.alias_info.is_write:
                for destination in pytree.tree_leaves(value):
                    self._check_written(node, destination)

    def _check_written(self, node: fx.Node, destination: Any) -> None:
        past_autograd = not self.context[1]
        while isinstance(destination, fx.Node) and isinstance(self.env.get(destination), (Tracked, _Alias)):
            tracked = self._tracked(destination)
            if tracked.parent is None:
                if self.trains and past_autograd and tracked.value in self.needing.of(self.inputs, self.nodes):
                    raise CaptureError(
                        f"{node.target}{_at(node)} writes past autograd, under no_grad or through detach() or .data, "
                        "to a value that a gradient flows through\n  Give the new value a name, with the gradient of the old: "
                        "h = h + (new - h).detach(). Frozen parameters and buffers can be written to"
                    )
                return
            source = tracked.remake[0] if tracked.remake else None
            past_autograd = past_autograd or (source is not None and source.target == operators.DETACH)
            destination = tracked.parent

    def _mutate(self, node: fx.Node) -> None:
        """A write: computes the new values, then hands each to everything that shares the memory."""
        target: Any = node.target
        packet, where = target.overloadpacket, self._where(node)
        if operators.views_in_place(target):
            self._view_in_place(node, where)
        elif torch.Tag.inplace_view in target.tags and packet not in operators.DETACHES:
            raise CaptureError(f"{target} at {where} gives a tensor another shape or memory; use one that returns a new tensor")
        elif packet in operators.COPIES:
            self._write_all(node, [(node.args[0], lambda meta: self._copied(node, meta))], where)
        elif packet in operators.FILLS_DIAGONAL:
            self._write_all(node, [(node.args[0], lambda meta: self._diagonal_filled(node))], where)
        else:
            self._write_form(node, functional_form(target, node.args, dict(node.kwargs), where), where)

    def _write_form(self, node: fx.Node, form: Form, where: str) -> None:
        """Writes what the functional form of a writing operator computes."""
        written = list(form.written)
        for destination in written:
            self._check_destination(node, destination, where)
            self._keep_for_backward(node, destination)
        metas = self._metas_of(form, where)
        known = metas
        if form.beside == 0 and len(written) == 1 and metas[0].dtype == self._tracked(written[0]).meta.dtype:
            known = [self._tracked(written[0]).meta]  # random numbers are drawn in its memory order
        outputs = self.emit_node(node, form.target, form.args, form.kwargs, known)
        made = zip(written, outputs[form.beside :], metas[form.beside :], strict=True)
        pairs = [(to, lambda meta, new=new, made=made: self._as_written(node, new, made, meta)) for to, new, made in made]
        beside = [Tracked(value, meta) for value, meta in zip(outputs[: form.beside], metas)]
        self._write_all(node, pairs, where, beside)

    def _write_all(self, node: fx.Node, pairs: Any, where: str, beside: Any = ()) -> None:
        """Writes to every destination what its function of the destination's meta emits; the results are what was written to,
        or ``beside``, what the operator returns beside that."""
        for destination, new_value in pairs:
            self._check_destination(node, destination, where)
            old = self.read(destination)
            new = new_value(self._tracked(destination).meta)
            self._write(node, destination, self._with_gradient(node, destination, old, new))
        results = list(beside) or [_Alias(self, destination) for destination, _ in pairs]
        is_sequence = isinstance(node.meta.get("val"), (tuple, list))
        self.env[node] = results if is_sequence else results[0]

    def _where(self, node: fx.Node) -> str:
        """Returns the user's line that called an operator; else the module, or the function that was captured."""
        return _source(node) or _module_path(node) or str(getattr(self.module, "name", type(self.module).__name__))

    def _with_gradient(self, node: fx.Node, destination: fx.Node, old: str, new: str) -> str:
        """Returns a written value that has no gradient, though autograd sees one through the value before: one of zeros."""
        if not self.context[1] or self._tracked(destination).parent is not None:
            return new  # of a view, the rest of what is viewed keeps its gradient
        needing = self.needing.of(self.inputs, self.nodes)
        if old not in needing or new in needing:
            return new
        target: Any = node.target
        if target.overloadpacket in operators.DETACHES:
            return new
        if target.overloadpacket in operators.WRITES_TRUTH:
            raise CaptureError(
                f"{target} at {self._where(node)} leaves the gradient of the value before on a value that has none; "
                "use one that returns a new tensor"
            )
        mask = self._emit_simple(node, operators.ONES_LIKE, new, dtype=torch.bool)
        return self._emit_simple(node, operators.WHERE, mask, new, old)

    def _check_destination(self, node: fx.Node, destination: Any, where: str) -> None:
        if not isinstance(destination, fx.Node) or not isinstance(self.env[destination], (Tracked, _Alias)):
            raise CaptureError(f"{node.target} at {where} writes to something that is not a tensor of the graph")

    def _metas_of(self, form: Form, where: str) -> list[Tensor]:
        """What the functional form of a writing operator makes, without computing it."""

        def fake(argument: Any) -> Any:
            if not isinstance(argument, fx.Node):
                return argument
            entry = self.env[argument]
            return self.metas[self.read(argument)] if isinstance(entry, (Tracked, _Alias)) else entry

        args, kwargs = _map_arguments(fake, form.args), {k: _map_arguments(fake, v) for k, v in form.kwargs.items()}
        try:
            made = self._faked(form.target, args, kwargs)
        except Exception as error:
            raise CaptureError(
                f"{form.target} at {where} cannot stand in for the operator that writes in place "
                f"({str(error).splitlines()[0]}); use one that returns a new tensor"
            ) from error
        return list(made) if isinstance(made, (tuple, list)) else [made]

    def _faked(self, overload: Any, args: Any, kwargs: Any) -> Any:
        """Returns an operator on fake tensors."""
        known = [*pytree.tree_leaves((args, kwargs)), *self.metas.values()]
        mode = next((leaf.fake_mode for leaf in known if hasattr(leaf, "fake_mode")), None)
        with warnings.catch_warnings(), mode or FakeTensorMode(allow_non_fake_inputs=True):
            warnings.simplefilter("ignore")
            return overload(*args, **kwargs)

    def _as_written(self, node: fx.Node, new: str, made: Tensor, meta: Tensor) -> str:
        """Returns a write keeps the shape and dtype of what it writes to, where the functional operator would promote it."""
        if tuple(made.shape) != tuple(meta.shape):
            raise CaptureError(
                f"{node.target} at {self._where(node)} writes a tensor of shape {list(made.shape)} to one of "
                f"{list(meta.shape)}, which would change its shape; write to a tensor of shape {list(made.shape)}"
            )
        if made.dtype == meta.dtype:
            return new
        return self._emit_simple(node, operators.TO_DTYPE, new, meta.dtype)

    def _keep_for_backward(self, node: fx.Node, destination: fx.Node) -> None:
        """Has a write to an input computed from a copy, if autograd may save that: the input itself is changed at the end."""
        root = self._tracked(destination)
        while root.parent is not None:
            root = self._tracked(root.parent)
        if not isinstance(root, _Placed) or root.value != root.first or not self.context[1]:
            return
        leaves = [a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, fx.Node) and a is not destination]
        operands = [self.read(a) for a in leaves if isinstance(self.env[a], (Tracked, _Alias))]
        needing = self.needing.of(self.inputs, self.nodes)
        if any(value in needing for value in operands):
            tracked = self._tracked(destination)
            tracked.value = self._emit_simple(node, operators.CLONE, self.read(destination))

    def _view_in_place(self, node: fx.Node, where: str) -> None:
        """An operator that changes how a tensor is seen: from here on its node is a view of what it was before."""
        destination: Any = node.args[0]
        self._check_destination(node, destination, where)
        while isinstance(self.env[destination], _Alias):
            destination = self.env[destination].node
        before = self.env[destination]
        if isinstance(before, _Placed):
            raise CaptureError(f"{node.target} at {where} changes the shape of an input; use one that returns a new tensor")
        scratch = fx.Graph()
        old = scratch.placeholder("old")
        self.env[old] = before
        for entry in pytree.tree_leaves(list(self.env.values())):
            if isinstance(entry, Tracked) and entry.parent is destination and entry.remake is not None:
                entry.parent = old
                maker, args, kwargs, which = entry.remake
                args, kwargs = pytree.tree_map(lambda a: old if a is destination else a, (args, kwargs))
                entry.remake = (maker, args, kwargs, which)
        view = scratch.call_function(view_of(node.target), (old, *node.args[1:]), dict(node.kwargs))
        view.meta = dict(node.meta)
        self._operator(view)
        self.env[destination] = self.env[node] = _Alias(self, view)

    def _diagonal_filled(self, node: fx.Node) -> str:
        destination, value, *wrap = node.args
        meta = self._tracked(destination).meta  # type: ignore[arg-type]
        mask = diagonal_mask(
            lambda op, *args, **kwargs: self._emit_simple(node, op, *args, **kwargs), meta, bool(wrap and wrap[0])
        )
        return self._emit_simple(node, operators.MASKED_FILL, self.read(destination), mask, value)  # type: ignore[arg-type]

    def _is_buffer(self, node: fx.Node) -> bool:
        """Tells whether a tensor is a buffer as it came in, which every rank holds whole."""
        value = self.read(node)
        return any(i.value == value and i.kind == "buffer" for i in self.inputs)

    def _normalise(self, node: fx.Node) -> None:
        """A norm that moves running statistics which are no buffers: they are computed apart, and written."""
        given, where = named_arguments(node), self._where(node)
        mean, var = given["running_mean"], given["running_var"]
        x = self.read(given["input"])
        outside, self.context = self.context, (self.context[0], False)
        shape, emit = tuple(self.metas[x].shape), lambda op, *args: self._emit_many(node, op, *args)
        moved = moved_statistics(emit, node, x, shape, self.read(mean), self.read(var))
        self.context = outside
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        args = tuple(None if name in operators.STATISTICS else a for name, a in zip(names, node.args))
        metas = node.meta["val"]
        metas = list(metas) if isinstance(metas, (tuple, list)) else [metas]
        outputs = self.emit_node(node, node.target, args, dict(node.kwargs), metas)
        beside = [Tracked(value, self.metas[value]) for value in outputs]
        pairs = [
            (to, lambda meta, new=new: self._as_written(node, new, self.metas[new], meta))
            for to, new in zip((mean, var), moved)
        ]
        self._write_all(node, pairs, where, beside)

    def _copied(self, node: fx.Node, meta: Tensor) -> str:
        source = node.args[1]
        if not isinstance(source, fx.Node):
            return self.emit_node(node, operators.FULL_LIKE, (node.args[0], source), {}, [meta])[0]
        value = self.read(source)
        have = self.metas[value]
        if have.dtype != meta.dtype:
            value = self._emit_simple(node, operators.TO_DTYPE, value, meta.dtype)
        if tuple(have.shape) == tuple(meta.shape):
            return value
        wide = (1,) * (len(meta.shape) - len(have.shape)) + tuple(have.shape)
        if len(wide) > len(meta.shape) or any(a not in (1, b) for a, b in zip(wide, meta.shape)):
            raise CaptureError(
                f"a tensor of shape {list(have.shape)} takes the place of one of {list(meta.shape)} at "
                f"{_source(node) or _source(source) or self._where(source)}, which changes its shape; give it the larger shape "
                "from the beginning"
            )
        return self._emit_simple(node, operators.EXPAND, value, list(meta.shape))

    def _write(self, at: fx.Node, destination: fx.Node, new: str) -> None:
        tracked = self._tracked(destination)
        if tracked.parent is not None:
            self.read(destination)
            source, _, _, which = tracked.remake  # type: ignore[misc]
            parent = self._tracked(tracked.parent)
            back = scatter_back(source, which, parent.meta, self._where(at))
            updated = back(lambda op, *a: self._emit_simple(at, op, *a), self.read(tracked.parent), new)
            self._write(at, tracked.parent, updated)
            tracked.version = self._tracked(tracked.parent).writes
        tracked.value = new
        tracked.writes += 1

    def read(self, node: fx.Node) -> str:
        """Returns the current value of a tensor; a view of something written since is made again."""
        tracked = self._tracked(node)
        if tracked.parent is not None:
            current = self.read(tracked.parent)
            parent = self._tracked(tracked.parent)
            if tracked.version != parent.writes:
                source, args, kwargs, which = tracked.remake  # type: ignore[misc]
                metas = source.meta["val"]
                out = self.emit_node(
                    source, source.target, args, kwargs, list(metas) if which is not None else [metas],
                )  # fmt: skip
                tracked.value = out[which or 0]
                tracked.version = parent.writes
                tracked.writes += 1
                assert current
        return tracked.value

    def _tracked(self, node: fx.Node) -> Tracked:
        entry = self.env[node]
        while isinstance(entry, _Alias):
            entry = self.env[entry.node]
        assert isinstance(entry, Tracked), (node, entry)
        return entry

    # -- emitting ---------------------------------------------------------------------------------------------------

    def _emit_simple(self, at: fx.Node, overload: Any, *args: Any, **kwargs: Any) -> str:
        """Emits an operator of one result on values given by name."""
        return self._emit_many(at, overload, *args, **kwargs)[0]

    def _emit_many(self, at: fx.Node, overload: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Emits an operator on values given by name; what it makes is computed on the fly."""
        made = self._faked(overload, [self.metas[a] if isinstance(a, str) else a for a in args], kwargs)
        inputs = [a for a in args if isinstance(a, str)]
        slots = iter(range(len(inputs)))
        arguments = tuple(Slot(next(slots)) if isinstance(a, str) else a for a in args)
        sequence = isinstance(made, (tuple, list))
        return self._append(at, overload, arguments, kwargs, inputs, list(made) if sequence else [made], sequence)

    def emit_node(self, at: fx.Node, overload: Any, args: Any, kwargs: Any, metas: list[Any]) -> list[str]:
        inputs: list[str] = []

        def slot(argument: Any) -> Any:
            if not isinstance(argument, fx.Node):
                return argument
            entry = self.env[argument]
            if not isinstance(entry, (Tracked, _Alias)):
                return entry
            inputs.append(self.read(argument))
            return Slot(len(inputs) - 1)

        arguments, keywords = _map_arguments(slot, args), {k: _map_arguments(slot, v) for k, v in kwargs.items()}
        sequence = len(getattr(overload._schema, "returns", ())) != 1 or isinstance(at.meta.get("val"), (tuple, list))
        return self._append(at, overload, arguments, keywords, inputs, metas, sequence)

    def _append(
        self, at: fx.Node, overload: Any, args: Any, kwargs: Any, inputs: list[str], metas: list[Any], sequence: bool
    ) -> list[str]:
        name = self.names.new(overload.overloadpacket.__name__.strip("_"))
        outputs = [name] if len(metas) == 1 else [self.names.new(f"{name}_o{i}") for i in range(len(metas))]
        for value, meta in zip(outputs, self._as_made(overload, args, kwargs, inputs, metas), strict=True):
            self.metas[value] = meta
            if meta.stride() != metas[outputs.index(value)].stride():
                self.restrided.add(value)
        operator = self._operator_call(overload, args, kwargs, inputs, outputs, sequence)
        autocast, grad = self.context
        custom = at.meta.get("custom") or {}
        self.nodes.append(
            Node(
                name, operator, tuple(inputs), tuple(outputs), _module_path(at), _source(at), autocast=autocast, grad=grad,
                recompute=custom.get(RECOMPUTE), calls=_module_calls(at),
                copy=custom.get(COPY), carries_batch=BATCH in custom,
            )
        )  # fmt: skip
        self.calls[name] = custom
        return outputs

    def _as_made(self, overload: Any, args: Any, kwargs: Any, inputs: list[str], metas: list[Any]) -> list[Any]:
        """What an operator makes, in the memory order that its kernel, and those before it, give it."""
        orders: list[Any] = [None] * len(metas)
        if not self.restrided.isdisjoint(inputs):

            def fake(leaf: Any) -> Any:
                return self.metas[inputs[leaf.index]] if isinstance(leaf, Slot) else leaf

            with contextlib.suppress(Exception):  # under autocast, for one; the order is then as export has it
                keywords = {k: _map_arguments(fake, v) for k, v in kwargs.items()}
                made = self._faked(overload, _map_arguments(fake, args), keywords)
                orders = [m.stride() for m in (made if isinstance(made, (tuple, list)) else [made])]
        own = strides_made(overload, [self.metas[i] for i in inputs], metas[0]) if metas else None
        if own is not None:
            orders[0] = own
        return [
            meta if order is None or order == meta.stride() or len(order) != meta.ndim else self._restrided(meta, order)
            for meta, order in zip(metas, orders)
        ]

    def _restrided(self, meta: Tensor, order: tuple[int, ...]) -> Tensor:
        return self._faked(torch.empty_strided, (tuple(meta.shape), order), {"dtype": meta.dtype, "device": meta.device})  # type: ignore[no-any-return]

    def _describe(self, value: str) -> TensorMeta:
        found = self.described.get(value)
        if found is None:
            found = self.described[value] = _meta(self.metas[value])
        return found

    def _operator_call(
        self, overload: Any, args: Any, kwargs: Any, inputs: list[str], outputs: list[str], sequence: bool
    ) -> Operator:
        """Returns one object for all equal calls, such as those of repeated layers, so that others can keep what they find out.

        The text of the arguments tells 1 from 1.0 and from True, which are equal.
        """
        taken, made = tuple(map(self._describe, inputs)), tuple(map(self._describe, outputs))
        devices = tuple([meta.device for meta in (*taken, *made)])  # equality of metas leaves these out
        key = (overload, repr(args), repr(kwargs), taken, made, devices, sequence)
        found = self.operators.get(key)
        if found is None:
            found = self.operators[key] = Operator(overload, args, kwargs, taken, made, sequence)
        return found


class _Placed(Tracked):
    """A placeholder, which remembers the value it came in with."""

    def __init__(self, value: str, meta: Tensor, first: str):
        super().__init__(value, meta)
        self.first = first


class _Alias:
    """The result of a write: the written tensor itself."""

    def __init__(self, converter: _Converter, node: fx.Node):
        entry = converter.env[node]
        self.node: fx.Node = entry.node if isinstance(entry, _Alias) else node


def _map_arguments(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        mapped = [_map_arguments(function, v) for v in value]
        return tuple(mapped) if isinstance(value, tuple) else mapped
    if isinstance(value, dict):
        return {k: _map_arguments(function, v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(_map_arguments(function, v) for v in (value.start, value.stop, value.step)))
    return function(value)


def _meta(value: Any) -> TensorMeta:
    shape, stride = tuple(int(s) for s in value.shape), tuple(int(s) for s in value.stride())
    return TensorMeta(shape, value.dtype, stride, value.device)


def _storage(value: Any) -> Any:
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(value)


def _attribute(owner: Any, path: str) -> Any:
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def _with_dense_gradient(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of an operator, whose gradient is to be dense: ranks cannot add sparse ones; the values are the
    same.
    """
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if "sparse" not in names:
        return node.args, node.kwargs
    at = names.index("sparse")
    kwargs = {name: value for name, value in node.kwargs.items() if name != "sparse"}
    return tuple(False if i == at else a for i, a in enumerate(node.args)), kwargs


def _input_name(kind: str, target: Any, fallback: str) -> str:
    if kind == "USER_INPUT":
        return fallback
    return str(target).replace(".", "_")


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    last: Any = list(stack.values())[-1] if stack else ("", "")
    return str(last[0])


def _module_calls(node: fx.Node) -> tuple[tuple[str, int], ...]:
    """Path and number of the call of every module around a node, first calls left out."""
    stack = node.meta.get("nn_module_stack") or {}
    found = [(str(entry[0]), key.rpartition("@")[2]) for key, entry in stack.items() if "@" in key]
    return tuple((path, int(number)) for path, number in found if number.isdigit())


def _drop_dead(nodes: list[Node], outputs: list[Any], updates: Any) -> tuple[list[Node], list[Any]]:
    """Removes operators whose results nothing reads. Random ones stay: they advance the generator; and collectives that a user
    calls: other ranks wait for them."""
    needed = {o for o in outputs if isinstance(o, str)} | {v for _, v in updates}
    kept = []
    for node in reversed(nodes):
        called = getattr(node.op.target, "namespace", "") == "shardwright"
        if operators.may_draw(node.op.target) or called or any(v in needed for v in node.outputs) or not node.outputs:
            kept.append(node)
            needed.update(node.inputs)
    return kept[::-1], outputs
