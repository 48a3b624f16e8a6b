"""Calls of callables that decide by values of tensors: undone and repeated where they decide otherwise."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from shardwright.api.stages import Target, capture_target
from shardwright.base.opaque import OpaqueFunction
from shardwright.capture.capture import capture
from shardwright.capture.decisions import Decisions, OtherWay, explored
from shardwright.capture.numbers import Numbers
from shardwright.errors import CaptureError, ShardwrightError
from shardwright.ir.graph import Graph
from shardwright.train.accumulation.module import GradAccumulation
from shardwright.world.execute.ambient import RandomState


class UndoneOtherwise:
    """A block in which a program runs. Where the callable decides otherwise, what ran is undone, at the end of the block.

    Args:
        bound: the program, bound for a signature.
        values: of its inputs.
        settled: how many of its decisions hold in any case.
    """

    def __init__(self, bound: Any, values: Sequence[Any], settled: int):
        self.decisions: Decisions = bound.decisions
        self.settled = settled
        self.random = RandomState() if bound.is_random else None
        self.statistics = [(values[n], values[n].clone()) for n in bound.moved_inputs]
        self.made_to_require = [values[n] for n in bound.made_to_require if not values[n].requires_grad]

    def __enter__(self) -> None:
        self.decisions.compare_from(self.settled)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.decisions.compare_from(None)
        if kind is not OtherWay:
            return
        if self.random is not None:
            self.random.restore()
        for buffer, before in self.statistics:
            buffer.detach().copy_(before)
        for leaf in self.made_to_require:
            leaf.requires_grad_(False)


def run_as_decided(bound: Any, leaves: list[Any], other: Callable[[tuple[Any, ...]], tuple[list[Any], Any]]) -> Any:
    """Runs a program, and where it assumes decisions that differ from the call's, those of other decisions.

    Args:
        bound: the program to try first.
        leaves: the flat inputs.
        other: returns, for the first decisions, the inputs and a program.
    """
    decided: tuple[Any, ...] = ()
    while True:
        try:
            return bound(leaves, len(decided))
        except OtherWay as found:
            decided = found.decided
        leaves, bound = other(decided)


def captured_way(
    target: Target, changing: Collection[str], assumed: Sequence[Any]
) -> tuple[Graph, Numbers | None, Decisions | None]:
    """Captures one way of a target, with changing numbers as inputs if that is possible.

    Args:
        target: the callable.
        changing: paths of attributes that are numbers of each call.
        assumed: how its first decisions by values of tensors go.

    Returns:
        The graph, the changing numbers and the decisions, where there are any.

    Raises:
        CaptureError: something that a graph cannot hold.
    """

    def captured(decisions: Decisions | None) -> tuple[Graph, Numbers | None]:
        numbers = Numbers(target.root, tuple(sorted(changing))) if changing else None
        try:
            graph = capture_target(target, partial(capture, numbers=numbers, decisions=decisions))
        except ShardwrightError as error:
            if numbers is not None:
                raise _Escaped(numbers.escaped or set(range(len(numbers.names)))) from error
            raise
        if numbers is not None and numbers.escaped:
            raise _Escaped(numbers.escaped)
        return graph, numbers

    names = tuple(sorted(changing))
    try:
        if isinstance(target.root, GradAccumulation):
            return *captured(None), None
        (graph, numbers), decisions = explored(captured, assumed)
    except _Escaped as error:
        return captured_way(target, [name for at, name in enumerate(names) if at not in error.positions], assumed)
    if decisions.taken:
        _check_opaque(graph, decisions)
    return graph, numbers, decisions if decisions.taken else None


class _Escaped(Exception):
    """Changing numbers went where they can only be constants."""

    def __init__(self, positions: set[int]):
        super().__init__(positions)
        self.positions = positions


def _check_opaque(graph: Graph, decisions: Decisions) -> None:
    """Refuses functions with effects of their own beside decisions, because they cannot be undone.

    Raises:
        CaptureError: there is such a function.
    """
    for node in graph.nodes:
        if isinstance(node.op.target, OpaqueFunction) and node.op.target.has_effects:
            raise CaptureError(
                f"{node.op.target} reads or changes objects outside, in a captured callable that decides by values of tensors "
                f"(at {decisions.sources[0]}): a call that decides otherwise is repeated, and what it changed stays\n"
                "  Hand it what it reads as an argument, or select by torch.where"
            )
