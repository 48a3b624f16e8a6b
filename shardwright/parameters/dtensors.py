"""Makes distributed tensors in the user's own code give the global result, or refuses.

DTensor lets a rank read its own part of a number, draws the same random numbers for every piece, and ignores an assignment to
``.data``. For tensors over our meshes, and no others:

- a number read off a tensor that ranks hold parts of (``item``, ``float``, ``if``, a format) is refused;
- random numbers are those that the single device would draw for the whole tensor, on all ranks from rank 0's generator;
- ``tensor.data = value`` writes this rank's piece of the value;
- pieces cannot be pickled, whole values are pickled as ordinary tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardwright.agreement import job_watch
from shardwright.agreement.random_state import agree_on_random_state
from shardwright.base.operators import IS_NONZERO, READS_NUMBER, draws_on_dtensors
from shardwright.base.torch_private import add_dtensor_handler, pytree
from shardwright.errors import WorldError

_meshes: set[DeviceMesh] = set()

# Given a distributed tensor and a whole value: this rank's piece of that, laid out alike if it has its shape, else whole; and
# the whole value of a distributed tensor. :mod:`.parameters` says how.
Cut = Callable[[DTensor, Tensor], DTensor]
Whole = Callable[[Tensor], Tensor]


def is_ours(value: Any) -> bool:
    """Tells whether a tensor is distributed over one of our meshes."""
    return isinstance(value, DTensor) and value.device_mesh in _meshes


def is_part(value: DTensor) -> bool:
    """Tells whether a rank holds less than the value of a distributed tensor: a piece, or a term of a sum."""
    mesh = value.device_mesh
    return any(not p.is_replicate() and mesh.size(i) > 1 for i, p in enumerate(value.placements))


def watch_over(mesh: DeviceMesh, cut: Cut, whole: Whole) -> None:
    """Registers a mesh as ours, when the first of its tensors is made."""
    _meshes.add(mesh)
    _teach(cut, whole)


@lru_cache(maxsize=1)
def _teach(cut: Cut, whole: Whole) -> None:
    """Installs this behaviour in DTensor, for as long as this process lives."""
    _teach_readings()
    _teach_draws(cut, whole)
    _teach_copies()
    _teach_data(cut)


# -- numbers ------------------------------------------------------------------------------------------------------------


def _check_readable(value: DTensor, what: str) -> None:
    if is_ours(value) and is_part(value):
        held = "a term of it" if any(p.is_partial() for p in value.placements) else "a piece of it"
        raise WorldError(
            f"{what} of a distributed tensor {list(value.shape)} would be another number on every rank, for each holds {held}: "
            "write sw.full_value(tensor).item() on every rank; for the norm of gradients, sw.get_total_norm or "
            "sw.clip_grad_norm_ (print on one rank, read on all)"
        )


def _teach_readings() -> None:
    def read(otherwise: Any) -> Callable[..., Any]:
        def handler(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            _check_readable(args[0], "a number (item, float, int, bool, if, a format)")
            return operator(args[0].to_local(), *args[1:], **kwargs)

        return handler

    for operator in (READS_NUMBER, IS_NONZERO):
        add_dtensor_handler(operator, read)

    plain_format, plain_list, plain_numpy = Tensor.__format__, Tensor.tolist, Tensor.numpy

    def in_format(self: DTensor, spec: str) -> str:
        if spec and self.dim() == 0 and is_ours(self):
            return format(self.item(), spec)
        return plain_format(self, spec)

    def tolist(self: DTensor) -> Any:
        _check_readable(self, "tolist()")
        return self.to_local().tolist() if is_ours(self) else plain_list(self)

    def numpy(self: DTensor, **kwargs: Any) -> Any:
        _check_readable(self, "numpy()")
        return self.to_local().numpy(**kwargs) if is_ours(self) else plain_numpy(self, **kwargs)

    for name, function in (("__format__", in_format), ("tolist", tolist), ("numpy", numpy)):
        setattr(DTensor, name, function)


# -- random numbers -----------------------------------------------------------------------------------------------------


def _teach_draws(cut: Cut, whole: Whole) -> None:
    def draw(otherwise: Callable[..., Any]) -> Callable[..., Any]:
        def handler(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, DTensor)]
            if not all(map(is_ours, given)) or any(p.is_partial() for t in given for p in t.placements):
                return otherwise(operator, args, kwargs)
            job_watch.note(f"random numbers for a tensor {list(given[0].shape)}")
            wholes: dict[int, Tensor] = {id(t): whole(t).clone() for t in given}
            args, kwargs = pytree.tree_map(lambda a: wholes[id(a)] if isinstance(a, DTensor) else a, (args, kwargs))
            if kwargs.get("generator") is None:
                agree_on_random_state(given[0].to_local().device)
            result = operator(*args, **kwargs)
            if operator._schema.is_mutable:
                for tensor in given:
                    tensor.to_local().copy_(cut(tensor, wholes[id(tensor)]).to_local())
            back = {id(wholes[id(tensor)]): tensor for tensor in given}

            def distributed(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                return back[id(value)] if id(value) in back else cut(given[0], value)

            return pytree.tree_map(distributed, result)

        return handler

    for overload in draws_on_dtensors():
        add_dtensor_handler(overload, draw)


# -- copies -------------------------------------------------------------------------------------------------------------


def _teach_copies() -> None:
    plain_reduce, plain_copy = DTensor.__reduce_ex__, DTensor.__deepcopy__

    def reduce(self: DTensor, protocol: Any) -> Any:
        if not is_ours(self):
            return plain_reduce(self, protocol)
        if is_part(self):
            raise WorldError(
                f"a distributed tensor {list(self.shape)} cannot be saved or pickled as it is: this rank holds a part of it. "
                "For one file, make {name: sw.full_value(t) for name, t in model.state_dict().items()} on every rank and save "
                "that on one; or save the pieces with torch.distributed.checkpoint"
            )
        value = self.to_local().detach()
        plain = nn.Parameter(value, self.requires_grad) if isinstance(self, nn.Parameter) else value
        return plain.__reduce_ex__(protocol)

    def deepcopy(self: DTensor, memo: dict[int, Any]) -> Any:
        # torch tells wrappers by their address, 0; of a gradient that shares its memory it is the place there
        if id(self) in memo or self.data_ptr() == 0 or not (is_ours(self) and self.is_leaf):
            return plain_copy(self, memo)
        alone = DTensor(self.to_local().detach().clone(), self._spec, requires_grad=self.requires_grad)
        memo[id(self)] = alone
        return alone

    def shallow(self: DTensor) -> Any:
        make, arguments, *state = plain_reduce(self, 4)  # a copy in this process, which holds the same piece
        made = make(*arguments)
        if state and state[0] is not None:
            made.__dict__.update(state[0])
        return made

    for name, function in (("__reduce_ex__", reduce), ("__deepcopy__", deepcopy), ("__copy__", shallow)):
        setattr(DTensor, name, function)


# -- assignments --------------------------------------------------------------------------------------------------------


def _teach_data(cut: Cut) -> None:
    plain: Any = Tensor.data

    def put(self: DTensor, value: Any) -> None:
        if not (is_ours(self) and isinstance(value, Tensor)):
            plain.__set__(self, value)
            return
        if value.shape != self.shape or value.dtype != self.dtype:
            raise WorldError(
                f"tensor.data = {str(value.dtype).removeprefix('torch.')} {list(value.shape)}, but the distributed tensor is "
                f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}: give the whole tensor, of its shape and dtype, "
                "on every rank"
            )
        if not isinstance(value, DTensor):
            value = cut(self, value)
        if value.device_mesh != self.device_mesh or value.placements != self.placements:
            value = value.redistribute(self.device_mesh, self.placements)
        self._local_tensor.data = value.to_local().detach()

    DTensor.data = property(lambda self: plain.__get__(self), put)  # type: ignore[assignment]
