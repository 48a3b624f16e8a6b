"""Runs a user's collective on a real rank, or puts it into the captured program."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from shardwright.base.user_code import user_line
from shardwright.capture.session import current_session
from shardwright.errors import ArgumentTypeError, ShardwrightError, WorldError
from shardwright.hybrid.mesh import current_mesh, current_tracing
from shardwright.hybrid.steps import Collective, kept, plan
from shardwright.ir.mesh import Mesh
from shardwright.world.current import current_world

_LINE = 192  # bytes of the message that describes a call


# -- checks --------------------------------------------------------------------------------------------------------------


def failed(name: str, given: str, edit: str) -> ShardwrightError:
    """Builds the error of a call that cannot be done, with the user's line."""
    return ShardwrightError(f"{name} at {user_line()}: {given}; {edit}")


def participants(name: str, axis: Any, x: Any = None) -> int:
    """Checks the tensor and axis of a call. Returns the number of ranks along the axis.

    Raises:
        ArgumentTypeError: the first argument is no tensor. ShardwrightError: the mesh has no such axis.
    """
    mesh = current_mesh().mesh
    if name not in ("rank", "size") and not isinstance(x, Tensor):
        raise ArgumentTypeError(f"{name} at {user_line()}: the first argument is a {type(x).__name__}; give a tensor")
    if axis not in mesh.axes:
        raise failed(name, f"the mesh {mesh} has no axis {axis!r}", f"name one of {', '.join(mesh.axes)}")
    return mesh.axis_size(axis)


def checked_dim(name: str, x: Tensor, what: str, dim: Any) -> int:
    """Returns the dim, counted from the front.

    Args:
        name: the collective, for messages.
        x: its tensor.
        what: the argument, for messages.
        dim: its value.
    """
    if type(dim) is not int or not -x.ndim <= dim < x.ndim:
        raise failed(name, f"{what}={dim!r} of a tensor {list(x.shape)}", f"give one of its {x.ndim} dims")
    return dim % x.ndim


def even(name: str, x: Tensor, dim: int, axis: str, count: int) -> None:
    """Refuses a dim that does not divide into equal pieces, one per rank.

    Args:
        name: the collective, for messages.
        x: its tensor.
        dim: the dim.
        axis: the mesh axis.
        count: the number of ranks along it.
    """
    if x.shape[dim] % count:
        short = -x.shape[dim] % count
        raise failed(
            name,
            f"dim {dim} of {list(x.shape)} does not divide by the {count} ranks of {axis!r}",
            f"pad it by {short}, or take another dim",
        )


def refuse_gradient(name: str, x: Tensor, op: str) -> None:
    """Refuses to differentiate a maximum or minimum: where values are equal, their gradient belongs to no rank."""
    if op in ("max", "min") and x.requires_grad and torch.is_grad_enabled():
        raise failed(name, f"op={op!r} has no gradient, and the tensor needs one", "hand in x.detach()")


# -- running -------------------------------------------------------------------------------------------------------------


def call(collective: Collective, x: Tensor) -> Tensor:
    """Runs a collective over an axis of two ranks or more, or captures it."""
    if current_tracing() is not None:
        mesh = current_mesh().mesh
        shape = collective.result_shape(tuple(x.shape), mesh.axis_size(collective.axis))
        result: Tensor = operator()(x, collective.kind, collective.axis, collective.op, list(collective.numbers), list(shape))
        return result
    if current_session() is not None:
        raise failed(
            collective.kind,
            "the model is written for one device in this mode, and shardwright puts its collectives in",
            "use AutoParallel(model, 'hybrid_parallel'), or leave it out",
        )
    world = current_world()
    world.rank_or_raise(
        lambda: failed(
            collective.kind,
            f"this process simulates all {world.size} ranks, and plain code runs once for all of them",
            "call it in a model of AutoParallel(model, 'hybrid_parallel')",
        )
    )
    return _on_this_rank(collective, x, world)


def _on_this_rank(collective: Collective, x: Tensor, world: Any) -> Tensor:
    now, shape = current_mesh(), tuple(x.shape)
    now.check_world(world)
    mesh, position = now.mesh, now.position(collective.axis, world.rank)
    if now.check:
        _compare(collective, x, mesh, world)
    move = world.prepared((collective, mesh, shape), lambda: plan(collective, mesh, (shape,) * mesh.size), str(collective))
    if collective.kind == "broadcast":
        x = x.narrow(0, 0, collective.sent_rows(position, shape[0]))
    result: Tensor = move(x, None, x.device)
    return kept(result, collective.receives(position)) if collective.kind == "permute" else result


def _compare(collective: Collective, x: Tensor, mesh: Mesh, world: Any) -> None:
    """Refuses, on all ranks of the axis, calls that differ between them."""
    text = f"{collective.kind}({_words(collective)}) of {str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    line = torch.frombuffer(bytearray(text.encode()[:_LINE].ljust(_LINE)), dtype=torch.uint8).to(world.device)
    gather = Collective("all_gather", collective.axis, numbers=(0,))
    move = world.prepared((gather, mesh, (_LINE,)), lambda: plan(gather, mesh, ((_LINE,),) * mesh.size), "compare")
    lines = move.run_forward(line).view(-1, _LINE)
    if bool((lines == line).all()):
        return
    ranks = mesh.group_of(world.rank, (collective.axis,))
    said = [bytes(row.tolist()).decode().strip() for row in lines]
    listed = "; ".join(f"rank {rank}: {text}" for rank, text in zip(ranks, said, strict=True))
    raise WorldError(
        f"{collective.kind} at {user_line()}: the ranks along {collective.axis!r} call different things: {listed}; make the "
        "same calls, with tensors of one shape and dtype, on all of them"
    )


def _words(collective: Collective) -> str:
    words = [repr(collective.axis), *(str(n) for n in collective.numbers)]
    return ", ".join([*words, f"op={collective.op!r}"] if "reduce" in collective.kind else words)


# -- in a captured program -----------------------------------------------------------------------------------------------


@cache
def operator() -> Any:
    """Returns the operator that stands for a collective in a captured graph; it computes shapes only."""
    schema = "(Tensor x, str kind, str axis, str op, int[] numbers, int[] shape) -> Tensor"
    make = torch.library.custom_op("shardwright::collective", mutates_args=(), schema=schema)
    made = make(_stands_for_a_collective)
    made.register_fake(lambda x, kind, axis, op, numbers, shape: x.new_empty(shape))
    return torch.ops.shardwright.collective.default


def _stands_for_a_collective(x: Tensor, kind: str, axis: str, op: str, numbers: list[int], shape: list[int]) -> Tensor:
    raise AssertionError(f"{kind} over {axis} of {math.prod(shape)} elements was captured, not run")


def collective_of(args: tuple[Any, ...]) -> Collective:
    """Returns the collective that a captured call of :func:`operator` stands for."""
    _, kind, axis, op, numbers, _ = args
    return Collective(kind, axis, op, tuple(numbers))
