"""Opaque functions: user code that is one operator, with its own forward and backward.

``torch.export`` records the operators that a function is made of, and so loses a backward that the user wrote. An opaque
function is recorded as one call instead: of :data:`FUNCTION`, whose arguments are the tensors and the function's number. Where
the program runs, the function itself is called, on whole tensors, and autograd differentiates what it does.
"""

from __future__ import annotations

import itertools
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.base.operators import may_draw, statistics_flag
from shardwright.base.torch_private import FakeTensor, TorchDispatchMode, has_side_effect, pytree
from shardwright.base.user_code import globals_read

_numbers = itertools.count()
_by_number: weakref.WeakValueDictionary[int, OpaqueFunction] = weakref.WeakValueDictionary()


class _Place:
    """A placeholder for a tensor in the structure of a result."""

    def __repr__(self) -> str:
        return "a tensor"


_TENSOR = _Place()


class OpaqueFunction:
    """A function of tensors that is one operator.

    Args:
        name: the operator's name in plans and programs.
        call: takes tensors, and returns a nested result of tensors and constants.

    Attributes:
        tags: as for torch's operators: whether its forward was seen to draw random numbers.
        may_be_split: whether its forward and backward may be run on tensors without values, to see if pieces of the tensors
            would give pieces of the result; those with effects besides may not.
        has_effects: whether its forward may read or change objects outside.
        traces: the results of these runs.
        result: the structure of what it returned when it was captured, with its constants.
        hook: which hook on gradients it calls, if it is there for one.

    >>> double = OpaqueFunction("double", lambda x: (2 * x, "doubled"))
    >>> double(torch.ones(2))
    (tensor([2., 2.]),)
    >>> double.with_result([torch.zeros(1)])
    (tensor([0.]), 'doubled')
    """

    def __init__(self, name: str, call: Callable[..., Any]):
        self.__name__ = self.__qualname__ = name
        self.__module__ = "user"
        self.call = call
        self.tags: set[torch.Tag] = set()
        self.result: tuple[Any, list[Any]] | None = None
        self.may_be_split = self.has_effects = False
        self.hook = ""
        self.traces: dict[Any, Any] = {}
        self.results_like: dict[Any, list[tuple[tuple[int, ...], torch.dtype]]] = {}  # by the shapes of the tensors
        self.number = next(_numbers)
        _by_number[self.number] = self

    def __repr__(self) -> str:
        return self.__name__

    def __deepcopy__(self, memo: Any) -> OpaqueFunction:
        return self

    def capture(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Calls the function on tensors without values, as it is captured; what its results are like is kept."""
        with draws_within() as draws:
            made = list(self._called(tensors))
        if draws.found:
            self.tags.add(torch.Tag.nondeterministic_seeded)
        self.results_like[_shapes(tensors)] = [(tuple(t.shape), t.dtype) for t in made]
        return made

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Calls the function; returns the tensors of its result.

        Tensors without values, as in predictions of memory, must not reach what the function does besides: a stand-in gives
        results of the same shapes.

        Raises:
            RuntimeError: the result has another structure, or other constants, than when it was captured.
        """
        if not self.may_be_split and any(t.is_meta or isinstance(t, FakeTensor) for t in tensors):
            like = self.results_like.get(_shapes(tensors))
            if like is not None:
                return tuple(_StandIn.apply(like, *tensors))
        return self._called(tensors)

    def _called(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        leaves, spec = pytree.tree_flatten(self.call(*tensors))
        found = (spec, [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        if self.result is None:
            self.result = found
        elif found != self.result:
            now, before = (pytree.tree_unflatten(kept, form) for form, kept in (found, self.result))
            raise RuntimeError(
                f"{self.__name__} returned {now}, and {before} when it was captured: in a parallel program a function with a "
                "backward of its own returns as many tensors, and the same constants, in every call"
            )
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def with_result(self, tensors: Sequence[Tensor]) -> Any:
        """Returns the nested result with these tensors in it."""
        assert self.result is not None, self
        spec, leaves = self.result
        given = iter(tensors)
        return pytree.tree_unflatten([next(given) if leaf is _TENSOR else leaf for leaf in leaves], spec)


def reads_outside(function: Any) -> bool:
    """Tells whether a function reads mutable outside objects, such as a list that it extends.

    >>> log = []
    >>> reads_outside(lambda x: log.append(x)), reads_outside(lambda x: torch.sin(x))
    (True, False)
    """
    if getattr(function, "__closure__", None):
        return True
    code = getattr(function, "__code__", None)
    names = globals_read(code) if code is not None else ()
    scope = getattr(function, "__globals__", {})
    fixed = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type, int, float, str, torch.dtype)
    return any(not isinstance(scope[name], fixed) for name in names if name in scope)


class RetainedGradient(OpaqueFunction):
    """The identity, which hands the gradient of its tensor to the tensor that a call returned for it."""

    def __init__(self) -> None:
        super().__init__("retain_grad", self._retain)
        self.hook = "retain_grad()"
        self._handed: list[weakref.ref[Tensor] | None] = [None]

    def _retain(self, x: Tensor) -> Tensor:
        made = x.view_as(x)
        if made.requires_grad and torch.is_grad_enabled():
            handed: list[weakref.ref[Tensor] | None] = [None]
            self._handed = handed  # of this call, whose backward may come after the next one
            made.register_hook(lambda gradient: self._keep(handed[0], gradient))
        return made

    @staticmethod
    def _keep(reference: weakref.ref[Tensor] | None, gradient: Tensor) -> None:
        tensor = None if reference is None else reference()
        if tensor is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that of reading the gradient of what is no leaf
            before = tensor.grad
        tensor.grad = gradient.detach().clone() if before is None else before + gradient.detach()

    def hand_to(self, tensor: Tensor) -> None:
        """Says which tensor the latest call returned for the one that keeps its gradient."""
        self._handed[0] = weakref.ref(tensor)


class draws_within(TorchDispatchMode):  # noqa: N801 - it is used as a function
    """Finds out whether operators within the block draw random numbers, and which tensors they write to."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False
        self.written: list[Any] = []

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or may_draw(function)
        written = [at for at, a in enumerate(function._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
        if statistics_flag(function) is not None and len(args) > 5 and args[5]:  # whose schema does not say so
            written += [3, 4]
        self.written += [args[at] for at in written if at < len(args)]
        return function(*args, **(kwargs or {}))


def opaque_function(number: int) -> OpaqueFunction:
    """Returns the function that a recorded call names. The caller has to keep it alive elsewhere."""
    return _by_number[number]


def _shapes(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors)


class _StandIn(torch.autograd.Function):
    """Results of the right shapes, and gradients of the right shapes, that nothing is computed for."""

    @staticmethod
    def forward(ctx: Any, like: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        return tuple(tensors[0].new_empty(shape, dtype=dtype) for shape, dtype in like)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *[torch.empty_like(tensor) for tensor in ctx.saved_tensors]


def _run_function(inputs: list[Tensor], number: int) -> list[Tensor]:
    return opaque_function(number).capture(inputs)


_library = torch.library.Library("shardwright_opaque", "DEF")
_library.define("function(Tensor[] inputs, int number) -> Tensor[]")
_library.define("hook(Tensor input, int number) -> ()")
_library.define("written_past_autograd(Tensor old, Tensor new) -> Tensor")
_library.impl("function", _run_function, "CompositeImplicitAutograd")
_library.impl("hook", lambda x, number: None, "CompositeImplicitAutograd")


class _WrittenPastAutograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, old: Tensor, new: Tensor) -> Tensor:
        return new.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


_library.impl("written_past_autograd", _WrittenPastAutograd.apply, "CompositeImplicitAutograd")

FUNCTION = torch.ops.shardwright_opaque.function.default  # the call of an opaque function
HOOK = torch.ops.shardwright_opaque.hook.default  # marks that a function is to be inserted where the tensor was made
has_side_effect(HOOK)
# Result of a write that autograd does not see: the value of ``new``, with the gradient of ``old``.
WRITTEN_PAST_AUTOGRAD = torch.ops.shardwright_opaque.written_past_autograd.default
