"""User code: the line of the user's program that caused an operator or a call."""

from __future__ import annotations

import dis
import linecache
import os
import sys
from functools import cache, lru_cache
from types import CodeType, FrameType

import torch
from torch import fx


def _source(node: fx.Node) -> str:
    """Returns ``file:line: code`` of the user's line that called the operator."""
    place = (node.meta.get("custom") or {}).get(SOURCE)
    if place is not None:
        return source_text(*place)
    trace = node.meta.get("stack_trace") or ""
    frames = []
    lines = trace.splitlines()
    for i, line in enumerate(lines):
        line = line.strip()
        if line.startswith('File "'):
            path, _, rest = line[6:].partition('", line ')
            number = rest.partition(",")[0]
            code = lines[i + 1].strip() if i + 1 < len(lines) else ""
            frames.append((path, number, code))
    users = [f for f in frames if is_users(f[0])]
    if not users:
        return ""
    path, number, code = users[-1]
    return f"{os.path.basename(path)}:{number}: {code}"


SOURCE = "shardwright_source"  # key in a node's custom meta: file and line of the user's call
_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_BORDER = os.path.join(_HERE, "capture", "left_behind.py")  # name of the function in which the callable is called
_NOBODYS = (_TORCH, _HERE, os.path.dirname(os.__file__) + os.sep, "<frozen", "<string", "<eval_with_key")
_SITE = (os.sep + "site-packages" + os.sep, os.sep + "dist-packages" + os.sep)


def user_frame() -> FrameType | None:
    """Returns the nearest frame of the captured callable that is neither torch's nor this package's; else none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        if frame.f_code.co_name == "forward" and frame.f_code.co_filename == _BORDER:
            return None
        frame = frame.f_back
    return frame


@cache
def is_users(path: str) -> bool:
    """Tells whether a file of code is neither torch's, nor this package's, nor Python's own."""
    if path.startswith((_TORCH, _HERE)):
        return False
    return not path.startswith(_NOBODYS) or any(site in path for site in _SITE)


def user_source() -> str:
    """Returns ``file:line: code`` of the user's line that runs now."""
    frame = user_frame()
    return "" if frame is None else source_text(frame.f_code.co_filename, frame.f_lineno)


def source_text(path: str, line: int) -> str:
    """Returns ``file:line: code``, as messages give it."""
    code = linecache.getline(path, line).strip()
    return f"{os.path.basename(path)}:{line}" + (f": {code}" if code else "")


@lru_cache(maxsize=1 << 14)
def globals_read(code: CodeType) -> tuple[str, ...]:
    """Returns the names of globals that a code object reads or writes. Code objects within it count too, attributes do not.

    >>> globals_read((lambda x: len(x.size)).__code__)
    ('len',)
    """
    found = dict.fromkeys(step.argval for step in dis.get_instructions(code) if step.opname in _OF_GLOBALS)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= dict.fromkeys(globals_read(constant))
    return tuple(found)


_OF_GLOBALS = ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "STORE_NAME")


def user_line() -> str:
    """Returns ``file:line`` of the nearest caller outside this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "shardwright":
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
