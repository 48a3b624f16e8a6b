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
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn, optim
from torch.autograd.graph import get_gradient_edge, increment_version
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from shardwright.capture.torch_private import StridedShard, job_timeout, set_group_timeout, will_execute_node
from shardwright.errors import WorldError
from shardwright.layout import Layout, chunk_pieces
from shardwright.mesh import Mesh
from shardwright.world.checksum import checksum
from shardwright.world.delayed_init import is_delayed, materialise
from shardwright.world.dtensors import watch_over
from shardwright.world.found_inf import agree_on_found_inf
from shardwright.world.watcher import note

T = TypeVar("T")

# Attributes of a moved parameter, and of a module or optimizer that has our hooks.
_MOVED_TO, _HOOKED = "_shardwright_moved_to", "_shardwright_hooked"


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
    made = DeviceMesh(device_type, torch.tensor(mesh.ranks).view(mesh.sizes), mesh_dim_names=mesh.axes)
    timeout = job_timeout(device_type)
    if timeout is not None and dist.get_rank() in mesh.ranks:
        for dim in range(made.ndim):
            set_group_timeout(timeout, made.get_group(dim))
    watch_over(made, _like, full_value)
    return made


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
            found[at] = Shard(dim) if factor == 1 else StridedShard(dim, split_factor=factor)
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


def distribute_parameters(root: nn.Module, layouts: Mapping[str, Layout], device: torch.device | str) -> dict[str, Layout]:
    """Replaces every parameter of a module by a DTensor parameter that holds only this rank's piece.

    Args:
        root: its parameters, tied ones once, are replaced in the tables of all submodules. Its buffers stay ordinary
            whole tensors. What is delayed gets its value now, one whole tensor at a time.
        layouts: a layout for each parameter, by name (one of its names, if tied), all of one mesh. A parameter that is
            not listed is replicated. A layout that DTensor cannot express is replaced by :func:`storable` of it.
        device: where parameters and buffers go.

    Returns:
        The layout in which each parameter is stored, under all of its names, without axes of size 1. Parameters that
        are DTensors already keep the layout that they have.

    Raises:
        WorldError: layouts of several meshes or none, a rank outside the mesh, ranks with different models, a parameter
            that is a DTensor of no layout. Nothing was changed.
        DelayedInitError: a tensor on the meta device has no recorded value. Nothing was changed.
    """
    device = torch.device(device)
    found = _Found(root)
    new = {name: p for name, p in found.parameters.items() if layout_of(p) is None}
    if new or found.buffers:
        chosen = _choose(new, found.by_first_name(layouts))
        mesh = next((layout.mesh for layout in chosen.values()), None) or _mesh_of(found.parameters.values(), layouts)
        _Distribution(found, chosen, mesh, device).run()
    found.adopt()
    return stored_layouts(root)


def adopt_slices(root: nn.Module, slices: Mapping[str, tuple[Layout, tuple[int, ...]]], device: torch.device) -> None:
    """Makes DTensors of parameters that are this rank's pieces already; every rank of the job makes this call.

    Args:
        slices: of every such parameter, by the first of its names, its layout and the shape of the whole. Ranks that should
            hold the same piece get that of the first of them.
    """
    found = _Found(root)
    for name, (layout, shape) in slices.items():
        old, over = found.parameters[name], device_mesh(layout.mesh, device.type)
        piece = old.detach().to(device, copy=True, memory_format=torch.contiguous_format)
        for i, axis in enumerate(layout.mesh.axes):
            if layout.mesh.sizes[i] > 1 and axis not in layout.split_axes:
                source = layout.mesh.group_of(dist.get_rank(), (axis,))[0]
                dist.broadcast(piece.view(-1).view(torch.uint8), source, group=over.get_group(i))
        gradient = None if old.grad is None else _as_dtensor(old.grad.to(device), layout, torch.Size(shape), over)
        _replace(old, _as_dtensor(piece, layout, torch.Size(shape), over), gradient)
    found.adopt()


def stored_layouts(root: nn.Module) -> dict[str, Layout]:
    """The layout of every distributed parameter of a module, under each of its names."""
    named = root.named_parameters(remove_duplicate=False)
    return {name: layout for name, parameter in named if (layout := layout_of(parameter))}


