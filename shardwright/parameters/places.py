"""Tells how distributed tensors lie, fast: what one spec says is found out once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwright.parameters.ours import is_ours, is_over_a_stage, is_part, view_of
from shardwright.parameters.placements import layout_of


class Place:
    """Position of tensors over one of our meshes: what a rank holds. Those of one shape that lie alike have the same one."""

    __slots__ = ("is_cut", "is_number", "is_part", "is_whole", "stage")

    def __init__(self, is_part: bool, has_layout: bool, has_dims: bool, stage: Any):
        self.is_part = is_part  # a rank holds a piece, or a term of a sum
        self.is_cut = is_part and has_layout  # a piece
        self.is_whole = not is_part and has_layout
        self.is_number = self.is_whole and not has_dims  # which every rank of the stage has
        self.stage = stage  # of a pipeline, whose mesh it is; None where all ranks have a part

    def stands_beside(self, other: Place) -> bool:
        """Tells whether it is a number that every rank has that has the other one."""
        return self.is_number and (self.stage is None or self.stage == other.stage)


class _Known(NamedTuple):
    """A spec, held so that no other gets its id, and the place that it says."""

    spec: Any
    place: Place


_known: dict[int, _Known] = {}  # by id of the spec: specs have slow hashes
_MOST_KNOWN = 16384


@lru_cache(maxsize=16384)
def _interned(mesh: Any, placements: Any, shape: Any, is_part: bool, has_layout: bool, is_staged: bool) -> Place:
    return Place(is_part, has_layout, bool(shape), mesh if is_staged else None)


def place_of_spec(tensor: DTensor) -> Place | None:
    """Returns how a tensor's spec says that it lies; ``None`` if it lies over a mesh that is not ours."""
    spec: Any = tensor._spec
    found = _known.get(id(spec))
    if found is None:
        if not is_ours(tensor):
            return None
        has_layout = layout_of(tensor) is not None
        mesh, is_staged = tensor.device_mesh, is_over_a_stage(tensor)
        place = _interned(mesh, tensor.placements, tensor.shape, is_part(tensor), has_layout, is_staged)
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        found = _known[id(spec)] = _Known(spec, place)
    return found.place


def place_of(tensor: DTensor) -> Place | None:
    """Returns how a tensor lies, if ranks may work on what they hold of it: no view, term of a sum or tensor of others."""
    place = place_of_spec(tensor)
    if place is None or place.is_cut:
        return place
    return place if place.is_whole and view_of(tensor) is None else None


def is_number(tensor: Tensor) -> bool:
    """Tells whether a tensor is a number that every rank has: no gradient flows into an ordinary one."""
    if isinstance(tensor, DTensor):
        place = place_of(tensor)
        return place is not None and place.is_number and place.stage is None
    return tensor.dim() == 0 and not tensor.requires_grad
