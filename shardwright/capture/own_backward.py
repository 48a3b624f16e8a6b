"""Own backward: the user's functions and hooks that decide gradients, recorded as opaque operators.

``torch.autograd.Function``, the hooks of tensors and the backward hooks of modules run as themselves in the parallel program,
on whole tensors, so that each sees the single device's values, once per rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.base.opaque import FUNCTION, HOOK, OpaqueFunction, RetainedGradient, reads_outside
from shardwright.base.torch_private import BackwardHook, FakeTensor, pytree
from shardwright.capture.names import Names
from shardwright.ir.graph import Graph, Node
from shardwright.ir.operator import Operator, Slot

_METHODS = ("forward", "setup_context", "backward", "vjp")  # of an autograd.Function


class OwnBackwards:
    """All opaque functions of one capture. Equal calls, such as those of repeated layers, share one.

    Args:
        refuse: makes the error for what cannot be recorded, from a text and what to write instead.
    """

    def __init__(self, refuse: Callable[[str, str], Exception]):
        self.refuse = refuse
        self.by_call: dict[Any, OpaqueFunction] = {}
        self.kept: list[OpaqueFunction] = []  # recorded calls name them by number, which keeps nothing alive

    def call(self, function: Any, apply: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Records the call of an ``autograd.Function`` and returns its result.

        Args:
            function: its class.
            apply: its ``apply``, as torch has it.
            args: tensors, and constants.
        """
        leaves, spec = pytree.tree_flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        constants = tuple((i, leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
        key = (function, spec, repr(constants)) if all(_is_plain(leaf) for _, leaf in constants) else (object(),)
        found = self.by_call.get(key)
        if found is None:

            def call(*given: Tensor) -> Any:
                rest = dict(constants)
                values = iter(given)
                whole = [rest[i] if i in rest else next(values) for i in range(spec.num_leaves)]
                return apply(*pytree.tree_unflatten(whole, spec))

            found = self.by_call[key] = OpaqueFunction(function.__name__, call)
            found.has_effects = any(reads_outside(getattr(function, name, None)) for name in _METHODS)
            found.may_be_split = not found.has_effects
        return self.record(found, tensors)

    def record(self, function: OpaqueFunction, tensors: list[Tensor]) -> Any:
        """Records the call of an opaque function on tensors, and returns its nested result.

        Raises:
            CaptureError: it cannot run without values, or changes an argument in place.
        """
        versions = [t._version for t in tensors]
        try:
            made = FUNCTION(tensors, function.number)
        except Exception as error:
            raise self.refuse(
                f"{function} cannot be captured: it cannot run on the shapes of tensors alone "
                f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'})",
                "Make it an operator with torch.library.custom_op, with register_fake for its shapes and register_autograd for "
                "its backward; or call it outside of the parallel module",
            ) from error
        if [t._version for t in tensors] != versions:
            raise self.refuse(
                f"{function} cannot be captured: it changes an argument in place (ctx.mark_dirty)",
                "Return a new tensor instead",
            )
        return function.with_result(made)

    # -- hooks ------------------------------------------------------------------------------------------------------------

    def hook(self, tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> _Handle:
        """Records a hook on the gradient of a tensor, and returns its handle."""
        if _holds_fakes(hook):
            raise self.refuse(
                "Tensor.register_hook cannot be captured: the hook reads a tensor that is computed in the captured callable",
                "Write it as a torch.autograd.Function that takes the tensor as an argument and saves it for its backward",
            )
        handle = _Handle()

        def call(x: Tensor) -> Tensor:
            made = x.view_as(x) if torch.is_grad_enabled() else x
            if made.requires_grad and not handle.is_removed:
                made.register_hook(hook)
            return made

        function = OpaqueFunction(f"hook_{_name(hook).strip('<>')}", call)
        function.hook = f"the hook {_name(hook)}"
        self.kept.append(function)
        HOOK(tensor, function.number)
        return handle

    def retain(self, tensor: Tensor) -> None:
        """Records that a tensor keeps its gradient."""
        function = RetainedGradient()
        self.kept.append(function)
        HOOK(tensor, function.number)


class RecordedBackwardHook:
    """Replaces torch's ``BackwardHook`` for a module's call: records it as a pair of operators, before and after the call.

    Args:
        own: the opaque functions of the capture.
        module, hooks, pre_hooks: as for torch's class.
    """

    def __init__(self, own: OwnBackwards, module: nn.Module, hooks: Any, pre_hooks: Any):
        self.own, self.name = own, type(module).__name__
        self.hook = f"the backward hook {' and '.join(map(_name, (*hooks, *pre_hooks)))}"
        self.make = lambda: BackwardHook(module, hooks, pre_hooks)
        self.of_call: Any = None  # torch's, set while a call runs

    def setup_input_hook(self, args: Any) -> Any:
        """Records the operator before the call; returns the arguments that the module is to get."""

        def before(*tensors: Tensor) -> Any:
            self.of_call = self.make()
            return self.of_call.setup_input_hook(_filled(args, tensors))

        return self._recorded(f"{self.name}_inputs", before, args)

    def setup_output_hook(self, result: Any) -> Any:
        """Records the operator after the call; returns the result that the caller is to get."""

        def after(*tensors: Tensor) -> Any:
            return self.of_call.setup_output_hook(_filled(result, tensors))

        return self._recorded(f"{self.name}_results", after, result)

    def _recorded(self, name: str, call: Callable[..., Any], value: Any) -> Any:
        tensors = [leaf for leaf in _direct(value) if isinstance(leaf, Tensor)]
        if not tensors:
            return call()
        function = OpaqueFunction(name, call)
        function.hook = self.hook
        self.own.kept.append(function)
        return self.own.record(function, tensors)


def with_hooks(
    nodes: list[Node], hooks: Mapping[str, Sequence[OpaqueFunction]], names: Names
) -> tuple[list[Node], dict[str, str]]:
    """Inserts every hook right behind the node that makes its value. Also returns the values' names behind the hooks.

    So a hook sees the whole gradient of the value, whoever reads it, before or after the hook was registered.
    """
    found: list[Node] = []
    renamed: dict[str, str] = {}
    for node in nodes:
        found.append(replace(node, inputs=tuple(renamed.get(value, value) for value in node.inputs)))
        for value, meta in zip(node.outputs, node.op.outputs):
            # the first of them is the first to see the gradient, and what retains it the last
            for function in sorted(reversed(hooks.get(value, ())), key=lambda hook: not isinstance(hook, RetainedGradient)):
                name = names.new(function.__name__)
                operator = Operator(function, (Slot(0),), {}, (meta,), (meta,), True)
                source = renamed.get(value, value)
                found.append(Node(name, operator, (source,), (name,), node.module, node.source))
                renamed[value] = name
    return found, renamed


def retained_outputs(graph: Graph) -> list[tuple[int, RetainedGradient]]:
    """Returns which outputs of a graph keep the gradients of values within it, each with what hands the gradient on."""
    found: list[tuple[int, RetainedGradient]] = []
    behind: dict[str, list[RetainedGradient]] = {}  # value -> what retains the gradient of that without hooks
    for node in graph.nodes:
        if isinstance(node.op.target, RetainedGradient):
            behind.setdefault(node.outputs[0], []).append(node.op.target)
        if isinstance(node.op.target, OpaqueFunction) and len(node.inputs) == 1:
            behind.setdefault(node.outputs[0], []).extend(behind.get(node.inputs[0], ()))
    for index, output in enumerate(graph.outputs):
        found += [(index, function) for function in behind.get(output, ())] if isinstance(output, str) else []
    return found


class _Handle:
    """A handle returned by ``register_hook``, which removes the hook."""

    def __init__(self) -> None:
        self.is_removed = False

    def remove(self) -> None:
        self.is_removed = True

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def _direct(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _filled(value: Any, tensors: tuple[Tensor, ...]) -> Any:
    """Replaces the tensors of a tuple, or a single tensor. Torch's hooks do not see nested ones."""
    given = iter(tensors)
    filled = tuple(next(given) if isinstance(leaf, Tensor) else leaf for leaf in _direct(value))
    return filled if isinstance(value, tuple) else filled[0]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def _name(hook: Any) -> str:
    """Returns the name of a hook as the user wrote it."""
    name: str = getattr(hook, "__name__", type(hook).__name__)
    return name


def _holds_fakes(hook: Any) -> bool:
    """Tells whether a hook closes over a tensor of the capture, which has no values."""
    cells = getattr(hook, "__closure__", None) or ()
    values = [cell.cell_contents for cell in cells] + list(getattr(hook, "__defaults__", None) or ())
    values += [getattr(hook, "args", ()), getattr(hook, "keywords", {})]
    return any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(values))
