"""Report on a job that failed: the rank that failed first, how, its last words, and where its log is."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence

_MOST = 30  # lines

# Last words of a rank that failed because another one did.
_BLAMES_ANOTHER = re.compile(
    r"[Cc]onnection closed by peer|[Cc]onnection reset by peer|Broken pipe|process has ended|script has ended|recvValue failed|"
    r"[Cc]onnection was (?:likely )?closed|comes to .*, but rank|failed to recv|ncclRemoteError"
)


def blames_another(lines: Sequence[str]) -> bool:
    """Tells whether a rank's last words say that another rank has left it alone.

    >>> blames_another(["RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:4711"])
    True
    """
    return any(_BLAMES_ANOTHER.search(line) for line in lines)


def ended_how(code: int) -> str:
    """Describes an exit code of a process as the system returns it.

    >>> ended_how(3), ended_how(-15)
    ('exit code 3', 'killed by SIGTERM')
    """
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}"


def exit_code(code: int) -> int:
    """Returns what the launcher exits with for a rank's exit code, as a shell does: 128 and the signal's number."""
    return 128 - code if code < 0 else code or 1


def failure_report(
    first: int,
    codes: Mapping[int, int | None],
    size: int,
    lines: Sequence[str],
    log: str,
    others: Mapping[int, Sequence[str]],
) -> list[str]:
    """Describes a failure; the first line says it in short.

    Args:
        first: the rank that failed first.
        codes: exit codes by rank, of those that ended by themselves.
        size: number of ranks.
        lines: the last lines of the first rank's log.
        log: where that log is.
        others: the last lines of other ranks that ended by themselves after it.
    """
    code = codes[first] or 0
    found = [f"rank {first} failed first, of {size} ranks: {ended_how(code)}"]
    if code == -signal.SIGKILL:
        found[0] += ", by somebody else or by the system for want of memory"
    if lines:
        found += ["its last lines:", *(f"  | {line}" for line in lines)]
    else:
        found += ["it printed no error"]
    found += [f"its log: {log}"] if log else []
    for rank, said in sorted(others.items()):
        found.append(f"then rank {rank} ended, {ended_how(codes[rank] or 0)}" + (f": {said[-1]}" if said else ""))
    return found[: _MOST + 1] + ([f"and {len(found) - _MOST - 1} more"] if len(found) > _MOST + 1 else [])
