"""Every way an operator may run on a mesh, as one table.

A row assigns each mesh axis to a *symbol*: to nothing, to one factor of the operator's rule, to a summed factor whose
sum is scattered over a dim of the output by the operator itself, or to sums that its inputs still have pending. Layouts
are written as codes, one int per axis, so that whole tables can be priced at once:

- ``-2``: partial, a sum is pending over the axis; ``-1``: replicated; ``d >= 0``: the axis splits dim ``d``.

Axes that split one dim together do so in the mesh's order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shardwright.ir.choice import Choice, make_choice
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import Operator
from shardwright.ir.signature import Signature, Split

PARTIAL, REPLICATED = -2, -1
Codes = np.ndarray[Any, np.dtype[np.int8]]

# A dim is cut unevenly only where the largest piece is at most this much larger than an even one.
_UNEVEN = 1.5


@dataclass(frozen=True)
class Symbol:
    """Role of one axis for an operator; see the module."""

    factor: str | None = None
    scatter: int | None = None
    pending: frozenset[int] | None = None


IDLE = Symbol()


@dataclass(eq=False)
class ChoiceTable:
    """Choices of one operator. ``C`` rows, ``A`` axes, ``I`` inputs, ``O`` outputs.

    Args:
        rows: ``(C, A)``, indices of symbols.
        inputs: for each input ``(C, A)``, layout codes in which it is read.
        gradients: for each input ``(C, A)``, whether its gradient, if any, is partial over an axis.
        computed, outputs: for each output ``(C, A)``, layout codes as computed, and after the operator's own sums.
        fraction: ``(C,)``, the share of the work that the busiest rank does.
        inner: ``(C, A)``, how many all-reduces the operator runs itself over an axis, as it splits a factor which reaches no
            output: one, of a pair of numbers, or two.
        reduced: ``(C,)``, elements, over all ranks, that those two reduce.
        fixed: the choice of a table of one row that does not come from symbols.
    """

    op: Operator
    signature: Signature
    mesh: Mesh
    symbols: tuple[Symbol, ...]
    rows: np.ndarray[Any, Any]
    inputs: tuple[Codes, ...]
    gradients: tuple[np.ndarray[Any, Any], ...]
    computed: tuple[Codes, ...]
    outputs: tuple[Codes, ...]
    fraction: np.ndarray[Any, Any]
    inner: np.ndarray[Any, Any]
    reduced: np.ndarray[Any, Any]
    fixed: Choice | None = None

    def __len__(self) -> int:
        return len(self.fraction)

    def choice(self, row: int, needs_grad: Sequence[bool]) -> Choice:
        """Builds the :class:`Choice` of one row."""
        if self.fixed is not None:
            return self.fixed
        assigned = [self.symbols[s] for s in self.rows[row]]
        split: dict[str, Split] = {}
        for axis, symbol in zip(self.mesh.axes, assigned, strict=True):
            if symbol.factor is not None:
                split[symbol.factor] = ((*split.get(symbol.factor, ((), None))[0], axis), None)
        sums = [axis for axis, symbol in zip(self.mesh.axes, assigned, strict=True) if symbol.pending]
        pending = None
        if sums:
            group = next(s.pending for s in assigned if s.pending)
            pending = {i: Layout.replicated(self.mesh, len(self.op.inputs[i].shape)).with_partial(sums) for i in group}
        outputs = None
        if self.signature.late and any(s.scatter is not None for s in assigned):
            metas = self.op.outputs
            outputs = [layout_of(code[row], len(m.shape), self.mesh).normal(m.shape) for code, m in zip(self.outputs, metas)]
        return make_choice(self.op, self.signature, self.mesh, split, needs_grad, pending, outputs)

    def restricted(self, keep: np.ndarray[Any, Any]) -> ChoiceTable:
        """Returns the table with only these rows, a mask or indices."""
        return replace(
            self,
            rows=self.rows[keep],
            inputs=tuple(code[keep] for code in self.inputs),
            gradients=tuple(mask[keep] for mask in self.gradients),
            computed=tuple(code[keep] for code in self.computed),
            outputs=tuple(code[keep] for code in self.outputs),
            fraction=self.fraction[keep],
            inner=self.inner[keep],
            reduced=self.reduced[keep],
        )


def layout_of(code: Iterable[int], ndim: int, mesh: Mesh) -> Layout:
    """Builds the layout that a code stands for.

    >>> layout_of([1, -2], 2, Mesh(("dp", "tp"), (2, 4))).short()
    'None,dp +sum(tp)'
    """
    dims: list[list[str]] = [[] for _ in range(ndim)]
    partial = []
    for axis, at in zip(mesh.axes, code, strict=True):
        if at >= 0:
            dims[at].append(axis)
        elif at == PARTIAL:
            partial.append((axis, "sum"))
    return Layout.of(mesh, dims, partial)


def code_of(layout: Layout, mesh: Mesh) -> tuple[int, ...]:
    """Returns the code of a layout.

    A layout of another mesh counts as replicated; orders of axes and piece sizes are left out.

    >>> mesh = Mesh(("dp", "tp"), (2, 4))
    >>> code_of(layout_of([1, -2], 2, mesh), mesh)
    (1, -2)
    """
    if layout.mesh != mesh:
        return (REPLICATED,) * len(mesh.axes)
    where = {axis: dim for dim, axes in enumerate(layout.bound) for axis in axes}
    where.update(dict.fromkeys(layout.partial_axes, PARTIAL))
    return tuple(where.get(axis, REPLICATED) for axis in mesh.axes)


def codes_of(layouts: Sequence[Layout], mesh: Mesh) -> Codes:
    """Returns the codes of layouts, one per row."""
    return np.array([code_of(layout, mesh) for layout in layouts], dtype=np.int8).reshape(len(layouts), len(mesh.axes))


def is_slice(source: Layout, target: Layout) -> bool:
    """Tells whether every rank has its piece of ``target`` within that of ``source``. Then a view is enough."""
    if source.mesh != target.mesh:
        return source.is_replicated
    if source.partial != target.partial:
        return False
    return all(then[: len(now)] == now for now, then in zip(source.bound, target.bound)) and (
        source.sizes == target.sizes or not any(source.sizes) or source.is_replicated
    )


def local_sizes(codes: Codes, shape: Sequence[int], sizes: Sequence[int]) -> np.ndarray[Any, Any]:
    """Counts the elements of a tensor's largest piece. Codes ``(..., A)`` on axes of ``sizes`` give ``(...)``.

    >>> local_sizes(np.array([[0, 1], [-1, 1]]), (4, 10), (2, 4))
    array([ 6., 12.])
    """
    total = np.ones(codes.shape[:-1])
    counts = np.asarray(sizes, dtype=float)
    for dim, size in enumerate(shape):
        ways = np.where(codes == dim, counts, 1.0).prod(axis=-1)
        total *= np.ceil(size / ways)
    return total


def choices_of(
    op: Operator,
    signature: Signature,
    mesh: Mesh,
    base: Sequence[Symbol] | None = None,
    free: Sequence[int] | None = None,
    among: Container[Symbol] | None = None,
) -> ChoiceTable:
    """Lists every choice of an operator on a mesh.

    Args:
        op: the operator.
        signature: its rule's factors.
        mesh: the mesh.
        base, free: where given, only the axes at the positions ``free`` vary, the others are as in ``base``.
        among: the symbols that axes may have; default: all.
    """
    symbols = symbols_of(op, signature)
    index = {symbol: i for i, symbol in enumerate(symbols)}
    varying = range(len(mesh.axes)) if free is None else free
    allowed = [i for i, symbol in enumerate(symbols) if among is None or symbol in among]
    options = [
        allowed if a in varying and mesh.sizes[a] > 1 else [index[base[a]] if base is not None else 0]
        for a in range(len(mesh.axes))
    ]
    found = list(itertools.product(*options))
    rows = np.array(found, dtype=np.int64).reshape(len(found), len(mesh.axes))
    rows = rows[_allowed(op, signature, mesh, symbols, rows)]
    return _table(op, signature, mesh, symbols, rows)


def symbols_of(op: Operator, signature: Signature) -> tuple[Symbol, ...]:
    """Lists the roles that an axis may have for an operator, idle first."""
    found = [IDLE]
    for factor in signature.order:
        if not signature.splittable(factor) or signature.sizes[factor] < 2:
            continue
        found.append(Symbol(factor))
        if factor in signature.summed and signature.late:
            output = signature.outputs[0]
            found += [Symbol(factor, scatter=d) for d, factors in enumerate(output) if _can_split(signature, factors)]
    found += [Symbol(pending=group) for group in signature.linear if all(op.inputs[i].differentiable for i in group)]
    return tuple(dict.fromkeys(found))


def _can_split(signature: Signature, factors: Sequence[str]) -> bool:
    major = signature.major(tuple(factors))
    return major is not None and signature.splittable(major) and signature.sizes[major] > 1


def _allowed(
    op: Operator, signature: Signature, mesh: Mesh, symbols: Sequence[Symbol], rows: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Finds rows whose pieces are large enough and that read at most one set of pending sums."""
    sizes = np.array(mesh.sizes, dtype=float)
    fine = np.ones(len(rows), dtype=bool)
    compound = {
        f for tensor in (*signature.inputs, *signature.outputs) for dim in tensor if len(dim) > 1 for f in dim
        if math.prod(signature.sizes[x] for x in dim) > signature.sizes[f]
    }  # fmt: skip
    for factor in {s.factor for s in symbols if s.factor is not None}:
        mine = [i for i, s in enumerate(symbols) if s.factor == factor]
        ways = np.where(np.isin(rows, mine), sizes, 1.0).prod(axis=1)
        fine &= _cut_well(signature.sizes[factor], ways, factor in compound)
    for dim in {s.scatter for s in symbols if s.scatter is not None}:
        major = signature.major(signature.outputs[0][dim])
        mine = [i for i, s in enumerate(symbols) if s.scatter == dim or (s.factor == major and s.scatter is None)]
        ways = np.where(np.isin(rows, mine), sizes, 1.0).prod(axis=1)
        fine &= _cut_well(op.outputs[0].shape[dim], ways, False)
    groups = [i for i, s in enumerate(symbols) if s.pending is not None]
    for one, other in itertools.combinations(groups, 2):
        fine &= ~((rows == one).any(axis=1) & (rows == other).any(axis=1))
    return fine


