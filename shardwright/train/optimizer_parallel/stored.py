"""Splits parameters, gradients and optimizer states over the ranks that would hold the same.

It is a matter of layouts alone. A parameter that an operator wants replicated over some axes is *stored* split over them;
where the operator reads it, it is gathered, and its gradient is reduce-scattered. An optimizer only ever sees the stored
piece.

=========  ==========================  ======================  ===========================  =======================
level      parameter, optimizer state  gradient of a step      gradients of micro-batches   bytes, of data parallel
=========  ==========================  ======================  ===========================  =======================
level1     split                       split                   whole, reduced once          1
level2     split                       split                   split, reduced each time     1
level3     split, gathered anew for    split                   split, reduced each time     1.5
           the backward pass
=========  ==========================  ======================  ===========================  =======================

With one micro-batch level 1 and 2 are the same. Data parallelism moves 2 (R - 1) / R of a gradient's bytes, an all-reduce;
a gather and a reduce-scatter move (R - 1) / R each.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardwright.errors import ArgumentTypeError, Problems, ShardwrightError
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.plan import Plan
from shardwright.train.optimizer_parallel.cut_axis import cut_axis

logger = logging.getLogger("shardwright")

LEVELS = ("level1", "level2", "level3")


@dataclass(frozen=True)
class OptimizerParallel:
    """Settings of :meth:`shardwright.AutoParallel.hsdp`."""

    shard_size: int = -1
    threshold: int = 64
    level: str = "level1"

    @property
    def reduces_each_micro_batch(self) -> bool:
        return self.level != "level1"

    @property
    def gathers_again(self) -> bool:
        return self.level == "level3"


def read_hsdp(shard_size: Any, threshold: Any, optimizer_level: Any) -> OptimizerParallel:
    """Checks the arguments of :meth:`shardwright.AutoParallel.hsdp` and returns them as settings.

    Raises:
        ShardwrightError: a value out of range; ``ArgumentTypeError`` where it is of the wrong type.
    """
    for name, value in (("shard_size", shard_size), ("threshold", threshold)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ArgumentTypeError(f"hsdp({name}={value!r}): give a whole number")
    if shard_size == 0 or shard_size < -1:
        raise ShardwrightError(f"hsdp(shard_size={shard_size}): give the number of ranks that share a parameter, or -1 for all")
    if threshold < 0:
        raise ShardwrightError(f"hsdp(threshold={threshold}): give KB, 0 or more; smaller parameters are not split")
    if optimizer_level not in LEVELS:
        raise ShardwrightError(f"hsdp(optimizer_level={optimizer_level!r}): give one of {', '.join(map(repr, LEVELS))}")
    if shard_size == 1:
        logger.warning("hsdp(shard_size=1) would split nothing and is ignored: parameters are split over all their replicas")
        shard_size = -1
    return OptimizerParallel(shard_size, threshold, optimizer_level)


def split_parameters(plan: Plan, settings: OptimizerParallel, parameters: Mapping[str, Any]) -> Plan:
    """Splits a plan's stored parameters over the ranks that would hold the same piece.

    Args:
        plan: the plan.
        settings: how to split.
        parameters: the module's, by qualified name. One with ``parallel_optimizer = False`` stays as it is, as do frozen
            ones, which have neither gradient nor state.

    Returns:
        The plan; where ``shard_size`` cuts an axis in two, on a finer mesh.

    Raises:
        ShardwrightError: more ranks per parameter than there are; an axis that cannot be cut. All problems at once.
    """
    if settings.shard_size > plan.mesh.size:
        raise ShardwrightError(
            f"hsdp(shard_size={settings.shard_size}): there are {plan.mesh.size} ranks; give 2 to {plan.mesh.size}, or -1 for "
            "all of them"
        )
    wanted = {i.value: i for i in plan.graph.inputs if i.kind == "parameter" and _is_eligible(i, settings, parameters)}
    if settings.shard_size != -1:
        plan = _cut_axes(plan, settings.shard_size, [plan.input_layouts[name] for name in wanted])
    layouts = dict(plan.input_layouts)
    for name, graph_input in wanted.items():
        layouts[name] = _split(layouts[name], graph_input.meta.shape, settings.shard_size)
    return replace(plan, input_layouts=layouts)


def _is_eligible(graph_input: Any, settings: OptimizerParallel, parameters: Mapping[str, Any]) -> bool:
    meta, parameter = graph_input.meta, parameters.get(str(graph_input.target))
    if not meta.shape or parameter is None or not parameter.requires_grad:
        return False
    if getattr(parameter, "parallel_optimizer", True) is False:
        return False
    return math.prod(meta.shape) * meta.dtype.itemsize >= settings.threshold * 1024


def replica_axes(layout: Layout) -> tuple[str, ...]:
    """Returns the axes along which ranks hold the same piece, most significant first."""
    mesh = layout.mesh
    return tuple(a for a, n in zip(mesh.axes, mesh.sizes, strict=True) if n > 1 and a not in layout.split_axes)


def _chosen(layout: Layout, size: int) -> tuple[str, ...]:
    """Returns the fastest axes of the replicas that hold ``size`` ranks; all where that does not divide their number."""
    axes, mesh = replica_axes(layout), layout.mesh
    if size == -1 or mesh.count(axes) % size:
        return axes
    at = len(axes)
    while at > 0 and mesh.count(axes[at:]) < size:
        at -= 1
    return axes[at:] if mesh.count(axes[at:]) == size else axes


def _cut_axes(plan: Plan, size: int, layouts: Sequence[Layout]) -> Plan:
    """Splits the axes in whose middle a block of ``size`` replicas begins."""
    problems = Problems()
    for _ in range(sum(len(mesh.axes) for mesh in {plan.mesh, *(layout.mesh for layout in layouts)})):
        cut = next(((layout.mesh, *found) for layout in layouts if (found := _to_cut(layout, size))), None)
        if cut is None:
            return plan
        mesh, axis, inner = cut
        try:
            plan, translate = cut_axis(plan, axis, (mesh.axis_size(axis) // inner, inner), mesh)
        except ShardwrightError as error:
            problems.add(f"hsdp(shard_size={size}) has to cut the axis {axis!r}: {error}")
            break
        layouts = [translate(layout) for layout in layouts]
    problems.raise_if_any("optimizer parallel cannot be done")
    return plan


def _to_cut(layout: Layout, size: int) -> tuple[str, int] | None:
    """Returns the axis that a block ends within, and its number of ranks in the block."""
    axes, mesh = replica_axes(layout), layout.mesh
    if mesh.count(axes) % size:
        return None
    inner = 1
    for axis in reversed(axes):
        if inner == size:
            return None
        count = mesh.axis_size(axis)
        if size % (inner * count) == 0:
            inner *= count
        elif size // inner and count % (size // inner) == 0 and size % inner == 0:
            return axis, size // inner
        else:
            return None
    return None


def _split(layout: Layout, shape: tuple[int, ...], size: int) -> Layout:
    """Splits a dim of the layout further: dim 0, if its pieces divide evenly, else another such dim, else dim 0 unevenly.

    A dim shorter than the number of ranks would leave some ranks without any: such a parameter stays as it is.
    """
    axes, mesh = _chosen(layout, size), layout.mesh
    count = mesh.count(axes)
    if count == 1:
        return layout
    for dim in range(len(shape)):
        pieces = layout.pieces(dim, shape[dim])
        if layout.sizes[dim] is None and all(piece and piece % count == 0 for piece in pieces):
            return _with(layout, dim, axes, mesh)
    if layout.sizes[0] is None and min(layout.pieces(0, shape[0])) >= count:
        return _with(layout, 0, axes, mesh)
    return layout


def _with(layout: Layout, dim: int, axes: tuple[str, ...], mesh: Mesh) -> Layout:
    bound = [list(own) for own in layout.bound]
    bound[dim] += axes
    return Layout.of(mesh, bound, layout.partial, layout.sizes)
