"""Runs operators on distributed tensors that lie alike, on what this rank holds of them.

Optimizers, averages and clipping call little else, many times in a step. So this is the short way through :mod:`.operators`,
for operators that compute each element by itself, and for norms: nothing is sent, specs are compared by their ids, and results
share the specs of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import Any, Final, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwright.base.operators import LIST_NORM, is_elementwise, is_elementwise_on_lists
from shardwright.parameters.ours import is_over_a_stage, view_of
from shardwright.parameters.placements import _alike
from shardwright.parameters.places import is_number, place_of, place_of_spec

NOT_ALIKE: Final = object()  # the answer where the short way does not lead


@cache
def _way(operator: Any) -> Any:
    """Returns the function that runs an operator on tensors that lie alike, if there may be such."""
    if operator is LIST_NORM:
        return _norms
    if is_elementwise_on_lists(operator):
        return _on_lists
    if not is_elementwise(operator):
        return None
    writes = [i for i, a in enumerate(operator._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return {(): _on_tensors, (0,): _on_tensors_in_place}.get(tuple(writes))


def run_alike(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operator on local tensors if its tensors lie alike, else returns ``NOT_ALIKE`` and has done nothing."""
    way = _way(operator)
    return NOT_ALIKE if way is None else way(operator, args, kwargs)


# -- tensors ------------------------------------------------------------------------------------------------------------


def _locals(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any] | None:
    """Returns arguments with local tensors in them, and the tensor that says how all lie; ``None`` if they lie differently."""
    found: list[Any] = []
    template: Any = None
    place: Any = None
    for value in args:
        if isinstance(value, DTensor):
            here = place_of(value)
            if here is None:
                return None
            if place is None or (here is not place and not here.is_number and place.stands_beside(here)):
                template, place = value, here
            elif here is not place and not here.stands_beside(place):
                return None
            value = value._local_tensor
        elif isinstance(value, (Tensor, list, tuple)):
            return None
        found.append(value)
    if template is None or any(isinstance(value, Tensor) for value in kwargs.values()):
        return None
    return found, template


