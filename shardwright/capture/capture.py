"""Capture: converts a callable to a Graph, by ``torch.export`` without decomposition.

Parameters and buffers are replaced by fake tensors of their global shape while the callable is traced, so that nothing
is computed, models on the meta device and models whose parameters are already distributed capture alike.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.base.torch_private import FakeTensorMode, modules_in_export, preserve_node_meta, pytree
from shardwright.base.user_code import _source, is_users
from shardwright.capture.backward_hooks import check_backward_hooks
from shardwright.capture.caches import caches_in, register_caches
from shardwright.capture.closure import FunctionModule
from shardwright.capture.converter import Converter
from shardwright.capture.decisions import Decisions
from shardwright.capture.fakes import autocast_around, fake_of, fake_state
from shardwright.capture.left_behind import Assignment, SavedState, check_values, ended_by, state_restored
from shardwright.capture.numbers import Numbers
from shardwright.capture.random_states import randomness_refused
from shardwright.capture.session import marked_modules, session
from shardwright.capture.torch_functions import Watch
from shardwright.capture.watch import watched
from shardwright.errors import CaptureError, ShardwrightError
from shardwright.ir.graph import Graph
from shardwright.ir.marks import Mark

logger = logging.getLogger("shardwright")


def capture(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
    marks: dict[nn.Module, Mark] | None = None,
    numbers: Numbers | None = None,
    decisions: Decisions | None = None,
) -> Graph:
    """Captures ``module(*args, **kwargs)`` as a graph. Nothing is computed, and the module is left as it was.

    Args:
        module: what is captured; it may be on the meta device.
        args, kwargs: tensors of global shape; only their shape, dtype and ``requires_grad`` are read.
        device: device the program will run on.
        marks: modules whose calls carry a strategy.
        numbers: attributes that are numbers of the call, not constants.
        decisions: how Python decides by values of tensors; without it such decisions are refused.

    Raises:
        CaptureError: the callable does something that a graph cannot hold.
    """
    register_caches()
    if caches := caches_in((args, kwargs)):
        raise CaptureError(
            f"a {caches[0]} is handed in, which a call changes in place: a captured callable would change a copy of it\n"
            "  Generate by net.generate(...), or pass use_cache=False and whole sequences"
        )
    check_values({**dict(module.named_parameters()), **dict(module.named_buffers())})
    flat, spec = pytree.tree_flatten((args, kwargs))

    def export() -> tuple[Any, list[Assignment], Watch]:
        if decisions is not None:
            decisions.begin()
        fakes = [fake_of(mode, leaf, device) if isinstance(leaf, Tensor) else leaf for leaf in flat]
        fake_args, fake_kwargs = pytree.tree_unflatten(fakes, spec)
        stand_ins = numbers.installed() if numbers is not None else contextlib.nullcontext()
        with fake_state(module, mode, device), state_restored(module), stand_ins, marked_modules(module, marks or {}):
            return _exported(module, fake_args, fake_kwargs, decisions)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        session() as now,
        warnings.catch_warnings(),
        preserve_node_meta(),
        _quiet_logs(),
        randomness_refused(module, export),
    ):
        warnings.simplefilter("ignore")
        converter: Converter | None = None
        try:
            exported, assigned, watch = export()
            formulas = numbers.formulas if numbers is not None else []
            converter = Converter(module, exported, now, flat, autocast_around(device), watch, formulas)
            graph = converter.graph()
        except Exception as error:
            if isinstance(error, _PASS_THROUGH):
                raise
            raise CaptureError(_capture_message(module, error, converter)) from error
    check_values(graph.constants)
    hidden = sum(len(assignment.tensors) for assignment in assigned) + (decisions.count if decisions is not None else 0)
    return replace(graph, assignments=tuple(assigned), hidden=hidden)


def _exported(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], decisions: Decisions | None
) -> tuple[Any, list[Assignment], Watch]:
    """Exports a module on fake tensors, watched for what a graph cannot keep.

    Args:
        module: the module.
        args, kwargs: fake tensors, with the module's state faked in the same mode.
        decisions: as for :func:`capture`.

    Returns:
        The exported program, the attributes that the callable assigned, and what was seen besides.
    """
    found: tuple[list[Assignment], list[Tensor]] = ([], [])
    before: SavedState | None = None
    depth = 0

    def begin(args: Any, kwargs: Any) -> None:
        nonlocal before, depth
        depth = len(modules_in_export())
        before = SavedState(module)  # now, for torch too has changed what modules hold
        watch.begin(args, kwargs)

    def end(result: Any) -> Any:
        nonlocal found
        watch.end()
        assert before is not None
        result = before.buffers_written(result, watch.assigned)
        found = before.assignments(watch.assigned)
        check_backward_hooks(module)
        result = (result, tuple(found[1])) if found[1] else result
        return result if decisions is None else decisions.with_result(result)

    def fail(error: BaseException) -> None:
        if decisions is None:
            raise error
        decisions.fail(error)
        while len(modules_in_export()) > depth:  # those that the error has left
            modules_in_export().popitem()

    with watched(module, decisions) as watch, ended_by(module, begin, end, fail):
        exported = torch.export.export(module, tuple(args), kwargs, strict=False)
    return exported, found[0], watch


class StepFound(BaseException):
    """Signals, within a capture, something only a train step does: a backward pass or an optimizer step."""


_PASS_THROUGH = (ShardwrightError, StepFound)


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Silences logs and stderr. A failed export logs its whole inner state; what the user needs is in the error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _capture_message(module: nn.Module, error: Exception, converter: Converter | None) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    name = module.name if isinstance(module, FunctionModule) else type(module).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    if converter is not None and converter.current is not None:
        where = f" at {_source(converter.current)}" if _source(converter.current) else where
    text = f"{name} cannot be captured as a graph{where}\n  {type(error).__name__}: "
    text += lines[0] if lines else "(no message)"
    if any(word in f"{type(error).__name__} {error}" for word in _OF_VALUES):
        text += (
            "\n  A captured callable may not make a number of the values of tensors (.item()), and no size may depend on them "
            "(nonzero, x[mask], unique); move that out of the callable, or write it with torch.where"
        )
    return text


# Words in errors of torch and of this package about shapes, branches and numbers that depend on values.
_OF_VALUES = ("data-dependent", "DataDependent", ".item()", "Unbacked", "SymInt", "SymFloat", "SymBool")
