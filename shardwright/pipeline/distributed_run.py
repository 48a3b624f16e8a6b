"""Runs the stages of one rank of a real job. Pieces travel as direct messages, and nobody waits for what it does not need.

A rank runs its row's actions in their order. What a stage sends leaves as soon as it is made, to the ranks that lack it; what
it receives is awaited where it is read, and asked for one action ahead. Sends are awaited at the end of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.graph import Graph
from shardwright.ir.layout import Layout
from shardwright.pipeline.crossing import Held, add_pieces
from shardwright.pipeline.elsewhere import Elsewhere
from shardwright.pipeline.flight import Flight, Message, Places, places_of
from shardwright.pipeline.random_turns import RandomTurns
from shardwright.pipeline.run import PipelineRun, StagePlace, Step
from shardwright.pipeline.schedules.actions import Action
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.pipeline.stage_run import Pieces, StageRun, draw_only
from shardwright.pipeline.units import Cut
from shardwright.redistribute.routes import exchange_routes
from shardwright.world.distributed.links import Link
from shardwright.world.distributed.operations import Operation
from shardwright.world.distributed.transfer import Transfer

_FIRST_TAG = 1 << 25  # of a pipeline's messages
_UPDATE_TAG = 1 << 24  # of new values of buffers
_LAST_TAG = (1 << 30) - 1


class DistributedPipelineRun(PipelineRun):
    """The stages of this rank's row, on a process of a job.

    Args:
        graph, places, runs, cut, schedule, loss: as of :class:`~shardwright.pipeline.run.PipelineRun`.
        rank: this rank.
        link: over all ranks of the job.
        broadcasts: whether every rank gets all results, not only the loss.
        device: where tensors are.
    """

    def __init__(
        self, graph: Graph, places: Sequence[StagePlace], runs: Mapping[int, StageRun], cut: Cut, schedule: Schedule,
        loss: int | None, rank: int, link: Link, broadcasts: bool, device: torch.device,
    ):  # fmt: skip
        super().__init__(graph, places, runs, cut, schedule, loss)
        self.rank, self.link, self.broadcasts, self.device = rank, link, broadcasts or loss is None, device
        self.row = schedule.row_of_stage[next(iter(runs))]
        self.tags = {name: at for at, name in enumerate(self.maker)}
        self._transfers: dict[Any, Transfer] = {}
        self._sums: dict[int, tuple[int, Operation]] = {}  # by result, with its number of elements
        self.turns = RandomTurns(rank, link, [place.ranks for place in places]) if self.draws_late else None
        self._places: dict[int, Places] = {}  # by the identity of rows, which live as long as the run

    def draw_once(self, grad: bool) -> None:
        """Runs what draws random numbers once per step; draws what others draw, so that generators stay alike."""
        for place in self.places if self.draws_once else ():
            index = place.stage.index
            if index in self.runs:
                self.runs[index].unshard(grad)
            else:
                draw_only(place.parts.once)

    def shown(self, result: Tensor) -> Tensor:
        """Returns a result as the caller gets it: without values where other ranks hold it."""
        return result.as_subclass(Elsewhere) if result.is_meta else result

    def updates(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what all stages have written to buffers: each stage's first rank sends it to the ranks of others.

        Args:
            buffers: those that operators write to in place, by value; on other ranks they are overwritten.
        """
        found, at = super().updates(buffers), _UPDATE_TAG
        under_way: list[Any] = []
        for place in self.places:
            graph, ranks = place.stage.graph, place.ranks
            moved = {value for node in graph.nodes if node.op.moves_statistics for value in node.inputs}
            for name, value in (*graph.updates, *((name, "") for name in buffers if name in moved)):
                at += 1
                if self.rank == ranks[0]:
                    new = (found[name] if value else buffers[name]).contiguous()
                    others = [rank for rank in range(self.link.size) if rank not in ranks]
                    under_way += [self.link.group.send([new], rank, at) for rank in others]
                elif self.rank not in ranks:
                    meta = self.graph.metas[value] if value else None
                    new = buffers[name] if meta is None else torch.empty(meta.shape, dtype=meta.dtype, device=self.device)
                    if value:
                        found[name] = new
                    under_way.append(self.link.group.recv([new], ranks[0], at))
        for work in under_way:
            work.wait()
        return found

    # -- actions ----------------------------------------------------------------------------------------------------

    def run(self, rows: Sequence[Sequence[Action]], grad: bool, step: Step | None = None) -> Step:
        """Runs the actions of this rank's row.

        Args:
            rows, grad, step: see :meth:`PipelineRun.run`.
        """
        if step is None:
            step = Step()
            self.draw_once(grad)
        places = self._places.get(id(rows))
        if places is None:
            places = self._places[id(rows)] = places_of(rows, self.tail)
        flight = Flight(self.graph, self.cross, self.device, places)
        actions = rows[self.row]
        goes_back = any(action.goes_back for action in actions)
        if step.tail_waits and goes_back:
            self._tail_backward(step, flight)
        for at, action in enumerate(actions):
            for coming in actions[at : at + 2]:
                self._ask(coming, flight)
            self._act(action, step, grad, flight)
            if self.is_before_tail(action):
                self.tail_forward(step, grad, partial(self._for_tail, step, flight))
                if grad and goes_back:
                    self._tail_backward(step, flight)
        flight.finish()
        if self.turns is not None and any(action.kind == "F" for action in actions):
            self.turns.finish()
        return step

    def _ask(self, action: Action, flight: Flight) -> None:
        """Starts to receive what an action reads of other rows."""
        micro, index = action.micro, action.stage
        if not action.is_compute:
            return
        assert micro is not None
        stage = self.places[index].stage
        if action.kind == "F":
            readers = [index] if self.tail != index + 1 else [index, index + 1]
            for reader in readers:
                for name, source in self.places[reader].stage.received.items():
                    if source not in self.runs:
                        flight.receive(Message(name, micro, source, reader, False))
        elif action.kind != "W":
            for name in stage.sent:
                for reader in self.readers[name] if name in self.reached_now else ():
                    if reader not in self.runs:
                        flight.receive(Message(name, micro, reader, index, True))

    def _act(self, action: Action, step: Step, grad: bool, flight: Flight) -> None:
        run, micro, index = self.runs[action.stage], action.micro, action.stage
        if not action.is_compute:
            return self.of_parameters(action, grad)
        assert micro is not None
        if action.kind == "F":
            received = {name: [self._received(name, micro, index, step, flight)] for name in run.received}
            if self.turns is not None:
                self.turns.begin(index)
            found = run.forward(micro, received, grad)
            if self.turns is not None:
                self.turns.end(index)
            for name in run.stage.sent:
                piece = found[name][0].detach()
                for reader in self.readers[name]:
                    if reader in self.runs:
                        step.sent[name, micro] = [piece]
                    else:
                        flight.send(Message(name, micro, index, reader, False), piece)
            for position, name in run.stage.returned.items():
                step.returned.setdefault(position, []).append([p.detach() for p in found[name]])
        elif action.kind == "W":
            run.backward_weight(micro)
        else:
            gradients = self._gradients(run, micro, step, flight)
            back = run.backward(micro, gradients) if action.kind == "B" else run.backward_input(micro, gradients)
            for name, pieces in back.items():
                if name not in self.reached_now:
                    continue
                maker = self.maker[name]
                if maker in self.runs:
                    step.given.setdefault((name, micro), []).append((index, pieces))
                else:
                    flight.send(Message(name, micro, index, maker, True), pieces[0])

    def _for_tail(self, step: Step, flight: Flight, name: str, micro: int) -> Pieces:
        assert self.tail is not None
        return [self._received(name, micro, self.tail, step, flight)]

    def _tail_backward(self, step: Step, flight: Flight) -> None:
        assert self.tail is not None
        index = self.tail

        def give(name: str, micro: int, pieces: Pieces) -> None:
            maker = self.maker[name]
            if maker in self.runs:
                step.given.setdefault((name, micro), []).append((index, pieces))
            else:
                flight.send(Message(name, micro, index, maker, True), pieces[0])

        self.tail_backward(step, self._gradients(self.runs[index], 0, step, flight), give)

    def _received(self, name: str, micro: int, index: int, step: Step, flight: Flight) -> Tensor:
        source = self.maker[name]
        if source in self.runs:
            is_last = index == max(reader for reader in self.readers[name] if reader in self.runs)
            sent = step.sent.pop((name, micro)) if is_last else step.sent[name, micro]
            return self.cross(Message(name, micro, source, index, False))(sent[0])
        return flight.received(Message(name, micro, source, index, False))

    def _gradients(self, run: StageRun, micro: int, step: Step, flight: Flight) -> dict[str, Pieces]:
        found: dict[str, Pieces] = {}
        index = run.stage.index
        for name in run.stage.sent:
            own = dict(step.given.pop((name, micro), ()))
            for reader in self.readers[name] if name in self.reached_now else ():
                if reader in self.runs:
                    piece = self.cross(Message(name, micro, reader, index, True))(own[reader][0])
                else:
                    piece = flight.received(Message(name, micro, reader, index, True))
                add_pieces(found, name, [piece])
        for position, name in run.stage.returned.items():
            seed = self.seeds.get(position)
            if seed is not None and name in self.graph.needs_grad:
                seed = self.seed_of(name, micro, seed)
                layout = self.held_of(index, name, micro).layout
                add_pieces(found, name, [seed[layout.slices(tuple(seed.shape))[self.rank]]])
        return found

    # -- moves ------------------------------------------------------------------------------------------------------

    def held_of(self, stage: int, name: str, micro: int) -> Held:
        """Returns how the ranks of a stage hold a value. Here layouts are over the numbers of the job's ranks already."""
        held = super().held_of(stage, name, micro)
        return Held(held.layout, held.groups, 0)

    def tag(self, message: Message) -> int:
        """Returns the tag of a message, which no other message between the same two ranks has."""
        at = (self.tags[message.name] * self.micro_count + message.micro) * len(self.places) ** 2
        return _FIRST_TAG + at + message.source * len(self.places) + message.target

    def cross(self, message: Message) -> Transfer:
        """Prepares the move of this rank's part of a value between two stages, once."""
        found = self._transfers.get(message)
        if found is None:
            name, micro, source, target, _ = message
            shape = self.shape_of(name, micro)
            before = self.held_of(source, name, micro).layout.without_partial()
            after = self.held_of(target, name, micro).layout.without_partial()
            routes = exchange_routes(before, after, shape)
            have, want = before.bounds(shape).get(self.rank), after.bounds(shape).get(self.rank)
            found = self._transfers[message] = Transfer(self.link, routes, have, want, self.tag(message))
        return found

    # -- results ----------------------------------------------------------------------------------------------------

    def outputs(self, step: Step) -> list[Any]:
        """Returns the results: the loss on every rank, others on every rank if that is asked for, else where they are made."""
        found: list[Any] = []
        for position, name in self.names.items():
            is_number = not self.graph.metas[name].shape
            is_summed = any(
                self.held_of(self.home[position], name, m).layout.partial for m in range(self.count_of(self.home[position]))
            )
            if is_number or is_summed or self.broadcasts:
                found.append(self._on_all_ranks(position, name, step))
            elif self.home[position] in self.runs:
                found.append(self._on_own_ranks(position, name, step))
            else:
                meta = self.graph.metas[name]
                found.append(torch.empty(meta.shape, dtype=meta.dtype, device="meta"))
        return found

    def _pieces(self, position: int, name: str, step: Step) -> list[tuple[Layout, Tensor | None]]:
        """Returns the layout of each micro-batch's part of a result and this rank's piece of it, pending sums done."""
        home, found = self.home[position], []
        for micro in range(self.count_of(home)):
            layout = self.held_of(home, name, micro).layout
            piece = step.returned[position][micro][0] if home in self.runs else None
            found.append((layout, piece))
        return found

    def _on_all_ranks(self, position: int, name: str, step: Step) -> Tensor:
        """Gathers a result on every rank: ranks add what they have of it, at its place."""
        meta, each = self.graph.metas[name], []
        for micro, (layout, piece) in enumerate(self._pieces(position, name, step)):
            shape = self.shape_of(name, micro)
            whole = torch.zeros(shape, dtype=meta.dtype, device=self.device)
            if piece is not None and self._is_first_holder(layout):
                whole[layout.slices(shape)[self.rank]] = piece
            each.append(whole)
        result = self.joined(name, each)
        if position not in self._sums or self._sums[position][0] != result.numel():
            self._sums[position] = result.numel(), self.link.prepare_all_reduce(result.numel(), inplace=True)
        return self._sums[position][1](result)

    def _is_first_holder(self, layout: Layout) -> bool:
        """Tells whether this rank is the first that holds its piece, or its part of a pending sum."""
        mesh = layout.mesh
        places = mesh.coordinates(self.rank)
        taken = {*layout.split_axes, *layout.partial_axes}
        return all(places[axis] == 0 for axis in mesh.axes if axis not in taken)

    def _on_own_ranks(self, position: int, name: str, step: Step) -> Tensor:
        """Gathers a result on the ranks of the stage that makes it."""
        each = []
        for micro, (layout, piece) in enumerate(self._pieces(position, name, step)):
            assert piece is not None
            shape = self.shape_of(name, micro)
            whole = Layout.replicated(layout.mesh, layout.ndim)
            key = ("result", name, micro)
            if key not in self._transfers:
                routes = exchange_routes(layout.without_partial(), whole, shape)
                have, want = layout.bounds(shape)[self.rank], whole.bounds(shape)[self.rank]
                self._transfers[key] = Transfer(self.link, routes, have, want, _FIRST_TAG - 1 - micro)
            each.append(self._transfers[key](piece.contiguous()))
        return self.joined(name, each)
