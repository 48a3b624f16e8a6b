"""Marks of calls, put onto operators once the graph is complete."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from shardwright.base.user_code import _source
from shardwright.capture.session import CALL, PIN, Session
from shardwright.ir.graph import Node
from shardwright.ir.layout import Layout
from shardwright.ir.marks import Mark


def at_line(node: fx.Node) -> str:
    """Returns `` at file:line: code`` of the user's line, or nothing where it is not known."""
    source = _source(node)
    return f" at {source}" if source else ""


def resolve_marks(nodes: list[Node], custom: dict[str, Any], now: Session) -> tuple[list[Node], dict[str, str]]:
    """Puts each marked call's mark on its one operator. Where it has several, pins its inputs and outputs.

    Returns:
        The nodes, and for every pin that was dropped the value it stood for.
    """
    inside: dict[int, list[str]] = {}
    for node in nodes:
        meta = custom[node.name]
        if PIN not in meta and CALL in meta:
            inside.setdefault(meta[CALL], []).append(node.name)
    single = {
        call
        for call, mark in enumerate(now.calls)
        if len(inside.get(call, ())) == 1 and not mark.is_pin and mark.module_path is None
        and mark.parameter_plan is None
    }  # fmt: skip
    now.impossible += _entries_without_tensors([call for call in range(len(now.calls)) if call not in single], now)
    result = []
    renamed: dict[str, str] = {}
    pinned: dict[str, int] = {}
    for node in nodes:
        before = node.inputs
        if renamed:
            node = replace(node, inputs=tuple(renamed.get(v, v) for v in node.inputs))
        meta = custom[node.name]
        pin = meta.get(PIN)
        if pin is not None:
            call, side, position = pin
            if call in single:
                renamed[node.outputs[0]] = node.inputs[0]  # it may have been renamed before
                pinned[node.outputs[0]] = position
                continue
            pin_mark = _pin_mark(now.calls[call], side, position)
            region = None if pin_mark else now.calls[call]
            node = replace(node, mark=pin_mark, mark_positions=(0,), mark_count=1, region=region)
        elif meta.get(CALL) in single:
            call = meta[CALL]
            positions = tuple(pinned.get(v) for v in before)
            node = replace(node, mark=now.calls[call], mark_positions=positions, mark_count=now.counts[call])
        elif CALL in meta:
            node = replace(node, mark=None, region=now.calls[meta[CALL]])
        result.append(node)
    return result, renamed


def _entries_without_tensors(calls: list[int], now: Session) -> list[str]:
    """Reports strategies with other entries than their call has tensors. The planner reports those of single operators.

    A module may leave out entries of its last inputs, a function may not.
    """
    found: dict[str, None] = {}  # a module that is called twice is one problem
    for call in calls:
        mark = now.calls[call]
        what = ".".join(filter(None, (mark.module_path, mark.name))) + (f" at {mark.source}" if mark.source else "")
        sides = (("in_strategy", mark.in_strategy, now.counts[call], "input"),
                 ("out_strategy", mark.out_strategy, now.results[call], "output"))  # fmt: skip
        reads_more = mark.attributes.keys() - {"recompute"}  # these attributes check their own entries
        for name, strategy, count, side in () if mark.is_pin or reads_more else sides:
            if not isinstance(strategy, tuple):
                continue
            kinds = {isinstance(entry, Layout) for entry in strategy if entry is not None}
            if len(kinds) > 1:
                found[f"{what}: {strategy} in {name} mixes slice counts and Layouts; write all entries as Layouts"] = None
            if len(strategy) > count or (mark.module_path is None and len(strategy) < count):
                hint = "" if mark.module_path is None or side == "output" else (
                    "; layouts of its parameters stand in parameter_plan={'weight': ...}"
                )  # fmt: skip
                found[
                    f"{what}: {len(strategy)} entries {strategy} in {name} for {count} tensor {side}{'s' * (count != 1)}; give "
                    f"one per {side}{_as_one(strategy, count)}{hint}"
                ] = None
    return list(found)


def _as_one(strategy: tuple[Any, ...], count: int) -> str:
    """Returns a hint for counts that are given without the outer parentheses."""
    return f": ({strategy},)" if count == 1 and all(isinstance(entry, int) for entry in strategy) else ""


def _pin_mark(mark: Mark, side: str, position: int) -> Mark | None:
    strategy = mark.in_strategy if side == "in" else mark.out_strategy
    if strategy is None or position >= len(strategy) or strategy[position] is None:
        return None
    what = "input" if side == "in" else "output"
    return replace(
        mark, name=f"{mark.name} {what} {position}", in_strategy=(strategy[position],), out_strategy=None,
        parameter_plan=None, is_pin=True,
    )  # fmt: skip
