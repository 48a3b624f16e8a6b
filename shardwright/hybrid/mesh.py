"""Mesh of collectives in user code, and the rank whose program is being captured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from shardwright.errors import ArgumentTypeError, LayoutError, WorldError
from shardwright.ir.mesh import Mesh
from shardwright.world.current import World, current_world


@dataclass(frozen=True)
class CollectiveMesh:
    """Mesh of all ranks, the axes that divide the batch, and whether calls are compared."""

    mesh: Mesh
    data: tuple[str, ...]
    check: bool = True

    def check_world(self, world: World) -> None:
        """Refuses a mesh that is not over all ranks, nor over one rank."""
        if self.mesh.size not in (1, world.size):
            raise WorldError(
                f"the mesh {self.mesh} has {self.mesh.size} ranks, this world has {world.size}: make it of {world.size} ranks"
            )

    def position(self, axis: str, rank: int) -> int:
        """Returns the rank's index along an axis."""
        return self.mesh.coordinates(rank)[axis] if self.mesh.axis_size(axis) > 1 else 0


@dataclass
class Tracing:
    """A capture in progress of one rank's program. ``asked``: axes on which it asked for its position."""

    collective_mesh: CollectiveMesh
    rank: int
    asked: set[str] = field(default_factory=set)


_chosen: list[CollectiveMesh] = []
_tracing: list[Tracing] = []


@contextmanager
def over(mesh: Mesh, data: str | Sequence[str] | None = None, check: bool = True) -> Iterator[Mesh]:
    """Sets, within the block, the mesh of collectives and of parameters that ranks own.

    An :class:`~shardwright.AutoParallel` in mode ``"hybrid_parallel"`` keeps the mesh of the block it is made in. Outside of
    any block the mesh is one axis ``"dp"`` of all ranks.

    Args:
        mesh: of all ranks of the world, in ascending order. Over a mesh of one rank every collective is the identity, so
            that the program of a rank is that of the single device.
        data: the axes over which ranks have different parts of the batch; default: ``"dp"``, if there is one.
        check: whether ranks of a real job compare every call outside of a captured model before it runs. It costs a small
            message per call; without it, ranks that call different things wait for each other.

    Raises:
        ArgumentTypeError: not a mesh.
        LayoutError: an axis that the mesh does not have, or ranks out of order.
        WorldError: other ranks than the world's.

    >>> with over(Mesh(("dp", "mp"), (4, 2))) as mesh:
    ...     print(mesh)
    dp=4,mp=2
    """
    if not isinstance(mesh, Mesh):
        raise ArgumentTypeError(f"collectives.over({mesh!r}): give a mesh, sw.Mesh(('dp', 'mp'), (2, 2))")
    axes = tuple(a for a in mesh.axes if a == "dp") if data is None else (data,) if isinstance(data, str) else tuple(data)
    if len(set(axes)) != len(axes):
        raise LayoutError(f"collectives.over: data={data!r} names an axis twice; name each axis once")
    unknown = [axis for axis in axes if axis not in mesh.axes]
    if unknown:
        raise LayoutError(f"collectives.over: data names {unknown[0]!r}; the axes of the mesh are {', '.join(mesh.axes)}")
    if mesh.ranks != tuple(range(mesh.size)):
        raise LayoutError(f"collectives.over: the ranks of the mesh {mesh} are out of order: leave ranks out")
    now = CollectiveMesh(mesh, mesh.ordered(axes), check)
    now.check_world(current_world())
    _chosen.append(now)
    try:
        yield mesh
    finally:
        _chosen.remove(now)


def chosen_mesh() -> CollectiveMesh | None:
    """Returns the mesh of the innermost block; ``None`` outside of all blocks."""
    return _chosen[-1] if _chosen else None


def current_mesh() -> CollectiveMesh:
    """Returns the mesh in force: a capture's, the innermost block's, or one axis ``"dp"`` of all ranks."""
    if _tracing:
        return _tracing[-1].collective_mesh
    return chosen_mesh() or CollectiveMesh(Mesh(("dp",), (current_world().size,)), ("dp",))


def current_tracing() -> Tracing | None:
    """Returns the capture of a rank's program in progress, or ``None``."""
    return _tracing[-1] if _tracing else None


@contextmanager
def tracing(collective_mesh: CollectiveMesh, rank: int) -> Iterator[Tracing]:
    """Marks the block as the capture of ``rank``'s program."""
    now = Tracing(collective_mesh, rank)
    _tracing.append(now)
    try:
        yield now
    finally:
        _tracing.remove(now)
