"""Random numbers of steps with one micro-batch: stages draw them while they run, one stage after the other.

With several micro-batches the numbers of the whole batch are drawn before any of them runs; see :mod:`.parts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardwright.errors import PipelineError
from shardwright.ir.graph import Graph
from shardwright.world.distributed.links import Link

_TAG = 1 << 23  # of random states


class RandomTurns:
    """Hands the random state from each stage to the next one, and that of the last to all ranks.

    Args:
        rank: this rank.
        link: over all ranks of the job.
        stages: the ranks of each stage.
    """

    def __init__(self, rank: int, link: Link, stages: Sequence[range]):
        self.rank, self.link, self.stages = rank, link, stages
        self.leaving: list[tuple[torch.Tensor, Any]] = []

    def begin(self, stage: int) -> None:
        """Takes over the state that the stage before has left."""
        if stage and self.rank not in self.stages[stage - 1]:
            self._receive(stage - 1)

    def end(self, stage: int) -> None:
        """Hands the state on."""
        own = self.stages[stage]
        is_last = stage == len(self.stages) - 1
        if self.rank == own[0]:
            readers = range(self.link.size) if is_last else self.stages[stage + 1]
            for rank in readers:
                if rank not in own:
                    state = torch.get_rng_state()
                    self.leaving.append((state, self.link.group.send([state], rank, _TAG + stage)))

    def finish(self) -> None:
        """Waits for the state of the last stage."""
        if self.rank not in self.stages[-1]:
            self._receive(len(self.stages) - 1)
        for _, work in self.leaving:
            work.wait()
        self.leaving.clear()

    def _receive(self, stage: int) -> None:
        state = torch.get_rng_state()
        self.link.group.recv([state], self.stages[stage][0], _TAG + stage).wait()
        torch.set_rng_state(state)


def check_order_of_draws(graph: Graph, stage_of: dict[str, int]) -> None:
    """Checks that stages draw random numbers in the order in which the program does.

    Raises:
        PipelineError: an operator draws after one of a later stage has.
    """
    latest = None
    for node in graph.nodes:
        if not node.op.draws or node.name not in stage_of:
            continue
        if latest is not None and stage_of[node.name] < stage_of[latest.name]:
            raise PipelineError(
                f"{node.where} draws random numbers on stage {stage_of[node.name]}, after {latest.where} has on stage "
                f"{stage_of[latest.name]}: stages draw one after the other\n  Call modules in the order of their stages, or "
                "mark them the other way round"
            )
        latest = node
