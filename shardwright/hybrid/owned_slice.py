"""Parameters of which each rank owns a slice, in per-rank programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.errors import ArgumentTypeError, LayoutError
from shardwright.hybrid.mesh import current_mesh
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.parameters.delayed.recorder import is_delayed
from shardwright.world.current import current_world

_OWN = "shardwright_own"


@dataclass(frozen=True)
class OwnedSlice:
    """Description of an owned parameter: how the slices of all ranks make up the whole, and whether it is one of them."""

    mesh: Mesh
    axes: tuple[str, ...]
    dim: int
    shape: tuple[int, ...]
    is_slice: bool

    @property
    def layout(self) -> Layout:
        """Layout of the slices."""
        dims: list[tuple[str, ...]] = [()] * len(self.shape)
        dims[self.dim] = self.axes
        return Layout.of(self.mesh, dims)


class OwnedParameter(nn.Parameter):
    """A parameter that remembers its :class:`OwnedSlice`, through copies too."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        vars(made).update(vars(self))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.detach(), self.requires_grad, owned_slice_of(self))


def _rebuilt(value: Tensor, requires_grad: bool, owned: OwnedSlice | None) -> nn.Parameter:
    made = OwnedParameter(value, requires_grad)
    setattr(made, _OWN, owned)
    return made


def own(value: Tensor, axes: str | Sequence[str], dim: int = 0, is_slice: bool = False) -> nn.Parameter:
    """Makes a parameter of which every rank along some axes owns a slice: its gradient is not summed over them.

    On a real rank the result is that rank's slice. Simulated ranks share one process, so there it is the whole, of which
    each rank's program sees its slice when it runs. Slices are cut as ``torch.chunk`` cuts.

    Args:
        value: the whole tensor, the same on every rank, so that the model begins as on a single device; a parameter
            keeps its ``requires_grad``.
        axes: the axis that the slices lie along, or several, the first of the mesh the most significant.
        dim: the dim that is cut.
        is_slice: whether ``value`` is this rank's slice already, all slices being of one shape; on real ranks only.

    Returns:
        An ``nn.Parameter``, to be used as the rank's slice.

    Raises:
        ArgumentTypeError: not a tensor.
        LayoutError: no such axis or dim, or a dim with fewer rows than slices.

    >>> own(torch.ones(8, 2), "dp").shape  # simulated: the whole
    torch.Size([8, 2])
    """
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"own({value!r}): give the whole tensor")
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    owned = _checked_slice(value, names, dim, is_slice)
    requires_grad = value.requires_grad if isinstance(value, nn.Parameter) else True
    data = value.detach()
    world = current_world()
    if world.keeps_pieces and owned.mesh.size > 1 and not is_delayed(value):  # values to come are cut then
        if not is_slice:
            data = data[owned.layout.slices(owned.shape)[world.rank]].clone(memory_format=torch.contiguous_format)
        owned = replace(owned, is_slice=True)
    return _rebuilt(data, requires_grad, owned)


def _checked_slice(value: Tensor, names: tuple[str, ...], dim: int, is_slice: bool) -> OwnedSlice:
    mesh = current_mesh().mesh
    unknown = [name for name in names if name not in mesh.axes]
    if unknown or not names:
        raise LayoutError(f"own(axes={names}): the axes of the mesh are {', '.join(mesh.axes)}; name one of them")
    if not isinstance(dim, int) or not -value.ndim <= dim < value.ndim:
        raise LayoutError(f"own(dim={dim!r}): the tensor is {list(value.shape)}; give one of its dims")
    dim, shape, count = dim % value.ndim, list(value.shape), mesh.count(names)
    if is_slice and mesh.size > 1:
        shared = "own(is_slice=True): simulated ranks share one process: give the whole, all slices joined"
        current_world().own_rank(lambda: LayoutError(shared))
    if is_slice:
        shape[dim] *= count
    if shape[dim] < count:
        raise LayoutError(f"own: dim {dim} of {shape} cannot be cut into {count} slices along {', '.join(names)}")
    return OwnedSlice(mesh, mesh.ordered(names), dim, tuple(shape), is_slice and mesh.size > 1)


def owned_slice_of(parameter: Any) -> OwnedSlice | None:
    """Returns the :class:`OwnedSlice` of a parameter made by :func:`own`; ``None`` for any other."""
    return getattr(parameter, _OWN, None)


def slice_shape(owned: OwnedSlice, rank: int) -> tuple[int, ...]:
    """Returns the shape of a rank's slice."""
    return owned.layout.local_shape(owned.shape, rank)
