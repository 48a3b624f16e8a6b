"""Random numbers that a captured callable draws without torch's operators: found and refused."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.base.torch_private import disable_current_modes, pytree
from shardwright.base.user_code import is_users, source_text
from shardwright.capture.python_state import PythonState
from shardwright.errors import CaptureError


@dataclass(frozen=True)
class _Generator:
    """A random generator, besides torch's, that a callable may draw from."""

    name: str
    state: Callable[[], Any]
    put_back: Callable[[Any], Any]


def _generators(module: nn.Module) -> Iterator[_Generator]:
    yield _Generator("random", random.getstate, random.setstate)
    yield _Generator("torch", torch.get_rng_state, torch.set_rng_state)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield _Generator("numpy.random", numpy.random.get_state, numpy.random.set_state)
    reached = [value for owner in module.modules() for value in vars(owner).values()]
    reached += PythonState(module).objects()
    for value in {id(value): value for value in reached}.values():
        if isinstance(value, random.Random):
            yield _Generator("random.Random", value.getstate, value.setstate)
        elif numpy is not None and isinstance(value, numpy.random.RandomState):
            yield _Generator("numpy.random.RandomState", value.get_state, value.set_state)
        elif numpy is not None and isinstance(value, numpy.random.Generator):
            bits = value.bit_generator
            yield _Generator("numpy.random.Generator", partial(getattr, bits, "state"), partial(setattr, bits, "state"))
        elif isinstance(value, torch.Generator):
            yield _Generator("torch.Generator", value.get_state, value.set_state)


@contextmanager
def randomness_refused(module: nn.Module, rerun: Callable[[], Any]) -> Iterator[None]:
    """Refuses, after the block, random numbers that Python or NumPy drew in it. Seeds that were set are refused too.

    Args:
        rerun: repeats the block, so that the line that drew can be found.

    Raises:
        CaptureError: a state is another than before; all are put back as they were.
    """
    before = [(generator, generator.state()) for generator in _generators(module)]
    yield
    changed = [generator.name for generator, was in before if not _same_state(was, generator.state())]
    if not changed:
        return
    for generator, was in before:
        generator.put_back(was)
    where = _where(rerun, [generator for generator, _ in before])
    for generator, was in before:
        generator.put_back(was)
    raise CaptureError(
        f"{' and '.join(dict.fromkeys(changed))}: a captured callable draws random numbers beside torch's operators, or sets a "
        f"seed{where}\n  It would happen once, at the capture, and be the same in every step. "
        "Draw with torch (torch.rand, dropout), or draw outside and hand the number in as an argument"
    )


def _same_state(one: Any, other: Any) -> bool:
    pairs = itertools.zip_longest(pytree.tree_leaves(one), pytree.tree_leaves(other))
    return all(torch.equal(a, b) if isinstance(a, Tensor) else _plainly_equal(a, b) for a, b in pairs)


def _plainly_equal(one: Any, other: Any) -> bool:
    same = one == other
    return bool(same.all()) if hasattr(same, "all") else bool(same)


def _where(rerun: Callable[[], Any], generators: Sequence[_Generator]) -> str:
    """Finds the line that draws. It runs the block again and compares the states at each of the user's lines."""
    known = [generator.state() for generator in generators]
    last: list[str] = []

    class Found(BaseException):
        pass

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not is_users(frame.f_code.co_filename):
            return None
        with disable_current_modes():
            if last and not all(_same_state(was, generator.state()) for was, generator in zip(known, generators)):
                raise Found
        last[:] = [source_text(frame.f_code.co_filename, frame.f_lineno)]
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        rerun()
    except Found:
        return f", at {last[0]}"
    except Exception:  # only the line is needed
        return ""
    finally:
        sys.settrace(outer)
    return ""
