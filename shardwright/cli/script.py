"""Runs scripts of users within a command. Their errors are reported by the script's own lines, not by our traceback."""

from __future__ import annotations

import linecache
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shardwright.errors import ShardwrightError

_OURS = str(Path(__file__).resolve().parents[1])


def run_script(script: str, name: str, arguments: Sequence[str] = (), call: Callable[[], Any] | None = None) -> Any:
    """Runs a script under a name, or calls one of its functions.

    Args:
        script: its path.
        name: the value of its ``__name__``, or the function to call.
        arguments: the arguments that it finds in ``sys.argv``.
        call: calls the function ``name`` of the script, instead of running all of it.

    Returns:
        The script's global names, or what the function returns.

    Raises:
        ShardwrightError: the script raised an error of its own, or ended; the text says what and where.
    """
    before = sys.argv, sys.path[:]
    sys.argv = [script, *arguments]
    sys.path[:1] = [str(Path(script).resolve().parent)]
    try:
        return runpy.run_path(script, run_name=name) if call is None else call()
    except ShardwrightError:
        raise
    except SystemExit as stopped:
        if stopped.code in (None, 0):
            return {}  # it is through
        ended = stopped.code if isinstance(stopped.code, str) else f"exit code {stopped.code}"
        raise ShardwrightError(
            f"{script} ended by itself before there was anything to plan: {ended}\n  if arguments of its own are missing, give "
            "them after --"
        ) from None
    except SyntaxError as error:
        where = f"{error.filename}:{error.lineno}"
        raise ShardwrightError(f"{script} is no Python: {error.msg} at {where}: {(error.text or '').strip()}") from None
    except Exception as error:
        raise ShardwrightError(_what_happened(script, error)) from None
    finally:
        sys.argv, sys.path[:] = before


def _what_happened(script: str, error: Exception) -> str:
    """Describes the error of a script, with the innermost line that its author wrote."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    mine = [f for f in frames if Path(f.filename).resolve() == Path(script).resolve()] or frames
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    if not mine:
        return f"{script} failed before there was anything to plan\n  {text}"
    frame = mine[-1]
    line = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    return f"{script} failed before there was anything to plan, at {frame.filename}:{frame.lineno}: {line}\n  {text}"


def _is_library(filename: str) -> bool:
    return filename.startswith(("<", _OURS)) or "site-packages" in filename or filename == runpy.__file__
