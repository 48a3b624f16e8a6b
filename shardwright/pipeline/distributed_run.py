"""Runs the stages of one rank of a real job. Pieces travel as direct messages, and nobody waits for what it does not need.

A rank runs its row's actions in their order. What a stage sends leaves as soon as it is made, to the ranks that lack it; what
it receives is awaited where it is read, and asked for one action ahead. Sends are awaited at the end of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.base.derivatives import first_derivative_only
from shardwright.ir.graph import Graph
from shardwright.ir.layout import Layout
from shardwright.ir.operator import TensorMeta
from shardwright.pipeline.crossing import Held
from shardwright.pipeline.flight import Flight, Message, Places, places_of
from shardwright.pipeline.micro import Cut
from shardwright.pipeline.run import PipelineRun, StagePlace, Step, add_pieces
from shardwright.pipeline.schedules.actions import Action
from shardwright.pipeline.schedules.schedule import Schedule
from shardwright.pipeline.stage_run import Pieces, StageRun, draw_only
from shardwright.redistribute.routes import exchange_routes
from shardwright.world.distributed.links import Link
from shardwright.world.distributed.operations import Handle
from shardwright.world.distributed.transfer import Transfer

_FIRST_TAG = 1 << 25  # of a pipeline's messages
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
        self.micro_count = schedule.micro_count
        self._transfers: dict[Any, Transfer] = {}
        self._places: dict[int, Places] = {}  # by the identity of rows, which live as long as the run

    def begin(self, values: Mapping[int, Sequence[Any]]) -> list[list[Pieces]]:
        """Runs what each own stage does once per step; draws what others draw, so that generators stay alike."""
        held = []
        for place in self.places:
            index = place.stage.index
            if index in self.runs:
                held.append(self.runs[index].begin(values[index]))
            else:
                draw_only(place.parts.once)
        return held

    # -- actions ----------------------------------------------------------------------------------------------------

    def run(self, rows: Sequence[Sequence[Action]], grad: bool, step: Step | None = None) -> Step:
        """Runs the actions of this rank's row.

        Args:
            rows, grad, step: see :meth:`PipelineRun.run`.
        """
        step = step or Step()
        places = self._places.get(id(rows))
        if places is None:
            places = self._places[id(rows)] = places_of(rows)
        flight = Flight(self.graph, self.cross, self.device, places)
        actions = rows[self.row]
        for at, action in enumerate(actions):
            for coming in actions[at : at + 2]:
                self._ask(coming, flight)
            self._act(action, step, grad, flight)
        flight.finish()
        return step

    def _ask(self, action: Action, flight: Flight) -> None:
        """Starts to receive what an action reads of other rows."""
        micro, index = action.micro, action.stage
        assert micro is not None
        stage = self.places[index].stage
        if action.kind == "F":
            for name, source in stage.received.items():
                if source not in self.runs:
                    flight.receive(Message(name, micro, source, index, False))
        elif action.kind != "W":
            for name in stage.sent:
                for reader in self.readers[name] if name in self.graph.needs_grad else ():
                    if reader not in self.runs:
                        flight.receive(Message(name, micro, reader, index, True))

    def _act(self, action: Action, step: Step, grad: bool, flight: Flight) -> None:
        run, micro, index = self.runs[action.stage], action.micro, action.stage
        assert micro is not None
        if action.kind == "F":
            received = {name: [self._received(name, micro, index, step, flight)] for name in run.received}
            found = run.forward(micro, received, grad)
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
                maker = self.maker[name]
                if maker in self.runs:
                    step.given.setdefault((name, micro), []).append((index, pieces))
                else:
                    flight.send(Message(name, micro, index, maker, True), pieces[0])

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
            for reader in self.readers[name] if name in self.graph.needs_grad else ():
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
            is_summed = any(self.held_of(self.home[position], name, micro).layout.partial for micro in range(self.micro_count))
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
        for micro in range(self.micro_count):
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
        as_bytes = result.to(torch.uint8) if result.dtype == torch.bool else result
        dist.all_reduce(as_bytes, group=self.link.group)
        return as_bytes.to(torch.bool) if result.dtype == torch.bool else result

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


@dataclass(frozen=True)
class Tied:
    """A parameter of which several rows hold copies.

    Args:
        name: of the program's input.
        meta: of the parameter.
        layouts: over the ranks of each row, in order.
    """

    name: str
    meta: TensorMeta
    layouts: tuple[Layout, ...]


class TiedGradients:
    """Adds up the gradients of parameters that several rows hold, on each of them.

    Args:
        tied: the parameters, the same on all ranks.
        rank: this rank.
        link: over all ranks of the job.
    """

    def __init__(self, tied: Sequence[Tied], rank: int, link: Link):
        self.own = [t for t in tied if any(rank in layout.mesh.ranks for layout in t.layouts)]
        self.ways: list[tuple[list[tuple[int, int, Transfer]], int]] = []
        for at, each in enumerate(tied):
            if each not in self.own:
                continue
            shape = each.meta.shape
            here = next(i for i, layout in enumerate(each.layouts) if rank in layout.mesh.ranks)
            ways: list[tuple[int, int, Transfer]] = []
            for source, before in enumerate(each.layouts):
                # to the rows of this rank's copy and from it: one transfer for each pair of rows
                for target, after in enumerate(each.layouts):
                    if source != target and here in (source, target):
                        routes = exchange_routes(before, after, shape)
                        have, want = before.bounds(shape).get(rank), after.bounds(shape).get(rank)
                        tag = _LAST_TAG - (at * len(each.layouts) + source) * len(each.layouts) - target
                        ways.append((source, target, Transfer(link, routes, have, want, tag)))
            self.ways.append((ways, here))

    def __call__(self, values: list[Any], places: Mapping[str, int]) -> None:
        """Makes the gradients of a rank's parameters those of all rows.

        Args:
            values: the local tensors of the program's inputs, which are replaced.
            places: where each input is.
        """
        at = [places[t.name] for t in self.own]
        if at and torch.is_grad_enabled() and any(values[n].requires_grad for n in at):
            for n, value in zip(at, _Tied.apply(self, *[values[n] for n in at]), strict=True):
                values[n] = value

    def added(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Returns the sums over rows, added in the order of rows."""
        under_way: list[tuple[int, int, Handle]] = []
        for index, (gradient, (ways, here)) in enumerate(zip(gradients, self.ways, strict=True)):
            for source, target, transfer in ways:
                given = gradient.contiguous() if source == here else gradient.new_empty(0)
                under_way.append((index, source if target == here else -1, transfer.start(given)))
        parts: list[dict[int, Tensor]] = [{here: g} for g, (_, here) in zip(gradients, self.ways, strict=True)]
        for index, source, handle in under_way:
            found = handle.wait()
            if source >= 0:
                parts[index][source] = found
        return [sum_in_order([part[row] for row in sorted(part)]) for part in parts]


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """Adds tensors, first to last."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tied: TiedGradients, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.tied, ctx.like = tied, [value.detach() for value in values]
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        given = [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, ctx.like, strict=True)]
        return None, *ctx.tied.added(given)
