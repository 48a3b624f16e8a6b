"""The parameters of a module as DTensors: each rank holds its piece, and nothing keeps the whole.

Ordinary parameters become ``nn.Parameter(DTensor)``, so that ``torch.optim``, ``clip_grad_norm_`` and
``torch.distributed.checkpoint`` work on them unchanged. The hot path never goes through DTensor: :func:`enter` hands
out local tensors and takes back local gradients, all parameters in few steps.

Invariants:

- A parameter's layout is its own: :func:`layout_of`. The first one given stays, whatever is planned later.
- No handle is stale. The parameter that a user holds from before stands for the new one from then on
  (:class:`MovedParameter`), and an optimizer made before is rebound at its next step, with its state.
- All ranks begin with the same values. Where they were given different ones, those of the mesh's first rank win.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from shardwright.errors import WorldError
from shardwright.layout import Layout, chunk_pieces
from shardwright.mesh import Mesh
from shardwright.world.delayed_init import is_delayed, materialise

T = TypeVar("T")

# Attributes of a distributed parameter, of a moved one, and of a module or optimizer that has our hooks.
_LAYOUT, _MOVED_TO, _HOOKED = "_shardwright_layout", "_shardwright_moved_to", "_shardwright_hooked"


# ------------------------------------------------------------------------------------------- layouts for DTensor


def device_mesh(mesh: Mesh, device_type: str) -> DeviceMesh:
    """The one DeviceMesh of a mesh and a device type, for as long as the process group lives.

    Args:
        mesh: its axis names become the names of the DeviceMesh's dims; its ranks keep their places.
        device_type: ``"cpu"``, ``"cuda"``, ….

    Returns:
        The same object every time. The first call creates process groups, so every rank of the job makes it.
    """
    return _device_mesh(mesh, device_type, dist.group.WORLD)


@lru_cache(maxsize=64)
def _device_mesh(mesh: Mesh, device_type: str, world: object) -> DeviceMesh:
    return DeviceMesh(device_type, torch.tensor(mesh.ranks).view(mesh.sizes), mesh_dim_names=mesh.axes)


@lru_cache(maxsize=65536)
def placements(layout: Layout, shape: tuple[int, ...]) -> tuple[Placement, ...] | None:
    """The DTensor placements, one per axis of the mesh, that mean what a layout means.

    Args:
        layout: where the pieces of the tensor are.
        shape: global shape.

    Returns:
        ``Shard``, ``Replicate`` and, for axes in another order than the mesh's, ``_StridedShard``. ``None`` where
        DTensor has no words for it: explicit piece sizes, pending reductions, a split over an axis along which the
        ranks do not ascend (process groups order their ranks), some uneven splits in another order.

    Raises:
        LayoutError: the layout has another number of dims than the shape.

    >>> layout = Layout((2, 2), ("dp", "mp"))
    >>> placements(layout("mp", "None"), (4, 4))
    (Replicate(), Shard(dim=0))
    >>> placements(layout("mp>dp", "None"), (4, 4))
    (_StridedShard(dim=0, sf=2), Shard(dim=0))
    """
    layout.bounds(shape)
    layout, mesh = layout.normal(shape), layout.mesh
    if layout.partial or any(sizes is not None for sizes in layout.sizes):
        return None
    if not all(_ascends(mesh, axis) for axis in layout.split_axes):
        return None
    found: list[Placement] = [Replicate() for _ in mesh.axes]
    for dim, axes in enumerate(layout.bound):
        order = [mesh.axes.index(axis) for axis in axes]
        factors = [math.prod(mesh.sizes[j] for j in order[:i] if j > at) for i, at in enumerate(order)]
        for at, factor in zip(order, factors):
            found[at] = Shard(dim) if factor == 1 else _StridedShard(dim, split_factor=factor)
        steps = sorted((at, mesh.sizes[at], factor) for at, factor in zip(order, factors))
        if order != sorted(order) and not _same_pieces(layout, dim, shape, steps):
            return None
    return tuple(found)


def _ascends(mesh: Mesh, axis: str) -> bool:
    return all(group == sorted(group) for group in mesh.groups((axis,)))


def _same_pieces(layout: Layout, dim: int, shape: tuple[int, ...], steps: Sequence[tuple[int, int, int]]) -> bool:
    """Whether DTensor's strided splits of ``dim`` give the layout's pieces; steps are (place in the mesh, count, factor)."""
    pieces = [torch.arange(shape[dim])]
    for _, count, factor in steps:
        pieces = [piece for whole in pieces for piece in _strided_split(whole, count, factor)]
    mesh = layout.mesh
    for rank, bounds in layout.bounds(shape).items():
        at, coordinates = 0, mesh.coordinates(rank)
        for place, count, _ in steps:
            at = at * count + coordinates[mesh.axes[place]]
        if not torch.equal(pieces[at], torch.arange(*bounds[dim])):
            return False
    return True


def _strided_split(whole: torch.Tensor, count: int, factor: int) -> list[torch.Tensor]:
    parts = whole.split(chunk_pieces(len(whole), (factor,)))
    split = [part.split(chunk_pieces(len(part), (count,))) for part in parts]
    return [torch.cat([pieces[i] for pieces in split]) for i in range(count)]


def storable(layout: Layout, shape: Sequence[int]) -> Layout:
    """The layout itself if a DTensor can have it, else the nearest that one can.

    Nearest: first without explicit piece sizes, then with the axes of every dim in the mesh's order, then without the
    axes along which ranks do not ascend. The caller redistributes from it where the parameter is used.

    >>> layout = Layout.parse("mp[3 1],None @ dp=2,mp=2")
    >>> storable(layout, (4, 2)).short()
    'mp,None'
    """
    shape, mesh = tuple(shape), layout.mesh
    plain = Layout.of(mesh, layout.bound)
    ordered = Layout.of(mesh, [mesh.ordered(axes) for axes in layout.bound])
    for candidate in (layout, plain, ordered):
        if placements(candidate, shape) is not None:
            return candidate
    return Layout.of(mesh, [[a for a in axes if _ascends(mesh, a)] for axes in ordered.bound])


# --------------------------------------------------------------------------------------------------- distribution


def distribute_parameters(
    root: nn.Module, layouts: Mapping[str, Layout], device: torch.device | str
) -> dict[str, Layout]:
    """Replaces every parameter of a module by a DTensor parameter that holds only this rank's piece.

    Args:
        root: its parameters, tied ones once, are replaced in the tables of all submodules. Its buffers stay ordinary
            whole tensors. What is delayed gets its value now, one whole tensor at a time.
        layouts: a layout for each parameter, by name (one of its names, if tied), all of one mesh. A parameter that is
            not listed is replicated. A layout that DTensor cannot express is replaced by :func:`storable` of it.
        device: where parameters and buffers go.

    Returns:
        The layout in which each parameter is stored, under all of its names. Parameters that were distributed before
        keep their first one.

    Raises:
        WorldError: layouts of several meshes or none, a rank outside the mesh, ranks with different models, a parameter
            that is a DTensor already. Nothing was changed.
        DelayedInitError: a tensor on the meta device has no recorded value. Nothing was changed.
    """
    device = torch.device(device)
    found = _Found(root)
    new = {n: p for n, p in found.parameters.items() if layout_of(p) is None}
    if new or found.buffers:
        chosen = _choose(new, {**found.aliased(layouts)})
        mesh = next((layout.mesh for layout in (*chosen.values(), *layouts.values())), None)
        if mesh is None:
            mesh = _mesh_of(found.parameters.values())
        _Distribution(found, chosen, mesh, device).run()
    found.adopt()
    return stored_layouts(root)


def stored_layouts(root: nn.Module) -> dict[str, Layout]:
    """The layout of every distributed parameter of a module, under each of its names."""
    named = root.named_parameters(remove_duplicate=False)
    return {name: layout for name, parameter in named if (layout := layout_of(current(parameter)))}


def layout_of(parameter: torch.Tensor) -> Layout | None:
    """The layout in which a distributed parameter is stored; ``None`` for any other tensor."""
    text = getattr(parameter, _LAYOUT, None)
    return _parse(text) if text else None


@lru_cache(maxsize=65536)
def _parse(text: str) -> Layout:
    return Layout.parse(text)


def full_value(parameter: torch.Tensor) -> torch.Tensor:
    """The whole tensor, detached, on every rank; every rank of the mesh makes this call."""
    parameter = current(parameter).detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _choose(parameters: Mapping[str, nn.Parameter], layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """A layout that can be stored for each parameter, once everything is found in order."""
    meshes = list(dict.fromkeys(layout.mesh for layout in layouts.values()))
    if len(meshes) > 1:
        raise WorldError(
            f"parameters are laid out over {len(meshes)} meshes, {' and '.join(map(str, meshes))}: give all of them "
            "layouts of one mesh, so that their norms and updates can be computed together"
        )
    chosen = {}
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            raise WorldError(
                f"parameter '{name}' is a DTensor already, over {parameter.device_mesh}: hand in the module before it "
                "is parallelised by other means"
            )
        if name in layouts:
            chosen[name] = storable(layouts[name], parameter.shape)
        elif meshes:
            chosen[name] = Layout.replicated(meshes[0], parameter.dim())
        else:
            raise WorldError(f"no layout for any of the {len(parameters)} parameters: give at least one, for its mesh")
    return chosen


def _mesh_of(parameters: Iterable[torch.Tensor]) -> Mesh | None:
    return next((layout.mesh for p in parameters if (layout := layout_of(p))), None)


class _Found:
    """The parameters and buffers of a module, each once, with every place that holds it."""

    def __init__(self, root: nn.Module):
        self.parameters: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        self.names: dict[int, list[str]] = {}
        self.places: dict[int, dict[tuple[int, str], nn.Module]] = {}
        for prefix, module in root.named_modules(remove_duplicate=False):
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self._add(self.parameters, prefix, module, key, current(parameter))
            attributes = {k: v for k, v in vars(module).items() if isinstance(v, torch.Tensor) and is_delayed(v)}
            for key, buffer in {**module._buffers, **attributes}.items():
                if buffer is not None:
                    self._add(self.buffers, prefix, module, key, buffer)

    def _add(self, table: dict[str, T], prefix: str, module: nn.Module, key: str, tensor: T) -> None:
        name = f"{prefix}.{key}" if prefix else key
        if id(tensor) not in self.names:
            table[name] = tensor
        self.names.setdefault(id(tensor), []).append(name)
        self.places.setdefault(id(tensor), {})[id(module), key] = module

    def aliased(self, layouts: Mapping[str, Layout]) -> dict[str, Layout]:
        """The layouts by the first name of each parameter."""
        given = {}
        for name, parameter in self.parameters.items():
            for alias in self.names[id(parameter)]:
                if alias in layouts:
                    given[name] = layouts[alias]
                    break
        return given

    def put(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Puts the new tensor wherever the old one is."""
        for (_, key), module in self.places[id(old)].items():
            setattr(module, key, new)

    def adopt(self) -> None:
        """Makes the tables hold parameters, not handles from before, and the modules load whole values."""
        for parameter in self.parameters.values():
            new = current(parameter)
            for (_, key), module in self.places[id(parameter)].items():
                if module._parameters[key] is not new:
                    setattr(module, key, new)
                if _HOOKED not in vars(module):
                    module.register_load_state_dict_pre_hook(_distribute_loaded)
                    setattr(module, _HOOKED, True)


