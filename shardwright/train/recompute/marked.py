"""Marks instructions of a local program that run again in the backward pass.

The pass sets ``recompute`` on instructions; :mod:`shardwright.world.execute.recipes` runs them accordingly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from shardwright.ir.graph import Graph
from shardwright.ir.instructions import Call, Move
from shardwright.ir.program import LocalProgram
from shardwright.train.recompute.pieces import keep_in_pieces
from shardwright.train.recompute.request import RecomputeRequest


def recompute_parameter_gathers(program: LocalProgram) -> LocalProgram:
    """Gathers parameters a second time for the backward pass, instead of keeping them.

    In the backward a parameter is gathered once, however many operators read it, and dropped as soon as the last of them
    has read it; meanwhile the gather that comes before it in the program is on its way. Calls that only turn parameters into
    others, such as casts and transposes, are repeated too.

    Args:
        program: not scheduled yet; its parameters are stored as pieces of what its operators read.
    """
    pieces = {i.name for i in program.inputs if i.kind == "parameter"}
    gathered: set[str] = set()
    chosen: set[str] = set()
    for instruction in program.instructions:
        sources = instruction.reads
        if not sources or not all(s in pieces or s in gathered for s in sources):
            continue
        if gathered.intersection(sources) or any(move.communicates for move in instruction.ends):
            gathered.update(instruction.outputs)
            chosen.update(instruction.outputs)
        else:
            pieces.update(instruction.outputs)
    return with_recompute(program, chosen)


# A module that is computed again, and the number of its call: each call is a whole of its own.
Whole = tuple[str, int]


def recompute_marked(program: LocalProgram, graph: Graph, requests: Mapping[str, RecomputeRequest]) -> LocalProgram:
    """Marks the instructions of operators and modules that are to be computed again.

    Of a module its inputs and outputs are kept, and everything inside is computed again; of nested modules the outermost
    counts.
    An operator's own setting takes precedence over its module's.

    Args:
        program: the program.
        graph: the graph that it was made from; its nodes carry the operators' settings.
        requests: by module path.
    """
    asked = {node.name: node.recompute for node in graph.nodes}
    whole_of: dict[str, Whole | None] = {}
    for node in graph.nodes:
        path = outermost(node.module, requests)
        whole_of[node.name] = None if path is None else (path, dict(node.calls).get(path, 0))
    marking = _Marking(program, asked, whole_of, requests)
    marked = marking.run()
    return keep_in_pieces(marked, graph, marking.in_pieces) if marking.in_pieces else marked


def outermost(module: str, paths: Iterable[str]) -> str | None:
    """Returns the shortest of the paths that contain a module."""
    found = [path for path in paths if not path or module == path or module.startswith(path + ".")]
    return min(found, key=len, default=None)


class _Marking:
    """Values of a program that are computed again.

    Args:
        asked: by node, the operator's own setting.
        whole_of: by node, the outermost recomputed module that it lies in.
    """

    def __init__(
        self, program: LocalProgram, asked: Mapping[str, bool | None], whole_of: Mapping[str, Whole | None],
        requests: Mapping[str, RecomputeRequest],
    ):  # fmt: skip
        self.program, self.asked, self.whole_of, self.requests = program, asked, whole_of, requests
        self.of_parameters = {i.name for i in program.inputs if i.kind == "parameter"}
        self.of_operator: dict[str, str] = {}  # results of an operator's own calls, and of the moves that settle them
        self.chosen: set[str] = set()
        self.kept: set[str] = set()
        self.in_pieces: set[str] = set()  # values that leave a recomputed module and are kept in slices
        self.read_outside = self._read_outside()

    def run(self) -> LocalProgram:
        for instruction in self.program.instructions:
            if isinstance(instruction, Call):
                self._call(instruction)
            for move in instruction.ends:
                self._move(move)
        return with_recompute(self.program, self.chosen, self.kept)

    def _call(self, call: Call) -> None:
        own = self.asked.get(call.cause)
        self.of_operator.update(dict.fromkeys(call.outputs, call.cause))
        if own or (own is None and self.whole_of.get(call.cause) is not None):
            self.chosen.update(call.outputs)
            if own is None:
                self._leaves(self.read_outside.intersection(call.outputs), call.cause)

    def _move(self, move: Move) -> None:
        own = self.asked.get(move.cause)
        if self.of_operator.get(move.source) == move.cause:
            self.of_operator[move.output] = move.cause
            if own is not None:
                self.chosen.update((move.output,) if own else ())
                return
        is_parameter = move.source in self.of_parameters
        if is_parameter:
            self.of_parameters.add(move.output)
        whole = self.whole_of.get(move.cause)
        if whole is None or not move.redistribution.forward:
            return
        if move.output in self.read_outside:
            self._leaves({move.output}, move.cause)
            return
        request = self.requests[whole[0]]
        if is_parameter:
            again = request.parallel_optimizer_comm_recompute and move.communicates
        else:
            again = request.mp_comm_recompute or not move.communicates
        if again:
            self.chosen.add(move.output)

    def _leaves(self, values: set[str], cause: str) -> None:
        """Keeps values that are read outside of the recomputed module of operator ``cause``."""
        self.kept.update(values)
        whole = self.whole_of.get(cause)
        if whole is not None and self.requests[whole[0]].recompute_slice_activation:
            self.in_pieces.update(values)

    def _read_outside(self) -> set[str]:
        """Finds the values that leave their recomputed module: read outside of it, or returned."""
        program = self.program
        made_in: dict[str, Whole | None] = {}
        found = {o for o in program.outputs if isinstance(o, str)} | {value for _, value in program.updates}
        for instruction in program.instructions:
            here = self.whole_of.get(instruction.cause)
            found.update(name for name in instruction.reads if made_in.get(name, here) != here)
            made_in.update(dict.fromkeys(instruction.outputs, here))
        return found


def with_recompute(program: LocalProgram, chosen: Collection[str], kept: Iterable[str] = ()) -> LocalProgram:
    """Sets ``recompute`` on the instructions that make the values of these names.

    Args:
        program: not scheduled yet: moves that are repeated share collectives with each other only.
        chosen: local values; instructions that have the mark already keep it.
        kept: of these, results that are kept nevertheless.
    """
    names = frozenset(chosen)
    instructions = [
        replace(i, recompute=True) if isinstance(i, (Call, Move)) and names.intersection(i.outputs) else i
        for i in program.instructions
    ]
    return replace(program, instructions=tuple(instructions), kept=program.kept | frozenset(kept))
