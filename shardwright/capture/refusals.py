"""Errors for what a graph cannot hold, with the user's line."""

from __future__ import annotations

from shardwright.base.user_code import user_source
from shardwright.errors import CaptureError

refused: list[CaptureError] = []  # errors of the current capture, because the user's code may swallow them


def refuse(what: str, instead: str) -> CaptureError:
    """Builds the error for a construct at the user's current line. It is raised again at the end if the user's code catches it.

    Args:
        what: the construct and what would be lost, a sentence without its end.
        instead: what to write instead.
    """
    source = user_source()
    refused.append(CaptureError(f"{what}{f', at {source}' if source else ''}\n  {instead}"))
    return refused[-1]
