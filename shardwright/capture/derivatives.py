"""Derivatives that a captured callable takes itself, by ``torch.autograd.grad``: forces, penalties on gradients, inner steps.

What has been recorded between the inputs and the outputs of a derivative is computed again as a function of the inputs, and the
derivative of that is written out as operators.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shardwright.base.opaque import FUNCTION, HOOK, opaque_function
from shardwright.base.operators import DETACH, DETERMINANT
from shardwright.base.torch_private import annotate, node_in_make_fx, pytree
from shardwright.capture.functionalise import draws, is_mutation, named_arguments, updates_statistics
from shardwright.capture.fx_nodes import map_arguments, storage_of
from shardwright.capture.recorded import Recorded
from shardwright.capture.refusals import refuse
from shardwright.capture.written_out import AtLine, written_out

DERIVED = "shardwright_derived"  # marks the operators of a derivative
_OPTIONS = ("allow_unused", "is_grads_batched", "materialize_grads")  # that change what is returned


@dataclass(frozen=True)
class Modes:
    """Grad mode and autocast, per kind of device with the dtype."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls) -> Modes:
        """Returns the modes that are on."""
        kinds = ("cpu", "cuda")
        found = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
        return cls(torch.is_grad_enabled(), found)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Sets these modes within the block."""
        with ExitStack() as stack, torch.set_grad_enabled(self.grad):
            for kind, enabled, dtype in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield


def derivative(
    began: Modes,
    trained: Iterable[Tensor],
    at_line: AtLine,
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """Returns what ``torch.autograd.grad`` returns, as tensors of the capture.

    Args:
        began: the modes in which the callable began.
        trained: inputs and parameters of the callable that need a gradient.
        at_line: makes the context in which each operator is recorded.
        outputs, inputs, grad_outputs: as torch's.
        options: as torch's.

    Raises:
        CaptureError: what is differentiated has hooks, draws random numbers, or writes to tensors from outside.
    """
    ends, starts = _as_tensors(outputs), _as_tensors(inputs)
    recorded = Recorded()
    between = _Between(recorded, starts, ends, trained)
    given = [] if grad_outputs is None else [grad_outputs] if isinstance(grad_outputs, Tensor) else list(grad_outputs)
    weights = [g for g in given if isinstance(g, Tensor)]
    creates = bool(options.get("create_graph", False))
    outside = [recorded.tensor(node, creates and between.may_need_gradient(node)) for node in between.outside]
    kept: set[fx.Node] = set()

    def run(*values: Tensor) -> Any:
        rest = iter(values)
        at_starts, of_outside, of_weights = ([next(rest) for _ in group] for group in (starts, outside, weights))
        weight = iter(of_weights)
        chosen = [next(weight) if isinstance(g, Tensor) else None for g in given] if given else None
        asked = {name: value for name, value in options.items() if name in _OPTIONS}
        with began.on():
            new_starts, new_ends = between.replay(at_starts, of_outside, kept)
        with torch.enable_grad():
            return torch.autograd.grad(new_ends, new_starts, chosen, create_graph=creates, **asked)

    def edit(graph: fx.Graph) -> None:
        between.call_functions(graph)
        _without_detach(graph, kept)
        _check_draws(graph)

    with annotate({DERIVED: True}):
        return tuple(written_out(run, [*starts, *outside, *weights], at_line, edit))


def _as_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = value.values()
    found = [value] if isinstance(value, Tensor) else list(value)
    if not all(isinstance(v, Tensor) for v in found):
        raise refuse("torch.autograd.grad of a GradientEdge cannot be captured", "Give the tensor itself")
    return found


def _without_detach(graph: fx.Graph, kept: set[fx.Node]) -> None:
    """Removes the ``detach`` by which autograd keeps results: derivatives of derivatives would stop there.

    Args:
        kept: those that the user wrote.
    """
    for node in graph.nodes:
        if node.op == "call_function" and node.target is DETACH and node not in kept:
            node.replace_all_uses_with(node.args[0])


def _check_draws(graph: fx.Graph) -> None:
    """Refuses derivatives of what draws random numbers, and removes draws whose numbers nothing reads."""
    needed: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        is_drawn = draws(node)
        if node.op == "output" or node in needed or (not is_drawn and is_mutation(node.target)):
            needed.update((node, *node.all_input_nodes))
            if is_drawn:
                raise refuse(
                    f"torch.autograd.grad in a captured callable cannot differentiate {node.target}: computed again, it would "
                    "draw other random numbers",
                    "Draw the numbers outside of what is differentiated and multiply by them; or leave the dropout out there",
                )
        elif is_drawn:
            graph.erase_node(node)


class _Between:
    """Part of an export between some values and others that are computed of them.

    Args:
        recorded: the export in progress.
        starts: the values that are differentiated by.
        ends: the values that are differentiated.
        trained: inputs and parameters that need a gradient.
    """

    def __init__(self, recorded: Recorded, starts: Sequence[Tensor], ends: Sequence[Tensor], trained: Iterable[Tensor]):
        self.trained = {recorded.node(tensor) for tensor in trained}
        self.recorded = recorded
        self.functions: list[tuple[list[fx.Node], Any, list[fx.Node]]] = []  # arguments, number and results of opaque ones
        self.starts = [self._node(t) for t in starts]
        self.ends = [self._node(t) for t in ends]
        self.nodes = self._dependent(list(recorded.graph.nodes))
        inner = {*self.nodes, *self.starts}
        read = [a for node in self.nodes for a in node.all_input_nodes] + self.ends
        self.outside = [n for n in dict.fromkeys(read) if n not in inner and isinstance(n.meta.get("val"), Tensor)]

    def _node(self, tensor: Tensor) -> fx.Node:
        node = self.recorded.node(tensor)
        if node is None:
            raise refuse(
                f"torch.autograd.grad cannot be captured: a tensor of {list(tensor.shape)} is a constant",
                "Differentiate what is computed in the callable, by its inputs, parameters or values",
            )
        return node

    def _dependent(self, recorded: list[fx.Node]) -> list[fx.Node]:
        """Lists the nodes that depend on the starts, that set a mode, or whose memory one of them writes to."""
        written: set[Any] = set()
        while True:
            found: list[fx.Node] = []
            reached, memory, prepared = set(self.starts), set[Any](), set[fx.Node]()
            for node in recorded:
                if node.op != "call_function":
                    continue
                if _sets_a_mode(node):
                    found.append(node)
                    continue
                if not reached - set(self.starts) and self._prepares(node, prepared):
                    continue
                depends = not reached.isdisjoint(node.all_input_nodes)
                if not depends and (node in self.starts or _memory(node).isdisjoint(written)):
                    continue
                self._check(node)
                if node.target is HOOK:
                    raise refuse("torch.autograd.grad cannot be captured through a hook on a gradient", "Remove the hook")
                found.append(node)
                reached.add(node)
                memory |= {key for a in _written(node) for key in _memory(a)}
            self._check_memory(memory, reached, recorded)
            if memory <= written:
                return found
            written |= memory

    def _prepares(self, node: fx.Node, prepared: set[fx.Node]) -> bool:
        """Tells whether a node is part of a write past autograd to a start, before anything is computed of it.

        What is differentiated begins with the values that they have then.
        """
        of_starts = node.target is DETACH and node.args[0] in self.starts
        if of_starts or (not prepared.isdisjoint(node.all_input_nodes) and _memory(node) & _memory(self.starts[0])):
            prepared.add(node)
            return True
        return False

    def _check(self, node: fx.Node) -> None:
        """Refuses second derivatives of what torch differentiates in another way on tensors without values."""
        of_derivative = any(DERIVED in (a.meta.get("custom") or {}) for a in (node, *node.all_input_nodes))
        if of_derivative and node.target is DETERMINANT:
            raise refuse(
                f"torch.autograd.grad of a derivative of {node.target} cannot be captured: its second derivative depends on "
                "values",
                "Use torch.linalg.inv, or take one of the derivatives outside",
            )

    def _check_memory(self, written: set[Any], reached: set[fx.Node], recorded: list[fx.Node]) -> None:
        fixed = [n for n in recorded if n.op in ("placeholder", "get_attr")]
        fixed += [n for n in self.starts if not is_mutation(n.target)]
        for node in fixed:
            if not _memory(node).isdisjoint(written):
                raise refuse(
                    f"torch.autograd.grad cannot be captured where what is differentiated writes in place to {node.name}",
                    "Write to a clone of it; or, under torch.no_grad(), to the tensor itself and not through .data or a view",
                )

    def may_need_gradient(self, node: fx.Node) -> bool:
        """Tells whether a value from outside may have a gradient: buffers and constants have none."""
        if node.op == "call_function":
            return node.target is not DETACH
        return node.op == "placeholder" and node in self.trained

    def replay(
        self, starts: Sequence[Tensor], outside: Sequence[Tensor], kept: set[fx.Node]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Computes everything between again; returns the values of starts and of ends.

        Args:
            starts, outside: values to begin with.
            kept: gets what stands for a ``detach`` of the user's.
        """
        values: dict[fx.Node, Any] = dict(zip(self.outside, outside, strict=True))
        inner = set(self.nodes)
        for node, value in zip(self.starts, starts, strict=True):
            if node not in inner:
                values.setdefault(node, value.detach().requires_grad_())

        def value_of(argument: Any) -> Any:
            if not isinstance(argument, fx.Node):
                return argument
            return values[argument] if argument in values else getattr(self.recorded.root, str(argument.target))

        opened: list[fx.Node] = []
        for node in self.nodes:
            args, kwargs = node.args, dict(node.kwargs)
            if updates_statistics(node):  # it has moved them already
                args, kwargs = (), {**named_arguments(node), "running_mean": None, "running_var": None}
            kwargs = {name: map_arguments(value_of, value) for name, value in kwargs.items()}
            made = values[node] = node.target(*map_arguments(value_of, args), **kwargs)  # type: ignore[operator]
            if node.target is DETACH:
                kept.add(node_in_make_fx(made))
            elif node.target is FUNCTION:
                self._keep_function(node, made, [value_of(a) for a in node.args[0]])  # type: ignore[union-attr]
            elif _sets_a_mode(node) == "_enter_autocast":
                opened.append(node)
            elif _sets_a_mode(node) == "_exit_autocast":
                opened.remove(node.args[0])  # type: ignore[arg-type]
        for node in reversed(opened):  # the derivative is asked for within the block
            values[node].__exit__(None, None, None)
        return [values[node] for node in self.starts], [values[node] for node in self.ends]

    def _keep_function(self, node: fx.Node, made: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        """Remembers a call of an opaque function, whose gradient is not that of the operators in it."""
        number: Any = node.args[1]
        call = ([node_in_make_fx(value) for value in given], number, [node_in_make_fx(value) for value in made])
        if not set(call[0]).isdisjoint(call[2]):
            raise refuse(f"torch.autograd.grad cannot be captured through {opaque_function(call[1])}, which returns an "
                         "argument as it is", "Have it return a view: x.view_as(x)")  # fmt: skip
        self.functions.append(call)

    def call_functions(self, graph: fx.Graph) -> None:
        """Has the results of opaque functions be made by calls of these."""
        order = {node: at for at, node in enumerate(graph.nodes)}
        for tensors, number, made in self.functions:
            found = [node for node in made if node in order]
            if not found:
                continue
            with graph.inserting_after(max(found, key=order.__getitem__)):
                call = graph.call_function(FUNCTION, (tensors, number))
            with graph.inserting_after(call):
                for at, node in enumerate(made):
                    if node in order:
                        result = graph.call_function(operator.getitem, (call, at))
                        node.replace_all_uses_with(result)


def _sets_a_mode(node: fx.Node) -> str:
    """Returns the name of the function, if it sets grad mode or autocast for the nodes after it; else an empty one."""
    name = getattr(node.target, "__name__", "")
    return name if name in ("_set_grad_enabled", "_enter_autocast", "_exit_autocast") else ""


def _written(node: fx.Node) -> list[fx.Node]:
    """Returns the arguments that a node writes to."""
    if not is_mutation(node.target):
        return []
    schema = node.target._schema  # type: ignore[union-attr]
    named = dict(zip((a.name for a in schema.arguments), node.args)) | dict(node.kwargs)
    writes = [named.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [a for a in pytree.tree_leaves(writes) if isinstance(a, fx.Node)]


def _memory(node: fx.Node) -> set[Any]:
    """Returns the memory of a node's values."""
    return {storage_of(leaf) for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)}
