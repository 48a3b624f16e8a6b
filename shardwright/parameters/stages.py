"""Distributes parameters over the ranks of the stages that read them: no other rank allocates them.

On ranks that do not read it, a parameter is a distributed tensor over the ranks that do, without elements here. One that
several stages read, such as a tied embedding, is on the ranks of each; its home is the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn

from shardwright.errors import WorldError
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.parameters.delayed.recorder import is_delayed
from shardwright.parameters.device_mesh import device_mesh
from shardwright.parameters.distribute import _Distribution, _Found, _replace
from shardwright.parameters.handles import current
from shardwright.parameters.ours import OF_ALL, StageHome, home_of, remember_home
from shardwright.parameters.placements import _as_dtensor, _like, layout_of, storable

# By module and name of the parameter, the layouts of all stages that read it: a rank has only its own.
_stored: WeakKeyDictionary[nn.Module, dict[str, list[Layout]]] = WeakKeyDictionary()


def distribute_over_stages(
    root: nn.Module, layouts: Mapping[str, Sequence[Layout]], device: torch.device
) -> dict[str, list[Layout]]:
    """Replaces every parameter of a module by a DTensor parameter over the ranks that read it.

    Args:
        root: its parameters are replaced in the tables of all submodules.
        layouts: by name, a layout over the ranks of each stage that reads the parameter, in order; those that are not listed
            are whole on rank 0's stage, by the first layout's mesh.
        device: where parameters and buffers go.

    Returns:
        The layouts in which each parameter is stored, as ``layouts``.

    Raises:
        WorldError: ranks with different models, or parameters that are distributed otherwise.
    """
    found = _Found(root)
    given = {name: list(each) for name, each in layouts.items()}
    mesh = next(iter(given.values()))[0].mesh
    stored: dict[str, list[Layout]] = {}
    for name, parameter in found.parameters.items():
        known = next((given[alias] for alias in found._names[id(parameter)] if alias in given), None)
        known = known or [Layout.replicated(mesh, parameter.dim())]
        stored[name] = [storable(layout, parameter.shape) for layout in known]
    meshes = [layout.mesh for each in stored.values() for layout in each]
    for mesh in dict.fromkeys([Mesh(OF_ALL, (dist.get_world_size(),)), *meshes]):
        device_mesh(mesh, device.type)  # in one order on every rank
    new = {name for name, p in found.parameters.items() if layout_of(p) is None}
    known_before = _stored.setdefault(root, {})
    for name in stored:
        if name in new:
            continue
        there = known_before.get(name, [])
        if not {_ranks(layout) for layout in stored[name]} <= {_ranks(layout) for layout in there}:
            raise WorldError(
                f"parameter {name} is distributed over other ranks than those of its stages already: make the model anew"
            )
        stored[name] = there
    known_before.update(stored)
    if new or found.buffers:
        _StageDistribution(found, {name: stored[name] for name in stored if name in new}, device).run()
    found.adopt()
    aliases = {alias: stored[name] for name, p in found.parameters.items() for alias in found._names[id(p)]}
    return {name: aliases[name] for name in layouts}


def _ranks(layout: Layout) -> tuple[int, ...]:
    return tuple(sorted(layout.mesh.ranks))


class _StageDistribution(_Distribution):
    """Compares all ranks of the job, then keeps this rank's pieces of what its stage reads."""

    def __init__(self, found: _Found, layouts: dict[str, list[Layout]], device: torch.device):
        self.rank, self.found, self.device = dist.get_rank(), found, device
        self.all_layouts = layouts
        self.layouts = {name: self._own(each) for name, each in layouts.items()}
        self.tensors = {n: found.parameters[n] for n in layouts} | found.buffers
        self.delayed = {name for name, tensor in self.tensors.items() if is_delayed(tensor)}
        self.mesh = Mesh((), (), (0,))  # the first rank's values win

    def _own(self, layouts: Sequence[Layout]) -> Layout:
        return next((layout for layout in layouts if self.rank in layout.mesh.ranks), layouts[0])

    def _groups(self) -> list[tuple[Any, int]]:
        return [(dist.group.WORLD, 0)]

    def _check_structure(self) -> None:
        own, self.layouts = self.layouts, {name: str(each) for name, each in self.all_layouts.items()}  # type: ignore[misc]
        try:
            super()._check_structure()
        finally:
            self.layouts = own

    def _move(self, old: nn.Parameter, piece: torch.Tensor, layout: Layout) -> None:
        name = next(n for n, p in self.found.parameters.items() if p is old)
        value = _as_dtensor(piece, layout, old.shape, device_mesh(layout.mesh, self.device.type))
        _replace(old, value, None if old.grad is None else _like(value, old.grad))
        home = self.all_layouts[name][0].mesh.ranks
        is_copy = self.rank in layout.mesh.ranks and layout.mesh.ranks != home
        new = current(old)
        remember_home(new, StageHome(home[0], is_copy))
        if is_copy and new.requires_grad:  # so that norms count its gradient once
            new.register_post_accumulate_grad_hook(_let_gradient_be_at_home)


def _let_gradient_be_at_home(parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        remember_home(parameter.grad, home_of(parameter))  # type: ignore[arg-type]
