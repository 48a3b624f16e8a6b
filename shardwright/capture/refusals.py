"""Refusals: errors for what a captured callable does and a graph cannot hold, at the user's line."""

from __future__ import annotations

from shardwright.base.user_code import user_source
from shardwright.errors import CaptureError

refused: list[CaptureError] = []  # within the capture that runs: the user's code may swallow an error


def refuse(what: str, instead: str) -> CaptureError:
    """Returns the error for a construct at the user's line that runs now; it is raised again at the end if the user's code
    catches it.

    Args:
        what: the construct and what would be lost, a sentence without its end.
        instead: what to write instead.
    """
    source = user_source()
    refused.append(CaptureError(f"{what}{f', at {source}' if source else ''}\n  {instead}"))
    return refused[-1]
