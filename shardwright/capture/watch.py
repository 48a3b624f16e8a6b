"""Watch: finds, while a callable is captured, what it does that a graph cannot keep, and refuses it with the user's line.

``torch.export`` records operators. What changes gradients or values beside operators (a backward of one's own, a hook, a
write to ``.data``, a random number of Python's) leaves no trace in what it records, so it is watched for here. What can be
had exactly is put right instead of refused: ``tensor.data`` is read as ``tensor.detach()``, a checkpointed function is called.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import GetSetDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from shardwright.base.torch_private import (
    CheckpointFunction,
    FakeTensor,
    SingleLevelFunction,
    annotate,
    checkpoint_module,
    global_backward_hooks,
    pytree,
)
from shardwright.base.user_code import _TORCH, SOURCE, user_frame, user_source
from shardwright.capture.closure import attribute_of
from shardwright.errors import CaptureError

_refused: list[CaptureError] = []  # within the capture that runs: the user's code may swallow an error


def refuse(what: str, instead: str) -> CaptureError:
    """Returns the error for a construct at the user's line that runs now; it is raised again at the end if the user's code
    catches it.

    Args:
        what: the construct and what would be lost, a sentence without its end.
        instead: what to write instead.
    """
    source = user_source()
    _refused.append(CaptureError(f"{what}{f', at {source}' if source else ''}\n  {instead}"))
    return _refused[-1]


@contextmanager
def watched(module: nn.Module, note: Callable[[str], None]) -> Iterator[Watch]:
    """Within the block, what a graph cannot keep raises a :class:`CaptureError`.

    Args:
        module: what is captured.
        note: is told, once a source line, what is computed as written and has no other effect.
    """
    check_backward_hooks(module)
    watch = Watch(module, note)
    with ExitStack() as stack:
        stack.enter_context(watch)
        for owner, name, value in watch.replacements():
            stack.enter_context(_replaced(owner, name, value))
        stack.callback(register_module_buffer_registration_hook(watch.buffer).remove)
        stack.callback(register_module_forward_pre_hook(watch.called).remove)
        stack.callback(_refused.clear)
        yield watch


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


# -- modules with hooks on their backward pass -----------------------------------------------------------------------------


def check_backward_hooks(module: nn.Module) -> None:
    """Refuses hooks that modules, or all modules, run in the backward pass. Without gradients none of them runs.

    Raises:
        CaptureError: there are some; all are named.
    """
    if not torch.is_grad_enabled():
        return
    found = [
        f"{path or type(owner).__name__}: {getattr(hook, '__name__', type(hook).__name__)}"
        for path, owner in module.named_modules()
        for hook in (*owner._backward_hooks.values(), *owner._backward_pre_hooks.values())
    ]
    found += [f"all modules: {getattr(hook, '__name__', type(hook).__name__)}" for hook in global_backward_hooks()]
    if found:
        listed = "; ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
        raise CaptureError(
            f"modules with backward hooks cannot be captured: the backward pass of a captured module runs operators, not the "
            f"module, so the hooks would never be called ({listed})\n"
            "  Remove the hook; one on a parameter (parameter.register_hook) is called, and so are forward hooks"
        )


# -- functions of torch ----------------------------------------------------------------------------------------------------


class Watch(TorchFunctionMode):
    """Sees every torch function that the captured callable calls on tensors.

    Args:
        module: what is captured.
        note: is told what is computed as written and has no other effect.
    """

    def __init__(self, module: nn.Module, note: Callable[[str], None]):
        super().__init__()
        self.module, self.note, self.thread = module, note, threading.get_ident()
        self.given: set[int] = set()  # ids of the tensors that stand for inputs, parameters and buffers
        self.assigned: dict[tuple[int, str], str] = {}  # by id of a module and name of a buffer, the line that assigned it
        self.known: set[int] = set()  # ids of tensors with values that may be read
        self.running = False  # whether the callable runs, and not what torch does before and after

    def begin(self, args: Any, kwargs: Any) -> None:
        """Takes notice of the tensors that the callable is about to work on."""
        given = [*self.module.parameters(), *self.module.buffers(), *pytree.tree_leaves((args, kwargs))]
        self.given = {id(leaf) for leaf in given if isinstance(leaf, Tensor)}
        self.arguments = (args, kwargs)
        self.flat = pytree.tree_flatten(self.arguments)
        self.running = True

    def buffer(self, module: nn.Module, name: str, value: Any) -> None:
        """Remembers the line that assigns a buffer."""
        self.assigned[id(module), name] = user_source()

    def end(self) -> None:
        """Takes notice that the callable has ended: what torch does afterwards is its own business.

        Raises:
            CaptureError: it swallowed a refusal, or changed its arguments.
        """
        self.running = False
        if _refused:
            raise _refused[0]
        leaves, spec = pytree.tree_flatten(self.arguments)
        before, spec_before = self.flat
        if spec != spec_before or any(a is not b for a, b in zip(leaves, before)):
            raise CaptureError(
                f"{type(self.module).__name__} changes an argument in place: a list, dict or the like that it is handed is "
                "another one in a capture, so the caller's would stay as it is\n  Return what is new, or change a copy"
            )

    def called(self, module: nn.Module, args: Any) -> None:
        """Refuses the call of a module that the captured one does not have: nobody would train it or update its buffers."""
        if not self.here:
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
        if handler is not None and self.here:
            found = handler(self, function, args, kwargs or {})
            if found is not None:
                return found
        if not self.here:
            return function(*args, **(kwargs or {}))
        if kwargs and isinstance(kwargs.get("generator"), torch.Generator):
            raise refuse(
                f"{getattr(function, '__name__', function)}(generator=...) cannot be captured: ranks draw the single device's "
                "numbers from torch's default generator",
                "Leave generator out, and seed with torch.manual_seed before the step; or draw outside and hand the numbers in",
            )
        frame = user_frame()
        if frame is None:
            return function(*args, **(kwargs or {}))
        if torch.is_grad_enabled():
            self.check_real(pytree.tree_leaves((args, kwargs)))
        with annotate({SOURCE: (frame.f_code.co_filename, frame.f_lineno)}):
            return function(*args, **(kwargs or {}))

    def check_real(self, leaves: list[Any]) -> None:
        """Refuses a tensor with a gradient that the captured module does not have: a graph would take it for a constant."""
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.requires_grad and not isinstance(leaf, FakeTensor):
                if id(leaf) not in self.known and attribute_of(self.module, leaf) is None:
                    raise refuse(
                        f"a tensor of {list(leaf.shape)} with a gradient is read in a captured callable that does not have it: "
                        "it would get none",
                        f"Make it a parameter of {type(self.module).__name__}, in an nn.ParameterList if there are several",
                    )
                self.known.add(id(leaf))

    def number(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Returns a number read off a tensor: refused where it depends on values, also if the user's code catches what
        torch raises.
        """
        try:
            found = function(*args, **kwargs)
        except Exception as error:
            raise self._of_values(function, error) from error
        if any(isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)) for leaf in pytree.tree_leaves(found)):
            raise self._of_values(function, None)
        return found

    def _of_values(self, function: Any, error: Exception | None) -> CaptureError:
        known = error is None or "DataDependent" in type(error).__name__ or not str(error)
        said = "" if known else f" ({type(error).__name__}: {str(error).splitlines()[0]})"
        return refuse(
            f"{getattr(self.module, 'name', type(self.module).__name__)} cannot be captured as a graph: "
            f"Tensor.{function.__name__} reads a number of a tensor that is computed{said}",
            "A captured callable may not branch on the values of tensors or call .item(), and no size may depend on them; "
            "return the tensor and read it outside, or write it with torch.where",
        )

    def hook(self, function: Any, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled() and not args[0].requires_grad:
            return
        raise refuse(
            f"Tensor.{function.__name__} cannot be captured: a graph has no place for a hook, it would never be called",
            "Remove it. To read or change a gradient, register the hook on a parameter, or on what the parallel module returns",
        )

    def retained(self, function: Any, args: Any, kwargs: Any) -> None:
        raise refuse(
            "Tensor.retain_grad cannot be captured: the gradient of a value within a captured callable is kept nowhere",
            "Remove it; gradients of inputs and parameters are there, torch.autograd.grad gives those of inputs",
        )

    def node(self, function: Any, args: Any, kwargs: Any) -> None:
        if getattr(args[0], "requires_grad", False):
            raise refuse(
                "Tensor.grad_fn cannot be read in a captured callable: other nodes run later than the one seen here",
                "Remove it; for a hook on gradients, register it on a parameter",
            )

    def gradient(self, function: Any, args: Any, kwargs: Any) -> None:
        if id(args[0]) in self.given:
            raise refuse(
                "Tensor.grad cannot be read in a captured callable: the gradient of an earlier step is no part of its inputs",
                "Read it outside, and hand in what is needed of it as an argument",
            )

    def new_gradient(self, function: Any, args: Any, kwargs: Any) -> None:
        if id(args[0]) in self.given:
            raise refuse(
                "Tensor.grad cannot be set in a captured callable: the gradients of the steps are no part of the program",
                "Set it outside, before or after the call",
            )

    def data(self, function: Any, args: Any, kwargs: Any) -> Tensor:
        return args[0].detach()

    def new_data(self, function: Any, args: Any, kwargs: Any) -> None:
        raise refuse(
            "tensor.data = ... cannot be captured: it gives a tensor other memory, past autograd and the graph",
            "For a buffer or a frozen parameter write: with torch.no_grad(): tensor.copy_(value). For an activation give the "
            "new value a name: h = h + (value - h).detach()",
        )

    def leaf(self, function: Any, args: Any, kwargs: Any) -> None:
        wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
        if id(args[0]) in self.given and bool(wanted) != args[0].requires_grad:
            raise refuse(
                f"requires_grad of an input, parameter or buffer is set to {bool(wanted)} in a captured callable: "
                "it would hold in the capture only",
                "Set it outside, before the call",
            )

    def derivative(self, function: Any, args: Any, kwargs: Any) -> None:
        with suppress(Exception):
            function(*args, **kwargs)  # somebody further out may take it for a sign, as of a train step
        raise refuse(
            f"{function.__name__} in a captured callable cannot be captured: derivatives are taken of the whole program",
            "Take the derivative outside: return the value, then call torch.autograd.grad or backward on it",
        )

    @property
    def here(self) -> bool:
        """Whether the captured callable is what calls: not torch around it, and not another thread."""
        return self.running and threading.get_ident() == self.thread

    def replacements(self) -> list[tuple[Any, str, Any]]:
        """Owner, name and stand-in of what is no torch function, and watched by standing in its place."""

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if self.here and cls is CheckpointFunction:
                self.checkpointed()
                return _call_reentrant(*args)
            if self.here:
                _check_function(cls, args)
            return super(SingleLevelFunction, cls).apply(*args, **kwargs)  # type: ignore[misc]

        def checkpoint(*args: Any, **kwargs: Any) -> Iterator[None]:
            """Stands for what a checkpoint does before and after the call of its function."""
            if not self.here:
                yield from _plain_checkpoint(*args, **kwargs)
                return
            self.checkpointed()
            yield

        def new_parameter(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if self.here:
                _check_parameter(sys._getframe(1).f_code.co_filename)
            return _plain_new_parameter(cls, *args, **kwargs)

        def enter(hooks: Any) -> Any:
            if self.here:
                _check_saved_tensors_hooks(hooks)
            return _plain_enter(hooks)

        def unseeded(name: str, plain: Any) -> Any:
            def stand_in(*args: Any, **kwargs: Any) -> Any:
                if self.here:
                    raise refuse(
                        f"torch.{name} cannot be captured: the state of the generator is no part of the program",
                        "Call it outside, before the step",
                    )
                return plain(*args, **kwargs)

            return stand_in

        seeds = ("manual_seed", "seed", "set_rng_state", "get_rng_state", "initial_seed")
        return [
            *((owner, name, unseeded(name, getattr(torch, name))) for owner in (torch, torch.random) for name in seeds),
            (SingleLevelFunction, "apply", classmethod(apply)),
            (checkpoint_module, "_checkpoint_without_reentrant_generator", checkpoint),
            (nn.Parameter, "__new__", staticmethod(new_parameter)),
            (torch.autograd.graph.saved_tensors_hooks, "__enter__", enter),
        ]

    def checkpointed(self) -> None:
        """Says once that a checkpoint is computed as written."""
        source = user_source()
        if source not in _said:
            _said.add(source)
            self.note(
                f"torch.utils.checkpoint, at {source}, is computed as written and saves no memory in a parallel program yet; "
                "for that say net.recompute('pattern of module names')"
            )

    def memory(self, function: Any, args: Any, kwargs: Any) -> None:
        raise refuse(
            f"Tensor.{function.__name__} cannot be captured: it changes a tensor's memory past the graph",
            "Make a new tensor instead: x = x.new_empty(shape), or x.reshape(shape)",
        )


def _key(function: Any) -> Any:
    """What tells a torch function apart: the getter or setter of a property is a new object every time."""
    owner: Any = getattr(function, "__self__", None)
    return (owner.__name__, function.__name__) if isinstance(owner, GetSetDescriptorType) else function


_HANDLERS: dict[Any, Callable[[Watch, Any, Any, Any], Any]] = {
    Tensor.register_hook: Watch.hook,
    Tensor.register_post_accumulate_grad_hook: Watch.hook,
    Tensor.retain_grad: Watch.retained,
    ("grad_fn", "__get__"): Watch.node,
    ("grad", "__get__"): Watch.gradient,
    ("grad", "__set__"): Watch.new_gradient,
    ("data", "__get__"): Watch.data,
    ("data", "__set__"): Watch.new_data,
    ("requires_grad", "__set__"): Watch.leaf,
    Tensor.requires_grad_: Watch.leaf,
    Tensor.backward: Watch.derivative,
    torch.autograd.backward: Watch.derivative,
    torch.autograd.grad: Watch.derivative,
    Tensor.item: Watch.number,
    Tensor.tolist: Watch.number,
    Tensor.numpy: Watch.number,
    Tensor.__array__: Watch.number,
    Tensor.__bool__: Watch.number,
    Tensor.__float__: Watch.number,
    Tensor.__int__: Watch.number,
    Tensor.__index__: Watch.number,
    Tensor.__complex__: Watch.number,
    Tensor.__format__: Watch.number,
    Tensor.set_: Watch.memory,
    Tensor.resize_: Watch.memory,
    Tensor.resize_as_: Watch.memory,
    Tensor.untyped_storage: Watch.memory,
    Tensor.storage: Watch.memory,
}


# -- what is no torch function ---------------------------------------------------------------------------------------------

_plain_checkpoint = checkpoint_module._checkpoint_without_reentrant_generator
_plain_new_parameter = nn.Parameter.__new__
_plain_enter = torch.autograd.graph.saved_tensors_hooks.__enter__
_said: set[str] = set()  # lines of which it has been said that their checkpoints save no memory


def _check_function(cls: Any, args: Any) -> None:
    """Refuses an ``autograd.Function`` whose backward is the user's own.

    Those of torch have the derivatives of their forward, or belong to an operator that is captured as a whole.
    """
    wants = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    if wants and not cls.__module__.startswith("torch."):
        raise refuse(
            f"the autograd.Function {cls.__name__} cannot be captured: only the operators of its forward would be, and its "
            "backward would be theirs instead of its own",
            "Call it outside of the parallel module, or write it with operators whose gradients add up to its backward: "
            "straight through is x + (f(x) - x).detach(), a gradient times c is x * c + (x - x * c).detach()",
        )


def _call_reentrant(function: Callable[..., Any], preserves_random_state: bool, *args: Any) -> Any:
    """Stands for a reentrant checkpoint: the call itself, without gradients where it would give none."""
    wants = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    with torch.set_grad_enabled(wants):
        return function(*args)


def _check_parameter(maker: str) -> None:
    """Refuses ``nn.Parameter(...)`` but where torch makes one for itself: it would be another in every call.

    Args:
        maker: the file that calls.
    """
    if not maker.startswith(_TORCH) or maker.startswith(os.path.join(_TORCH, "nn")):
        raise refuse(
            "a parameter that is made while the callable is captured cannot be trained: it exists in the capture only",
            "Make it in __init__; of unknown shape, run the model once on one device before it becomes parallel",
        )


def _check_saved_tensors_hooks(hooks: Any) -> None:
    """Refuses a block of hooks on saved tensors; torch's own (``save_on_cpu``) change no value."""
    packs = getattr(hooks.pack_hook, "__module__", None) or ""
    if torch.is_grad_enabled() and not packs.startswith("torch."):
        raise refuse(
            "saved_tensors_hooks in a captured callable cannot be captured: what is saved for the backward pass is decided by "
            "the parallel program",
            "Open the block around the call of the parallel module",
        )