def _cut_well(size: int, ways: np.ndarray[Any, Any], evenly: bool) -> np.ndarray[Any, Any]:
    if evenly:
        return size % ways == 0
    return (ways <= size) & (np.ceil(size / ways) * ways <= _UNEVEN * size)


def _table(
    op: Operator, signature: Signature, mesh: Mesh, symbols: tuple[Symbol, ...], rows: np.ndarray[Any, Any]
) -> ChoiceTable:
    computed = [_codes(signature, t, symbols, True, None)[rows] for t in signature.outputs]
    inputs = [_codes(signature, t, symbols, False, i)[rows] for i, t in enumerate(signature.inputs)]
    working = rows != 0
    gradients = [working & (code == REPLICATED) for code in inputs]
    outputs = list(computed)
    if signature.late:
        scatter = np.array([REPLICATED if s.scatter is None else s.scatter for s in symbols], dtype=np.int8)[rows]
        settled = np.where(computed[0] == PARTIAL, scatter, computed[0])
        outputs[0] = settled
        sums = (computed[0] == PARTIAL).any(axis=1)[:, None]
        for i in signature.late:
            code = _late_code(signature, i, settled)
            inputs[i] = np.where(sums, code, inputs[i])
            gradients[i] = np.where(sums, (settled >= 0) & (code == REPLICATED), gradients[i])
    share = _fraction(signature, mesh, symbols, rows)
    inner, reduced = np.zeros(rows.shape, dtype=np.int8), np.full(len(rows), _largest(op))
    for factor in signature.inner:
        mine = np.isin(rows, [i for i, s in enumerate(symbols) if s.factor == factor])
        inner = np.where(mine, _reductions(signature, factor), inner)
        if factor not in signature.pairs:
            reduced = np.where(mine.any(axis=1), reduced / signature.sizes[factor], reduced)
    return ChoiceTable(
        op, signature, mesh, symbols, rows, tuple(inputs), tuple(gradients), tuple(computed), tuple(outputs), share, inner,
        reduced,
    )  # fmt: skip


