"""Ragged tensors: those whose size depends on values, such as the elements that a mask selects.

They have no place in a graph. While the callable is captured a :class:`Ragged` stands for one, and remembers how it is
computed. What is computed of it is ragged, too, until a result has one size: a sum, a loss, a write to a tensor. Then all of it
becomes one opaque operator, on whole tensors, that every rank computes as a single device does.

Invariants:

- Whether a result has one size is tried out on two sizes; a run checks it.
- A tensor that is written to between is refused: what was computed of it before is computed later here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardwright.base.opaque import FUNCTION, OpaqueFunction, draws_within
from shardwright.base.torch_private import FakeTensor, FakeTensorMode, disable_current_modes, no_function_modes, pytree
from shardwright.base.user_code import user_source
from shardwright.capture.decisions import Decisions
from shardwright.capture.refusals import refuse
from shardwright.capture.size_stand_ins import SizeStandIn, like

_PLACES = (torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere)
_SIZES = (3, 7)  # that are tried out
_FRESH = (Tensor.__getitem__, Tensor.masked_select, torch.masked_select)  # of which no other tensor is a view


@dataclass(eq=False)
class Call:
    """A call of a torch function on ragged tensors and others.

    Args:
        function, args, kwargs: the call.
        copies: whether the first argument is one that the function writes to; then a copy is written to.
    """

    function: Any
    args: Any
    kwargs: Any
    copies: bool = False
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    grad: bool = True
    autocast: Any = None

    def __post_init__(self) -> None:
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        self.versions = [(leaf, leaf._version) for leaf in leaves if isinstance(leaf, Tensor)]
        self.before = [leaf.of if isinstance(leaf, Length) else leaf for leaf in leaves if isinstance(leaf, (Ragged, Length))]
        for leaf in self.before:
            leaf.is_read = True
        self.grad, self.autocast = torch.is_grad_enabled(), _autocast()

    def value(self, given: dict[int, Tensor], made: dict[int, Any]) -> Any:
        """Computes the result of values of the tensors.

        Args:
            given: values, by the ids of the tensors of the capture.
            made: results of other calls, by id.
        """
        if id(self) not in made:
            args, kwargs = pytree.tree_map(
                lambda leaf: leaf.value(given, made) if isinstance(leaf, (Ragged, Length)) else given.get(id(leaf), leaf),
                (self.args, self.kwargs),
            )
            with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
                if self.copies:
                    args = (args[0].clone(), *args[1:])
                result = self.function(*args, **kwargs)
                made[id(self)] = args[0] if self.copies else result
        return made[id(self)]

    def tensors(self, found: dict[int, Tensor]) -> dict[int, Tensor]:
        """Collects the tensors that it reads, by id.

        Raises:
            CaptureError: one has been written to since, or autocast is another one.
        """
        for tensor, version in self.versions:
            if tensor._version != version:
                raise refuse(
                    "a tensor is written to after something whose size depends on values was computed of it",
                    "Write to a clone of it, or before",
                )
            found[id(tensor)] = tensor
        if self.autocast != _autocast():
            raise refuse("autocast is switched within what has a size that depends on values", "Switch it around all of that")
        for ragged in self.before:
            ragged.call.tensors(found)
        return found


def _autocast() -> Any:
    return [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]


class Ragged(SizeStandIn):
    """A stand-in for a tensor whose size depends on values.

    Args:
        functions: record what is computed of it.
        call: makes it.
        at: its position among the results of the call.
        samples: tensors without values, like it for each of the sizes that are tried out.
    """

    what = "a tensor"
    instead = (
        "Compute it of all elements with a weight that is zero for the others, or torch.where; for experts of transformers' "
        'models, call model.set_experts_implementation("batched_mm")'
    )

    def __init__(self, functions: RaggedFunctions, call: Call, at: int, samples: Sequence[Tensor]):
        self.functions, self.call, self.at, self.samples = functions, call, at, samples
        self.is_read = False  # whether something was computed of it
        first = samples[0]
        self.dtype, self.device, self.ndim = first.dtype, first.device, first.dim()
        self.is_cuda = first.is_cuda
        self.requires_grad, self.source = False, user_source()

    def value(self, given: dict[int, Tensor], made: dict[int, Any]) -> Tensor:
        """Computes it, as :meth:`Call.value`."""
        return pytree.tree_leaves(self.call.value(given, made))[self.at]  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        one = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Ragged))
        return one.functions.called(function, args, kwargs or {})

    @property
    def shape(self) -> tuple[Any, ...]:
        """The sizes: numbers, and stand-ins for those that depend on values."""
        pairs = zip(*(sample.shape for sample in self.samples))
        return tuple(a if a == b else Length(self, dim) for dim, (a, b) in enumerate(pairs))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> Any:
        return Length(self, None)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __iter__(self) -> Iterator[Tensor]:
        for at in range(len(self)):
            row = self.samples[0].shape[1:]
            if row != self.samples[1].shape[1:]:
                raise self._refused("an iteration")
            made = self.functions.ended(Call(Tensor.__getitem__, (self, at), {}), (row, self.dtype))
            if self.call.function in _PLACES:  # all of them, as a rule
                self.functions.decisions.likely[id(made)] = made, at
            yield made

    def __getattr__(self, name: str) -> Any:
        if name in ("T", "mT", "H", "mH"):
            return self.functions.called(_turned, (self, name), {})
        method = getattr(Tensor, name, None)
        if not callable(method) or name.startswith("__"):
            return super().__getattr__(name)
        return lambda *args, **kwargs: self.functions.called(method, (self, *args), kwargs)


class Length(SizeStandIn):
    """A stand-in for a size that depends on values, which can be compared with a number.

    Args:
        of: the ragged tensor.
        dim: whose size it is; ``None`` for the number of elements.
    """

    what, instead = "the size of a tensor", Ragged.instead

    def __init__(self, of: Ragged, dim: int | None):
        self.of, self.along = of, dim

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        one = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Length))
        return one.of.functions.called(function, args, kwargs or {})

    def value(self, given: dict[int, Tensor], made: dict[int, Any]) -> int:
        """Computes it, as :meth:`Call.value`."""
        return self.size_of(self.of.value(given, made))

    def size_of(self, tensor: Tensor) -> int:
        return tensor.numel() if self.along is None else int(tensor.shape[self.along])

    def read(self) -> int:
        """Reads it as an integer, which is a decision."""
        functions = self.of.functions
        call = Call(lambda tensor: torch.tensor(self.size_of(tensor), device=tensor.device), (self.of,), {})
        guess = self.of.call.args[0].numel() if self.of.call.function in _PLACES and not self.along else None
        return functions.decisions.integer(functions.ended(call, ((), torch.int64)), guess)

    __int__ = __index__ = read

    def compared(self, compare: Callable[[Any, Any], bool], other: Any) -> bool:
        """Compares it with a number, which is a decision."""
        if not isinstance(other, int):
            raise self._refused("a comparison")
        functions = self.of.functions
        call = Call(lambda tensor: torch.tensor(compare(self.size_of(tensor), other), device=tensor.device), (self.of,), {})
        return functions.decisions.decide(functions.ended(call, ((), torch.bool)))

    def __bool__(self) -> bool:
        return self.compared(operator.ne, 0)


def _operator(form: str) -> Any:
    return lambda self, *others: self.functions.called(getattr(Tensor, form), (self, *others), {})


for _compare in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne):
    setattr(Length, f"__{_compare.__name__}__", lambda self, other, compare=_compare: self.compared(compare, other))
for _name in ("add", "sub", "mul", "truediv", "pow", "matmul", "mod", "floordiv", "and", "or", "xor"):
    for _form in (f"__{_name}__", f"__r{_name}__"):
        if hasattr(Tensor, _form):
            setattr(
                Ragged, _form, lambda self, other, form=_form: self.functions.called(getattr(Tensor, form), (self, other), {})
            )
    setattr(Ragged, f"__i{_name}__", lambda self, other, form=f"__{_name}__": self.functions.written(self, form, other))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "getitem"):
    _form = f"__{_name}__"
    setattr(Ragged, _form, _operator(_form))
for _name in ("neg", "invert", "abs"):
    setattr(Ragged, f"__{_name}__", _operator(f"__{_name}__"))


class RaggedFunctions:
    """Records what a captured callable computes of ragged tensors.

    Args:
        decisions: those by values of tensors.
    """

    def __init__(self, decisions: Decisions):
        self.decisions = decisions
        self.mode = FakeTensorMode()
        self.kept: list[OpaqueFunction] = []  # recorded calls name them by number, which keeps nothing alive

    def begun(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Returns what a function that selects by values makes; ``None`` if it is none on these arguments."""
        if function in (Tensor.__getitem__, torch.masked_select, Tensor.masked_select):
            given = args[1:] if function is Tensor.__getitem__ else args[1:2]
            leaves = pytree.tree_leaves(given)
            selects = any(isinstance(leaf, Ragged) or (isinstance(leaf, Tensor) and _is_mask(leaf)) for leaf in leaves)
            return self.called(function, args, kwargs) if selects else None
        if function in (torch.where, torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere):
            if function is torch.where and len(args) + len(kwargs) > 1:
                return None
            return self.called(function, args, kwargs)
        leaves = pytree.tree_leaves((args[1:], kwargs))
        return self.called(function, args, kwargs) if any(isinstance(leaf, Ragged) for leaf in leaves) else None

    def called(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Returns the result of a function: tensors where it has one size, else ragged ones.

        Raises:
            CaptureError: it draws, writes to a ragged tensor, or returns a number that depends on values.
        """
        name = getattr(function, "__name__", str(function))
        writes = function is Tensor.__setitem__ or (name.endswith("_") and not name.endswith("__"))
        if writes and args and isinstance(args[0], Tensor):
            target = args[0]
            result = self.ended(Call(function, args, kwargs, copies=True), (target.shape, target.dtype))
            target.copy_(result)
            return True if function is Tensor.__setitem__ else target
        if writes or name in ("backward", "item", "tolist", "numpy", "register_hook"):
            raise Ragged._refused(name)
        found = [pytree.tree_flatten(self._sample(function, args, kwargs, at)) for at in range(len(_SIZES))]
        (ones, spec), (others, _) = found
        call = Call(function, args, kwargs)
        pairs = list(zip(ones, others, strict=True))
        leaves = [self._leaf(call, at, pair, name) for at, pair in enumerate(pairs)]
        one_size = [isinstance(one, Tensor) and one.shape == other.shape for one, other in pairs]
        if all(one_size):
            leaves = pytree.tree_leaves(self.ended(call, *[(one.shape, one.dtype) for one in ones]))
        elif any(one_size):  # beside ragged ones
            apart = zip(leaves, one_size, ones)
            leaves = [self.ended(Call(_same, (r,), {}), (one.shape, one.dtype)) if ends else r for r, ends, one in apart]
        return pytree.tree_unflatten(leaves, spec)

    def written(self, ragged: Ragged, form: str, other: Any) -> Ragged:
        """Writes to a ragged tensor in place, if nothing else reads its memory: it has just been selected."""
        if ragged.is_read or ragged.call.function not in _FRESH:
            raise Ragged._refused(f"{form} in place")
        made = self.called(getattr(Tensor, form), (ragged, other), {})
        if not isinstance(made, Ragged) or made.dtype != ragged.dtype:
            raise Ragged._refused(f"{form} in place")
        return made

    def ended(self, call: Call, *likes: tuple[Sequence[int], torch.dtype]) -> Any:
        """Records a call whose results have one size, with all that it reads, as one operator.

        Args:
            call: the call.
            likes: shapes and dtypes of its results.
        """
        tensors = call.tensors({})
        ids = list(tensors)
        name = getattr(call.function, "__name__", "function").strip("_<>")

        def run(*given: Tensor) -> Any:
            if any(isinstance(value, FakeTensor) for value in given):
                return [like(given[0], shape, given, dtype) for shape, dtype in likes]
            made = pytree.tree_leaves(call.value(dict(zip(ids, given)), {}))
            for (shape, _), value in zip(likes, made, strict=True):
                if tuple(shape) != value.shape:
                    raise RuntimeError(
                        f"{name} gives {list(value.shape)}, and {list(shape)} for other sizes that depend on values: in a "
                        "parallel program it has to have one size"
                    )
            return made

        function = OpaqueFunction(f"{name}_of_selected", run)
        self.kept.append(function)
        made = FUNCTION(list(tensors.values()), function.number)
        return made[0] if len(likes) == 1 else made

    def _leaf(self, call: Call, at: int, pair: tuple[Any, Any], name: str) -> Any:
        one, other = pair
        if isinstance(one, Tensor):
            return Ragged(self, call, at, pair)
        if one != other:
            raise Ragged._refused(name)
        return one

    def _sample(self, function: Any, args: Any, kwargs: Any, at: int) -> Any:
        """Calls a function on tensors without values, with one of the sizes that are tried out."""
        with disable_current_modes(), no_function_modes(), self.mode, draws_within() as draws:
            args, kwargs = pytree.tree_map(lambda leaf: self._sample_of(leaf, at), (args, kwargs))
            given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            result = _selected(function, args, kwargs, _SIZES[at])
        if draws.found:
            raise Ragged._refused("a function that draws random numbers")
        if any(written is tensor or getattr(written, "_base", None) is tensor for written in draws.written for tensor in given):
            raise Ragged._refused("a function that moves running statistics, or writes to another tensor,")
        return result

    def _sample_of(self, leaf: Any, at: int) -> Any:
        if isinstance(leaf, (Ragged, Length)):
            return leaf.samples[at] if isinstance(leaf, Ragged) else leaf.size_of(leaf.of.samples[at])
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)


def _turned(tensor: Tensor, name: str) -> Tensor:
    return getattr(tensor, name)  # type: ignore[no-any-return]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _is_mask(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bool, torch.uint8) and tensor.dim() > 0


def _selected(function: Any, args: Any, kwargs: Any, size: int) -> Any:
    """Calls a function on tensors without values, as if masks select a number of elements."""
    if function in (torch.masked_select, Tensor.masked_select):
        return args[0].new_empty(size)
    if function in (torch.nonzero, Tensor.nonzero, torch.where, torch.argwhere, Tensor.argwhere):
        tensor = args[0] if args else next(iter(kwargs.values()))
        if function is torch.where or kwargs.get("as_tuple"):
            return tuple(tensor.new_empty(size, dtype=torch.int64) for _ in range(max(1, tensor.dim())))
        return tensor.new_empty((size, tensor.dim()), dtype=torch.int64)
    if function is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        places: list[Any] = []
        for one in index:
            is_mask = isinstance(one, Tensor) and _is_mask(one)
            places += [one.new_empty(size, dtype=torch.int64) for _ in range(one.dim())] if is_mask else [one]
        return args[0][tuple(places)]
    return function(*args, **kwargs)


# Functions that select by values, or read what was selected.
OF_RAGGED = (
    Tensor.__getitem__, Tensor.__setitem__, torch.masked_select, Tensor.masked_select, torch.where, torch.nonzero,
    Tensor.nonzero, torch.argwhere, Tensor.argwhere,
)  # fmt: skip
