"""Makes delayed tensors, or one rank's slices of them, from their record."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from shardwright.base.operators import EMPTY
from shardwright.base.torch_private import disable_current_modes
from shardwright.errors import numbered
from shardwright.parameters.delayed.record import (
    CPU,
    DelayedInitError,
    T,
    _Generator,
    _leaves,
    _map,
    _record_of,
    _Ref,
    _ref,
    _Step,
    _user_line,
)


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

    >>> from shardwright.parameters.delayed.recorder import no_init_parameters
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
        count = f"{len(problems)} of {len(wanted)} tensors cannot be materialised, none was"
        raise DelayedInitError(f"{count}\n{numbered(problems)}")


@contextlib.contextmanager
def _replaying() -> Iterator[None]:
    """Makes real tensors within the block, whatever modes are on; restores the default generator and dtype."""
    dtype, state = torch.get_default_dtype(), torch.get_rng_state()
    with disable_current_modes(), torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_rng_state(state)


def _closure(roots: Iterable[_Step]) -> list[_Step]:
    """Collects the steps that make the values of ``roots``, in their order."""
    found: set[_Step] = set()
    stack = list(roots)
    while stack:
        step = stack.pop()
        if step not in found:
            found.add(step)
            stack += step.inputs if step.base is None else (*step.inputs, step.base)
    return sorted(found, key=lambda step: step.serial)


def _draws_behind(steps: Iterable[_Step]) -> list[_Step]:
    """Collects the draws to repeat so that the draws among ``steps`` get their numbers."""
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
    """Builds the storage of each slot from its last step. Frees it when asked for the next."""
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
    """Runs the steps on real storages, each freed after its last use unless wanted; returns the generator's last state too."""
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
    if getattr(step.call, "overloadpacket", None) in EMPTY:
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
    """Builds the tensor; a storage that does not exist yet is about to be filled."""
    if ref.slot not in storages:
        storages[ref.slot] = torch.UntypedStorage(ref.nbytes)
    tensor = torch.empty(0, dtype=ref.dtype, device=CPU).set_(storages[ref.slot], ref.offset, ref.size, ref.stride)
    return tensor.conj() if ref.conj else tensor


def _value_now(tensor: torch.Tensor, reader: Any) -> torch.Tensor:
    """Returns the real tensor behind a delayed one, if no draw is involved."""
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
