"""Distributes the parameters of a module as DTensors: each rank holds its piece, and nobody the whole.

Ordinary parameters become ``nn.Parameter(DTensor)``, so that ``torch.optim``, ``clip_grad_norm_`` and
``torch.distributed.checkpoint`` work on them unchanged. The hot path never goes through DTensor: :func:`enter` returns
local tensors and takes back local gradients, of all parameters in few steps.

Invariants:

- A parameter keeps the first layout it is given (:func:`layout_of`), whatever is planned later.
- No handle is stale. The parameter that a user holds from before stands for the new one from then on
  (:class:`MovedParameter`), and an optimizer made before is rebound at its next step, with its state.
- All ranks begin with the same values. Where theirs differ, those of the mesh's first rank win.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from shardwright.agreement.checksum import checksum
from shardwright.errors import WorldError
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.parameters.delayed.recorder import is_delayed
from shardwright.parameters.delayed.replay import materialise
from shardwright.parameters.device_mesh import device_mesh
from shardwright.parameters.handles import _HOOKED, _MOVED_TO, MovedParameter, current
from shardwright.parameters.optimizer import _watch_optimizers
from shardwright.parameters.ours import is_whole_copy
from shardwright.parameters.placements import _as_dtensor, _like, _slice, layout_of, storable, stored_layouts

T = TypeVar("T")

# ------------------------------------------------------------------------------------------- layouts for DTensor


# --------------------------------------------------------------------------------------------------- distribution


def distribute_parameters(root: nn.Module, layouts: Mapping[str, Layout], device: torch.device | str) -> dict[str, Layout]:
    """Replaces every parameter of a module by a DTensor parameter of this rank's piece.

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
    """Makes DTensors of parameters that are this rank's pieces already.

    Every rank of the job makes this call.

    Args:
        root: the module.
        slices: the layout and global shape of every such parameter, by the first of its names. Ranks that should hold the same
            piece get that of the first of them.
        device: where parameters go.
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


def _choose(parameters: Mapping[str, nn.Parameter], layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """Chooses a layout that can be stored for each parameter, after checking all of them."""
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
    """Parameters of a module and its new buffers, each once, with every place that holds it."""

    def __init__(self, root: nn.Module):
        self.modules = list(root.modules())
        self.parameters: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        self._names: dict[int, list[str]] = {}
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for prefix, module in root.named_modules(remove_duplicate=False):
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    if is_whole_copy(parameter):
                        raise WorldError(f"parameter {key!r} is whole for now: call nets outside of net.whole()")
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
        """Returns the layouts by the first name of each parameter. They may have been given for any of its names."""
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
        """Puts the new parameters into the modules' tables. The modules then accept whole values when loading."""
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
                tensor.data = piece  # the same object, for all who hold it

    def _piece(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Returns the part of a value that this rank keeps: a slice of a parameter, the whole of a buffer."""
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
        """Tells, for each number, whether it is the same on all ranks of the mesh: one small reduction per axis."""
        ends = torch.tensor([list(numbers), [-n for n in numbers]], dtype=torch.int64, device=self.device)
        for group, _ in self._groups():
            dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
        return (ends[0] == -ends[1]).tolist()  # type: ignore[no-any-return]

    def _of_first_rank(self, differing: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Receives this rank's pieces of the first rank's values, one at a time in its order."""
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
        """Broadcasts the first rank's value along each axis in turn."""
        value = value.contiguous()
        for group, source in self._groups():
            dist.broadcast(value.view(-1).view(torch.uint8), source, group=group)
        return value

    def _groups(self) -> list[tuple[dist.ProcessGroup, int]]:
        """Returns this rank's group along every axis, with the group's first rank."""
        if self.device_mesh is None:
            return []
        axes = [(i, axis) for i, axis in enumerate(self.mesh.axes) if self.mesh.sizes[i] > 1]
        return [(self.device_mesh.get_group(i), self.mesh.group_of(self.rank, (axis,))[0]) for i, axis in axes]


def _first_other(here: Sequence[str], there: Sequence[str]) -> int:
    """Returns the index at which two lists begin to differ, -1 where they do not."""
    if here == there:
        return -1
    return next((i for i, (a, b) in enumerate(zip(here, there)) if a != b), min(len(here), len(there)))


def _replace(old: nn.Parameter, value: DTensor, gradient: DTensor | None) -> None:
    """Puts a new parameter in the place of an old one. That becomes a handle of it."""
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    new.grad = gradient
    if old._backward_hooks is not None:
        new._backward_hooks = old._backward_hooks  # the same dict, so that the user's handles still remove them
    if old._post_accumulate_grad_hooks is not None:
        new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
    _leave(old, new)


def _slice_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Turns whole values, as a single device saves them, into DTensors before ``load_state_dict``."""
    for key, parameter in module._parameters.items():
        value = state.get(prefix + key)
        if parameter is None or layout_of(parameter) is None or not isinstance(value, torch.Tensor):
            continue
        if not isinstance(value, DTensor) and value.shape == parameter.shape:
            state[prefix + key] = _like(parameter, value)


# ------------------------------------------------------------------------------------- handles and optimizers from before


def _leave(old: nn.Parameter, new: nn.Parameter) -> None:
    """Empties a parameter and makes it a handle of the new one. Code that bypasses the handle finds 0 elements and fails."""
    old.grad = None
    old.data = old.data.new_empty(0)
    old.requires_grad_(False)
    vars(old).clear()
    vars(old)[_MOVED_TO] = new
    old.__class__ = MovedParameter
    _watch_optimizers()


# ----------------------------------------------------------------------------------------------------- the hot path