def layout_of(parameter: torch.Tensor) -> Layout | None:
    """The layout in which a DTensor is stored, without axes of size 1; ``None`` for any other tensor.

    It is read from the DTensor itself, so it holds whatever replaced the parameter: a cast, a copy, a checkpoint.
    """
    parameter = current(parameter)
    if not isinstance(parameter, DTensor):
        return None
    return _layout_of(parameter.device_mesh, parameter.placements, parameter.dim())


@lru_cache(maxsize=4096)
def _layout_of(mesh: DeviceMesh, split: tuple[Placement, ...], ndim: int) -> Layout | None:
    """The inverse of :func:`placements`; ``None`` for meshes without names and placements that no layout means."""
    dims: list[list[int]] = [[] for _ in range(ndim)]
    for at in reversed(range(len(split))):
        placement = split[at]
        if not isinstance(placement, (Shard, StridedShard)):
            if not placement.is_replicate():
                return None
            continue
        factor = int(placement.split_factor) if isinstance(placement, StridedShard) else 1
        order, place = dims[placement.dim], 0
        while place < len(order) and math.prod(mesh.size(i) for i in order[:place]) < factor:
            place += 1
        if math.prod(mesh.size(i) for i in order[:place]) != factor:
            return None
        order.insert(place, at)
    names = mesh.mesh_dim_names or ()
    if len(names) != mesh.ndim:
        return None
    over = Mesh(names, tuple(mesh.shape), tuple(mesh.mesh.flatten().tolist()))
    return Layout.of(over, [[names[i] for i in order if mesh.size(i) > 1] for order in dims])


def full_value(parameter: torch.Tensor) -> torch.Tensor:
    """The whole tensor, detached, on every rank; every rank of the mesh makes this call.

    Args:
        parameter: a DTensor of any placements. An ordinary tensor is returned as it is, detached.

    Returns:
        A tensor of the global shape.

    >>> full_value(nn.Parameter(torch.ones(2)))
    tensor([1., 1.])
    """
    parameter = current(parameter)
    layout, value = layout_of(parameter), parameter.detach()
    if not isinstance(value, DTensor):
        return value
    if not layout or layout.split_axes:
        if value.device_mesh.size() == dist.get_world_size():
            note(f"full_value of a tensor {list(value.shape)}")
    if layout is None:
        return value.full_tensor()
    return _gathered(value.to_local(), layout, tuple(value.shape), value.device_mesh)


def _gathered(piece: torch.Tensor, layout: Layout, shape: tuple[int, ...], mesh: DeviceMesh) -> torch.Tensor:
    """Undoes the splits of every dim, the least significant axis first, one gather each."""
    rank, dims = dist.get_rank(), [list(axes) for axes in layout.bound]
    for dim, axes in enumerate(dims):
        while axes:
            here, axis = Layout.of(layout.mesh, dims), axes.pop()
            group = layout.mesh.group_of(rank, (axis,))
            shapes = [here.local_shape(shape, member) for member in group]
            sent = piece.new_zeros(max(map(math.prod, shapes)))
            sent[: piece.numel()] = piece.flatten()
            parts = [torch.empty_like(sent) for _ in group]
            process_group = mesh.get_group(layout.mesh.axes.index(axis))
            dist.all_gather([part.view(torch.uint8) for part in parts], sent.view(torch.uint8), group=process_group)
            piece = torch.cat([part[: math.prod(s)].view(s) for part, s in zip(parts, shapes)], dim)
    return piece


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
                f"parameter '{name}' is a DTensor already, with {parameter.placements} over {parameter.device_mesh}, "
                "which no layout means: hand in the module before it is parallelised by other means"
            )
        if name in layouts:
            chosen[name] = storable(layouts[name], parameter.shape)
        elif meshes:
            chosen[name] = Layout.replicated(meshes[0], parameter.dim())
        else:
            raise WorldError(f"no layout for any of {len(parameters)} parameters: give at least one, for its mesh")
    return chosen


def _mesh_of(parameters: Iterable[torch.Tensor], layouts: Mapping[str, Layout]) -> Mesh | None:
    known = [layout for p in parameters if (layout := layout_of(p))]
    return next((layout.mesh for layout in (*known, *layouts.values())), None)


