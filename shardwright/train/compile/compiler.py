"""Compiles the local calls between moves with ``torch.compile``; moves stay as they are.

:mod:`shardwright.train.compile.segments` finds the runs of calls. Each becomes one :class:`Call`, whose function is compiled
when it is first called, for tensors like those of that call (:mod:`shardwright.train.compile.segment`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from shardwright.base.torch_private import cpp_compiler, pytree
from shardwright.errors import ArgumentTypeError, ShardwrightError
from shardwright.ir import rank_groups
from shardwright.ir.graph import Graph
from shardwright.ir.instructions import Call, Instruction, PerRank, Ref
from shardwright.ir.program import LocalProgram
from shardwright.train.compile.draws import drawn_apart
from shardwright.train.compile.segment import CompiledSegment, Functions, SegmentOfRank, Written
from shardwright.train.compile.segments import Segment, segments_of


def segment_compiler(compile: bool | str, mode: str) -> SegmentCompiler | None:
    """Makes the compiler that ``AutoParallel(..., compile=...)`` asks for; ``None`` for ``False``.

    Raises:
        ShardwrightError: an unknown backend, or a mode in which nothing is compiled.

    >>> segment_compiler("aot_eager", "auto").functions.backend
    'aot_eager'
    """
    if not isinstance(compile, (bool, str)):
        raise ArgumentTypeError(f"compile={compile!r}: give True, False or the name of a torch.compile backend")
    if compile is False:
        return None
    if mode in ("stand_alone", "hybrid_parallel"):
        raise ShardwrightError(
            f"compile={compile!r} with parallel_mode={mode!r}: such a target runs as it is; give its modules to torch.compile, "
            "or choose another mode"
        )
    if compile is True:
        return SegmentCompiler("inductor")
    known = torch.compiler.list_backends(exclude_tags=())
    if compile not in known:
        raise ShardwrightError(f"compile={compile!r} is no backend of torch.compile; give True or one of {', '.join(known)}")
    return SegmentCompiler(compile)


class SegmentCompiler:
    """Makes programs of compiled segments, which share all compiled functions.

    Args:
        backend: a backend of ``torch.compile``.
    """

    def __init__(self, backend: str):
        self.functions = Functions(backend)

    def check(self, device: torch.device) -> None:
        """Raises an error early where a compiler is missing.

        Raises:
            ShardwrightError: Inductor is to make code for a CPU, and there is no C++ compiler.
        """
        if self.functions.backend != "inductor" or device.type != "cpu":
            return
        try:
            cpp_compiler()
        except RuntimeError as error:
            raise ShardwrightError(
                "compile=True needs a C++ compiler, and PyTorch's Inductor finds none: install g++, or name another in the "
                "environment variable CXX; compile='aot_eager' needs none, but fuses nothing"
            ) from error

    def compiled(self, program: LocalProgram, graph: Graph, runs_rank_groups: bool) -> LocalProgram:
        """Replaces the segments of a program by calls of functions compiled when first called.

        Args:
            program: the program.
            graph: the graph that it was made from.
            runs_rank_groups: whether the world runs a call once per rank group.

        Returns:
            A program of the same inputs, moves, outputs and updates. Values within a segment have no names any more.
        """
        program = drawn_apart(program, graph)
        items = segments_of(program, graph, by_rank_groups=runs_rank_groups)
        readers = Counter(name for name in program.outputs if isinstance(name, str))
        readers.update(name for _, name in program.updates)
        for item in items:
            readers.update(_inputs(program, item))
        instructions: list[Instruction] = []
        for item in items:
            if not isinstance(item, Segment):
                instructions.append(item)
            elif outputs := tuple(name for call in item.calls for name in call.outputs if readers[name]):
                instructions.append(self._call(program, item, outputs, runs_rank_groups))
        return replace(program, instructions=tuple(instructions))

    def _call(self, program: LocalProgram, segment: Segment, outputs: tuple[str, ...], runs_rank_groups: bool) -> Call:
        """Builds a segment's one call. Where it depends on the rank, it is compiled for each rank's values."""
        calls, inputs = segment.calls, _inputs(program, segment)
        inside = {name for call in calls for name in call.reads}
        written = Written(calls, inputs, outputs, frozenset(inside))
        refs = tuple(Ref(name) for name in inputs)
        lanes = rank_groups.join(*(call.rank_groups for call in calls))
        whole = replace(calls[0], kwargs={}, outputs=outputs, sequence=True, cause=calls[-1].cause, rank_groups=lanes)
        leaves = pytree.tree_leaves([(call.args, call.kwargs) for call in calls])
        if not runs_rank_groups and not any(isinstance(leaf, PerRank) for leaf in leaves):
            return replace(whole, function=CompiledSegment(self.functions, written, 0), args=refs)
        of_rank: dict[int, CompiledSegment] = {}

        def own(rank: int) -> CompiledSegment:
            if rank not in of_rank:
                of_rank[rank] = CompiledSegment(self.functions, written, rank)
            return of_rank[rank]

        return replace(whole, function=SegmentOfRank(written), args=(PerRank(own), *refs))


def _inputs(program: LocalProgram, item: Instruction | Segment) -> tuple[str, ...]:
    """Returns the values that an instruction or segment reads but does not make."""
    calls: Sequence[Instruction] = item.calls if isinstance(item, Segment) else (item,)
    own = {name for call in calls for name in call.outputs}
    return tuple(dict.fromkeys(name for call in calls for name in call.reads if name not in own))
