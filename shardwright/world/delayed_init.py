"""Delayed initialisation: build a model on the meta device now, make its values one parameter at a time later.

While the context is open, a dispatch mode sends every new tensor to the meta device and writes down the operators that
make or change its values. Replaying them gives, bit for bit, the values of an ordinary construction. Three facts make
the record small and its replay cheap:

- **A tensor is a view of a storage.** Only storages have values, so views, `nn.Parameter(t)`, `.data` and tied weights
  need no record: they are geometry over a storage. Each meta storage carries, as an attribute, the step that wrote it
  last; each step holds the steps that it read. There is no other registry, so a record dies with its tensors.
- **The state of a generator is a value too.** A draw names the draw before it, or the state that the program had set.
  While the context is open each generator holds a *token* that stands for "the state after step n"; thus reseeding and
  `fork_rng` inside the context mean what they mean outside. On leaving, the generator is as if nothing was drawn.
- **A fill forgets.** `normal_` over a whole storage depends on nothing before it, so a value that is initialised twice
  costs one. The first draw only advances the generator, into a temporary.

Replay walks the draws in their order. A storage is built, whole, when its last draw comes up; its earlier draws are
then repeated from saved states (5 KB each). So only one storage is real at any time, whatever the model did in between.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack

from shardwright.errors import ShardwrightError

T = TypeVar("T")

META, CPU = torch.device("meta"), torch.device("cpu")

_aten = torch.ops.aten
# Write every element of their first argument without reading it.
_FILLS = {
    getattr(_aten, name)
    for name in "uniform_ normal_ random_ exponential_ geometric_ cauchy_ log_normal_ bernoulli_ zero_ fill_ copy_".split()
}
# Read the shape of their first argument, not its values.
_LIKE = {
    getattr(_aten, name)
    for name in "empty_like zeros_like ones_like full_like rand_like randn_like randint_like "
    "new_empty new_empty_strided new_zeros new_ones new_full".split()
}
_EMPTY = {
    getattr(_aten, name)
    for name in "empty empty_strided empty_permuted empty_like new_empty new_empty_strided".split()
}
_LIFTS = {_aten.lift_fresh, _aten.lift_fresh_copy, _aten.lift}

_RECORD = "_shardwright_delayed"  # the attribute of a meta storage that holds its _Record
_serials = itertools.count(1)


class DelayedInitError(ShardwrightError):
    """A construction that cannot be delayed, or a tensor whose value was not recorded."""


# ---------------------------------------------------------------------------------------------------- the record


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
    """One recorded operator. ``base`` wrote the storage that this step changes in part; ``inputs`` wrote what it reads."""

    serial: int
    call: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    default_dtype: torch.dtype
    inputs: tuple[_Step, ...]
    base: _Step | None
    outputs: list[_Ref | None] = field(default_factory=list)
    zeroed: bool = False  # torch.empty: replayed as zeros, so that all ranks agree on them
    after: _Step | torch.Tensor | None = None  # a draw: the draw before it, or the generator's state
    own_generator: bool = False


@dataclass(eq=False)
class _Record:
    """What a meta storage carries."""

    slot: int
    last: _Step
    device: torch.device  # where the tensor would be without the context
    version: int = 0  # the highest version counter that recorded operators can have left on a tensor of this storage


def _record_of(tensor: torch.Tensor) -> _Record | None:
    if tensor.device.type != "meta" or tensor.layout != torch.strided:
        return None
    return getattr(tensor.untyped_storage(), _RECORD, None)


def _map(change: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        return type(tree)([_map(change, x) for x in tree])
    if isinstance(tree, dict):
        return {k: _map(change, x) for k, x in tree.items()}
    return change(tree)


def _tensors(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _map(lambda x: found.append(x) if isinstance(x, torch.Tensor) else None, tree)
    return found


def _covers(tensor: torch.Tensor) -> bool:
    """Whether the tensor is the whole of its storage, each element once."""
    if tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
        return False
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _name(call: Any) -> str:
    return str(getattr(call, "overloadpacket", None) or getattr(call, "__name__", call))


def _user_line() -> str:
    """The source line, outside torch and this file, that is running."""
    torch_folder = str(Path(torch.__file__).parent)
    frame: FrameType | None = sys._getframe()
    while frame and (frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(torch_folder)):
        frame = frame.f_back
    return f" at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""


class _Recorder(TorchDispatchMode):
    """Sends new tensors to the meta device and records the steps that give them values."""

    def __init__(self) -> None:
        super().__init__()
        self._draws: dict[int, _Step] = {}
        self._generators: dict[int, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = _tensors((args, kwargs))
        delayed = [t for t in tensors if _record_of(t)]
        strange = [t for t in tensors if t.device.type == "meta" and not _record_of(t)]
        if strange and not delayed:
            return func(*args, **kwargs)  # a meta model of the user's own
        if strange:
            raise DelayedInitError(
                f"{_name(func)}{_user_line()} reads a meta tensor of shape {tuple(strange[0].shape)} that was not made "
                "under no_init_parameters(), so its value is unknown: make it inside the context"
            )
        written = _written(func, args, kwargs)
        if tensors and not delayed:
            if func.overloadpacket in _LIFTS:
                return self._constant(args[0])
            if written and torch.Tag.nondeterministic_seeded in func.tags:
                raise DelayedInitError(
                    f"{_name(func)}{_user_line()} draws into a tensor of shape {tuple(written[0].shape)} that was made "
                    "outside no_init_parameters(), where draws do not happen: make the tensor inside the context"
                )
            if written or func.is_view or torch.Tag.data_dependent_output in func.tags:
                return func(*args, **kwargs)
        for tensor in written:
            if not _record_of(tensor):
                raise DelayedInitError(
                    f"{_name(func)}{_user_line()} writes a delayed value into a tensor of shape {tuple(tensor.shape)} "
                    "that was made outside no_init_parameters(): make that tensor inside the context too"
                )
        if torch.Tag.data_dependent_output in func.tags:
            return self._read(func, args, kwargs)
        return self._delay(func, args, kwargs, written)

    def _delay(self, func: Any, args: Any, kwargs: dict[str, Any], written: list[torch.Tensor]) -> Any:
        """Runs the operator on meta tensors and records it if it makes or changes values."""
        places = any(a.name == "device" for a in func._schema.arguments)
        device = self._device(args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and device.type != "cpu":
            raise DelayedInitError(
                f"{_name(func)}{_user_line()} draws on device '{device}', and no_init_parameters() replays draws on the "
                "CPU: build the model on the CPU inside the context, shardwright moves it"
            )
        kwargs.pop("pin_memory", None)
        meta_kwargs = {**kwargs, "device": META} if places else kwargs
        try:
            out = func(*_map(_as_meta, args), **_map(_as_meta, meta_kwargs))
        except NotImplementedError:  # its shape depends on values, or it knows no meta tensors
            if written:
                raise
            return self._read(func, args, kwargs)
        fresh = [t for t in _tensors(out) if not _record_of(t)]
        changed = [] if torch.Tag.inplace_view in func.tags else written
        if fresh or changed:
            step = self._step(func, args, {**kwargs, "device": CPU} if places else kwargs, changed)
            if torch.Tag.nondeterministic_seeded in func.tags:
                self._draw(step, (args, kwargs))
            step.outputs = [_own(t, step, device) for t in _tensors(out)]
        for tensor in written:
            if not tensor.is_inference():  # the counter is raised after this call
                record = _record_of(tensor)
                assert record is not None
                record.version = max(record.version, tensor._version + 1)
        return out

    def record_call(self, call: Callable[..., Any], tensor: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Records a whole Python function that fills ``tensor``, one of its arguments, with draws."""
        with _disable_current_modes():
            self._draw(self._step(call, (), kwargs, [tensor], fills=True), kwargs)

    def _step(
        self, call: Any, args: Any, kwargs: dict[str, Any], changed: list[torch.Tensor], fills: bool = False
    ) -> _Step:
        packet = getattr(call, "overloadpacket", None)
        reads = [t for t in _tensors((args, kwargs)) if _record_of(t)]
        base = None
        if fills or packet in _FILLS:
            reads.remove(next(t for t in reads if t is changed[0]))
            record = _record_of(changed[0])
            base = None if record is None or _covers(changed[0]) else record.last
        if packet in _LIKE:
            args, reads = (_as_meta(torch.empty_like(args[0], device=META)), *args[1:]), []
        step = _Step(
            serial=next(_serials),
            call=call,
            args=_map(_freeze, args),
            kwargs=_map(_freeze, kwargs),
            default_dtype=torch.get_default_dtype(),
            inputs=tuple({r.last: None for t in reads if (r := _record_of(t))}),
            base=base,
            zeroed=packet in _EMPTY,
        )
        for tensor in changed:
            record = _record_of(tensor)
            assert record is not None
            record.last = step
        return step

    def _draw(self, step: _Step, arguments: Any) -> None:
        """Puts the step behind the last draw of its generator."""
        generators: list[torch.Generator] = []
        _map(lambda x: generators.append(x) if isinstance(x, torch.Generator) else None, arguments)
        generator = generators[0] if generators else torch.default_generator
        state = generator.get_state()
        self._generators[id(generator)] = generator
        step.after = self._draws.get(_token(state), state)
        step.own_generator = bool(generators)
        self._draws[step.serial] = step
        generator.set_state(_with_token(state, step.serial))

    def _device(self, args: Any, kwargs: dict[str, Any]) -> torch.device:
        """Where the result would be without the context."""
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type != "meta":
            return torch.device(asked)
        generator = kwargs.get("generator")
        devices = [r.device for t in _tensors((args, kwargs)) if (r := _record_of(t))]
        devices += [generator.device] if generator is not None else []
        return next((d for d in devices if d.type != "cpu"), CPU)

    def _constant(self, value: torch.Tensor) -> torch.Tensor:
        return self._delay(_aten.clone.default, (value,), {}, [])

    def _read(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs an operator whose result Python needs now, which only values without draws allow."""
        read = "item() or bool()" if func is _aten._local_scalar_dense.default else _name(func)
        out = func(*_map(lambda x: _value_now(x, read), args), **_map(lambda x: _value_now(x, read), kwargs))
        return _map(lambda x: self._constant(x) if isinstance(x, torch.Tensor) else x, out)

    def restore_generators(self) -> None:
        """Takes the tokens out: each generator is as if nothing was drawn since the program last set it."""
        for generator in self._generators.values():
            state: Any = self._draws.get(_token(generator.get_state()))
            while isinstance(state, _Step):
                state = state.after
            if state is not None:
                generator.set_state(state)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that the operator's schema says it writes."""
    found: list[torch.Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


def _own(tensor: torch.Tensor, step: _Step, device: torch.device) -> _Ref | None:
    """Makes ``step`` the maker of a storage that has none; ``None`` if the tensor is one of the step's arguments."""
    storage = tensor.untyped_storage()
    if not hasattr(storage, _RECORD):
        setattr(storage, _RECORD, _Record(next(_serials), step, device))
    elif getattr(storage, _RECORD).last is not step or not step.is_maker_of(tensor):
        return None
    return _ref(tensor)


def _as_meta(x: Any) -> Any:
    """An argument for the run on meta: real tensors lose their values, generators stay untouched."""
    if isinstance(x, torch.Generator):
        return None
    if isinstance(x, torch.Tensor) and x.device.type != "meta":
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
    return x


def _ref(tensor: torch.Tensor) -> _Ref:
    record = _record_of(tensor)
    assert record is not None
    if tensor.is_neg():
        raise DelayedInitError(
            f"no_init_parameters() cannot record a lazily negated view{_user_line()}: call resolve_neg() on it first"
        )
    nbytes = tensor.untyped_storage().nbytes()
    return _Ref(
        record.slot,
        nbytes,
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.storage_offset(),
        tensor.dtype,
        tensor.is_conj(),
    )


def _freeze(x: Any) -> Any:
    """An argument as a step keeps it."""
    if isinstance(x, torch.Generator):
        return _Generator
    if isinstance(x, torch.Tensor):
        if _record_of(x):
            return _ref(x)
        return x if x.device.type == "meta" else x.detach().clone()
    return x


# CPU generator states: the seed (8 bytes), two counters (16 bytes), then the words of the Mersenne Twister, 8 bytes each.
_TOKEN_BYTES, _TOKEN_MARK = slice(24, 40), 0x5EED70CE


def _token(state: torch.Tensor) -> int:
    serial, mark = state[_TOKEN_BYTES].clone().view(torch.int64).tolist()
    return serial if mark == _TOKEN_MARK else 0


def _with_token(state: torch.Tensor, serial: int) -> torch.Tensor:
    state = state.clone()
    state[_TOKEN_BYTES] = torch.tensor([serial, _TOKEN_MARK]).view(torch.uint8)
    return state
