"""Decides which calls of a local program may be compiled, and which are worth it."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

import torch

from shardwright.base.operators import STATISTICS
from shardwright.base.torch_private import pytree
from shardwright.ir.graph import Graph, Node
from shardwright.ir.instructions import Call, Ref
from shardwright.ir.operator import OpOverload, Slot
from shardwright.ir.program import LocalProgram
from shardwright.rules.norm import update_running
from shardwright.rules.pieces import piece
from shardwright.rules.traits import traits_of
from shardwright.train.compile.draws import draws

_RULES = "shardwright.rules."


def left_out(program: LocalProgram, graph: Graph) -> frozenset[int]:
    """Finds the ids of the calls that are not compiled.

    They draw random numbers, change something in place or cannot be traced, or are computed again in the backward pass one by
    one.
    """
    nodes = {node.name: node for node in graph.nodes}
    changed = changed_in_place(program, graph)
    found = set()
    for call in program.calls:
        node = nodes[call.cause]
        if call.recompute or not _can_trace(call, node) or draws(call, node) or not changed.isdisjoint(call.reads):
            found.add(id(call))
    return frozenset(found)


def changed_in_place(program: LocalProgram, graph: Graph) -> frozenset[str]:
    """Finds the values that some call changes, and those that they are moved from."""
    nodes = {node.name: node for node in graph.nodes}
    found: set[str] = set()
    for instruction in reversed(program.instructions):
        if isinstance(instruction, Call):
            found.update(_changes(instruction, nodes[instruction.cause]))
        found.update(move.source for move in instruction.ends if move.output in found)
    return frozenset(found)


def computes(call: Call) -> bool:
    """Tells whether a call does work that a compiler can merge, rather than only reinterpret memory."""
    return traits_of(call.function).does_work


def _can_trace(call: Call, node: Node) -> bool:
    if call.function is piece:
        return False  # a copy that differs from rank to rank, of what was drawn
    for function in _functions(call):
        if isinstance(function, OpOverload):
            if function.namespace != "aten" or function._schema.is_mutable or _has_any_size(function, node):
                return False
        elif not isinstance(function, types.BuiltinFunctionType) and not _module_of(function).startswith((_RULES, "torch")):
            return False
    return True


def _functions(call: Call) -> Iterable[Any]:
    """Yields the function of a call, and the functions among its arguments."""
    yield call.function
    for leaf in pytree.tree_leaves((call.args, call.kwargs)):
        if isinstance(leaf, OpOverload):
            yield leaf


def _module_of(function: Any) -> str:
    return getattr(function, "__module__", None) or ""


def _has_any_size(function: Any, node: Node) -> bool:
    """Tells whether the shape of a result depends on values, or values are read."""
    if torch.Tag.data_dependent_output in function.tags:
        return True
    if torch.Tag.dynamic_output_shape not in function.tags:
        return False
    looks_up = traits_of(function).looks_up  # by numbers; by a mask it has any size
    return not looks_up or any(m.dtype in (torch.bool, torch.uint8) for m in node.op.inputs[1:])


def _changes(call: Call, node: Node) -> list[str]:
    """Returns the values that a call changes in place."""
    if call.function is update_running:
        return [ref.name for ref in call.args[:2] if isinstance(ref, Ref)]
    refs = [leaf.name for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Ref)]
    functions = list(_functions(call))
    if any(isinstance(f, OpOverload) and f._schema.is_mutable for f in functions):
        return refs
    op = node.op
    if op.moves_statistics and op.target in functions:
        statistics = [op.argument(name) for name in STATISTICS]
        return [refs[slot.index] for slot in statistics if isinstance(slot, Slot)]
    return []
