"""Redistribution: the steps that turn one layout of a tensor into another, forward and backward.

The backward of a redistribution is the redistribution of the gradient. The gradient of a value has the value's pieces;
where the value was partial, its gradient is replicated; and it is partial over the axes along which the ranks that read
the value then do different work. So one planner of values plans both directions, and both are minimal.

Plans are remembered: by the layouts themselves, and beneath that by the layouts with their axes renamed, so that plans
for ``dp`` and ``tp`` of one size are made once.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.redistribution import Redistribution
from shardwright.ir.step import Step
from shardwright.redistribute.planner import Options, cheapest

DEFAULT = Options()


@lru_cache(maxsize=65536)
def redistribution(
    source: Layout,
    target: Layout,
    shape: tuple[int, ...],
    partial_gradient: tuple[str, ...] = (),
    options: Options = DEFAULT,
) -> Redistribution:
    """Plans a redistribution of a tensor of global ``shape``, forward and backward.

    Args:
        source, target: layouts before and after.
        shape: global shape.
        partial_gradient: axes over which the gradient at the target is partial.
        options: rules and prices.

    >>> base = Layout((2, 2), ("dp", "mp"))
    >>> str(redistribution(base("dp", "None"), base("None", "None"), (4, 4), ("dp",)))
    'all_gather(dp, dim 0) | reduce_scatter(dp, dim 0)'
    """
    source, target = source.normal(shape), target.normal(shape)
    partial_gradient = tuple(a for a in partial_gradient if target.mesh.axis_size(a) > 1)
    forward = steps_between(source, target, shape, options)
    gradient = target.without_partial().with_partial(partial_gradient)
    backward = steps_between(gradient, source.without_partial(), shape, options)
    return Redistribution(source, target, shape, partial_gradient, forward, backward)


@lru_cache(maxsize=65536)
def steps_between(source: Layout, target: Layout, shape: tuple[int, ...], options: Options = DEFAULT) -> tuple[Step, ...]:
    """Finds the cheapest steps from ``source`` to ``target``, over the same ranks or others.

    Partial axes of ``target`` must be partial in ``source``: a pending reduction is done or kept, never invented.

    Args:
        source, target: layouts before and after.
        shape: global shape.
        options: rules and prices.
    """
    source, target = source.normal(shape), target.normal(shape)
    if source == target:
        return ()
    same = source.mesh == target.mesh
    assert set(target.partial) <= set(source.partial), f"cannot make a sum pending: {source} -> {target}"
    assert same or not target.partial, "a pending reduction cannot cross to another mesh"
    plain_source, plain_target = _plain_mesh(source.mesh), _plain_mesh(target.mesh)
    links = options.links
    if links.axes:
        plain = dict(zip((*target.mesh.axes, *source.mesh.axes), (*plain_target.axes, *plain_source.axes), strict=True))
        named = tuple((plain[axis], latency, bandwidth) for axis, latency, bandwidth in links.axes if axis in plain)
        options = replace(options, links=replace(links, axes=named))
    steps = _plain_steps(_renamed(source, plain_source), _renamed(target, plain_target), shape, options)
    named_mesh = {plain_source: source.mesh, plain_target: target.mesh}
    if all(plain == mesh for plain, mesh in named_mesh.items()):
        return steps
    return tuple(_renamed_step(step, named_mesh) for step in steps)


@lru_cache(maxsize=65536)
def _plain_steps(source: Layout, target: Layout, shape: tuple[int, ...], options: Options) -> tuple[Step, ...]:
    return cheapest(source, target, shape, options)


@lru_cache(maxsize=1024)
def _plain_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh with its axes named by their position."""
    return Mesh(tuple(f"a{i}" for i in range(len(mesh.axes))), mesh.sizes, mesh.ranks)


def _renamed(layout: Layout, mesh: Mesh) -> Layout:
    names = dict(zip(layout.mesh.axes, mesh.axes, strict=True))
    dims = [tuple(names[a] for a in axes) for axes in layout.bound]
    return Layout.of(mesh, dims, [(names[a], op) for a, op in layout.partial], layout.sizes)


def _renamed_step(step: Step, meshes: dict[Mesh, Mesh]) -> Step:
    mesh = meshes[step.source.mesh]
    names = dict(zip(step.source.mesh.axes, mesh.axes, strict=True))
    source, target = _renamed(step.source, mesh), _renamed(step.target, meshes[step.target.mesh])
    return Step(step.kind, tuple(names[a] for a in step.axes), source, target, step.dims, step.op)
