"""Writes: makes the in-place operators of an exported program functional."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from shardwright.base import operators
from shardwright.base.opaque import WRITTEN_PAST_AUTOGRAD
from shardwright.base.torch_private import pytree
from shardwright.base.user_code import _source
from shardwright.capture.emitter import Emitter, Placeholder, WrittenTensor
from shardwright.capture.functionalise import (
    Form,
    Tracked,
    diagonal_mask,
    functional_form,
    moved_statistics,
    named_arguments,
    scatter_back,
    view_of,
)
from shardwright.capture.fx_nodes import map_arguments, module_path, storage_of
from shardwright.capture.resolve_marks import at_line
from shardwright.capture.session import CLOCK
from shardwright.errors import CaptureError


class Writes:
    """Emits what writing operators compute. All views of the written memory get the new value.

    Args:
        emitter: appends to the graph that is being made.
        module: what is captured, for errors.
        saved: storages that autograd had saved for the backward pass, with the time on the capture's clock.
    """

    def __init__(self, emitter: Emitter, module: nn.Module, saved: Mapping[Any, int]):
        self.emitter, self.module, self.saved = emitter, module, saved
        self.trains = emitter.context[1]  # whether there are gradients at all

    def check_write(self, node: fx.Node) -> None:
        """Refuses a write past autograd to a value that is saved for the backward pass."""
        target: Any = node.target
        for argument, value in named_arguments(node).items():
            schema = next(a for a in target._schema.arguments if a.name == argument)
            if schema.alias_info is not None and schema.alias_info.is_write:
                for destination in pytree.tree_leaves(value):
                    self._check_written(node, destination)

    def _check_written(self, node: fx.Node, destination: Any) -> None:
        past_autograd = not self.emitter.context[1]
        storage = storage_of(destination.meta.get("val")) if isinstance(destination, fx.Node) else None
        while isinstance(destination, fx.Node) and isinstance(self.emitter.env.get(destination), (Tracked, WrittenTensor)):
            tracked = self.emitter.tracked(destination)
            if tracked.parent is None:
                gradient = self.trains and past_autograd and tracked.value in self.emitter.needs_gradient()
                written_at = (node.meta.get("custom") or {}).get(CLOCK, math.inf)
                if gradient and storage in self.saved and self.saved[storage] <= written_at:
                    raise CaptureError(
                        f"{node.target}{at_line(node)} writes past autograd, under no_grad or through detach() or .data, to a "
                        "value that the backward pass reads again: its gradients would be those of another function\n"
                        "  Write to a clone, or give the new value a name, with the gradient of the old: "
                        "h = h + (new - h).detach()"
                    )
                return
            source = tracked.remake[0] if tracked.remake else None
            past_autograd = past_autograd or (source is not None and source.target == operators.DETACH)
            destination = tracked.parent

    def mutate(self, node: fx.Node) -> None:
        """Emits a write: computes the new values, then passes each to everything that shares the memory.

        Raises:
            CaptureError: the write has no functional form, or writes to something that is not a tensor of the graph.
        """
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
        if form.beside == 0 and len(written) == 1 and metas[0].dtype == self.emitter.tracked(written[0]).meta.dtype:
            known = [self.emitter.tracked(written[0]).meta]  # random numbers are drawn in the destination's memory order
        outputs = self.emitter.emit_node(node, form.target, form.args, form.kwargs, known)
        made = zip(written, outputs[form.beside :], metas[form.beside :], strict=True)
        pairs = [(to, lambda meta, new=new, made=made: self._as_written(node, new, made, meta)) for to, new, made in made]
        beside = [Tracked(value, meta) for value, meta in zip(outputs[: form.beside], metas)]
        self._write_all(node, pairs, where, beside)

    def _write_all(self, node: fx.Node, pairs: Any, where: str, beside: Any = ()) -> None:
        """Writes a new value to every destination.

        Args:
            node: the operator that writes.
            pairs: each destination, and the function of its fake tensor that emits the new value.
            where: the user's line.
            beside: what the operator returns beside the tensors it writes to, if it does.
        """
        for destination, new_value in pairs:
            self._check_destination(node, destination, where)
            old = self.emitter.read(destination)
            new = new_value(self.emitter.tracked(destination).meta)
            self._write(node, destination, self._with_gradient(node, destination, old, new), not self.emitter.context[1])
        results = list(beside) or [WrittenTensor(self.emitter, destination) for destination, _ in pairs]
        is_sequence = isinstance(node.meta.get("val"), (tuple, list))
        self.emitter.env[node] = results if is_sequence else results[0]

    def _where(self, node: fx.Node) -> str:
        """Returns the user's line that called an operator; else the module, or the function that was captured."""
        return _source(node) or module_path(node) or str(getattr(self.module, "name", type(self.module).__name__))

    def _with_gradient(self, node: fx.Node, destination: fx.Node, old: str, new: str) -> str:
        """Returns a written value. It gets a gradient of zeros if only the old value has one."""
        if not self.emitter.context[1] or self.emitter.tracked(destination).parent is not None:
            return new  # for a view, the rest of the viewed tensor keeps its gradient
        needing = self.emitter.needs_gradient()
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
        mask = self.emitter.emit(node, operators.ONES_LIKE, new, dtype=torch.bool)
        return self.emitter.emit(node, operators.WHERE, mask, new, old)

    def _check_destination(self, node: fx.Node, destination: Any, where: str) -> None:
        if not isinstance(destination, fx.Node) or not isinstance(self.emitter.env[destination], (Tracked, WrittenTensor)):
            raise CaptureError(f"{node.target} at {where} writes to something that is not a tensor of the graph")

    def _metas_of(self, form: Form, where: str) -> list[Tensor]:
        """Computes the fake results of the functional form of a writing operator."""

        def fake(argument: Any) -> Any:
            if not isinstance(argument, fx.Node):
                return argument
            entry = self.emitter.env[argument]
            return self.emitter.metas[self.emitter.read(argument)] if isinstance(entry, (Tracked, WrittenTensor)) else entry

        args, kwargs = map_arguments(fake, form.args), {k: map_arguments(fake, v) for k, v in form.kwargs.items()}
        try:
            made = self.emitter.faked(form.target, args, kwargs)
        except Exception as error:
            raise CaptureError(
                f"{form.target} at {where} cannot stand in for the operator that writes in place "
                f"({str(error).splitlines()[0]}); use one that returns a new tensor"
            ) from error
        return list(made) if isinstance(made, (tuple, list)) else [made]

    def _as_written(self, node: fx.Node, new: str, made: Tensor, meta: Tensor) -> str:
        """Casts a new value to the dtype of what it is written to. Checks that the shape is the same."""
        if tuple(made.shape) != tuple(meta.shape):
            raise CaptureError(
                f"{node.target} at {self._where(node)} writes a tensor of shape {list(made.shape)} to one of "
                f"{list(meta.shape)}, which would change its shape; write to a tensor of shape {list(made.shape)}"
            )
        if made.dtype == meta.dtype:
            return new
        return self.emitter.emit(node, operators.TO_DTYPE, new, meta.dtype)

    def _keep_for_backward(self, node: fx.Node, destination: fx.Node) -> None:
        """Makes a write to an input work on a copy if autograd may save it. The input itself is changed at the end."""
        root = self.emitter.tracked(destination)
        while root.parent is not None:
            root = self.emitter.tracked(root.parent)
        if not isinstance(root, Placeholder) or root.value != root.first or not self.emitter.context[1]:
            return
        leaves = [a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, fx.Node) and a is not destination]
        operands = [self.emitter.read(a) for a in leaves if isinstance(self.emitter.env[a], (Tracked, WrittenTensor))]
        needing = self.emitter.needs_gradient()
        if any(value in needing for value in operands):
            tracked = self.emitter.tracked(destination)
            tracked.value = self.emitter.emit(node, operators.CLONE, self.emitter.read(destination))

    def _view_in_place(self, node: fx.Node, where: str) -> None:
        """Makes the node of an in-place view operator a view of what it was before."""
        destination: Any = node.args[0]
        self._check_destination(node, destination, where)
        while isinstance(self.emitter.env[destination], WrittenTensor):
            destination = self.emitter.env[destination].node
        before = self.emitter.env[destination]
        if isinstance(before, Placeholder):
            raise CaptureError(f"{node.target} at {where} changes the shape of an input; use one that returns a new tensor")
        scratch = fx.Graph()
        old = scratch.placeholder("old")
        self.emitter.env[old] = before
        for entry in pytree.tree_leaves(list(self.emitter.env.values())):
            if isinstance(entry, Tracked) and entry.parent is destination and entry.remake is not None:
                entry.parent = old
                maker, args, kwargs, which = entry.remake
                args, kwargs = pytree.tree_map(lambda a: old if a is destination else a, (args, kwargs))
                entry.remake = (maker, args, kwargs, which)
        view = scratch.call_function(view_of(node.target), (old, *node.args[1:]), dict(node.kwargs))
        view.meta = dict(node.meta)
        self.emitter.track_operator(view)
        self.emitter.env[destination] = self.emitter.env[node] = WrittenTensor(self.emitter, view)

    def _diagonal_filled(self, node: fx.Node) -> str:
        destination, value, *wrap = node.args
        meta = self.emitter.tracked(destination).meta  # type: ignore[arg-type]
        mask = diagonal_mask(
            lambda op, *args, **kwargs: self.emitter.emit(node, op, *args, **kwargs), meta, bool(wrap and wrap[0])
        )
        return self.emitter.emit(node, operators.MASKED_FILL, self.emitter.read(destination), mask, value)  # type: ignore[arg-type]

    def is_buffer(self, node: fx.Node) -> bool:
        """Tells whether a tensor is an unchanged buffer, which every rank holds whole."""
        value = self.emitter.read(node)
        return any(i.value == value and i.kind == "buffer" for i in self.emitter.inputs)

    def normalise(self, node: fx.Node) -> None:
        """Emits a norm that moves running statistics which are no buffers. They are computed separately, and written."""
        given, where = named_arguments(node), self._where(node)
        mean, var = given["running_mean"], given["running_var"]
        x = self.emitter.read(given["input"])
        shape, emit = tuple(self.emitter.metas[x].shape), lambda op, *args: self.emitter.emit_many(node, op, *args)
        with self.emitter.in_context((self.emitter.context[0], False)):
            moved = moved_statistics(emit, node, x, shape, self.emitter.read(mean), self.emitter.read(var))
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        args = tuple(None if name in operators.STATISTICS else a for name, a in zip(names, node.args))
        metas = node.meta["val"]
        metas = list(metas) if isinstance(metas, (tuple, list)) else [metas]
        outputs = self.emitter.emit_node(node, node.target, args, dict(node.kwargs), metas)
        beside = [Tracked(value, self.emitter.metas[value]) for value in outputs]
        pairs = [
            (to, lambda meta, new=new: self._as_written(node, new, self.emitter.metas[new], meta))
            for to, new in zip((mean, var), moved)
        ]
        self._write_all(node, pairs, where, beside)

    def _copied(self, node: fx.Node, meta: Tensor) -> str:
        source = node.args[1]
        if not isinstance(source, fx.Node):
            return self.emitter.emit_node(node, operators.FULL_LIKE, (node.args[0], source), {}, [meta])[0]
        value = self.emitter.read(source)
        have = self.emitter.metas[value]
        if have.dtype != meta.dtype:
            value = self.emitter.emit(node, operators.TO_DTYPE, value, meta.dtype)
        if tuple(have.shape) == tuple(meta.shape):
            return value
        wide = (1,) * (len(meta.shape) - len(have.shape)) + tuple(have.shape)
        if len(wide) > len(meta.shape) or any(a not in (1, b) for a, b in zip(wide, meta.shape)):
            raise CaptureError(
                f"a tensor of shape {list(have.shape)} takes the place of one of {list(meta.shape)} at "
                f"{_source(node) or _source(source) or self._where(source)}, which changes its shape; give it the larger shape "
                "from the beginning"
            )
        return self.emitter.emit(node, operators.EXPAND, value, list(meta.shape))

    def _write(self, at: fx.Node, destination: fx.Node, new: str, past_autograd: bool) -> None:
        """Hands a new value to a tensor, and to what it is a view of.

        Args:
            past_autograd: whether autograd does not see the write, so that the old value's gradient stays.
        """
        tracked = self.emitter.tracked(destination)
        if tracked.parent is None:
            if past_autograd and self.trains and tracked.value in self.emitter.needs_gradient():
                with self.emitter.in_context((self.emitter.context[0], True)):
                    new = self.emitter.emit(at, WRITTEN_PAST_AUTOGRAD, tracked.value, new)
        else:
            self.emitter.read(destination)
            source, _, _, which = tracked.remake  # type: ignore[misc]
            parent = self.emitter.tracked(tracked.parent)
            back = scatter_back(source, which, parent.meta, self._where(at))
            updated = back(lambda op, *a: self.emitter.emit(at, op, *a), self.emitter.read(tracked.parent), new)
            is_detached = source.target == operators.DETACH
            self._write(at, tracked.parent, updated, past_autograd or is_detached)
            if past_autograd and not is_detached:
                return  # made again from what it is a view of, whose gradient it has
            tracked.version = self.emitter.tracked(tracked.parent).writes
        tracked.value = new
        tracked.writes += 1
