"""Emitter: appends operators to the graph that is being made, and keeps the current value of each tensor."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from shardwright.base import operators
from shardwright.base.opaque import OpaqueFunction
from shardwright.base.torch_private import FakeTensorMode, pytree
from shardwright.base.user_code import _source
from shardwright.capture.functionalise import Tracked
from shardwright.capture.fx_nodes import map_arguments, meta_of, module_calls, module_path, storage_of, with_dense_gradient
from shardwright.capture.names import Names
from shardwright.capture.session import BATCH, COPY, RECOMPUTE
from shardwright.capture.strides import strides_made
from shardwright.ir.graph import GraphInput, NeedsGradient, Node
from shardwright.ir.operator import Operator, OpOverload, Slot, TensorMeta


class Emitter:
    """Inputs and nodes of a graph so far, and the current value of every tensor.

    Args:
        autocast: the autocast around the callable, as :func:`~shardwright.capture.fakes.autocast_around` returns it.
    """

    def __init__(self, autocast: Any):
        self.inputs: list[GraphInput] = []
        self.nodes: list[Node] = []
        self.env: dict[fx.Node, Any] = {}  # fx node -> Tracked, list of Tracked, or a plain value
        self.names = Names()
        self.metas: dict[str, Tensor] = {}  # value -> fake tensor
        self.described: dict[str, TensorMeta] = {}  # value -> what rules see of it
        self.operators: dict[Any, Operator] = {}
        self.needing = NeedsGradient()
        self.restrided: set[str] = set()  # values whose strides differ from those in the exported program
        self.calls: dict[str, Any] = {}  # node name -> custom meta
        self.context: tuple[Any, bool] = (autocast, torch.is_grad_enabled())

    def needs_gradient(self) -> Any:
        """Returns the values so far that a gradient flows through."""
        return self.needing.of(self.inputs, self.nodes)

    @contextlib.contextmanager
    def in_context(self, context: tuple[Any, bool]) -> Iterator[None]:
        """Sets, within the block, autocast and grad mode of the operators."""
        outside, self.context = self.context, context
        try:
            yield
        finally:
            self.context = outside

    def track_operator(self, node: fx.Node) -> None:
        """Emits an exported operator as it is, and tracks its outputs. They may be views of its inputs."""
        metas = node.meta["val"]
        sequence = isinstance(metas, (tuple, list))
        if sequence and any(meta is None for meta in metas):  # gradients that a backward operator was not asked for
            metas = [self.faked(torch.empty, (0,), {}) if meta is None else meta for meta in metas]
        args, kwargs = with_dense_gradient(node)
        outputs = self.emit_node(node, node.target, args, kwargs, list(metas) if sequence else [metas])
        parent = self._viewed(node, metas[0] if sequence and metas else metas)
        tracked: list[Any] = []
        for i, (value, meta) in enumerate(zip(outputs, metas if sequence else [metas], strict=True)):
            entry = Tracked(value, meta)
            if parent is not None:
                entry.parent, entry.version = parent, self.tracked(parent).writes
                entry.remake = (node, node.args, node.kwargs, i if sequence else None)
                entry.context = self.context
            tracked.append(entry)
        self.env[node] = tracked if sequence else tracked[0]

    def track_opaque(self, node: fx.Node, function: OpaqueFunction, tensors: Sequence[fx.Node]) -> None:
        """Emits the call of an opaque function on tensors. It returns new tensors."""
        inputs = [self.read(tensor) for tensor in tensors]
        slots = tuple(Slot(i) for i in range(len(inputs)))
        metas = list(node.meta["val"])
        outputs = self._append(node, function, slots, {}, inputs, metas, sequence=True)
        self.env[node] = [Tracked(value, meta) for value, meta in zip(outputs, metas, strict=True)]

    def _viewed(self, node: fx.Node, meta: Any) -> fx.Node | None:
        """Finds the input that an operator's output shares its memory with."""
        if not isinstance(meta, Tensor) or node.target == operators.LIFTS_COPY or operators.is_unsafe_view(node.target):
            return None
        for argument in pytree.tree_leaves((node.args, node.kwargs)):
            if isinstance(argument, fx.Node):
                shares = isinstance(self.env.get(argument), (Tracked, WrittenTensor))
                if shares and storage_of(self.tracked(argument).meta) == storage_of(meta):
                    return argument
        return None

    def read(self, node: fx.Node) -> str:
        """Returns the current value of a tensor. A view of something written to since is computed again."""
        tracked = self.tracked(node)
        if tracked.parent is not None:
            current = self.read(tracked.parent)
            parent = self.tracked(tracked.parent)
            if tracked.version != parent.writes:
                source, args, kwargs, which = tracked.remake  # type: ignore[misc]
                metas = source.meta["val"]
                with self.in_context(tracked.context):
                    out = self.emit_node(
                        source, source.target, args, kwargs, list(metas) if which is not None else [metas],
                    )  # fmt: skip
                tracked.value = out[which or 0]
                tracked.version = parent.writes
                tracked.writes += 1
                assert current
        return tracked.value

    def tracked(self, node: fx.Node) -> Tracked:
        """Returns the entry of a tensor; after a write, that of the tensor written to."""
        entry = self.env[node]
        while isinstance(entry, WrittenTensor):
            entry = self.env[entry.node]
        assert isinstance(entry, Tracked), (node, entry)
        return entry

    def emit(self, at: fx.Node, overload: Any, *args: Any, **kwargs: Any) -> str:
        """Emits an operator with one result, on values given by name."""
        return self.emit_many(at, overload, *args, **kwargs)[0]

    def emit_many(self, at: fx.Node, overload: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Emits an operator on values given by name. The shapes of its results are found with fake tensors."""
        made = self.faked(overload, [self.metas[a] if isinstance(a, str) else a for a in args], kwargs)
        inputs = [a for a in args if isinstance(a, str)]
        slots = iter(range(len(inputs)))
        arguments = tuple(Slot(next(slots)) if isinstance(a, str) else a for a in args)
        sequence = isinstance(made, (tuple, list))
        return self._append(at, overload, arguments, kwargs, inputs, list(made) if sequence else [made], sequence)

    def emit_node(self, at: fx.Node, overload: Any, args: Any, kwargs: Any, metas: list[Any]) -> list[str]:
        """Emits an operator on an fx node's arguments. Returns the names of its outputs.

        Args:
            at: the fx node that the new node takes its module, source line and marks from.
            overload: the operator.
            args, kwargs: its arguments, in which fx nodes stand for tensors.
            metas: fake tensors of global shape, one per output.
        """
        inputs: list[str] = []

        def slot(argument: Any) -> Any:
            if not isinstance(argument, fx.Node):
                return argument
            entry = self.env[argument]
            if not isinstance(entry, (Tracked, WrittenTensor)):
                return entry
            inputs.append(self.read(argument))
            return Slot(len(inputs) - 1)

        arguments, keywords = map_arguments(slot, args), {k: map_arguments(slot, v) for k, v in kwargs.items()}
        sequence = len(getattr(overload._schema, "returns", ())) != 1 or isinstance(at.meta.get("val"), (tuple, list))
        return self._append(at, overload, arguments, keywords, inputs, metas, sequence)

    def faked(self, overload: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator on fake tensors and returns its fake results."""
        known = [*pytree.tree_leaves((args, kwargs)), *self.metas.values()]
        mode = next((leaf.fake_mode for leaf in known if hasattr(leaf, "fake_mode")), None)
        with warnings.catch_warnings(), mode or FakeTensorMode(allow_non_fake_inputs=True):
            warnings.simplefilter("ignore")
            return overload(*args, **kwargs)

    def _append(
        self, at: fx.Node, overload: Any, args: Any, kwargs: Any, inputs: list[str], metas: list[Any], sequence: bool
    ) -> list[str]:
        name = self.names.new(getattr(overload, "overloadpacket", overload).__name__.strip("_"))
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
                name, operator, tuple(inputs), tuple(outputs), module_path(at), _source(at), autocast=autocast, grad=grad,
                recompute=custom.get(RECOMPUTE), calls=module_calls(at),
                copy=custom.get(COPY), carries_batch=BATCH in custom,
            )
        )  # fmt: skip
        self.calls[name] = custom
        return outputs

    def _as_made(self, overload: Any, args: Any, kwargs: Any, inputs: list[str], metas: list[Any]) -> list[Any]:
        """Returns an operator's fake outputs with the strides that its kernel gives them."""
        if not isinstance(overload, OpOverload):
            return metas
        orders: list[Any] = [None] * len(metas)
        if not self.restrided.isdisjoint(inputs):

            def fake(leaf: Any) -> Any:
                return self.metas[inputs[leaf.index]] if isinstance(leaf, Slot) else leaf

            with contextlib.suppress(Exception):  # for example under autocast; the strides then stay as export has them
                keywords = {k: map_arguments(fake, v) for k, v in kwargs.items()}
                made = self.faked(overload, map_arguments(fake, args), keywords)
                orders = [m.stride() for m in (made if isinstance(made, (tuple, list)) else [made])]
        own = strides_made(overload, [self.metas[i] for i in inputs], metas[0]) if metas else None
        if own is not None:
            orders[0] = own
        return [
            meta if order is None or order == meta.stride() or len(order) != meta.ndim else self._restrided(meta, order)
            for meta, order in zip(metas, orders)
        ]

    def _restrided(self, meta: Tensor, order: tuple[int, ...]) -> Tensor:
        return self.faked(torch.empty_strided, (tuple(meta.shape), order), {"dtype": meta.dtype, "device": meta.device})  # type: ignore[no-any-return]

    def _describe(self, value: str) -> TensorMeta:
        found = self.described.get(value)
        if found is None:
            found = self.described[value] = meta_of(self.metas[value])
        return found

    def _operator_call(
        self, overload: Any, args: Any, kwargs: Any, inputs: list[str], outputs: list[str], sequence: bool
    ) -> Operator:
        """Returns one ``Operator`` object for all equal calls, such as those of repeated layers.

        So what others compute per object is computed once for all of them. The text of the arguments tells 1 from 1.0 and from
        True, which are equal.
        """
        taken, made = tuple(map(self._describe, inputs)), tuple(map(self._describe, outputs))
        devices = tuple([meta.device for meta in (*taken, *made)])  # two metas are equal whatever their devices
        key = (overload, repr(args), repr(kwargs), taken, made, devices, sequence)
        found = self.operators.get(key)
        if found is None:
            found = self.operators[key] = Operator(overload, args, kwargs, taken, made, sequence)
        return found


class Placeholder(Tracked):
    """A placeholder of the exported program, which remembers the value it came in with."""

    def __init__(self, value: str, meta: Tensor, first: str):
        super().__init__(value, meta)
        self.first = first


class WrittenTensor:
    """A written tensor, as the result of the write."""

    def __init__(self, emitter: Emitter, node: fx.Node):
        entry = emitter.env[node]
        self.node: fx.Node = entry.node if isinstance(entry, WrittenTensor) else node
