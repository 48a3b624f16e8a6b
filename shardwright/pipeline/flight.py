"""Messages of one step that are under way, and when their tensors are free.

A message is known to have arrived once its reader sends something that it made later, so that waiting for the send then takes
no time, and what is sent is not held longer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardwright.ir.graph import Graph
from shardwright.pipeline.schedules.actions import FORWARD, WEIGHT, Action
from shardwright.world.distributed.operations import Handle
from shardwright.world.distributed.transfer import Transfer

Place = tuple[int, int]  # a row, and the position of an action in it
Places = Mapping[tuple[int, int, bool], Place]


class Message(NamedTuple):
    """A value of a micro-batch, or its gradient, on its way between two stages."""

    name: str
    micro: int
    source: int
    target: int
    gradient: bool


def places_of(rows: Sequence[Sequence[Action]], tail: int | None = None) -> Places:
    """Returns where each stage's forward and backward of each micro-batch stand, by stage, micro-batch and whether backward.

    Args:
        rows: the actions.
        tail: the number of the tail, which runs after the last forward of the stage before it.
    """
    found = {
        (action.stage, action.micro or 0, action.kind != FORWARD): (row, at)
        for row, actions in enumerate(rows)
        for at, action in enumerate(actions)
        if action.is_compute and action.kind != WEIGHT
    }
    if tail is not None:
        own = [(place, micro, goes_back) for (stage, micro, goes_back), place in found.items() if stage == tail - 1]
        forwards = [place for place, _, goes_back in own if not goes_back]
        place = max(forwards) if forwards else (own[0][0][0], -1)
        found.update({(tail, micro, goes_back): place for _, micro, _ in own for goes_back in (False, True)})
    return found


class Flight:
    """Messages of one step that are under way.

    Args:
        graph: of the whole network, for dtypes.
        cross: prepares a message.
        device: where tensors are.
        places: of the actions that this step runs.
    """

    def __init__(self, graph: Graph, cross: Callable[[Message], Transfer], device: torch.device, places: Places):
        self.graph, self.cross, self.device, self.places = graph, cross, device, places
        self.receiving: dict[Message, Handle] = {}
        self.sending: dict[int, list[tuple[int, Handle]]] = {}  # by row, with the position of the action that reads it

    def send(self, message: Message, piece: Tensor) -> None:
        """Starts to send this rank's part of a value to another stage."""
        transfer = self.cross(message)
        if transfer.sends:
            row, at = self.places[message.target, message.micro, message.gradient]
            self.sending.setdefault(row, []).append((at, transfer.start(piece.contiguous())))

    def receive(self, message: Message) -> None:
        """Starts to receive this rank's part of a value, unless it has been asked for."""
        if message not in self.receiving:
            dtype = self.graph.metas[message.name].dtype
            self.receiving[message] = self.cross(message).start(torch.empty(0, dtype=dtype, device=self.device))

    def received(self, message: Message) -> Tensor:
        """Waits for this rank's part of a value."""
        found = self.receiving.pop(message).wait()
        row, reached = self.places[message.source, message.micro, message.gradient]
        waiting = self.sending.get(row)
        if waiting:
            self.sending[row] = [each for each in waiting if each[0] > reached]
            for at, handle in waiting:
                if at <= reached:
                    handle.wait()
        return found

    def finish(self) -> None:
        """Waits until everything has left."""
        for waiting in self.sending.values():
            for _, handle in waiting:
                handle.wait()
        self.sending.clear()