def _on_tensors_in_place(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = _locals(args, kwargs)
    if found is None or place_of(args[0]) is not place_of(found[1]):
        return NOT_ALIKE
    operator(*found[0], **kwargs)
    return args[0]


def _on_tensors(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = _locals(args, kwargs)
    if found is None:
        return NOT_ALIKE
    result, template = operator(*found[0], **kwargs), found[1]
    if isinstance(result, (list, tuple)):
        return type(result)(_lying_as(template, value) for value in result)
    return _lying_as(template, result)


def _lying_as(template: Any, local: Tensor) -> Any:
    """Makes a local result a distributed tensor. One of the template's dtype and strides shares its spec."""
    like = template._local_tensor
    if local.dtype == like.dtype and local.stride() == like.stride():
        return _made(local, template._spec)
    return _alike(template, local)


def _made(local: Tensor, spec: Any) -> Any:
    return DTensor.__new__(DTensor, local, spec, requires_grad=False)  # its __init__ does nothing, slowly


# -- lists --------------------------------------------------------------------------------------------------------------

_spec_of, _local_of = attrgetter("_spec"), attrgetter("_local_tensor")


class _Verdict(NamedTuple):
    """Answer whether lists of tensors with these specs lie alike, at each place of the lists."""

    specs: Any  # held, so that no others get their ids
    is_right: bool
    may_be_views: bool


_verdicts: dict[Any, _Verdict] = {}  # by ids of the specs
_MOST_REMEMBERED = 512


class _List(NamedTuple):
    """A list among the arguments: its place there, its tensors' specs, and whether no tensor is an ordinary one."""

    at: int
    specs: list[Any]
    is_pure: bool


def _on_lists(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    values = [*args, *kwargs.values()]
    lists: list[_List] = []
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            if not is_number(value):
                return NOT_ALIKE
            values[i] = value._local_tensor if isinstance(value, DTensor) else value
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            found = _list(i, value)
            if found is None:
                return NOT_ALIKE
            lists.append(found)
    if not lists or lists[0].at:
        return NOT_ALIKE
    key = tuple([tuple(map(id, each.specs)) for each in lists])
    verdict = _verdicts.get(key) or _judge(key, [(values[each.at], each.specs) for each in lists])
    if not verdict.is_right:
        return NOT_ALIKE
    if verdict.may_be_views and any(_is_view(t) for each in lists for t in values[each.at]):
        return NOT_ALIKE
    templates = values[0]
    for at, _, is_pure in lists:
        values[at] = list(map(_local_of, values[at])) if is_pure else [getattr(t, "_local_tensor", t) for t in values[at]]
    result = operator(*values[: len(args)], **dict(zip(kwargs, values[len(args) :])))
    if not isinstance(result, (list, tuple)) or not result:
        return result
    return [_lying_as(template, value) for template, value in zip(templates, result)]


def _list(at: int, tensors: Sequence[Any]) -> _List | None:
    """Describes a list of tensors; ``None`` if an ordinary tensor in it is no number."""
    try:
        return _List(at, list(map(_spec_of, tensors)), True)
    except AttributeError:  # an ordinary tensor
        if not all(isinstance(t, DTensor) or is_number(t) for t in tensors):
            return None
        return _List(at, [t._spec if isinstance(t, DTensor) else None for t in tensors], False)


def _is_view(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and view_of(tensor) is not None


def _judge(key: Any, lists: Sequence[tuple[Sequence[Tensor], list[Any]]]) -> _Verdict:
    """Decides whether tensors lie as those of the first list do, or are numbers; remembers it."""
    places = [place_of_spec(t) if isinstance(t, DTensor) else None for t in lists[0][0]]
    is_right = all(place is not None and (place.is_cut or place.is_whole) for place in places)
    for tensors, _ in lists[1:]:
        is_right = is_right and len(tensors) == len(places)
        for tensor, place in zip(tensors, places):
            mine = place_of_spec(tensor) if isinstance(tensor, DTensor) else place
            is_right = is_right and (mine is place or (mine is not None and place is not None and mine.stands_beside(place)))
    verdict = _Verdict([specs for _, specs in lists], is_right, any(p is not None and not p.is_cut for p in places))
    return _remember(_verdicts, key, verdict)


def _remember(table: dict[Any, Any], key: Any, value: Any) -> Any:
    if len(table) >= _MOST_REMEMBERED:
        table.clear()
    table[key] = value
    return value


# -- norms --------------------------------------------------------------------------------------------------------------


class _Norms(NamedTuple):
    """The specs that DTensor gave to the norms of tensors with these specs."""

    specs: Any  # of the tensors; held, so that no others get their ids
    made: list[Any]


_norms_made: dict[Any, _Norms] = {}  # by ids of the specs and the order


def remember_norms(tensors: Sequence[Any], rest: tuple[Any, ...], norms: Sequence[Any]) -> None:
    """Records what DTensor made of norms of pieces. Norms that it did not leave to the ranks are not recorded."""
    for tensor, norm in zip(tensors, norms):
        splits = [placement.is_replicate() for placement in tensor.placements]
        if [placement.is_replicate() for placement in norm.placements] != splits or norm.dim():
            return
    specs = list(map(_spec_of, tensors))
    _remember(_norms_made, (tuple(map(id, specs)), rest), _Norms(specs, list(map(_spec_of, norms))))


def _norms(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or not all(isinstance(t, DTensor) for t in args[0]):
        return NOT_ALIKE
    known = _norms_made.get((tuple([id(t._spec) for t in args[0]]), args[1:]))
    if known is None or any(view_of(t) is not None or is_over_a_stage(t) for t in args[0]):
        return NOT_ALIKE
    found = operator(list(map(_local_of, args[0])), *args[1:])
    return [_made(norm, spec) for norm, spec in zip(found, known.made)]
