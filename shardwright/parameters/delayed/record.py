"""Record of the operators that make a tensor which does not exist yet."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from shardwright.errors import ShardwrightError

T = TypeVar("T")
META, CPU = torch.device("meta"), torch.device("cpu")


class DelayedInitError(ShardwrightError):
    """A construction that cannot be delayed, or a tensor whose initialisation was not recorded."""


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
    """Placeholder for an explicit ``generator=`` in the arguments of a step."""


@dataclass(eq=False)
class _Step:
    """One recorded operator: the steps whose values it reads, and the values that it makes of them."""

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
    """Record that a meta storage carries."""

    slot: int
    last: _Step
    device: torch.device  # where it would be without the context
    version: int = 0  # the highest version counter that recorded operators can have left on a tensor of this storage


_RECORD = "_shardwright_record"
_serials = itertools.count(1)


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
    """Tells whether the tensor is the whole of its storage, each element once."""
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
    """Copies the values of the user's own tensors among an argument, since they may change."""
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
    """Returns an argument as it is for the run on meta."""
    if isinstance(x, torch.Generator):
        return None
    return _shape_only(x) if isinstance(x, torch.Tensor) and not _record_of(x) else x


@functools.cache
def _schema(func: Any) -> tuple[tuple[tuple[int, str], ...], bool]:
    """Returns the written arguments of an operator, as positions and names, and whether it takes a device."""
    arguments = list(enumerate(func._schema.arguments))
    written = tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return written, any(a.name == "device" for _, a in arguments)


OURS = str(Path(__file__).parent) + os.sep  # the files that record and replay


def _frame_outside(*places: str) -> FrameType | None:
    """Returns the innermost frame that runs none of these files and folders."""
    frame: FrameType | None = sys._getframe()
    while frame and frame.f_code.co_filename.startswith(places):
        frame = frame.f_back
    return frame


def _user_line(call: Any = "") -> str:
    """Describes the operator, and the source line outside torch that runs it."""
    frame = _frame_outside(OURS, str(Path(torch.__file__).parent))
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