class _Found:
    """The parameters of a module and the buffers that are new to us, each once, with every place that holds it."""

    def __init__(self, root: nn.Module):
        self.modules = list(root.modules())
        self.parameters: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        self._names: dict[int, list[str]] = {}
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for prefix, module in root.named_modules(remove_duplicate=False):
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self._add(self.parameters, prefix, module, key, current(parameter))
            done = _HOOKED in vars(module)
            attributes = {key: value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
            for key, buffer in {**attributes, **module._buffers}.items():
                if buffer is not None and (is_delayed(buffer) or (key in module._buffers and not done)):
                    self._add(self.buffers, prefix, module, key, buffer)

    def _add(self, table: dict[str, T], prefix: str, module: nn.Module, key: str, tensor: T) -> None:
        name = f"{prefix}.{key}" if prefix else key
        if id(tensor) not in self._names:
            table[name] = tensor
        self._names.setdefault(id(tensor), []).append(name)
        self._places.setdefault(id(tensor), []).append((module, key))

    def by_first_name(self, layouts: Mapping[str, Layout]) -> dict[str, Layout]:
        """The layouts under the name that we use for each parameter, whichever of its names they came under."""
        given = {}
        for name, parameter in self.parameters.items():
            known = [layouts[alias] for alias in self._names[id(parameter)] if alias in layouts]
            if known:
                given[name] = known[0]
        return given

    def put(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Puts the new tensor wherever the old one is."""
        for module, key in self._places[id(old)]:
            if getattr(module, key, None) is not new:
                setattr(module, key, new)

    def adopt(self) -> None:
        """Makes the tables hold the new parameters, and the modules load whole values into them."""
        for parameter in self.parameters.values():
            self.put(parameter, current(parameter))
        for module in self.modules:
            if _HOOKED not in vars(module):
                module.register_load_state_dict_pre_hook(_slice_loaded)
                setattr(module, _HOOKED, True)


class _Distribution:
    """One run of :func:`distribute_parameters`: compares the ranks, then moves the tensors one by one."""

    def __init__(self, found: _Found, layouts: dict[str, Layout], mesh: Mesh | None, device: torch.device):
        self.rank = dist.get_rank()
        self.device_mesh = device_mesh(mesh, device.type) if mesh else None  # every rank of the job makes this call
        if mesh is not None and self.rank not in mesh.ranks:
            raise WorldError(f"rank {self.rank} is not among the ranks of the mesh {mesh}: distribute on those only")
        self.found, self.layouts, self.device = found, layouts, device
        self.tensors: dict[str, torch.Tensor] = {n: found.parameters[n] for n in layouts} | found.buffers
        self.delayed = {name for name, tensor in self.tensors.items() if is_delayed(tensor)}
        self.mesh = mesh or Mesh((), (), (self.rank,))

    def run(self) -> None:
        self._check_structure()
        checksums: dict[str, int] = {}
        pieces: dict[str, torch.Tensor] = {}

        def look(name: str, value: torch.Tensor) -> None:
            checksums[name] = checksum(value)
            if name in self.delayed:
                pieces[name] = self._piece(name, value)

        materialise(self.tensors, look)
        agreed = self._agree([checksums[name] for name in self.tensors])
        differing = {n: t for (n, t), agrees in zip(self.tensors.items(), agreed) if not agrees}
        pieces.update(self._of_first_rank(differing))
        for name, tensor in self.tensors.items():
            piece = pieces.pop(name) if name in pieces else self._piece(name, tensor.detach())
            if name in self.layouts:
                self._move(self.found.parameters[name], piece, self.layouts[name])
            elif name in self.delayed or tensor.device != piece.device:
                self.found.put(tensor, piece)
            elif name in differing:
                tensor.data = piece  # the same object, for whoever holds it

    def _piece(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a value: a slice of a parameter, the whole of a buffer."""
        if name in self.layouts:
            return _slice(value, self.layouts[name], self.device)
        return value.to(self.device, copy=name in self.delayed)

    def _move(self, old: nn.Parameter, piece: torch.Tensor, layout: Layout) -> None:
        assert self.device_mesh is not None
        value = _as_dtensor(piece, layout, old.shape, self.device_mesh)
        _replace(old, value, None if old.grad is None else _like(value, old.grad))

    # -- between ranks -----------------------------------------------------------------------------------------

    def _check_structure(self) -> None:
        lines = [
            f"{name} {tuple(t.shape)} {t.dtype} {t.requires_grad} {self.layouts.get(name)}" for name, t in self.tensors.items()
        ]
        digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=7).digest()
        if not all(self._agree([int.from_bytes(digest, "little")])):
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, lines)
            other, first = next((rank, i) for rank, its in enumerate(everyone) if (i := _first_other(everyone[0], its)) >= 0)
            here, there = (repr((*its, "nothing more")[min(first, len(its))]) for its in (everyone[0], everyone[other]))
            raise WorldError(
                "the ranks have built different models: names, shapes, dtypes, requires_grad or layouts of their "
                f"parameters and buffers differ. The first: rank 0 has {here} where rank {other} has {there} (rank "
                f"{self.rank} has {len(lines)} of them). Build the same model on every rank"
            )

    def _agree(self, numbers: Sequence[int]) -> list[bool]:
        """For each number whether it is the same on all ranks of the mesh: one small reduction per axis."""
        ends = torch.tensor([list(numbers), [-n for n in numbers]], dtype=torch.int64, device=self.device)
        for group, _ in self._groups():
            dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
        return (ends[0] == -ends[1]).tolist()  # type: ignore[no-any-return]

    def _of_first_rank(self, differing: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's pieces of the first rank's values, which come one at a time in the order that rank makes them."""
        if not differing:
            return {}
        names = list(self.tensors)
        pieces = {}

        def send(name: str, value: torch.Tensor) -> None:
            self._broadcast(torch.tensor([names.index(name)], device=self.device))
            pieces[name] = self._piece(name, self._broadcast(value.to(self.device)))

        if self.rank == self.mesh.ranks[0]:
            logging.getLogger("shardwright").warning(
                "%d of %d parameters and buffers differed between the ranks, and those of rank %d were sent to all: call "
                "torch.manual_seed with the same number on every rank before building the model",
                *(len(differing), len(names), self.rank),
            )
            materialise(differing, send)
            return pieces
        for _ in differing:
            name = names[int(self._broadcast(torch.tensor([0], device=self.device)))]
            value = torch.empty(differing[name].shape, dtype=differing[name].dtype, device=self.device)
            pieces[name] = self._piece(name, self._broadcast(value))
        return pieces

    def _broadcast(self, value: torch.Tensor) -> torch.Tensor:
        """The first rank's value, along each axis in turn from the ranks that stand first on it."""
        value = value.contiguous()
        for group, source in self._groups():
            dist.broadcast(value.view(-1).view(torch.uint8), source, group=group)
        return value

    def _groups(self) -> list[tuple[dist.ProcessGroup, int]]:
        """This rank's group along every axis, with the first rank of it in the mesh's order."""
        if self.device_mesh is None:
            return []
        axes = [(i, axis) for i, axis in enumerate(self.mesh.axes) if self.mesh.sizes[i] > 1]
        return [(self.device_mesh.get_group(i), self.mesh.group_of(self.rank, (axis,))[0]) for i, axis in axes]


def _first_other(here: Sequence[str], there: Sequence[str]) -> int:
    """Where two lists begin to differ, -1 where they do not."""
    if here == there:
        return -1
    return next((i for i, (a, b) in enumerate(zip(here, there)) if a != b), min(len(here), len(there)))


def _slice(value: torch.Tensor, layout: Layout, device: torch.device) -> torch.Tensor:
    """A copy of this rank's piece of a whole value."""
    piece = value.detach()[tuple(slice(*ends) for ends in layout.bounds(value.shape)[dist.get_rank()])]
    return piece.to(device, copy=True, memory_format=torch.contiguous_format)


def _as_dtensor(piece: torch.Tensor, layout: Layout, shape: torch.Size, mesh: DeviceMesh) -> DTensor:
    split = placements(layout, tuple(shape))
    strides = [math.prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape))]
    return DTensor.from_local(piece, mesh, split, run_check=False, shape=shape, stride=tuple(strides))


