"""Errors a user can cause, and the collector that reports all of them at once.

Every message names the operator as the user wrote it and the source line, what was given, the rule that was
broken with its numbers, and one edit that fixes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


class ShardwrightError(ValueError):
    """Base of every error that a user's input can cause."""


class LayoutError(ShardwrightError):
    """A Layout, Mesh or shape that does not fit together."""


class StrategyError(ShardwrightError):
    """A strategy that an operator cannot follow. Carries one line per problem in ``problems``."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()):
        super().__init__(message)
        self.problems = problems or (message,)


class CaptureError(ShardwrightError):
    """A callable that cannot be captured as a graph."""


class PipelineError(ShardwrightError):
    """A pipeline that cannot be cut or scheduled as asked. Carries one line per problem in ``problems``."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()):
        super().__init__(message)
        self.problems = problems or (message,)


class WorldError(ShardwrightError):
    """A set of ranks that cannot do what is asked."""


class CheckpointError(ShardwrightError):
    """A checkpoint that cannot be saved or loaded; ``problems`` has a line for each thing that is wrong."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()):
        super().__init__(message)
        self.problems = problems


class MemoryLimitError(ShardwrightError):
    """No plan fits into a rank's memory. ``least`` is the bytes that the smallest plan found needs."""

    def __init__(self, message: str, least: float):
        super().__init__(message)
        self.least = least


class ArgumentTypeError(ShardwrightError, TypeError):
    """An argument of the wrong type: both a ``TypeError`` and a :class:`ShardwrightError`."""


class IndexRangeError(ShardwrightError, IndexError):
    """An index outside of the dim it is looked up in.

    It is both an ``IndexError``, as on a single device, and a :class:`ShardwrightError`.
    """


@dataclass
class Problems:
    """Collects problems so that a user sees all of them, not just the first.

    >>> problems = Problems()
    >>> problems.add("matmul1: 3 strategies for 2 inputs")
    >>> len(problems.lines)
    1
    """

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)

    def raise_if_any(self, what: str) -> None:
        """Raises one error that lists every problem, or does nothing.

        Raises:
            StrategyError: there is a problem.
        """
        if self.lines:
            raise StrategyError(listed(what, self.lines, "nothing was run"), tuple(self.lines))


def listed(what: str, problems: Sequence[str], instead: str = "") -> str:
    """Returns the text of an error that lists every problem.

    Args:
        what: cannot be done.
        problems: a line for each.
        instead: what was not done.

    >>> print(listed("it cannot be read", ["no file", "no rank"]))
    it cannot be read: 2 problems
      1. no file
      2. no rank
    """
    return f"{what}: {counted(problems, instead)}\n{numbered(problems)}"


def counted(problems: Sequence[str], instead: str = "") -> str:
    """Counts problems, and says what was not done.

    >>> counted(["no file"], "nothing was run")
    '1 problem, nothing was run'
    """
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count}, {instead}" if instead else count


def numbered(problems: Sequence[str]) -> str:
    """Returns one line for each problem, with its number.

    >>> print(numbered(["no file", "no rank"]))
      1. no file
      2. no rank
    """
    return "\n".join(f"  {i}. {line}" for i, line in enumerate(problems, 1))
