"""Torch functions that a captured callable calls: refused where a graph cannot keep them, else annotated with their line."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import GetSetDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwright.base.torch_private import FakeTensor, annotate, function_modes, pytree, within_function_modes
from shardwright.base.user_code import SOURCE, user_frame, user_source
from shardwright.capture.checked_losses import CHECKED
from shardwright.capture.closure import attribute_of
from shardwright.capture.data import check_aliases, give_data
from shardwright.capture.decisions import Decisions
from shardwright.capture.derivatives import Modes, derivative
from shardwright.capture.fx_nodes import storage_of
from shardwright.capture.own_backward import OwnBackwards
from shardwright.capture.ragged import OF_RAGGED
from shardwright.capture.recorded import Recorded
from shardwright.capture.refusals import refuse, refused
from shardwright.capture.sequences import OF_SEQUENCES, Sequences, handled
from shardwright.capture.session import CLOCK
from shardwright.errors import CaptureError


class Watch(TorchFunctionMode):
    """Sees every torch function that the captured callable calls on tensors.

    Args:
        module: what is captured.
        decisions: those by values of tensors, where they can be kept.
    """

    def __init__(self, module: nn.Module, decisions: Decisions | None = None):
        super().__init__()
        self.module, self.decisions, self.thread = module, decisions, threading.get_ident()
        self.given: set[int] = set()  # ids of the tensors that stand for inputs, parameters and buffers
        self.assigned: dict[tuple[int, str], str] = {}  # by id of a module and name of a buffer, the line that assigned it
        self.known: set[int] = set()  # ids of tensors with gradients that belong to the module
        self.is_transforming = False  # whether a transformation of torch.func runs
        self.data_writes: list[Any] = []  # inputs, parameters and buffers whose .data was assigned, the writes, and where
        self.has_pushed = False  # whether such a one took a forward-mode derivative
        self.running = False  # whether the callable runs, and not what torch does before and after
        self.own_backwards = OwnBackwards(refuse)
        self.sequences = None if decisions is None else Sequences(decisions)
        self.clock = 0  # counts the torch functions that the callable calls
        self.made_to_require: set[int] = set()  # positions of inputs that the callable itself makes require a gradient
        self.saved: dict[Any, int] = {}  # storage that autograd saved for the backward pass -> when on the clock

    def begin(self, args: Any, kwargs: Any) -> None:
        """Records the tensors that the callable is about to work on."""
        given = [*self.module.parameters(), *self.module.buffers(), *pytree.tree_leaves((args, kwargs))]
        self.given = {id(leaf) for leaf in given if isinstance(leaf, Tensor)}
        self.trained = [leaf for leaf in given if isinstance(leaf, Tensor) and leaf.requires_grad]
        self.arguments = (args, kwargs)
        self.flat = pytree.tree_flatten(self.arguments)
        self.modes = Modes.now()
        around = function_modes()
        self.of_export = around[around.index(self) + 1 :]
        self.running = True

    def note_assigned(self, module: nn.Module, name: str, value: Any) -> None:
        """Remembers the line that assigns a parameter or buffer."""
        self.assigned[id(module), name] = user_source()

    def end(self) -> None:
        """Records that the callable has ended. What torch does afterwards is not watched.

        Raises:
            CaptureError: it swallowed a refusal, or changed its arguments.
        """
        self.running = False
        for written, since, value, source in self.data_writes:
            check_aliases(Recorded().graph, written, since, value, source)
        if refused:
            raise refused[0]
        leaves, spec = pytree.tree_flatten(self.arguments)
        before, spec_before = self.flat
        if spec != spec_before or any(a is not b for a, b in zip(leaves, before)):
            raise CaptureError(
                f"{type(self.module).__name__} changes an argument in place: a list, dict or the like that it is handed is "
                "another one in a capture, so the caller's would stay as it is\n  Return what is new, or change a copy"
            )

    def check_called(self, module: nn.Module, args: Any) -> None:
        """Refuses calls of modules that are not submodules of the captured one.

        Nobody would train them or update their buffers.

        Raises:
            CaptureError: the module is not a submodule.
        """
        if not self.is_in_callable:
            return
        held = itertools.chain(*(t.values() for m in module.modules() for t in (m._parameters, m._buffers)))
        if any(tensor is not None and not isinstance(tensor, FakeTensor) for tensor in held):
            raise refuse(
                f"{type(module).__name__} is called in a captured callable that does not have it as a submodule: its "
                "parameters would get no gradients, its buffers no updates",
                "Make it a submodule: an attribute of its own, or in an nn.ModuleList or nn.ModuleDict",
            )

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _HANDLERS.get(_key(function))
        if handler is not None and self.is_in_callable:
            found = handler(self, function, args, kwargs or {})
            if found is not None:
                return found
        if not self.is_in_callable:
            return function(*args, **(kwargs or {}))
        if kwargs and isinstance(kwargs.get("generator"), torch.Generator):
            raise refuse(
                f"{getattr(function, '__name__', function)}(generator=...) cannot be captured: ranks draw the single device's "
                "numbers from torch's default generator",
                "Leave generator out, and seed with torch.manual_seed before the step; or draw outside and hand the numbers in",
            )
        with self.at_user_line() as is_users:
            if is_users and torch.is_grad_enabled():
                self.check_real(pytree.tree_leaves((args, kwargs)))
            return function(*args, **(kwargs or {}))

    @contextmanager
    def at_user_line(self) -> Iterator[bool]:
        """Annotates operators, within the block, with the user's line and the time; yields whether there is such a line."""
        frame = user_frame()
        if frame is None:
            yield False
            return
        self.clock += 1
        with annotate({SOURCE: (frame.f_code.co_filename, frame.f_lineno), CLOCK: self.clock}):
            yield True

    def check_real(self, leaves: list[Any]) -> None:
        """Refuses a tensor with a gradient that is not the captured module's. A graph would take it for a constant.

        Raises:
            CaptureError: there is one among the leaves.
        """
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.requires_grad and not isinstance(leaf, FakeTensor):
                if id(leaf) not in self.known and attribute_of(self.module, leaf) is None:
                    raise refuse(
                        f"a tensor of {list(leaf.shape)} with a gradient is read in a captured callable that does not have it: "
                        "it would get none",
                        f"Make it a parameter of {type(self.module).__name__}, in an nn.ParameterList if there are several",
                    )
                self.known.add(id(leaf))

    def read_number(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Reads a number off a tensor, which is refused if it depends on values.

        It is refused even if the user's code catches what torch raises.
        """
        if self.decisions is not None and not self.is_transforming and _is_computed(args):
            found = self._decided(function, args, kwargs)
            if found is not None:
                return found
        try:
            found = function(*args, **kwargs)
        except Exception as error:
            raise self._of_values(function, error) from error
        if any(isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)) for leaf in pytree.tree_leaves(found)):
            raise self._of_values(function, None)
        return found

    def _decided(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Returns what Python decides by, or the text that stands for values; ``None`` where a number itself is read."""
        assert self.decisions is not None
        tensor = args[0]
        with self.at_user_line():
            if function is Tensor.__format__ or function is Tensor.__repr__:
                return self.decisions.text(tensor, lambda value: function(value, *args[1:], **kwargs))
            if function is Tensor.__contains__:
                tensor = (args[1] == tensor).any()
            elif function in (torch.equal, Tensor.equal):
                if args[0].dtype != args[1].dtype:
                    return None
                return args[0].shape == args[1].shape and self.decisions.decide((args[0] == args[1]).all())
            elif function in (torch.allclose, Tensor.allclose):
                tensor = torch.isclose(*args, **kwargs).all()
            elif tensor.numel() != 1:
                return None
            elif _is_integer(tensor) and function in (Tensor.item, Tensor.__int__, Tensor.__index__):
                return self.decisions.integer(tensor)
            elif function not in _READ_TRUTH or (function is Tensor.item and tensor.dtype is not torch.bool):
                return None
            return self.decisions.decide(tensor)

    def of_checked(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Records a loss that looks at values before it computes."""
        if self.decisions is None or self.is_transforming:
            return None
        with self.at_user_line(), within_function_modes(self.of_export):  # which take notice of no_grad
            return CHECKED[function](self.decisions.decide, *args, **kwargs)

    def of_sequences(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Records a function of packed sequences, or of elements that a mask selects."""
        method = handled(function, args) if self.sequences is not None else None
        if method is None:
            return None
        with self.at_user_line():
            return getattr(self.sequences, method)(function, *args, **kwargs)

    def of_ragged(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Records what selects by values, and what reads that."""
        if self.sequences is None or self.is_transforming:
            return None
        with self.at_user_line():
            return self.sequences.ragged.begun(function, args, kwargs)

    def _of_values(self, function: Any, error: Exception | None) -> CaptureError:
        known = error is None or "DataDependent" in type(error).__name__ or not str(error)
        said = "" if known else f" ({type(error).__name__}: {str(error).splitlines()[0]})"
        return refuse(
            f"{getattr(self.module, 'name', type(self.module).__name__)} cannot be captured as a graph: "
            f"Tensor.{function.__name__} reads a number of a tensor that is computed{said}",
            "A captured callable may not call .item() or make a number of values of tensors, and no size may depend on them; "
            "compute with the tensor itself, return it and read it outside, or write it with torch.where",
        )

    def save(self, tensor: Tensor) -> Tensor:
        """Takes notice that autograd saves a tensor for the backward pass."""
        self.saved.setdefault(storage_of(tensor), self.clock)
        return tensor

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops watching within the block, which is recorded as one operator."""
        running, self.running = self.running, False
        try:
            yield
        finally:
            self.running = running

    @contextmanager
    def transforming(self) -> Iterator[None]:
        """Marks a block in which a transformation runs, where functions with a backward of their own are refused."""
        before, self.is_transforming = self.is_transforming, True
        try:
            yield
        finally:
            self.is_transforming = before

    def record_hook(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Records a hook on the gradient of an activation, and returns its handle."""
        tensor, hook = args[0], args[1] if len(args) > 1 else kwargs.get("hook")
        if not tensor.requires_grad or not torch.is_grad_enabled():
            return None  # torch says what is wrong
        if id(tensor) in self.given or function is not Tensor.register_hook:
            raise refuse(
                f"Tensor.{function.__name__} of an input or parameter cannot be captured: each call would register one more",
                "Register it outside, before the call",
            )
        with self.paused():
            return self.own_backwards.hook(tensor, hook)

    def record_retain_grad(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Records that an activation keeps its gradient; leaves do in any case."""
        if id(args[0]) in self.given or not args[0].requires_grad or not torch.is_grad_enabled():
            return
        with self.paused():
            self.own_backwards.retain(args[0])

    def refuse_grad_fn(self, function: Any, args: Any, kwargs: Any) -> None:
        """Refuses to read ``grad_fn``."""
        if getattr(args[0], "requires_grad", False) and not isinstance(args[0], nn.Parameter):  # which has none
            raise refuse(
                "Tensor.grad_fn cannot be read in a captured callable: other nodes run later than the one seen here",
                "Remove it; for a hook on gradients, register it on a parameter",
            )

    def refuse_reading_grad(self, function: Any, args: Any, kwargs: Any) -> None:
        """Refuses to read ``grad`` of inputs, parameters and buffers."""
        if id(args[0]) in self.given:
            raise refuse(
                "Tensor.grad cannot be read in a captured callable: the gradient of an earlier step is no part of its inputs",
                "Read it outside, and hand in what is needed of it as an argument",
            )

    def refuse_setting_grad(self, function: Any, args: Any, kwargs: Any) -> None:
        """Refuses to set ``grad`` of inputs, parameters and buffers."""
        if id(args[0]) in self.given:
            raise refuse(
                "Tensor.grad cannot be set in a captured callable: the gradients of the steps are no part of the program",
                "Set it outside, before or after the call",
            )

    def read_data(self, function: Any, args: Any, kwargs: Any) -> Tensor:
        """Reads ``tensor.data`` as ``tensor.detach()``."""
        return args[0].detach()

    def set_data(self, function: Any, args: Any, kwargs: Any) -> bool:
        """Gives a tensor other values, past autograd: what was made of it before keeps the old ones."""
        tensor, value = args
        with self.paused(), self.at_user_line(), within_function_modes(self.of_export):
            written = give_data(tensor, value, id(tensor) in self.given)
        self.data_writes.append((*written, user_source()))
        return True

    def set_requires_grad(self, function: Any, args: Any, kwargs: Any) -> None:
        """Sets ``requires_grad`` of an input, for every call; refuses to change that of parameters and buffers."""
        wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
        if id(args[0]) in self.given and bool(wanted) != args[0].requires_grad:
            position = next((i for i, leaf in enumerate(self.flat[0]) if leaf is args[0]), None)
            if position is not None and wanted:
                self.made_to_require.add(position)
                self.trained.append(args[0])
                return
            raise refuse(
                f"requires_grad of an input, parameter or buffer is set to {bool(wanted)} in a captured callable: "
                "it would hold in the capture only",
                "Set it outside, before the call",
            )

    def refuse_derivative(self, function: Any, args: Any, kwargs: Any) -> None:
        """Refuses derivatives that the callable itself takes."""
        with suppress(Exception):
            function(*args, **kwargs)  # a caller may react to it, for example because it signals a train step
        raise refuse(
            f"{function.__name__} in a captured callable cannot be captured: derivatives are taken of the whole program",
            "Take the derivative outside: return the value, then call torch.autograd.grad or backward on it",
        )

    def derive(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Takes a derivative that the callable asks for, as operators."""
        with suppress(RuntimeError):
            function(_NOTHING, _NOTHING)  # a caller may react to it, for example because it signals a train step
        with self.paused(), within_function_modes(self.of_export):
            return derivative(self.modes, self.trained, self.at_user_line, *args, **kwargs)

    @property
    def is_in_callable(self) -> bool:
        """True while the captured callable itself calls, not torch around it or another thread."""
        return self.running and threading.get_ident() == self.thread

    def refuse_new_memory(self, function: Any, args: Any, kwargs: Any) -> None:
        """Refuses what changes a tensor's memory."""
        raise refuse(
            f"Tensor.{function.__name__} cannot be captured: it changes a tensor's memory past the graph",
            "Make a new tensor instead: x = x.new_empty(shape), or x.reshape(shape)",
        )


_NOTHING = torch.zeros(())
_READ_NUMBERS = (
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__bool__, Tensor.__float__, Tensor.__int__,
    Tensor.__index__, Tensor.__complex__, Tensor.__format__, Tensor.__contains__, Tensor.is_nonzero, torch.is_nonzero,
    Tensor.equal, torch.equal, Tensor.allclose, torch.allclose,
)  # fmt: skip
_READ_TRUTH = (Tensor.__bool__, Tensor.item, Tensor.is_nonzero, torch.is_nonzero)


def _is_integer(tensor: Tensor) -> bool:
    return tensor.dtype is not torch.bool and not tensor.is_floating_point() and not tensor.is_complex()


def _is_computed(args: Any) -> bool:
    """Tells whether there are tensors without values among the arguments. Those made of Python's numbers have some."""
    return any(isinstance(a, FakeTensor) and a.constant is None for a in args)


def _key(function: Any) -> Any:
    """Returns a key of a torch function. The getter or setter of a property is a new object every time."""
    owner: Any = getattr(function, "__self__", None)
    return (owner.__name__, function.__name__) if isinstance(owner, GetSetDescriptorType) else function


_HANDLERS: dict[Any, Callable[[Watch, Any, Any, Any], Any]] = {
    Tensor.register_hook: Watch.record_hook,
    Tensor.register_post_accumulate_grad_hook: Watch.record_hook,
    Tensor.retain_grad: Watch.record_retain_grad,
    ("grad_fn", "__get__"): Watch.refuse_grad_fn,
    ("grad", "__get__"): Watch.refuse_reading_grad,
    ("grad", "__set__"): Watch.refuse_setting_grad,
    ("data", "__get__"): Watch.read_data,
    ("data", "__set__"): Watch.set_data,
    ("requires_grad", "__set__"): Watch.set_requires_grad,
    Tensor.requires_grad_: Watch.set_requires_grad,
    Tensor.backward: Watch.refuse_derivative,
    torch.autograd.backward: Watch.refuse_derivative,
    torch.autograd.grad: Watch.derive,
    **dict.fromkeys(_READ_NUMBERS, Watch.read_number),
    **dict.fromkeys(OF_RAGGED, Watch.of_ragged),
    **dict.fromkeys(OF_SEQUENCES, Watch.of_sequences),
    **dict.fromkeys(CHECKED, Watch.of_checked),
    Tensor.set_: Watch.refuse_new_memory,
    Tensor.resize_: Watch.refuse_new_memory,
    Tensor.resize_as_: Watch.refuse_new_memory,
    Tensor.untyped_storage: Watch.refuse_new_memory,
    Tensor.storage: Watch.refuse_new_memory,
}