def _reductions(signature: Signature, factor: str) -> int:
    """Counts the all-reduces of a lowering that splits an inner factor: a largest and a sum, or a sum and a count in one."""
    return 1 if factor in signature.pairs else 2


def _largest(op: Operator) -> float:
    return float(max((meta.numel for meta in op.inputs), default=0))


def _codes(
    signature: Signature, tensor: Sequence[Sequence[str]], symbols: Sequence[Symbol], is_output: bool, index: int | None
) -> Codes:
    """Returns the code of one tensor that each symbol gives an axis."""
    where = {signature.major(tuple(factors)): dim for dim, factors in enumerate(tensor)}
    codes = []
    for symbol in symbols:
        if symbol.pending is not None:
            codes.append(PARTIAL if is_output or index in symbol.pending else REPLICATED)
        elif symbol.factor is None:
            codes.append(REPLICATED)
        elif symbol.factor in where:
            codes.append(where[symbol.factor])
        else:
            codes.append(PARTIAL if is_output and symbol.factor in signature.summed else REPLICATED)
    return np.array(codes, dtype=np.int8)


def _late_code(signature: Signature, index: int, settled: Codes) -> Codes:
    """Returns the code of an input that is combined with the reduced output: each of its dims as the output has it."""
    place = {tuple(factors): dim for dim, factors in enumerate(signature.inputs[index]) if factors}
    to_input = [place.get(tuple(factors), REPLICATED) for factors in signature.outputs[0]]
    table = np.array([*to_input, REPLICATED, REPLICATED], dtype=np.int8)  # settled -1 and -2 read the last two
    return table[settled]


