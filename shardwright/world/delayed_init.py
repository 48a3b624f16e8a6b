"""Delayed initialisation: build a model on the meta device now, make its values one parameter at a time later.

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
import functools
import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from shardwright.capture.torch_private import TorchDispatchMode, current_dispatch_modes, disable_current_modes
from shardwright.errors import ShardwrightError

T = TypeVar("T")

META, CPU = torch.device("meta"), torch.device("cpu")


class DelayedInitError(ShardwrightError):
    """A construction that cannot be delayed, or a tensor whose initialisation was not recorded."""


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
    >>> values = materialise(dict(net.named_parameters()), lambda name, value: value)
    >>> eager = torch.nn.Linear(4, 2)  # the generator is where it was
    >>> torch.equal(values["weight"], eager.weight)
    True
    """
    if any(isinstance(mode, _Recorder) for mode in current_dispatch_modes()):
        yield
        return
    recorder = _Recorder(id(_frame_outside(__file__, contextlib.__file__)))
    try:
        with _AsBuilt(recorder), recorder:
            yield
    finally:
        recorder.restore_generators()


def is_delayed(tensor: torch.Tensor) -> bool:
    """Whether the tensor was made under :func:`no_init_parameters` and has no value yet.

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


def materialise(wanted: Mapping[str, torch.Tensor], keep: Callable[[str, torch.Tensor], T]) -> dict[str, T]:
    """Computes delayed tensors one at a time, with the values of an ordinary construction.

    ``keep(name, value)`` is called once per name with the full tensor on the CPU, of the delayed tensor's shape, stride
    and dtype, without gradient. The value is freed before the next is made, so ``keep`` clones the piece that it
    returns (a slice shares the whole's memory). Tensors of one storage (tied weights, views) are built together; names
    that are one tensor get one object. A tensor that is real already is handed on as it is. The order of calls follows
    the draws and is the same on every rank that built the same model.

    Memory beyond what ``keep`` returns: one storage, and the temporaries of the operators that fill it. Time: every
    draw up to the last one wanted happens once, and once more for each value in which a later draw takes part. The
    global generator and default dtype are as before afterwards.

    Args:
        wanted: delayed tensors by name, of one or several contexts; global shapes.
        keep: takes a name and its full value, and returns what shall remain of it.

    Returns:
        What ``keep`` returned, in the order of ``wanted``.

    Raises:
        DelayedInitError: tensors without a recorded value, or changed after the context closed; nothing was computed.

    >>> with no_init_parameters():
    ...     net = torch.nn.Linear(4, 2).double()
    >>> half = materialise(dict(net.named_parameters()), lambda name, value: value[:1].clone())
    >>> {name: tuple(value.shape) for name, value in half.items()}
    {'weight': (1, 4), 'bias': (1,)}
    """
    _check(wanted)
    names: dict[int, list[str]] = defaultdict(list)  # of each slot
    kept: dict[str, T] = {}
    last: dict[int, _Step] = {}
    for name, tensor in wanted.items():
        record = _record_of(tensor)
        if record is None:
            kept[name] = keep(name, tensor.detach())
        else:
            names[record.slot].append(name)
            last[record.slot] = record.last
    refs = {name: _ref(wanted[name]) for group in names.values() for name in group}
    with _replaying():
        for slot, storages in _storages(last):
            values: dict[_Ref, torch.Tensor] = {}
            for name in names[slot]:
                ref = refs[name]
                if ref not in values:
                    values[ref] = _view(storages, ref)
                kept[name] = keep(name, values[ref])
            del values, storages  # before the next is made
    return {name: kept[name] for name in wanted}


def _check(wanted: Mapping[str, torch.Tensor]) -> None:
    problems = []
    for name, tensor in wanted.items():
        record = _record_of(tensor)
        if record is None and tensor.device.type != "meta":
            continue
        what = f"'{name}' ({tuple(tensor.shape)}, {tensor.dtype})"
        if record is None:
            problems.append(
                f"{what} is on the meta device without a record: it was converted or made outside the context, or with "
                "device='meta'. Convert (net.double(), net.to(...), copy.deepcopy(net)) inside "
                "`with no_init_parameters():`"
            )
        elif not tensor.is_inference() and tensor._version > record.version:
            problems.append(
                f"{what} was changed in place after no_init_parameters() closed ({tensor._version} changes, "
                f"{record.version} recorded). Do that inside `with no_init_parameters():`"
            )
    if problems:
        lines = "".join(f"\n  {i}. {line}" for i, line in enumerate(problems, 1))
        raise DelayedInitError(f"{len(problems)} of {len(wanted)} tensors cannot be materialised, none was{lines}")


# ---------------------------------------------------------------------------------------------------- what is recorded


@dataclass(frozen=True)
class _Ref:
    """A tensor as geometry over a storage."""

    slot: int
    nbytes: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    conj: bool


class _Generator:
    """Stands for an explicit ``generator=`` in the arguments of a step."""


@dataclass(eq=False)
class _Step:
    """One recorded operator: the steps whose values it reads, and what it makes of them."""

    serial: int
    call: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    default_dtype: torch.dtype
    inputs: tuple[_Step, ...]
    base: _Step | None  # of a fill that covers a part of its storage: the step that wrote the rest
    outputs: tuple[_Ref | None, ...] = ()
    after: _Step | torch.Tensor | None = None  # of a draw: the draw before it, or the state of the generator


@dataclass(eq=False)
class _Record:
    """What a meta storage carries."""

    slot: int
    last: _Step
    device: torch.device  # where it would be without the context
    version: int = 0  # the highest version counter that recorded operators can have left on a tensor of this storage


_RECORD = "_shardwright_record"
_serials = itertools.count(1)
_aten = torch.ops.aten


def _packets(names: str) -> set[Any]:
    return {getattr(_aten, name) for name in names.split()}


# These write every element of their first argument without reading it.
_FILLS = _packets("uniform_ normal_ random_ exponential_ geometric_ cauchy_ log_normal_ bernoulli_ zero_ fill_ copy_")
# These read the shape of their first argument, not its values.
_LIKE = _packets(
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like "
    "new_empty new_empty_strided new_zeros new_ones new_full"
)
# These have no values: zeros in the replay, so that all ranks agree on them.
_EMPTY = _packets("empty empty_strided empty_permuted empty_like new_empty new_empty_strided")
_LIFTS = _packets("lift lift_fresh lift_fresh_copy")  # torch.tensor(...) ends in one


def _record_of(tensor: torch.Tensor) -> _Record | None:
    try:
        return getattr(tensor.untyped_storage(), _RECORD, None)
    except (NotImplementedError, RuntimeError):  # sparse tensors and some subclasses have no storage
        return None


def _known(tensor: torch.Tensor) -> _Record:
    record = _record_of(tensor)
    assert record is not None
    return record


def _ref(tensor: torch.Tensor) -> _Ref:
    if tensor.is_neg():
        raise DelayedInitError(f"a lazily negated view{_user_line()} cannot be recorded: call resolve_neg() on it")
    nbytes, offset = tensor.untyped_storage().nbytes(), int(tensor.storage_offset())
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    return _Ref(_known(tensor).slot, nbytes, shape, stride, offset, tensor.dtype, tensor.is_conj())


def _covers(tensor: torch.Tensor) -> bool:
    """Whether the tensor is the whole of its storage, each element once."""
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _map(change: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        return type(tree)([_map(change, x) for x in tree])
    if isinstance(tree, dict):
        return {key: _map(change, x) for key, x in tree.items()}
    return change(tree)


def _leaves(kind: type[T], tree: Any) -> list[T]:
    found: list[T] = []
    _map(lambda x: found.append(x) if isinstance(x, kind) else None, tree)
    return found


def _frozen(x: Any) -> Any:
    """An argument as a step holds it: values of the user's own tensors are copied, as they may change."""
    if isinstance(x, torch.Generator):
        return _Generator
    if isinstance(x, torch.Tensor) and _record_of(x):
        return _ref(x)
    return x.detach().clone() if isinstance(x, torch.Tensor) else x


def _check_dense(tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided:
        raise DelayedInitError(f"a sparse tensor{_user_line()} cannot be delayed: make it outside no_init_parameters()")


def _shape_only(x: torch.Tensor) -> torch.Tensor:
    _check_dense(x)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)


def _as_meta(x: Any) -> Any:
    """An argument as the run on meta gets it."""
    if isinstance(x, torch.Generator):
        return None
    return _shape_only(x) if isinstance(x, torch.Tensor) and not _record_of(x) else x


@functools.cache
def _schema(func: Any) -> tuple[tuple[tuple[int, str], ...], bool]:
    """The arguments that an operator writes, as positions and names, and whether it takes a device."""
    arguments = list(enumerate(func._schema.arguments))
    written = tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return written, any(a.name == "device" for _, a in arguments)


def _frame_outside(*places: str) -> FrameType | None:
    """The innermost frame that runs none of these files and folders."""
    frame: FrameType | None = sys._getframe()
    while frame and frame.f_code.co_filename.startswith(places):
        frame = frame.f_back
    return frame


def _user_line(call: Any = "") -> str:
    """The operator, and the source line outside torch that runs it."""
    frame = _frame_outside(__file__, str(Path(torch.__file__).parent))
    place = f" at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""
    return f"{getattr(call, 'overloadpacket', call)}{place}"


# A CPU generator's state: its seed (8 bytes), counters (16 bytes), the words of the Mersenne Twister (8 bytes each), …
_TOKEN, _TOKEN_MARK = slice(24, 40), 0x5EED70CE


def _token(state: torch.Tensor) -> int:
    serial, mark = state[_TOKEN].clone().view(torch.int64).tolist()
    return serial if mark == _TOKEN_MARK else 0


def _with_token(state: torch.Tensor, serial: int) -> torch.Tensor:
    state = state.clone()
    state[_TOKEN] = torch.tensor([serial, _TOKEN_MARK], dtype=torch.int64, device=CPU).view(torch.uint8)
    return state


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
            leaves_meta = func.overloadpacket in _LIKE and asked is not None and asked != META
            if any(t.device.type == "meta" for t in tensors) and not leaves_meta:
                return func(*args, **kwargs)  # a meta tensor of the model's own
            if func.overloadpacket in _LIFTS:
                return self.constant(args[0])
            if written and torch.Tag.nondeterministic_seeded in func.tags:
                raise DelayedInitError(
                    f"{_user_line(func)} draws into a tensor of shape {tuple(written[0].shape)} that was made outside "
                    "no_init_parameters(), where draws are delayed: make the tensor inside the context"
                )
            if written or func.is_view or torch.Tag.data_dependent_output in func.tags:
                return func(*args, **kwargs)
        for tensor in () if func.overloadpacket in _LIKE else tensors:
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
        device, draws = _device(args, kwargs), torch.Tag.nondeterministic_seeded in func.tags
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
            step = self._step(func, args, kwargs, changed, fills=func.overloadpacket in _FILLS)
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
        if getattr(call, "overloadpacket", None) in _LIKE:
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
        """Puts the step behind the draw that came before it on its generator."""
        generator = generators[0] if generators else torch.default_generator
        state = generator.get_state()
        step.after = self._draws.get(_token(state), state)
        self._draws[step.serial] = step
        self._generators[id(generator)] = generator
        generator.set_state(_with_token(state, step.serial))

    def _read(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs an operator whose result Python needs now: possible where no draws are involved."""
        what = ".item(), bool(), int() or float()" if func is _aten._local_scalar_dense.default else func

        def now(x: Any) -> Any:
            return _value_now(x, what) if isinstance(x, torch.Tensor) else x

        out = func(*_map(now, args), **_map(now, kwargs))
        return _map(lambda x: self.constant(x) if isinstance(x, torch.Tensor) else x, out)

    def constant(self, value: torch.Tensor) -> torch.Tensor:
        """A delayed copy of a real tensor."""
        return self._delay(_aten.clone.default, (value,), {}, [])  # type: ignore[no-any-return]

    def record_call(self, call: Callable[..., Any], tensor: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Records a whole Python function that fills ``tensor`` with draws."""
        _check_draw(call.__name__, _known(tensor).device)
        with disable_current_modes():
            self._draw(self._step(call, (), kwargs, [tensor], fills=True), _leaves(torch.Generator, kwargs))

    def allow_version(self, tensor: torch.Tensor, more: int = 0) -> None:
        """Notes a tensor's version counter, so that a later change shows."""
        if not tensor.is_inference():
            record = _known(tensor)
            record.version = max(record.version, tensor._version + more)

    def runs_model_code(self, frame: FrameType | None) -> bool:
        """Whether a method of a module or an optimizer called the frame, within the context."""
        while frame and id(frame) != self._user_frame:  # frames beyond are none of ours
            if isinstance(frame.f_locals.get("self"), (torch.nn.Module, torch.optim.Optimizer)):
                return True
            frame = frame.f_back
        return False

    def restore_generators(self) -> None:
        """Takes the tokens out: each generator is as if nothing was drawn since the program last set it."""
        for generator in self._generators.values():
            state: Any = self._draws.get(_token(generator.get_state()))
            while isinstance(state, _Step):
                state = state.after
            if state is not None:
                generator.set_state(state)


def _device(args: Any, kwargs: dict[str, Any]) -> torch.device:
    """Where the result would be without the context."""
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
    """Answers where the dispatcher is not asked: attributes, conversions to Python, assignments to ``.data``."""

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
        """``device``, ``is_cpu`` or ``is_meta`` as model code is to see it."""
        if asker.f_code.co_filename == __file__:
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
    """An argument of ``tensor.to``; the device where the tensor would be is the one where it is."""
    if isinstance(x, str):
        x = torch.device(x)
    return META if isinstance(x, torch.device) and x == record.device else x


# ---------------------------------------------------------------------------------------------------- replaying


@contextlib.contextmanager
def _replaying() -> Iterator[None]:
    """Real tensors, whatever modes are on; the default generator and dtype come back."""
    dtype, state = torch.get_default_dtype(), torch.get_rng_state()
    with disable_current_modes(), torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_rng_state(state)


def _closure(roots: Iterable[_Step]) -> list[_Step]:
    """The steps that make the values of ``roots``, in their order."""
    found: set[_Step] = set()
    stack = list(roots)
    while stack:
        step = stack.pop()
        if step not in found:
            found.add(step)
            stack += step.inputs if step.base is None else (*step.inputs, step.base)
    return sorted(found, key=lambda step: step.serial)


def _draws_behind(steps: Iterable[_Step]) -> list[_Step]:
    """The draws that must happen so that the draws among ``steps`` get their numbers, in their order."""
    found: set[_Step] = set()
    stack = [step for step in steps if step.after is not None]
    while stack:
        draw = stack.pop()
        if draw not in found:
            found.add(draw)
            stack += [step for step in _closure(draw.inputs) if step.after is not None]
            stack += [draw.after] if isinstance(draw.after, _Step) else []
    return sorted(found, key=lambda draw: draw.serial)


def _storages(last: Mapping[int, _Step]) -> Iterator[tuple[int, dict[int, torch.UntypedStorage]]]:
    """Builds the storage of each slot, given the step that wrote it last; lets go of it when asked for the next."""
    slots = [(slot, _closure([step])) for slot, step in last.items()]
    tasks: dict[_Step | None, list[tuple[list[_Step], int | None]]] = defaultdict(list)  # by last draw
    for slot, program in slots:
        tasks[next((step for step in reversed(program) if step.after is not None), None)].append((program, slot))
    draws = _draws_behind(step for _, program in slots for step in program)
    followers: dict[_Step, list[_Step]] = defaultdict(list)
    states: dict[_Step, torch.Tensor] = {}  # of the generator, before each draw that is to come or to be repeated
    for draw in draws:
        if draw not in tasks:  # it only advances the generator
            tasks[draw].append((_closure([*draw.inputs, draw]), None))
        if isinstance(draw.after, _Step):
            followers[draw.after].append(draw)
        elif draw.after is not None:
            states[draw] = draw.after
    uses = Counter(step for group in tasks.values() for program, _ in group for step in program)
    for moment in (None, *draws):
        for program, wanted in tasks.pop(moment, ()):
            storages, after = _run(program, states, wanted)
            uses.subtract(program)
            for step in program:
                if not uses[step]:
                    states.pop(step, None)
            if moment is not None and after is not None:
                states.update({follower: after for follower in followers[moment]})
            if wanted is not None:
                yield wanted, storages
            del storages


def _run(
    program: Sequence[_Step], states: Mapping[_Step, torch.Tensor], wanted: int | None
) -> tuple[dict[int, torch.UntypedStorage], torch.Tensor | None]:
    """Runs the steps on real storages, each freed after its last use but the wanted one; the generator's last state."""
    last_use = {}
    for i, step in enumerate(program):
        for ref in _leaves(_Ref, (step.args, step.kwargs, step.outputs)):
            last_use[ref.slot] = i
    storages: dict[int, torch.UntypedStorage] = {}
    after = None
    for i, step in enumerate(program):
        state = _run_step(step, storages, states.get(step))
        after = after if state is None else state
        for slot in [slot for slot in storages if last_use[slot] <= i and slot != wanted]:
            del storages[slot]
    return storages, after


def _run_step(step: _Step, storages: dict[int, torch.UntypedStorage], state: torch.Tensor | None) -> torch.Tensor | None:
    """Runs one step; returns the state after it of the generator that it draws from."""
    arguments = (step.args, step.kwargs)
    generator = torch.Generator() if _Generator in _leaves(type, arguments) else torch.default_generator
    if step.after is not None:
        assert state is not None
        generator.set_state(state)
    held = {storage.data_ptr() for storage in storages.values()}
    held |= {t.data_ptr() for t in _leaves(torch.Tensor, arguments) if t.device.type == "cpu"}

    def real(x: Any) -> Any:
        if isinstance(x, _Ref):
            return _view(storages, x)
        return generator if x is _Generator else x

    torch.set_default_dtype(step.default_dtype)
    out = step.call(*_map(real, step.args), **_map(real, step.kwargs))
    if getattr(step.call, "overloadpacket", None) in _EMPTY:
        out.zero_()
    for ref, value in zip(step.outputs, _leaves(torch.Tensor, out)):
        if ref is None:
            continue
        same = (ref.size, ref.stride, ref.offset) == (tuple(value.shape), value.stride(), value.storage_offset())
        if same and ref.slot not in storages and value.is_conj() == ref.conj and value.data_ptr() not in held:
            storages[ref.slot] = value.untyped_storage()
        else:  # this kernel lays its result out otherwise than the one for meta tensors
            _view(storages, ref).copy_(value)
    return None if state is None else generator.get_state()


def _view(storages: dict[int, torch.UntypedStorage], ref: _Ref) -> torch.Tensor:
    """The tensor; a storage that does not exist yet is about to be filled."""
    if ref.slot not in storages:
        storages[ref.slot] = torch.UntypedStorage(ref.nbytes)
    tensor = torch.empty(0, dtype=ref.dtype, device=CPU).set_(storages[ref.slot], ref.offset, ref.size, ref.stride)
    return tensor.conj() if ref.conj else tensor


def _value_now(tensor: torch.Tensor, reader: Any) -> torch.Tensor:
    """The real tensor behind a delayed one, if no draw is involved."""
    record = _record_of(tensor)
    if record is None:
        return tensor
    program = _closure([record.last])
    if any(step.after is not None for step in program):
        raise DelayedInitError(
            f"{_user_line(reader)} needs the value of a tensor of shape {tuple(tensor.shape)} that holds random "
            "numbers, and it is not available under no_init_parameters(): read it outside the context"
        )
    with _replaying():
        return _view(_run(program, {}, record.slot)[0], _ref(tensor))