class _Distribution:
    """One run of :func:`distribute_parameters`: compare the ranks, then move the parameters one by one."""

    def __init__(self, found: _Found, layouts: dict[str, Layout], mesh: Mesh | None, device: torch.device):
        rank = dist.get_rank()
        if mesh is not None and rank not in mesh.ranks:
            raise WorldError(f"rank {rank} is not among the ranks of the mesh {mesh}: distribute on those ranks only")
        self.found, self.layouts, self.device, self.rank = found, layouts, device, rank
        self.tensors: dict[str, torch.Tensor] = {n: found.parameters[n] for n in layouts} | found.buffers
        self.first = mesh is None or rank == mesh.ranks[0]
        self.mesh = None if mesh is None else device_mesh(mesh, device.type)

    def run(self) -> None:
        self._check_structure()
        checksums: dict[str, int] = {}
        pieces: dict[str, torch.Tensor] = {}

        def look(name: str, value: torch.Tensor) -> None:
            checksums[name] = _checksum(value)
            if is_delayed(self.tensors[name]):
                pieces[name] = self._piece(name, value)

        materialise(self.tensors, look)
        names = list(self.tensors)
        same = self._agree([checksums[n] for n in names])
        differing = {n: self.tensors[n] for n, agrees in zip(names, same) if not agrees}
        pieces.update(self._from_first_rank(differing))
        if differing and self.first:
            logging.getLogger("shardwright").warning(
                "%d of %d parameters and buffers differed between ranks; those of rank %d were taken. Seed every rank "
                "alike, torch.manual_seed(0) before the model is built, so that they need not be sent",
                *(len(differing), len(names), self.rank),
            )
        for name, tensor in self.tensors.items():
            piece = pieces.pop(name) if name in pieces else self._piece(name, tensor.detach())
            if name in self.layouts:
                assert isinstance(tensor, nn.Parameter)
                self.found.put(tensor, self._move(tensor, piece, self.layouts[name]))
            elif piece is not tensor:
                self._set_buffer(tensor, piece)

    def _piece(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a value: a parameter's slice, a buffer's whole."""
        if name in self.layouts:
            return _slice(value, self.layouts[name], self.rank, self.device)
        return value.clone().to(self.device) if is_delayed(self.tensors[name]) else value.to(self.device)

    def _move(self, old: nn.Parameter, piece: torch.Tensor, layout: Layout) -> nn.Parameter:
        assert self.mesh is not None
        shape, grad = old.shape, old.grad
        new = nn.Parameter(_as_dtensor(piece, layout, shape, self.mesh), requires_grad=old.requires_grad)
        for key, value in vars(old).items():
            setattr(new, key, value)
        setattr(new, _LAYOUT, str(layout))
        if grad is not None:
            new.grad = _as_dtensor(_slice(grad, layout, self.rank, self.device), layout, shape, self.mesh)
        _leave(old, new)
        return new

    def _set_buffer(self, old: torch.Tensor, new: torch.Tensor) -> None:
        if old.device == new.device and not is_delayed(old):
            old.data = new.to(old.dtype)
        else:
            self.found.put(old, new)

    # -- between ranks -----------------------------------------------------------------------------------------

    def _check_structure(self) -> None:
        lines = [
            f"{name} {tuple(t.shape)} {t.dtype} {t.requires_grad} {self.layouts.get(name)}"
            for name, t in self.tensors.items()
        ]
        digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=7).digest()
        if not all(self._agree([int.from_bytes(digest, "little")])):
            raise WorldError(
                "the ranks have built different models: names, shapes, dtypes, requires_grad or layouts of their "
                f"parameters and buffers differ; rank {self.rank} has {len(lines)}. Build the same model on every rank"
            )

    def _agree(self, numbers: Sequence[int]) -> list[bool]:
        """For each number whether it is the same on all ranks of the mesh; one small reduction per axis."""
        if self.mesh is None:
            return [True] * len(numbers)
        ends = torch.tensor([numbers, [-n for n in numbers]], dtype=torch.int64, device=self.device)
        for group in self._groups():
            dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
        return (ends[0] == -ends[1]).tolist()  # type: ignore[no-any-return]

    def _from_first_rank(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The pieces of the mesh's first rank's values, sent one whole value at a time in the order it makes them."""
        names = list(self.tensors)
        pieces = {}

        def send(name: str, value: torch.Tensor) -> None:
            self._broadcast(torch.tensor(names.index(name), device=self.device))
            pieces[name] = self._piece(name, self._broadcast(value.to(self.device)))

        if self.first:
            materialise(tensors, send)
            return pieces
        for _ in tensors:
            name = names[int(self._broadcast(torch.tensor(0, device=self.device)))]
            like = self.tensors[name]
            pieces[name] = self._piece(name, self._broadcast(torch.empty(like.shape, dtype=like.dtype, device=self.device)))
        return pieces

    def _broadcast(self, value: torch.Tensor) -> torch.Tensor:
        """The value of the first rank: along each axis in turn, from the group's first rank."""
        value = value.contiguous()
        bits = value.view(torch.uint8) if value.dtype == torch.bool else value
        for group in self._groups():
            dist.broadcast(bits, group=group, group_src=0)
        return value

    def _groups(self) -> Iterator[dist.ProcessGroup]:
        assert self.mesh is not None
        return (self.mesh.get_group(dim) for dim in range(self.mesh.ndim) if self.mesh.size(dim) > 1)
