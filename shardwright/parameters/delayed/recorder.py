"""Delayed initialisation: builds a model on the meta device; its values are made later, one parameter at a time.

While the context is open, a dispatch mode sends every new tensor to the meta device and writes down the operators that
make or change its values. Replaying them gives, bit for bit, the values of an ordinary construction. Four facts make
the record small and its replay cheap:

- **A tensor is a view of a storage.** Only storages have values, so views, `nn.Parameter(t)`, `.data` and tied weights
  need no record: they are geometry over a storage. Each meta storage carries, as an attribute, the step that wrote it
  last; each step holds the steps that it read. There is no other registry, so a record dies with its tensors.
- **The state of a generator is a value too.** A draw names the draw before it, or the state that the program had set.
  While the context is open each generator holds a *token* that stands for "the state after step n"; thus reseeding and
  `fork_rng` inside the context mean what they mean outside. On leaving, the generator is as if nothing was drawn.
- **A fill forgets.** `normal_` over a whole storage depends on nothing before it, so of a value that is initialised
  twice the first draw only advances the generator, into a temporary.
- **A storage is due at its last draw.** Replay walks the draws in their order and builds a storage, whole, when its
  last draw comes up, repeating its earlier draws from saved states (5 KB each). So one storage is real at any time.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, FunctionType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from shardwright.base.operators import CLONE, FILLS, LIFTS, READS_NUMBER, READS_SHAPE, may_draw
from shardwright.base.torch_private import TorchDispatchMode, current_dispatch_modes, disable_current_modes
from shardwright.parameters.delayed.record import (
    _RECORD,
    CPU,
    META,
    OURS,
    DelayedInitError,
    _as_meta,
    _check_dense,
    _covers,
    _frame_outside,
    _frozen,
    _known,
    _leaves,
    _map,
    _Record,
    _record_of,
    _ref,
    _schema,
    _serials,
    _shape_only,
    _Step,
    _token,
    _user_line,
    _with_token,
)
from shardwright.parameters.delayed.replay import _value_now


@contextlib.contextmanager
def no_init_parameters() -> Iterator[None]:
    """Builds modules and optimizers without their values: parameters and buffers live on the meta device.

    Everything that PyTorch would compute is recorded and :func:`materialise` computes it later, one parameter at a
    time, with the numbers that an ordinary construction draws from the generator's state at entry. Casts
    (``net.bfloat16()``), ``torch.manual_seed``, ``fork_rng``, explicit generators and any initialiser made of PyTorch
    operators are recorded. A nested context joins the outer one.

    - The generator itself is not advanced: what is drawn after the context starts where the context started. Two
      contexts in a row without a draw or a seed between them therefore give equal weights.
    - Values that involve draws cannot be read inside (``.item()``, ``bool()``, ``tolist()``); others can, so
      ``torch.linspace(0, rate, depth).tolist()`` works.
    - A real tensor made outside stays real; what is computed from it is delayed, with its value of that moment.
    - Replay happens on the CPU, so draws on another device are refused. ``.to(device)`` inside keeps meta tensors.
    - Python's and NumPy's own random numbers cannot be recorded: they are drawn at once, as ever.
    - Model code that asks a delayed tensor for its ``device`` or ``is_meta`` from inside a module's method gets the
      answer of an ordinary construction, since some models skip their initialisation on meta. What such code puts on
      ``device="meta"`` itself stays there, without a value.

    Raises:
        DelayedInitError: an operator inside reads a random value, draws on another device than the CPU, or mixes
            delayed tensors with meta tensors that the context does not know.

    >>> with no_init_parameters():
    ...     net = torch.nn.Linear(4, 2)
    ...     optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    >>> net.weight.device
    device(type='meta')
    >>> from shardwright.parameters.delayed.replay import materialise
    >>> values = materialise(dict(net.named_parameters()), lambda name, value: value)
    >>> eager = torch.nn.Linear(4, 2)  # the generator is where it was
    >>> torch.equal(values["weight"], eager.weight)
    True
    """
    if any(isinstance(mode, _Recorder) for mode in current_dispatch_modes()):
        yield
        return
    recorder = _Recorder(id(_frame_outside(OURS, contextlib.__file__)))
    try:
        with _AsBuilt(recorder), recorder:
            yield
    finally:
        recorder.restore_generators()


def is_delayed(tensor: torch.Tensor) -> bool:
    """Tells whether the tensor was made under :func:`no_init_parameters` and has no value yet.

    Args:
        tensor: any tensor. A view, ``.data`` and an ``nn.Parameter`` of a delayed tensor are delayed as well.

    Returns:
        ``False`` for real tensors, and for meta tensors from elsewhere: a conversion after the context makes those.

    >>> with no_init_parameters():
    ...     weight = torch.nn.Parameter(torch.zeros(2))
    >>> is_delayed(weight), is_delayed(weight.data), is_delayed(weight.double()), is_delayed(torch.zeros(2))
    (True, True, False, False)
    """
    return _record_of(tensor) is not None


# ---------------------------------------------------------------------------------------------------- what is recorded


# ---------------------------------------------------------------------------------------------------- recording


class _Recorder(TorchDispatchMode):
    """Sends new tensors to the meta device and records the steps that give them values."""

    def __init__(self, user_frame: int) -> None:
        super().__init__()
        self._user_frame = user_frame
        self._draws: dict[int, _Step] = {}
        self._generators: dict[int, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = _leaves(torch.Tensor, (args, kwargs))
        writes = [args[i] if i < len(args) else kwargs.get(name) for i, name in _schema(func)[0]]
        written = _leaves(torch.Tensor, writes)
        if any(s.device.type != "meta" for s in _leaves(torch.UntypedStorage, args)):
            raise DelayedInitError(
                f"{_user_line(func)} makes a tensor of memory that exists already, as torch.load does, which cannot be "
                "delayed: do that before no_init_parameters()"
            )
        asked = kwargs.get("device")
        if not tensors and asked == META and self.runs_model_code(sys._getframe(1)):
            return func(*args, **kwargs)  # as in skip_init: there, delayed tensors say that they are on the CPU
        if tensors and not any(_record_of(t) for t in tensors):
            leaves_meta = func.overloadpacket in READS_SHAPE and asked is not None and asked != META
            if any(t.device.type == "meta" for t in tensors) and not leaves_meta:
                return func(*args, **kwargs)  # a meta tensor of the model's own
            if func.overloadpacket in LIFTS:
                return self.constant(args[0])
            if written and may_draw(func):
                raise DelayedInitError(
                    f"{_user_line(func)} draws into a tensor of shape {tuple(written[0].shape)} that was made outside "
                    "no_init_parameters(), where draws are delayed: make the tensor inside the context"
                )
            if written or func.is_view or torch.Tag.data_dependent_output in func.tags:
                return func(*args, **kwargs)
        for tensor in () if func.overloadpacket in READS_SHAPE else tensors:
            if tensor.device.type == "meta" and not _record_of(tensor):
                raise DelayedInitError(
                    f"{_user_line(func)} reads a meta tensor of shape {tuple(tensor.shape)} that was made outside "
                    "no_init_parameters(), so its value is unknown: make it inside the context"
                )
        for tensor in written:
            if not _record_of(tensor):
                raise DelayedInitError(
                    f"{_user_line(func)} writes a delayed value into a real tensor of shape {tuple(tensor.shape)} that "
                    "was made outside no_init_parameters(): make that tensor inside the context"
                )
        if torch.Tag.data_dependent_output in func.tags:
            return self._read(func, args, kwargs)
        return self._delay(func, args, kwargs, written)

    def _delay(self, func: Any, args: Any, kwargs: dict[str, Any], written: Sequence[torch.Tensor]) -> Any:
        """Runs the operator on meta tensors, and records it if it makes or changes values."""
        device, draws = _device(args, kwargs), may_draw(func)
        if draws:
            _check_draw(func, device)
        kwargs.pop("pin_memory", None)
        meta_kwargs = kwargs
        if _schema(func)[1]:
            meta_kwargs, kwargs = {**kwargs, "device": META}, {**kwargs, "device": CPU}
        try:
            out = func(*_map(_as_meta, args), **_map(_as_meta, meta_kwargs))
        except NotImplementedError:  # the shape of its result depends on values, or meta tensors are beyond it
            if written:
                raise
            return self._read(func, args, kwargs)
        results = _leaves(torch.Tensor, out)
        fresh = [_record_of(t) is None for t in results]
        for tensor in results:
            _check_dense(tensor)
        changed = [] if torch.Tag.inplace_view in func.tags else written
        if any(fresh) or changed:
            step = self._step(func, args, kwargs, changed, fills=func.overloadpacket in FILLS)
            if draws:
                self._draw(step, _leaves(torch.Generator, (args, kwargs)))
            for tensor in results:
                if not _record_of(tensor):
                    setattr(tensor.untyped_storage(), _RECORD, _Record(next(_serials), step, device))
            step.outputs = tuple(_ref(t) if new else None for t, new in zip(results, fresh))
        for tensor in written:
            self.allow_version(tensor, 1)  # the counter is raised after this call
        return out

    def _step(self, call: Any, args: Any, kwargs: Any, changed: Sequence[torch.Tensor], fills: bool) -> _Step:
        reads = [t for t in _leaves(torch.Tensor, (args, kwargs)) if _record_of(t)]
        base = None
        if fills:
            del reads[next(i for i, t in enumerate(reads) if t is changed[0])]
            base = None if _covers(changed[0]) else _known(changed[0]).last
        if getattr(call, "overloadpacket", None) in READS_SHAPE:
            frozen_args: Any = (_shape_only(args[0]), *_map(_frozen, args[1:]))
            reads = []
        else:
            frozen_args = _map(_frozen, args)
        inputs = tuple({_known(t).last: None for t in reads})
        dtype = torch.get_default_dtype()
        step = _Step(next(_serials), call, frozen_args, _map(_frozen, kwargs), dtype, inputs, base)
        for tensor in changed:
            _known(tensor).last = step
        return step

    def _draw(self, step: _Step, generators: Sequence[torch.Generator]) -> None:
        """Links the step to the previous draw on its generator."""
        generator = generators[0] if generators else torch.default_generator
        state = generator.get_state()
        step.after = self._draws.get(_token(state), state)
        self._draws[step.serial] = step
        self._generators[id(generator)] = generator
        generator.set_state(_with_token(state, step.serial))

    def _read(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs an operator whose result Python needs now. That is possible where no draws are involved."""
        what = ".item(), bool(), int() or float()" if func is READS_NUMBER else func

        def now(x: Any) -> Any:
            return _value_now(x, what) if isinstance(x, torch.Tensor) else x

        out = func(*_map(now, args), **_map(now, kwargs))
        return _map(lambda x: self.constant(x) if isinstance(x, torch.Tensor) else x, out)

    def constant(self, value: torch.Tensor) -> torch.Tensor:
        """Makes a delayed copy of a real tensor."""
        return self._delay(CLONE, (value,), {}, [])  # type: ignore[no-any-return]

    def record_call(self, call: Callable[..., Any], tensor: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Records a whole Python function that fills ``tensor`` with draws."""
        _check_draw(call.__name__, _known(tensor).device)
        with disable_current_modes():
            self._draw(self._step(call, (), kwargs, [tensor], fills=True), _leaves(torch.Generator, kwargs))

    def allow_version(self, tensor: torch.Tensor, more: int = 0) -> None:
        """Records a tensor's version counter, so that a later change is noticed."""
        if not tensor.is_inference():
            record = _known(tensor)
            record.version = max(record.version, tensor._version + more)

    def runs_model_code(self, frame: FrameType | None) -> bool:
        """Tells whether a module's or optimizer's method, within the context, called the frame."""
        while frame and id(frame) != self._user_frame:  # frames beyond are none of ours
            if isinstance(frame.f_locals.get("self"), (torch.nn.Module, torch.optim.Optimizer)):
                return True
            frame = frame.f_back
        return False

    def restore_generators(self) -> None:
        """Removes the tokens: each generator is as if nothing was drawn since the program last set it."""
        for generator in self._generators.values():
            state: Any = self._draws.get(_token(generator.get_state()))
            while isinstance(state, _Step):
                state = state.after
            if state is not None:
                generator.set_state(state)


def _device(args: Any, kwargs: dict[str, Any]) -> torch.device:
    """Returns the device on which the result would be without the context."""
    asked = kwargs.get("device")
    if asked is not None and asked.type != "meta":
        return asked  # type: ignore[no-any-return]
    places = [record.device for t in _leaves(torch.Tensor, (args, kwargs)) if (record := _record_of(t))]
    places += [generator.device for generator in _leaves(torch.Generator, (args, kwargs))]
    return next((place for place in places if place.type != "cpu"), CPU)


def _check_draw(call: Any, device: torch.device) -> None:
    if device.type != "cpu":
        raise DelayedInitError(
            f"{_user_line(call)} draws on device '{device}', but no_init_parameters() replays draws on the CPU: build "
            "the model on the CPU inside the context, shardwright moves it afterwards"
        )


class _AsBuilt(TorchFunctionMode):
    """Handles what does not reach the dispatcher: attributes, conversions to Python, assignments to ``.data``."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        record = None if tensor is None else _record_of(tensor)
        if tensor is None or record is None:
            return func(*args, **kwargs)
        if func in _READS:
            with disable_current_modes():
                return func(_value_now(tensor, f".{func.__name__}()"), *args[1:], **kwargs)
        if func in (torch.Tensor.to, torch.Tensor.cpu):  # where it would be already: no copy
            args = (*args, CPU) if func is torch.Tensor.cpu else args
            func = torch.Tensor.to
            return func(tensor, *_map(lambda x: _stay(x, record), args[1:]), **_map(lambda x: _stay(x, record), kwargs))
        if func == _SET_DATA:
            with disable_current_modes():
                func(tensor, args[1] if _record_of(args[1]) else self._recorder.constant(args[1]))
                return self._recorder.allow_version(tensor)
        return self._attribute(func, tensor, record, sys._getframe(1)) if func in _ATTRIBUTES else func(*args, **kwargs)

    def _attribute(self, getter: Any, tensor: torch.Tensor, record: _Record, asker: FrameType) -> Any:
        """Returns ``device``, ``is_cpu`` or ``is_meta`` as model code is to see it."""
        if asker.f_code.co_filename.startswith(OURS):
            return getter(tensor)
        if _ATTRIBUTES[getter] == "is_meta" and asker.f_code.co_filename == torch.nn.init.__file__:
            # torch.nn.init does nothing on meta, and elsewhere it may loop until its draws please it. Record the call.
            code = asker.f_code
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            arguments = {name: asker.f_locals[name] for name in names}
            self._recorder.record_call(FunctionType(code, asker.f_globals, code.co_name), tensor, arguments)
            return True
        if not self._recorder.runs_model_code(asker):
            return getter(tensor)
        place = record.device
        return {"device": place, "is_cpu": place.type == "cpu", "is_meta": False}[_ATTRIBUTES[getter]]


_READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_ATTRIBUTES = {getattr(torch.Tensor, name).__get__: name for name in ("device", "is_cpu", "is_meta")}


def _stay(x: Any, record: _Record) -> Any:
    """Returns an argument of ``tensor.to``. The device where the tensor would be is replaced by the one where it is."""
    if isinstance(x, str):
        x = torch.device(x)
    return META if isinstance(x, torch.device) and x == record.device else x


# ---------------------------------------------------------------------------------------------------- replaying