def _fraction(signature: Signature, mesh: Mesh, symbols: Sequence[Symbol], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    share = np.ones(len(rows))
    sizes = np.array(mesh.sizes, dtype=float)
    for factor in dict.fromkeys(s.factor for s in symbols if s.factor is not None):
        mine = [i for i, s in enumerate(symbols) if s.factor == factor]
        size = signature.sizes[factor]
        share *= np.ceil(size / np.where(np.isin(rows, mine), sizes, 1.0).prod(axis=1)) / size
    return share


def _apart(signature: Signature, choice: Choice) -> dict[str, Split]:
    """Returns the splits of factors; of tied ones that the same axes split only one, as it is the same work."""
    found: dict[str, Split] = {}
    for factor in sorted(choice.split, key=lambda f: f in signature.inner):
        axes = choice.split[factor][0]
        if factor not in signature.tied or all(f not in signature.tied or a != axes for f, (a, _) in found.items()):
            found[factor] = choice.split[factor]
    return found


def table_of_choice(op: Operator, signature: Signature, mesh: Mesh, choice: Choice) -> ChoiceTable:
    """Builds a table of one row from a given choice, as far as this mesh's codes can express it.

    Args:
        op: the operator.
        signature: its rule's factors.
        mesh: the mesh.
        choice: the choice.
    """

    def codes(layouts: Sequence[Layout]) -> tuple[Codes, ...]:
        return tuple(codes_of([layout], mesh) for layout in layouts)

    gradients = tuple(np.array([[a in axes for a in mesh.axes]], dtype=bool) for axes in choice.partial_gradient)
    split = _apart(signature, choice)
    mine = {f: axes for f, (axes, _) in split.items() if f in signature.inner and axes}
    share, inside = 1.0, {a: _reductions(signature, f) for f, axes in mine.items() for a in axes}
    reduced = _largest(op) / math.prod(signature.sizes[f] for f in mine if f not in signature.pairs)
    for factor, (axes, pieces) in split.items():
        size = max(1, signature.sizes[factor])
        share *= (max(pieces) if pieces else -(-size // choice.mesh.count(axes))) / size
    return ChoiceTable(
        op, signature, mesh, (IDLE,), np.zeros((1, len(mesh.axes)), dtype=np.int64), codes(choice.inputs), gradients,
        codes(choice.computed), codes(choice.outputs), np.array([share]), np.array([[inside.get(a, 0) for a in mesh.axes]]),
        np.array([reduced]), choice,
    )  # fmt: skip
