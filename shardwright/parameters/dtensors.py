"""Makes distributed tensors in the user's own code behave as the whole ones, or refuses.

DTensor lets a rank read its own part of a number, draws the same random numbers for every piece, and ignores an assignment to
``.data``. For tensors over our meshes, and no others:

- every operator of torch computes what it computes on whole tensors (:mod:`.operators`);
- numbers, lists, texts are those of the whole value, which every rank reads at once;
- random numbers are those that the single device would draw for the whole tensor, on all ranks from rank 0's generator;
- ``tensor.data = value`` writes this rank's piece of the value;
- pieces cannot be pickled, whole values are pickled as ordinary tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright.base.operators import CHECKS_AND_UNSCALES
from shardwright.base.torch_private import add_dtensor_handlers
from shardwright.errors import WorldError
from shardwright.parameters.operators import run_operator
from shardwright.parameters.ours import is_ours, is_over_a_stage, is_part, view_of
from shardwright.parameters.placements import _like
from shardwright.parameters.whole import whole_value


@lru_cache(maxsize=1)
def teach() -> None:
    """Installs this behaviour in DTensor, for as long as this process lives."""
    add_dtensor_handlers(run_operator, besides=(CHECKS_AND_UNSCALES,))
    _teach_readings()
    _teach_memory()
    _teach_copies()
    _teach_data()
    _teach_views()


# -- numbers ------------------------------------------------------------------------------------------------------------


def _teach_readings() -> None:
    plain_format, plain_list, plain_numpy, plain_text = Tensor.__format__, Tensor.tolist, Tensor.numpy, DTensor.__repr__

    def in_format(self: DTensor, spec: str) -> str:
        if self.dim() == 0 and is_ours(self):
            return format(self.item(), spec)
        return plain_format(self, spec)

    def tolist(self: DTensor) -> Any:
        return whole_value(self, "tolist()").tolist() if is_ours(self) else plain_list(self)

    def numpy(self: DTensor, **kwargs: Any) -> Any:
        if not is_ours(self):
            return plain_numpy(self, **kwargs)
        value = whole_value(self, "numpy()")
        return value.requires_grad_(self.requires_grad).numpy(**kwargs)

    def text(self: DTensor) -> str:
        if not is_ours(self):
            return plain_text(self)
        value = whole_value(self, "the text").requires_grad_(self.requires_grad)
        return f"Parameter containing:\n{value!r}" if isinstance(self, nn.Parameter) else repr(value)

    for name, function in (("__format__", in_format), ("tolist", tolist), ("numpy", numpy), ("__repr__", text)):
        setattr(DTensor, name, function)


# -- memory -------------------------------------------------------------------------------------------------------------


def _teach_memory() -> None:
    """Makes what works on a tensor's memory, which a DTensor does not have, work on the whole value."""

    def on_whole_value(plain: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)
        def method(self: DTensor, *args: Any) -> Any:
            if not is_ours(self) or self.requires_grad:
                return plain(self, *args)  # which refuses it
            value = whole_value(self, plain.__name__).clone()
            plain(value, *(whole_value(a, plain.__name__) if isinstance(a, Tensor) else a for a in args))
            return self.copy_(value)

        return method

    def dlpack(self: DTensor, *args: Any, **kwargs: Any) -> Any:
        if is_ours(self):
            raise WorldError(f"a distributed tensor {list(self.shape)} has no memory to share: sw.full_value(tensor) has")
        return Tensor.__dlpack__(self, *args, **kwargs)

    for name in ("apply_", "map_", "map2_"):
        setattr(DTensor, name, on_whole_value(getattr(Tensor, name)))
    DTensor.__dlpack__ = dlpack  # type: ignore[assignment]


# -- copies -------------------------------------------------------------------------------------------------------------


def _teach_copies() -> None:
    plain_reduce, plain_copy = DTensor.__reduce_ex__, DTensor.__deepcopy__

    def reduce(self: DTensor, protocol: Any) -> Any:
        if not is_ours(self):
            return plain_reduce(self, protocol)
        if is_part(self) or is_over_a_stage(self):
            raise WorldError(
                f"a distributed tensor {list(self.shape)} cannot be saved or pickled as it is: this rank holds a part of it. "
                "For one file, write `with net.whole(): torch.save(model.state_dict(), path)`, or of other tensors save "
                "sw.full_value(tensor), with every rank in the block or the call; for pieces, sw.save(folder, model=net)"
            )
        value = self.to_local().detach()
        plain = nn.Parameter(value, self.requires_grad) if isinstance(self, nn.Parameter) else value
        return plain.__reduce_ex__(protocol)

    def deepcopy(self: DTensor, memo: dict[int, Any]) -> Any:
        # torch tells wrappers by their address, 0; of a gradient that shares its memory it is the place there
        if id(self) in memo or self.data_ptr() == 0 or not (is_ours(self) and self.is_leaf):
            known = id(self) in memo
            made = plain_copy(self, memo)
            if isinstance(self, nn.Parameter) and is_ours(self) and not known:
                made.grad = None  # torch copies the gradients of tensors, and not those of parameters
            return made
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


def _teach_data() -> None:
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
            value = _like(self, value)
        if value.device_mesh != self.device_mesh and is_ours(value):
            value = _like(self, whole_value(value, "data"))
        elif value.placements != self.placements:
            value = value.redistribute(self.device_mesh, self.placements)
        self._local_tensor.data = value.to_local().detach()

    DTensor.data = property(lambda self: plain.__get__(self), put)  # type: ignore[assignment]


# -- views --------------------------------------------------------------------------------------------------------------


def _teach_views() -> None:
    """Makes what reads the local tensor of a view that holds a copy get the value of now."""

    def on_new_copy(plain: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)
        def method(self: DTensor, *args: Any, **kwargs: Any) -> Any:
            if view_of(self) is not None:
                whole = whole_value(self, plain.__name__)
                if self.device_mesh.get_coordinate() is not None:
                    self._local_tensor.copy_(whole)
            return plain(self, *args, **kwargs)

        return method

    for name in ("to_local", "full_tensor", "redistribute"):
        setattr(DTensor, name, on_new_copy(getattr(DTensor, name)))
