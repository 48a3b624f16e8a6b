"""A schedule: for each rank of a pipeline its actions in their order. Read and written as torch's CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from shardwright.errors import PipelineError
from shardwright.pipeline.schedules.actions import COMPUTE, FORWARD, TRANSFERS, Action
from shardwright.pipeline.schedules.execution import Durations, execute


@dataclass(frozen=True)
class Schedule:
    """The actions of each rank of a pipeline, in order. A rank is the set of devices that a row's stages are on.

    Where micro-batches are cut into ``slices`` of their sequence, these are what is counted: slice k of micro-batch m has the
    number ``m * slices + k``, and ``micro_count`` is the number of all of them.

    >>> print(Schedule("one by one", ((Action(0, "F", 0), Action(0, "B", 0)), (Action(1, "F", 0), Action(1, "B", 0))), 2, 1))
    one by one: 2 stages on 2 ranks, 1 micro-batch
    rank 0  0F0         0B0
    rank 1      1F0 1B0
    """

    name: str
    rows: tuple[tuple[Action, ...], ...]
    stage_count: int
    micro_count: int
    slices: int = 1

    @cached_property
    def row_of_stage(self) -> tuple[int, ...]:
        """The rank of each stage.

        Raises:
            PipelineError: a stage is on no rank, or on two.
        """
        found: dict[int, set[int]] = {stage: set() for stage in range(self.stage_count)}
        for rank, row in enumerate(self.rows):
            for action in row:
                found.setdefault(action.stage, set()).add(rank)
        for stage, ranks in found.items():
            if len(ranks) != 1 or stage >= self.stage_count:
                where = f"on ranks {', '.join(map(str, sorted(ranks)))}" if ranks else "on no rank"
                raise PipelineError(
                    f"schedule {self.name!r} of {self.stage_count} stages has stage {stage} {where}; "
                    f"put each of the stages 0 to {self.stage_count - 1} on one rank"
                )
        return tuple(next(iter(found[stage])) for stage in range(self.stage_count))

    def compute_only(self) -> Schedule:
        """Drops what is not F, B, I or W."""
        return self._only(COMPUTE)

    def forward_only(self) -> Schedule:
        """Drops what is not F: a schedule of inference, in the same order."""
        return self._only((FORWARD,))

    def _only(self, kinds: Sequence[str]) -> Schedule:
        rows = tuple(tuple(action for action in row if action.kind in kinds) for row in self.rows)
        return replace(self, rows=rows)

    def to_csv(self, path: str | Path) -> None:
        """Writes a row for each rank, as ``torch.distributed.pipelining`` does: a column a step, empty where a rank idles."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(_columns(self))

    @classmethod
    def from_csv(cls, path: str | Path, name: str | None = None, slices: int = 1) -> Schedule:
        """Reads what :meth:`to_csv` or torch wrote; sends and receives are left out, as they follow from the rest.

        A cell ``(0F1;3B0)OVERLAP_F_B``, two actions that torch runs in one, becomes the two in their order.

        Args:
            path: the file.
            name: the name of the schedule; by default that of the file.
            slices: how many slices of a micro-batch its numbers count, which no file says.

        Raises:
            PipelineError: a cell is no action, or the file has none.
        """
        rows = []
        with Path(path).open(newline="", encoding="utf-8") as file:
            for line, cells in enumerate(csv.reader(file), 1):
                try:
                    actions = [Action.parse(text) for cell in cells for text in _parts(cell)]
                except PipelineError as error:
                    raise PipelineError(f"{path}, row {line}: {error}") from None
                rows.append(tuple(action for action in actions if action.kind not in TRANSFERS))
        found = [action for row in rows for action in row if action.is_compute]
        if not found:
            raise PipelineError(f"{path} has no action; write one row per rank, such as 0F0,0F1,0B0,0B1")
        micro_count = 1 + max(action.micro or 0 for action in found)
        return cls(name or Path(path).stem, tuple(rows), 1 + max(action.stage for action in found), micro_count, slices)

    def __str__(self) -> str:
        columns = _columns(self)
        widths = [max(map(len, cells)) for cells in zip(*columns, strict=True)]
        label = max(len(f"rank {rank}") for rank in range(len(columns))) if columns else 0
        lines = []
        for rank, row in enumerate(columns):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append(f"rank {rank}".ljust(label + 2) + " ".join(cells))
        head = f"{self.name}: {_count(self.stage_count, 'stage')} on {_count(len(self.rows), 'rank')}, "
        head += _count(self.micro_count // self.slices, "micro-batch")
        head += f" of {self.slices} slices each" if self.slices > 1 else ""
        return "\n".join([head, *(line.rstrip() for line in lines)])


def _columns(schedule: Schedule) -> list[list[str]]:
    """Puts actions into columns of time, each taking one; a row that stops for good goes on without gaps."""
    run = execute(schedule.rows, schedule.stage_count, Durations())
    table = []
    for row, starts in zip(schedule.rows, run.starts):
        cells: list[str] = []
        for at, action in enumerate(row):
            if at < len(starts):
                cells += [""] * (int(starts[at]) - len(cells))
            cells.append(str(action))
        table.append(cells)
    length = max((len(cells) for cells in table), default=0)
    return [cells + [""] * (length - len(cells)) for cells in table]


def _parts(cell: str) -> Sequence[str]:
    text = cell.strip()
    if text.startswith("(") and text.endswith(")OVERLAP_F_B"):
        text = text[1 : text.index(")")]
    return [part for part in text.split(";") if part.strip()]


def _count(count: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"
