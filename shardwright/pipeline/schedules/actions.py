"""One thing that a rank of a pipeline does, written as torch's pipelines write it: stage, kind, micro-batch."""

from __future__ import annotations

import re
from typing import NamedTuple

from shardwright.errors import PipelineError

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"
# The work proper: it takes a stage's time, and other work waits for it. B is I and W in one.
COMPUTE = (FORWARD, BACKWARD, INPUT, WEIGHT)
# What moves activations and gradients between stages follows from the work, so no schedule needs to hold it.
TRANSFERS = ("SEND_F", "RECV_F", "SEND_B", "RECV_B")
# What moves a stage's parameters and their gradients among the ranks that share them.
UNSHARD, RESHARD, REDUCE_GRAD = PARAMETERS = ("UNSHARD", "RESHARD", "REDUCE_GRAD")
KINDS = (*COMPUTE, *TRANSFERS, *PARAMETERS)

_TEXT = re.compile(rf"(\d+)({'|'.join(sorted(KINDS, key=len, reverse=True))})(\d*)")


class Action(NamedTuple):
    """One thing that a rank does: a kind of work, of a stage, for a micro-batch.

    >>> print(Action(0, "F", 3), Action(1, "UNSHARD"), Action.parse("2SEND_B1"))
    0F3 1UNSHARD 2SEND_B1
    """

    stage: int
    kind: str
    micro: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.micro is None else self.micro}"

    @property
    def is_compute(self) -> bool:
        """True for work proper: F, B, I or W."""
        return self.kind in COMPUTE

    @property
    def goes_back(self) -> bool:
        """True for work of a backward pass: B, I or W."""
        return self.is_compute and self.kind != FORWARD

    @classmethod
    def parse(cls, text: str) -> Action:
        """Reads an action from its text.

        Raises:
            PipelineError: the text is none of an action.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None or ((match[2] in COMPUTE or match[2] in TRANSFERS) and not match[3]):
            raise PipelineError(
                f"{text.strip()!r} is no action of a pipeline schedule; write stage, kind and micro-batch, such as 0F1, "
                f"with a kind of {', '.join(KINDS)}"
            )
        return cls(int(match[1]), match[2], int(match[3]) if match[3] else None)
