"""Mode "hybrid_parallel": a program written per rank, bound to run on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.agreement.numbers import check_same_shapes
from shardwright.api.bound import BoundCall, device_of
from shardwright.api.settings import Settings
from shardwright.api.stages import before_compiling, check_assignments, first_part
from shardwright.base.torch_private import pytree
from shardwright.errors import LayoutError, Problems, ShardwrightError, WorldError
from shardwright.hybrid import collectives
from shardwright.hybrid.capture import PerRankInput, capture_ranks
from shardwright.hybrid.mesh import CollectiveMesh
from shardwright.hybrid.owned_slice import owned_slice_of
from shardwright.hybrid.program import local_program
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.program import LocalProgram
from shardwright.parameters.placements import layout_of
from shardwright.partition.partitioner import scheduled
from shardwright.train.accumulation.module import GradAccumulation, given_a_part
from shardwright.train.fusion.settings import buckets_of
from shardwright.train.precision.wires import Precision
from shardwright.world.current import World

Shape = tuple[int, ...]


class HybridBoundCall(BoundCall):
    """A per-rank program, captured for all ranks and bound on a world; it has no plan."""

    def __init__(self, root: nn.Module, args: Any, kwargs: Any, world: World, settings: Settings):
        _check_settings(settings)
        if before_compiling:
            raise ShardwrightError("a hybrid_parallel program is not planned: its writer made the plan; use another mode")
        self.root, self.world = root, world
        self.collective_mesh = settings.collective_mesh or CollectiveMesh(Mesh(("dp",), (world.size,)), ("dp",))
        if self.collective_mesh.mesh.size != world.size:
            raise WorldError(
                f"the program is over the mesh {self.collective_mesh.mesh}, this world has {world.size} ranks: make it anew"
            )
        layouts, slices = _parameter_layouts(root, self.collective_mesh.mesh)
        self.micro = root if isinstance(root, GradAccumulation) else None
        if self.micro is not None:
            args, kwargs = first_part(self.micro, args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inputs = _per_rank_inputs(leaves, settings.dataset_strategy, self.collective_mesh, world)
        device = device_of(root, world)
        self.device_type = device.type
        with given_a_part(self.micro), settings.precision.computing(device.type):
            ranks = capture_ranks(root, leaves, spec, inputs, self.collective_mesh, device)
        shapes = {n: own.shape if (own := owned_slice_of(p)) else tuple(p.shape) for n, p in root.named_parameters()}
        as_stored = {n: (shapes[n], layout, layout) for n, layout in layouts.items()}
        local_program(
            ranks, as_stored, inputs, self.collective_mesh, settings.gradients_mean
        )  # refuses before anything is changed
        stored = self._placed(layouts, slices, device)
        parameters = {n: (shapes[n], stored[n], layout) for n, layout in layouts.items()}
        program = local_program(ranks, parameters, inputs, self.collective_mesh, settings.gradients_mean)
        self.graph = replace(ranks.of(world.rank), updates=program.updates)
        check_assignments(self.graph, self.micro is not None)
        ids = buckets_of(self.graph.inputs, dict(root.named_parameters(remove_duplicate=False)))
        self.schedule = replace(settings.schedule, ids=ids)
        self.compiler = None
        self.program = self._finished(program)
        self.run = world.bind(self.program) if self.micro is None else self._accumulated(program, settings)
        self._find_inputs()
        self.is_random = any(n.op.draws for n in self.graph.nodes)
        self._count_inputs()

    def _finished(self, program: LocalProgram) -> LocalProgram:
        return scheduled(program, self.schedule)

    def _placed(self, layouts: dict[str, Layout], slices: dict[str, Shape], device: torch.device) -> dict[str, Layout]:
        """Places the parameters; returns the layouts that they really have."""
        owned = {n: (layouts[n], shape) for n, shape in slices.items()}
        return self.world.place_parameters(self.root, layouts, device, owned)

    @contextmanager
    def single_device(self) -> Iterator[None]:
        """Runs the target within the block as on a single device: every axis has one rank."""
        mesh = self.collective_mesh.mesh
        with collectives.over(Mesh(mesh.axes, (1,) * len(mesh.axes))):
            yield

    def __getattr__(self, name: str) -> Any:
        if name in ("plan", "view"):
            raise ShardwrightError("a hybrid_parallel program has no plan: its writer made it; see net.program")
        raise AttributeError(name)


def _check_settings(settings: Settings) -> None:
    problems = Problems()
    if settings.strategies:
        problems.add(f"shard({{...}}) at {settings.source} gives strategies: a program of one rank has none; drop the call")
    if settings.file is not None:
        problems.add("load_strategies(...) gives a plan: a program of one rank has none; drop the call")
    if settings.hsdp is not None:
        problems.add("hsdp() splits what a plan stores: a parameter is split by sw.collectives.own(...); drop the call")
    if settings.recompute:
        problems.add("recompute(...) changes a plan, and a program of one rank has none; drop the call")
    if settings.compiler is not None:
        problems.add("compiled segments are not there for a program of one rank: drop the call")
    if settings.precision != Precision(dtype=settings.precision.dtype):
        problems.add("what reduces in another dtype is not there for a program of one rank: cast in the program; drop the call")
    if settings.output == "sharded":
        problems.add(
            "output='sharded' leaves results as plans split them: a program of one rank has no plan; drop the argument"
        )
    problems.raise_if_any("hybrid_parallel runs what is written")


def _parameter_layouts(root: nn.Module, mesh: Mesh) -> tuple[dict[str, Layout], dict[str, Shape]]:
    """Finds the layout in which the program reads each parameter.

    Returns:
        The layouts by name, and the global shapes of those parameters that already are this rank's slices.
    """
    layouts, slices = {}, {}
    for name, parameter in root.named_parameters():
        told = owned_slice_of(parameter)
        stored = layout_of(parameter)
        if told is None:
            if stored is not None and stored.split_axes:
                raise LayoutError(
                    f"parameter {name!r} is split already, {stored.short()}, and does not say that ranks own it: it is a copy "
                    "of one that they own, or of another mode's; call the model itself, or copy it before its first call"
                )
            layouts[name] = Layout.replicated(mesh, parameter.ndim)
            continue
        if told.mesh != mesh:
            raise LayoutError(
                f"parameter {name!r} is owned over the mesh {told.mesh}, the program is over {mesh}: make the model and the "
                "AutoParallel within one 'with sw.collectives.over(mesh):'"
            )
        layouts[name] = told.layout
        if told.is_slice and stored is None:
            slices[name] = told.shape
    return layouts, slices


# -- inputs --------------------------------------------------------------------------------------------------------------


def _per_rank_inputs(
    leaves: Sequence[Any], strategy: Any, collective_mesh: CollectiveMesh, world: World
) -> dict[int, PerRankInput]:
    """Describes in which layouts ranks give the tensor inputs and programs read them."""
    positions = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    shapes = [tuple(leaves[at].shape) for at in positions]
    if isinstance(strategy, str):
        first = next((shape[0] for shape in shapes if shape), 0)
        used = [_by_rows(shape, first, collective_mesh) for shape in shapes]
    else:
        used = [_given_layout(entry, shape, collective_mesh, i) for i, (entry, shape) in enumerate(_pairs(strategy, shapes))]
    whole = world.inputs_are_whole or strategy == "full_batch"
    if not whole:
        check_same_shapes([leaves[at] for at in positions], world.size)
        shapes = [_all_slices(shape, layout) for shape, layout in zip(shapes, used, strict=True)]
    found = {}
    for at, shape, layout in zip(positions, shapes, used, strict=True):
        _check_rows(shape, layout, collective_mesh)
        given = Layout.replicated(collective_mesh.mesh, len(shape)) if strategy == "full_batch" else layout
        found[at] = PerRankInput(shape, given, layout)
    return found


def _by_rows(shape: Shape, batch: int, collective_mesh: CollectiveMesh) -> Layout:
    """Returns the layout that splits dim 0 over the data axes, if it is the batch."""
    dims: list[tuple[str, ...]] = [()] * len(shape)
    if shape and shape[0] == batch:
        dims[0] = collective_mesh.data
    return Layout.of(collective_mesh.mesh, dims)


def _pairs(strategy: Sequence[Any], shapes: Sequence[Shape]) -> list[tuple[Any, Shape]]:
    if len(strategy) != len(shapes):
        raise ShardwrightError(
            f"dataset_strategy has {len(strategy)} entries for {len(shapes)} tensor inputs; give one per input"
        )
    return list(zip(strategy, shapes, strict=True))


def _given_layout(entry: Any, shape: Shape, collective_mesh: CollectiveMesh, position: int) -> Layout:
    """Returns an entry of the dataset strategy as a layout over the program's mesh.

    Slice counts must be those of the batch over the data axes.
    """
    mesh, what = collective_mesh.mesh, f"dataset_strategy input {position}"
    if isinstance(entry, Layout):
        if (entry.mesh.axes, entry.mesh.sizes) != (mesh.axes, mesh.sizes):
            raise LayoutError(f"{what} is over the mesh {entry.mesh}, the program is over {mesh}: use the program's axes")
        layout = Layout.of(mesh, entry.bound)
    elif tuple(entry) == (mesh.count(collective_mesh.data), *(1,) * (len(shape) - 1)) or not any(n > 1 for n in entry):
        layout = Layout.of(mesh, [collective_mesh.data if n > 1 else () for n in entry])
    else:
        raise LayoutError(f"{what} is {entry}: slice counts do not say which axes of {mesh} split; give a Layout")
    if layout.ndim != len(shape):
        raise LayoutError(f"{what} has {layout.ndim} dims, the tensor {list(shape)} has {len(shape)}: give one entry a dim")
    return layout


def _all_slices(shape: Shape, layout: Layout) -> Shape:
    return tuple(size * layout.mesh.count(axes) for size, axes in zip(shape, layout.bound, strict=True))


def _check_rows(shape: Shape, layout: Layout, collective_mesh: CollectiveMesh) -> None:
    for dim, axes in enumerate(layout.bound):
        if min(layout.pieces(dim, shape[dim])) == 0 and shape[dim]:
            count = collective_mesh.mesh.count(axes)
            raise ShardwrightError(
                f"an input {list(shape)} is shared out along {', '.join(axes)}, but dim {dim} leaves one of the {count} ranks "
                f"without a row: hand in {count} rows or more, best a multiple"
            )
