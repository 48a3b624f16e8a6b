"""Runs the operators of the user's own code on distributed tensors as on whole ones.

DTensor has rules for some operators, refuses others, refuses ordinary tensors beside its own, and loses what is written into
views of pieces. For tensors over our meshes every operator of torch runs here, in one of two ways:

- **on pieces**: what computes each element by itself (:func:`~shardwright.base.operators.is_elementwise`) runs on this rank's
  piece, and other tensors are cut like it. Nothing is sent.
- **on whole values**: everything else gets the values gathered, on every rank. Results are held by every rank; what the
  operator wrote is cut back into the pieces.

An ordinary tensor beside a distributed one is the whole value, which every rank has. Only norms are left to DTensor: ranks
send a number each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from shardwright.agreement import job_watch
from shardwright.agreement.random_state import agree_on_random_state
from shardwright.base.operators import (
    CHANGES_MEMORY,
    LIST_NORM,
    READS_NUMBER,
    READS_SHAPE,
    RUN_BY_DTENSOR,
    VECTOR_NORM,
    is_elementwise,
    is_elementwise_on_lists,
    may_draw,
    operator_of,
)
from shardwright.base.torch_private import pytree, return_and_correct_aliasing
from shardwright.errors import WorldError
from shardwright.ir.layout import Layout
from shardwright.parameters.alike import NOT_ALIKE, remember_norms, run_alike
from shardwright.parameters.beside import check_no_plain_call, let_gradients_pass
from shardwright.parameters.ours import (
    View,
    at_home_with,
    has_homes,
    is_over_a_stage,
    is_part,
    mesh_of_all_ranks,
    remember_view,
    view_of,
)
from shardwright.parameters.placements import _alike, _like, _over, _slice, layout_of
from shardwright.parameters.places import place_of_spec
from shardwright.parameters.whole import whole_numbers, whole_value

Otherwise = Callable[..., Any]


def run_operator(otherwise: Otherwise) -> Otherwise:
    """Returns the function by which DTensor runs an operator; ``otherwise`` runs it as torch does."""

    def run(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = run_alike(operator, args, kwargs)
        if result is not NOT_ALIKE:
            return result
        tensors = _tensors_in((*args, *kwargs.values()))
        given = [t for t in tensors if isinstance(t, DTensor)]
        if any(place_of_spec(t) is None for t in given):  # over another mesh than ours
            return otherwise(operator, args, kwargs)
        if _is_for_dtensor(operator, given, args, len(given) < len(tensors)):
            result = otherwise(operator, args, kwargs)
            if operator is LIST_NORM and not kwargs:
                remember_norms(given, args[1:], result)
            return result
        if len(given) < len(tensors):
            check_no_plain_call(operator_of(operator))
            let_gradients_pass(tensors)
        call = _Call(operator, args, kwargs, tensors)
        if is_elementwise_on_lists(operator):
            return _run_on_lists(call)
        template = call.template()
        return call.on_whole_values() if template is None else call.on_pieces(template)

    def at_home(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = run(operator, args, kwargs)
        if has_homes():
            given = [t for t in _tensors_in((*args, *kwargs.values())) if isinstance(t, DTensor)]
            for value in _tensors_in((result,)):
                if isinstance(value, DTensor):
                    of = next((t for t in given if t.device_mesh == value.device_mesh), None)
                    if of is not None:
                        at_home_with(value, of)
        return result

    return at_home


def _tensors_in(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors_in(value)
    return found


def _is_for_dtensor(operator: Any, given: Sequence[DTensor], args: Any, is_mixed: bool) -> bool:
    """Tells whether DTensor itself runs an operator: a second name of a tensor, or a norm of pieces."""
    first = given[0]
    if operator.overloadpacket in RUN_BY_DTENSOR:
        return view_of(first) is None
    if operator not in (VECTOR_NORM, LIST_NORM) or is_mixed or any(map(is_over_a_stage, given)):
        return False
    order = args[1] if len(args) > 1 else 2
    if not (isinstance(order, (int, float)) and 0 < order < math.inf and len(args) <= 2):
        return False
    exact = (torch.float32, torch.float64)  # others round every rank's norm
    if not all(t.dtype in exact and view_of(t) is None and layout_of(t) is not None for t in given):
        return False
    return (any if operator is LIST_NORM else all)(map(is_part, given))


class _Call:
    """One call of an operator with at least one distributed tensor."""

    def __init__(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor]):
        self.operator, self.args, self.kwargs, self.tensors = operator, args, kwargs, tensors
        self.given = [t for t in tensors if isinstance(t, DTensor)]
        self.name = operator_of(operator)
        self.written = self._written()
        self.whole_written: list[DTensor] = []  # of lists, those that the operator wrote to as whole values
        self._whole: dict[int, Tensor] = {}  # by id of the tensor

    def _written(self) -> list[Tensor]:
        """Lists the tensors that the operator writes to."""
        found: list[Any] = []
        for i, argument in enumerate(self.operator._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = self.args[i] if i < len(self.args) else self.kwargs.get(argument.name)
                found += [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
        return found

    def with_tensors(self, replace: Callable[[Tensor], Tensor]) -> Any:
        """Runs the operator with every tensor replaced."""

        def given(value: Any) -> Any:
            return replace(value) if isinstance(value, Tensor) else value

        args, kwargs = pytree.tree_map(given, (self.args, self.kwargs))
        return self.operator(*args, **kwargs)

    # -- on pieces --------------------------------------------------------------------------------------------------

    def template(self) -> DTensor | None:
        """Returns the tensor whose layout the result of an elementwise operator has; ``None`` if it runs on whole values."""
        if not is_elementwise(self.operator) or len(self.written) > 1:
            return None
        if self._makes_plain_result():
            return None
        try:
            shape = torch.broadcast_shapes(*(t.shape for t in self.tensors))
        except RuntimeError:
            return None  # torch says on whole values what is wrong with them
        candidates = self.written or self.given
        return next((t for t in candidates if isinstance(t, DTensor) and is_cut(t) and t.shape == shape), None)

    def on_pieces(self, template: DTensor) -> Any:
        """Runs an elementwise operator on this rank's pieces. The result is laid out like the template."""
        cut = cut_like(template, self.whole)
        result = self.with_tensors(cut)
        if self.written:
            return template
        if isinstance(result, (list, tuple)):
            return type(result)(_alike(template, value) for value in result)
        return _alike(template, result)

    def _makes_plain_result(self) -> bool:
        """Tells whether the result is an ordinary tensor: where an ordinary one with a gradient takes part, as losses do."""
        if not torch.is_grad_enabled() or self.written:
            return False
        return any(t.requires_grad and not isinstance(t, DTensor) for t in self.tensors)

    # -- on whole values --------------------------------------------------------------------------------------------

    def whole(self, tensor: Tensor) -> Tensor:
        """Returns the whole value of a tensor, once for all of its uses; a view's shares memory with its base's."""
        if not isinstance(tensor, DTensor):
            return tensor
        if id(tensor) not in self._whole:
            view = view_of(tensor)
            if view is None:
                self._whole[id(tensor)] = whole_value(tensor, "a number" if self.operator is READS_NUMBER else self.name)
            else:
                self._whole[id(tensor)] = view.of_whole(self.whole(view.base))
        return self._whole[id(tensor)]

    def on_whole_values(self) -> Any:
        """Runs any operator on whole values, cuts back what it wrote, and distributes its results."""
        if torch.Tag.inplace_view in self.operator.tags:
            return self._change_shape()
        if self.operator.overloadpacket in READS_SHAPE and not may_draw(self.operator):
            return self._distributed(self.with_tensors(lambda t: t._local_tensor if isinstance(t, DTensor) else t))
        draws = may_draw(self.operator)
        if draws and self.kwargs.get("generator") is None:
            job_watch.note(f"random numbers for a tensor {list(self.given[0].shape)}")
            agree_on_random_state(self.given[0]._local_tensor.device)
        self._whole.update(whole_numbers(self.given, self.name))
        result = self.with_tensors(self.whole)
        for tensor in self.written:
            if isinstance(tensor, DTensor):
                self._write_back(tensor, self.whole(tensor))
        if self._makes_plain_result():
            return result
        back = {id(value): tensor for tensor, value in ((t, self.whole(t)) for t in (*self.given, *self.written))}
        views = self._views_of()

        def distributed(i: int, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in back:
                return back[id(value)]
            first = self.given[0]
            if draws and value.shape == first.shape and is_cut(first):
                return _like(first, value)
            made = self._distributed(value)
            if views is not None:
                remember_view(made, View(views, self._replay(None if value is result else i)))
            return made

        if isinstance(result, (list, tuple)):
            return type(result)(distributed(i, value) for i, value in enumerate(result))
        return distributed(0, result)

    def _change_shape(self) -> Any:
        """Runs an operator that changes a tensor's shape in place, on a result that every rank holds whole."""
        tensor: Any = self.args[0]
        is_result = isinstance(tensor, DTensor) and not isinstance(tensor, nn.Parameter)
        if not is_result or is_part(tensor) or view_of(tensor) is not None or self.operator.overloadpacket in CHANGES_MEMORY:
            raise WorldError(
                f"{self.name} changes the shape or memory of a distributed tensor {list(self.given[0].shape)} in place, which "
                f"ranks hold in pieces: write it out of place, new = tensor.{self.name.rstrip('_')}(...)"
            )
        shaped = torch.empty_strided(tensor.shape, tensor.stride(), device="meta", dtype=tensor.dtype)
        shaped = getattr(shaped, self.name.rstrip("_"))(*self.args[1:], **self.kwargs)
        mesh = tensor.device_mesh
        made = _over(tensor._local_tensor, mesh, [Replicate()] * mesh.ndim, shaped.shape, shaped.stride())
        if mesh.get_coordinate() is not None:
            self.operator(tensor._local_tensor, *self.args[1:], **self.kwargs)
        else:
            tensor._local_tensor = made._local_tensor
        tensor._spec = made._spec
        return return_and_correct_aliasing(self.operator, self.args, self.kwargs, tensor)

    def _views_of(self) -> DTensor | None:
        """Returns the tensor of which the results are views that hold a copy; ``None`` where they hold its own memory."""
        aliases = (r.alias_info is not None and not r.alias_info.is_write for r in self.operator._schema.returns)
        base = self.args[0] if self.args else None
        if not any(aliases) or not isinstance(base, DTensor):
            return None
        return base if is_part(base) or is_over_a_stage(base) or view_of(base) is not None else None

    def _replay(self, index: int | None) -> Callable[[Tensor], Tensor]:
        operator, rest, kwargs = self.operator, self.args[1:], self.kwargs

        def of_whole(whole: Tensor) -> Tensor:
            made = operator(whole, *rest, **kwargs)
            return made if index is None else made[index]

        return of_whole

    def _distributed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        mesh = self.given[0].device_mesh
        if not value.dim() and is_over_a_stage(self.given[0]):  # as all ranks have computed it
            mesh = mesh_of_all_ranks(mesh.device_type)
        return _over(value, mesh, [Replicate()] * mesh.ndim, value.shape, value.stride())

    def _write_back(self, tensor: DTensor, value: Tensor) -> None:
        """Writes a whole value into what this rank holds of a tensor, or of what it is a view of."""
        if value.shape != tensor.shape:
            raise WorldError(
                f"{self.name} would change a distributed tensor {list(tensor.shape)} to {list(value.shape)} in place: give it "
                "a tensor of the right shape"
            )
        view = view_of(tensor)
        if view is not None:
            self._write_back(view.base, self.whole(view.base))
            if tensor.device_mesh.get_coordinate() is not None:
                tensor._local_tensor.copy_(value)
        elif is_cut(tensor):
            layout = layout_of(tensor)
            assert layout is not None
            if tensor.device_mesh.get_coordinate() is not None:
                tensor._local_tensor.copy_(_slice(value, layout, value.device))
        elif is_part(tensor):  # the terms of a sum, which is complete now
            made = self._distributed(value)
            tensor._local_tensor, tensor._spec = made._local_tensor, made._spec


def is_cut(tensor: Tensor) -> bool:
    """Tells whether a rank can write into its piece of a tensor, empty where another stage holds it."""
    if not isinstance(tensor, DTensor) or not (is_part(tensor) or is_over_a_stage(tensor)):
        return False
    return view_of(tensor) is None and layout_of(tensor) is not None


def cut_like(template: DTensor, whole: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns a function that cuts tensors as a template is cut.

    Args:
        template: a distributed tensor.
        whole: gives the whole value of a tensor. Tensors that are cut like the template do not need it.

    Returns:
        A function from a tensor whose shape may be broadcast to the template's to the part of it for this rank's piece.
    """
    layout = layout_of(template)
    assert layout is not None
    rank = dist.get_rank()
    bounds = _bounds(layout, tuple(template.shape), rank)
    is_here = template.device_mesh.get_coordinate() is not None

    def cut(tensor: Tensor) -> Tensor:
        if is_cut(tensor) and tensor.shape == template.shape and _same_cut(tensor, template):
            local: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
            return local if is_here else local.new_empty((0,) * len(bounds))
        value = whole(tensor)
        sizes = zip(value.shape, bounds[len(bounds) - value.dim() :], template.shape[len(bounds) - value.dim() :])
        return value[tuple(slice(*ends) if size == full else slice(None) for size, ends, full in sizes)]

    return cut


@lru_cache(maxsize=4096)
def _bounds(layout: Layout, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, int], ...]:
    return tuple(layout.bounds(shape).get(rank, ((0, 0),) * len(shape)))  # none of another stage's


def _same_cut(tensor: Any, template: DTensor) -> bool:
    return tensor.device_mesh == template.device_mesh and tensor.placements == template.placements


# -- lists --------------------------------------------------------------------------------------------------------------


def _run_on_lists(call: _Call) -> Any:
    """Runs an operator on lists of tensors: at each place of the lists on pieces, where one can, else on whole values."""
    values = [*call.args, *call.kwargs.values()]
    lists = [value for value in values if _is_list_of_tensors(value)]
    written = {id(t) for t in call.written}
    writes_twice = len(written) < len(call.written) or any(id(t) in written for other in lists[1:] for t in other)
    templates: list[DTensor | None] = []
    made: dict[int, list[Tensor]] = {id(each): [] for each in lists}
    for beside in zip(*lists, strict=True):
        template = None if writes_twice else _template_of_place(beside, written)
        templates.append(template)
        cut = call.whole if template is None else cut_like(template, call.whole)
        for each, tensor in zip(lists, beside):
            made[id(each)].append(cut(tensor))
        if template is None:
            call.whole_written += [t for t in beside if id(t) in written and isinstance(t, DTensor)]
    new = [made.get(id(v), call.whole(v) if isinstance(v, Tensor) else v) for v in values]
    many = len(call.args)
    result = call.operator(*new[:many], **dict(zip(call.kwargs, new[many:])))
    for tensor in call.whole_written:
        call._write_back(tensor, call.whole(tensor))
    if not isinstance(result, (list, tuple)):
        return result
    if call.written:
        return type(result)(call.args[0])
    return [call._distributed(v) if t is None else _alike(t, v) for t, v in zip(templates, result, strict=True)]


def _template_of_place(beside: Sequence[Tensor], written: set[int]) -> DTensor | None:
    """Returns a tensor like whose pieces all at one place of the lists can be cut; ``None`` if there is none."""
    template: Any = next((t for t in beside if is_cut(t)), None)
    if template is None or any(t.shape != template.shape and t.dim() for t in beside):
        return None
    writes_others = any(id(t) in written and not (is_cut(t) and _same_cut(t, template)) for t in beside)
    return None if writes_others else template


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(t, Tensor) for t in value)