def _replace(old: nn.Parameter, value: DTensor, gradient: DTensor | None) -> None:
    """Puts a new parameter in the place of an old one, which becomes a handle of it."""
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    new.grad = gradient
    if old._backward_hooks is not None:
        new._backward_hooks = old._backward_hooks  # the same dict, so that the user's handles still remove them
    if old._post_accumulate_grad_hooks is not None:
        new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
    _leave(old, new)


def _like(parameter: torch.Tensor, value: torch.Tensor) -> DTensor:
    """A whole value, the same on all ranks, as a DTensor beside a parameter: sliced alike if it has its shape."""
    assert isinstance(parameter, DTensor)
    layout = layout_of(parameter)
    assert layout is not None
    if value.shape != parameter.shape:
        layout = Layout.replicated(layout.mesh, value.dim())
    device = parameter.to_local().device
    return _as_dtensor(_slice(value, layout, device), layout, value.shape, parameter.device_mesh)


def _slice_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before ``load_state_dict``: whole values, as a single device saves them, become DTensors like the parameters."""
    for key, parameter in module._parameters.items():
        value = state.get(prefix + key)
        if parameter is None or layout_of(parameter) is None or not isinstance(value, torch.Tensor):
            continue
        if not isinstance(value, DTensor) and value.shape == parameter.shape:
            state[prefix + key] = _like(parameter, value)


# ------------------------------------------------------------------------------------- handles and optimizers from before


class MovedParameter(nn.Parameter):
    """A parameter from before the distribution: stands for the new one wherever it is used.

    Every function that is given it works on the new parameter: ``old.grad``, ``old.norm()``, ``old.requires_grad_()``,
    ``clip_grad_norm_([old], 1.0)``, ``copy.deepcopy(old)``. Only ``id``, ``hash`` and ``is`` tell them apart.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*current(args), **current(kwargs or {}))

    def __getattr__(self, name: str) -> Any:  # of DTensor, and what users hung on the parameter
        return getattr(current(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(current(self), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(current(self), name)

    def __copy__(self) -> Any:
        return copy.copy(current(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(current(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return current(self).__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(current(self))


def current(value: Any) -> Any:
    """The new parameter for one from before; everything else as it is, also within lists, tuples and dicts.

    >>> current([1, torch.nn.Linear])
    [1, <class 'torch.nn.modules.linear.Linear'>]
    """
    kind = type(value)
    if kind is MovedParameter:
        return vars(value)[_MOVED_TO]
    if kind in (list, tuple):
        return kind(map(current, value))
    if kind is dict:
        return {key: current(item) for key, item in value.items()}
    return value


def _leave(old: nn.Parameter, new: nn.Parameter) -> None:
    """Empties a parameter and makes it a handle of the new one. What goes past the handle meets 0 elements and fails."""
    old.grad = None
    old.data = old.data.new_empty(0)
    old.requires_grad_(False)
    vars(old).clear()
    vars(old)[_MOVED_TO] = new
    old.__class__ = MovedParameter
    _watch_optimizers()


@lru_cache(maxsize=1)
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
    agree_on_found_inf()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _finish_local_step(optimizer)
    moved = any(type(p) is MovedParameter for group in optimizer.param_groups for p in group["params"])
    if moved or _HOOKED not in vars(optimizer):
        rebind(optimizer)
    if _HOOKED in vars(optimizer) and len(args) == 1 and not kwargs:  # a closure must find the true parameters
        _begin_local_step(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _finish_local_step(optimizer) or _HOOKED not in vars(optimizer):
        return
    # Tell autograd what DTensor does not: the local tensors changed, so a forward before the step has no backward.
    params = [p for group in optimizer.param_groups for p in group["params"]]
    increment_version([p._local_tensor for p in params if type(p) is DTensor and p.grad is not None])


def rebind(optimizer: Optimizer) -> None:
    """Makes an optimizer work on the distributed parameters; it happens by itself before every step.

    Handles from before give way to the new parameters, in the lists that the optimizer has, and their state follows.
    State in whole tensors (from steps before the distribution, or loaded from a single device's checkpoint) is cut to
    the parameter's piece; whole state of another shape is replicated; numbers such as ``step`` stay.

    Args:
        optimizer: any; one that has no distributed parameters is left as it is.
    """
    ours = False
    for group in optimizer.param_groups:
        params, on_device = group["params"], group.get("capturable") or group.get("fused")
        for i, old in enumerate(params):
            params[i] = new = current(old)
            if layout_of(new) is None:
                continue
            ours = True
            state = optimizer.state.pop(old, None) or {}
            for key, value in state.items():
                if not isinstance(value, torch.Tensor) or isinstance(value, DTensor):
                    continue
                if value.dim() or (value.shape == new.shape and key != "step"):
                    state[key] = _like(new, value)
                elif on_device:
                    state[key] = value.to(new.device)
            if state:
                optimizer.state[new] = state
    if ours and _HOOKED not in vars(optimizer):
        optimizer.register_load_state_dict_post_hook(rebind)
        optimizer.register_state_dict_pre_hook(_before_state_dict)
        optimizer.register_load_state_dict_pre_hook(_before_state_dict)
        setattr(optimizer, _HOOKED, True)


# Optimizers whose update of an element reads nothing but that element's own numbers. They step on local tensors, with
# the speed of plain ones: AdamW over 40 small DTensors takes 8.8 ms, over their local tensors 0.9.
_ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    {optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax}
    | {optim.Adagrad, optim.Adadelta, optim.RMSprop, optim.Rprop, optim.ASGD}
)
_LOCAL_STEP = "_shardwright_local_step"


class _LocalStep(NamedTuple):
    """What an optimizer holds outside a step, and the local tensor that stands for each of its parameters within."""

    params: list[list[torch.Tensor]]
    state: Any
    leaves: list[tuple[torch.Tensor, torch.Tensor]]


def _begin_local_step(optimizer: Optimizer) -> None:
    """Gives the optimizer local tensors instead of DTensors, until the step has ended."""
    groups, its = optimizer.param_groups, vars(optimizer)
    if type(optimizer) not in _ELEMENTWISE or any(group.get("differentiable") for group in groups):
        return
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return  # they may want to see the true parameters
    leaves: list[tuple[torch.Tensor, torch.Tensor]] = []
    lists: list[list[torch.Tensor]] = []
    state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
    for group in groups:
        lists.append([])
        for parameter in group["params"]:
            values, grad = optimizer.state.get(parameter), parameter.grad
            if grad is None:
                continue
            leaf = parameter
            if type(parameter) is DTensor:
                split = parameter._spec.placements
                beside = [grad, *(v for v in (values or {}).values() if type(v) is DTensor)]
                if any(type(v) is not DTensor or v._spec.placements != split for v in beside):
                    return
                leaf = parameter._local_tensor.detach()
                leaf.grad = grad._local_tensor
                values = values and {k: v._local_tensor if type(v) is DTensor else v for k, v in values.items()}
            if values:
                state[leaf] = values
            lists[-1].append(leaf)
            leaves.append((parameter, leaf))
    its[_LOCAL_STEP] = _LocalStep([group["params"] for group in groups], optimizer.state, leaves)
    optimizer.state = state
    for group, params in zip(groups, lists):
        group["params"] = params


def _before_state_dict(optimizer: Optimizer, *rest: Any) -> None:
    _finish_local_step(optimizer)


def _finish_local_step(optimizer: Optimizer) -> bool:
    """Gives the optimizer its DTensors back, and new state to them. Also after a step that failed, when first asked."""
    step: _LocalStep | None = vars(optimizer).pop(_LOCAL_STEP, None)
    if step is None:
        return False
    for parameter, leaf in step.leaves:
        if leaf is parameter:
            if leaf in optimizer.state:
                step.state[leaf] = optimizer.state[leaf]
            continue
        if leaf.grad is None:
            parameter.grad = None  # zero_grad after a step that failed
        values = optimizer.state.get(leaf)
        if values is not None:
            kept = step.state[parameter]
            for key in kept.keys() - values.keys():
                del kept[key]
            for key, value in values.items():
                if type(kept.get(key)) is not DTensor or kept[key]._local_tensor is not value:
                    kept[key] = _beside(parameter, key, value)
    for group, params in zip(optimizer.param_groups, step.params):
        group["params"] = params
    optimizer.state = step.state
    return True


def _beside(parameter: Any, key: str, value: Any) -> Any:
    """A piece of state made in a local step as a DTensor; numbers such as ``step`` as they are."""
    local = parameter._local_tensor
    if not isinstance(value, torch.Tensor) or value.shape != local.shape or (key == "step" and not local.dim()):
        return value
    return _alike(parameter, value)


def _alike(parameter: DTensor, piece: torch.Tensor) -> DTensor:
    """A local tensor as a DTensor with the parameter's shape and placements; differentiable."""
    shape, stride = parameter.shape, parameter.stride()
    mesh, split = parameter.device_mesh, parameter.placements
    return DTensor.from_local(piece, mesh, split, run_check=False, shape=shape, stride=stride)


# ----------------------------------------------------------------------------------------------------- the hot path


def enter(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The local tensors of many parameters, differentiable: the gradients of those become DTensor gradients of these.

    Each local gradient must be the parameter's piece of the whole gradient, reduced already. Frozen parameters give
    tensors without gradient.

    Args:
        parameters: DTensors; ordinary tensors among them are handed through.

    Returns:
        One local tensor each, which shares memory with the parameter.
    """
    found: list[Any] = list(map(current, parameters))
    training = torch.is_grad_enabled()
    group: list[int] = []
    size = 0
    for i, parameter in enumerate(found):
        if type(parameter) is not DTensor:
            continue
        if not (training and parameter.requires_grad):
            found[i] = parameter._local_tensor.detach()
            continue
        group.append(i)
        size += parameter._local_tensor.nbytes
        if size >= _GROUP_BYTES:
            _enter_group(found, group)
            group, size = [], 0
    if group:
        _enter_group(found, group)
    return found


# Parameters enter in groups, so that the gradients of one group are handed on before those of the next are complete.
_GROUP_BYTES = 4 << 20


def _enter_group(found: list[Any], group: Sequence[int]) -> None:
    for i, local in zip(group, _Enter.apply(_sentinel().leaf, *[found[i] for i in group])):
        found[i] = local


class _Enter(torch.autograd.Function):
    """From DTensor parameters to their local tensors, and from local gradients back.

    Autograd would accept a DTensor gradient for each parameter, at 9 us apiece. In an ordinary ``.backward()``, for a
    parameter without hooks, it is cheaper to do here what autograd's AccumulateGrad does: set ``.grad`` or add to it.
    """

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, *parameters: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.parameters = parameters
        return tuple([parameter._local_tensor.detach() for parameter in parameters])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        references = list(map(sys.getrefcount, gradients))
        if torch.is_grad_enabled():
            return None, *(g if g is None else _alike(p, g) for g, p in zip(gradients, ctx.parameters))
        _, node, alone = _sentinel()
        direct = will_execute_node(node)
        results: list[Any] = [None]
        for parameter, gradient, count in zip(ctx.parameters, gradients, references):
            if gradient is None:
                results.append(None)
                continue
            have = parameter.grad
            plain = direct and not (parameter._backward_hooks or parameter._post_accumulate_grad_hooks)
            if plain and type(have) is DTensor and have._spec.placements == parameter._spec.placements:
                have._local_tensor.add_(gradient)
                results.append(None)
                continue
            if not gradient.is_contiguous():
                gradient = gradient.contiguous()
            elif count > alone or gradient._use_count() > 1:
                gradient = gradient.clone()  # somebody else has it, and optimizers write into gradients
            whole = DTensor(gradient, parameter._spec, requires_grad=False)
            if plain and have is None:
                parameter.grad = whole
                results.append(None)
            else:
                results.append(whole)
        return tuple(results)


class _Sentinel(NamedTuple):
    """A leaf that nobody asks a gradient of, so that the engine visits its node only where it visits every leaf; and
    how many references Python counts to a gradient in a backward function if nobody else holds it."""

    leaf: torch.Tensor
    node: Any
    alone: int


@lru_cache(maxsize=1)
def _sentinel() -> _Sentinel:
    counts: list[int] = []

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            counts.extend(map(sys.getrefcount, gradients))
            return gradients

    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros((), device="cpu", requires_grad=True)
        (Count.apply(torch.zeros((), device="cpu", requires_grad=True)) * 2).backward()
    return _Sentinel(leaf, get_gradient_edge(leaf).node, counts[0])
