"""Prices choices and redistributions on a machine, as whole tables; each kind is priced once.

Seconds and bytes are those of the busiest rank. Results are shared: operators and edges that are alike get the very same
arrays, by which the search recognises repeated layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shardwright.cost.communication import CollectivePrice, Communication
from shardwright.cost.compute import local_seconds, optimizer_seconds
from shardwright.cost.convolution import Channels, channels_of
from shardwright.ir.buckets import Buckets, MoveBuckets
from shardwright.ir.graph import Graph
from shardwright.ir.machine import Machine
from shardwright.ir.mesh import Mesh
from shardwright.ir.operator import TensorMeta
from shardwright.plan.choose.tables import PARTIAL, REPLICATED, ChoiceTable, Codes, local_sizes
from shardwright.rules.traits import family

Array = np.ndarray[Any, Any]

_PAIR = 16.0  # bytes of a sum and a count


class Pricing:
    """Prices of one machine and mesh.

    Args:
        sharing: bytes of all parameters, which share collectives; 0: none does.
        schedule: bytes of the parameters that share a collective, of gradient sums and of gathers.
    """

    def __init__(self, machine: Machine, mesh: Mesh, sharing: float = 0.0, schedule: MoveBuckets | None = None):
        self.machine, self.mesh, self.sharing = machine, mesh, sharing
        self.sums, self.gathers = (schedule or MoveBuckets()).sums, (schedule or MoveBuckets()).gathers
        self.communication = Communication(machine, mesh)
        self._memo: dict[Any, Any] = {}
        self._alive: list[Any] = []  # the objects whose ids are in keys
        self._sizes = np.asarray(mesh.sizes)
        self._radix = 16 ** np.arange(len(mesh.axes), dtype=np.int64)

    def _once(self, key: Any, alive: Sequence[Any], make: Any) -> Any:
        if key not in self._memo:
            self._memo[key] = make()
            self._alive.extend(alive)
        return self._memo[key]

    def interned(self, array: Array) -> Array:
        """Returns the one array with this content, so that alike choices have one price."""
        return self._once(("array", array.dtype, array.shape, array.tobytes()), (), lambda: array)  # type: ignore[no-any-return]

    def interned_table(self, table: ChoiceTable) -> ChoiceTable:
        """Returns the table with interned arrays."""

        def one(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(map(self.interned, arrays))

        return replace(
            table, inputs=one(table.inputs), gradients=one(table.gradients), computed=one(table.computed),
            outputs=one(table.outputs),
        )  # fmt: skip

    def zeros(self, count: int) -> Array:
        return self._once(("zeros", count), (), lambda: np.zeros(count))  # type: ignore[no-any-return]

    def scaled(self, array: Array, weight: float) -> Array:
        if weight == 1.0:
            return array
        return self._once(("scaled", id(array), weight), (array,), lambda: array * weight)  # type: ignore[no-any-return]

    def keys(self, codes: Codes, gradients: Array) -> Array:
        """Computes one number for each layout and gradient."""
        return ((codes.astype(np.int64) + 3 + 8 * gradients) * self._radix).sum(axis=-1)

    def local_bytes(self, metas: Sequence[TensorMeta], codes: Sequence[Codes], count: int) -> Array:
        """Counts the bytes of the largest piece of each of ``T`` tensors in ``count`` choices: ``(T, C)``."""
        if not metas:
            return np.zeros((0, count))
        return np.stack([self.piece_bytes(meta, code) for meta, code in zip(metas, codes)])

    def piece_bytes(self, meta: TensorMeta, codes: Codes) -> Array:
        return local_sizes(codes, meta.shape, self.mesh.sizes) * meta.dtype.itemsize

    # -- variables --------------------------------------------------------------------------------------------------

    def operator(self, table: ChoiceTable, needs_grad: tuple[bool, ...]) -> Array:
        """Computes the seconds of each choice, forward and backward, with the collectives it runs itself."""
        key = ("operator", id(table), needs_grad)
        return self._once(key, (table,), lambda: sum(self.operator_parts(table, needs_grad)))  # type: ignore[no-any-return]

    def operator_parts(self, table: ChoiceTable, needs_grad: tuple[bool, ...]) -> tuple[Array, Array, Array]:
        """Computes the seconds of each choice: computing forward, computing backward, its own collectives."""
        op = table.op
        inputs = self.local_bytes(op.inputs, table.inputs, len(table))
        outputs = self.local_bytes(op.outputs, table.outputs, len(table))
        channels = self._channels(table) if self.machine.channel_block > 1 and family(op) == "conv" else None
        forward, backward = local_seconds(op, self.machine, table.fraction, inputs, outputs, needs_grad, channels)
        return np.asarray(forward), np.asarray(backward), self._own_collectives(table, any(needs_grad))

    def _channels(self, table: ChoiceTable) -> Channels:
        """Returns the channels of a convolution that a rank has in each choice; groups are split only as wholes."""
        whole, codes = channels_of(table.op), table.inputs[1]
        if whole.groups > 1:
            return whole
        first, second = (np.ceil(size / self._ways(codes, dim)) for dim, size in enumerate(table.op.inputs[1].shape[:2]))
        made, read = (second, first) if whole.transposed else (first, second)
        return whole._replace(made=made, read=read)

    def _ways(self, codes: Codes, dim: int) -> Array:
        """Counts the pieces of a dim."""
        return np.asarray(np.where(codes == dim, self._sizes, 1).prod(axis=-1))

    def _own_collectives(self, table: ChoiceTable, grad: bool) -> Array:
        seconds = np.zeros(len(table))
        for meta, before, after in zip(table.op.outputs, table.computed, table.outputs):
            if not np.array_equal(before, after):
                seconds += self._pairwise(meta, before, after, grad)
        if table.inner.any():
            for row in np.flatnonzero(table.inner.any(axis=1)).tolist():
                for axes, nbytes in self._inner(table, row):
                    seconds[row] += float(self.communication.all_reduce(nbytes, axes))
        return seconds

    def _inner(self, table: ChoiceTable, row: int) -> list[tuple[list[int], float]]:
        """Returns the axes and bytes of each all-reduce in a choice's lowering."""
        axes: dict[int, list[int]] = {count: np.flatnonzero(table.inner[row] == count).tolist() for count in (1, 2)}
        held = table.reduced[row] * table.fraction[row] * math.prod(self.mesh.sizes[a] for a in axes[2])
        by_count = [(1, _PAIR), (2, 4 * float(held))]
        return [(axes[count], nbytes) for count, nbytes in by_count if axes[count] for _ in range(count)]

    def own_steps(
        self, table: ChoiceTable, row: int, grad: bool
    ) -> tuple[tuple[CollectivePrice, ...], tuple[CollectivePrice, ...]]:
        """Returns the collectives that one choice of an operator runs itself, forward and backward.

        They add up to its price.
        """
        forward: list[CollectivePrice] = []
        backward: list[CollectivePrice] = []
        none = np.zeros((1, len(self.mesh.axes)), dtype=bool)
        for meta, computed, outputs in zip(table.op.outputs, table.computed, table.outputs):
            before, after = computed[row], outputs[row]
            if np.array_equal(before, after):
                continue
            size, describe = meta.dtype.itemsize, self.communication.describe
            forward += describe(meta.shape, size, before.tolist(), after.tolist())
            if grad:
                back_from, back_to = gradient_codes(before[None], after[None], none)
                backward += describe(meta.shape, size, back_from[0].tolist(), back_to[0].tolist())
        for axes, nbytes in self._inner(table, row):
            names, count = tuple(self.mesh.axes[a] for a in axes), math.prod(self.mesh.sizes[a] for a in axes)
            seconds = float(self.communication.all_reduce(nbytes, axes))
            forward.append(CollectivePrice("all_reduce", names, 2 * nbytes * (count - 1) / count, seconds))
        return tuple(forward), tuple(backward)

    def _pairwise(self, meta: TensorMeta, before: Codes, after: Codes, grad: bool) -> Array:
        """Computes the seconds from each row's layout to the same row's other one."""
        seconds = np.zeros(len(before))
        changed = np.flatnonzero((before != after).any(axis=1))
        keys = np.concatenate([before[changed], after[changed]], axis=1)
        unique, where = np.unique(keys, axis=0, return_inverse=True)
        count = len(self.mesh.axes)
        none = np.zeros((1, count), dtype=bool)
        prices = [float(self.move(meta, u[None, :count], u[None, count:], none, grad)[0][0, 0]) for u in unique]
        if len(changed):
            seconds[changed] = np.array(prices)[where.reshape(-1)]
        return seconds

    def parameter(
        self, meta: TensorMeta, codes: Codes, grad: bool, optimizer_bytes_per_byte: float, gradients: float
    ) -> tuple[Array, Array]:
        """Computes the seconds of the optimizer, and the bytes of a parameter with states and gradient.

        Args:
            meta: the parameter.
            codes: layouts in which it is stored.
            grad: whether it is trained.
            optimizer_bytes_per_byte: bytes of optimizer state per byte of parameter.
            gradients: the share of its gradient that counts.
        """

        def make() -> tuple[Array, Array]:
            held = self.piece_bytes(meta, codes)
            if not grad:
                return np.zeros(len(codes)), held
            seconds = optimizer_seconds(held, optimizer_bytes_per_byte, self.machine)
            return np.asarray(seconds), held * (1 + optimizer_bytes_per_byte + gradients)

        return self._once(("parameter", meta, id(codes), grad, optimizer_bytes_per_byte, gradients), (codes,), make)  # type: ignore[no-any-return]

    def to_whole(self, meta: TensorMeta, codes: Codes, grad: bool) -> Array:
        """Computes the seconds to make a value whole on every rank."""
        target = np.full((1, len(self.mesh.axes)), REPLICATED, dtype=np.int8)
        return self.move(meta, codes, target, np.zeros((1, len(self.mesh.axes)), dtype=bool), grad)[0][:, 0]

    # -- edges ------------------------------------------------------------------------------------------------------

    def move(
        self, meta: TensorMeta, source: Codes, target: Codes, gradients: Array, grad: bool, keeps: bool = False,
        stored: bool = False, counted: bool = False,
    ) -> tuple[Array, Array | None]:  # fmt: skip
        """Computes the seconds ``(S, T)`` of redistributions in both directions, and the bytes that readers keep.

        Args:
            meta: the value.
            source, target: layout codes ``(S, A)`` and ``(T, A)``.
            gradients: ``(T, A)``, axes over which the gradient that comes back is partial.
            grad: whether a gradient comes back.
            keeps: whether autograd keeps what the reader reads.
            stored: whether the source is a parameter; part of its communication hides behind computing.
            counted: whether the source's own bytes are counted already.
        """
        key = ("move", meta.shape, meta.dtype, id(source), id(target), id(gradients), grad, keeps, stored, counted)
        return self._once(  # type: ignore[no-any-return]
            key, (source, target, gradients), lambda: self._move(meta, source, target, gradients, grad, keeps, stored, counted)
        )

    def _move(
        self, meta: TensorMeta, source: Codes, target: Codes, gradients: Array, grad: bool, keeps: bool, stored: bool,
        counted: bool,
    ) -> tuple[Array, Array | None]:  # fmt: skip
        if not grad:
            gradients = np.zeros_like(gradients)
        rows, row_of = self._unique(source, np.zeros(source.shape, dtype=bool))
        columns, column_of = self._unique(target, gradients)
        here, there, masks = source[rows], target[columns], gradients[columns]
        forward, backward = self.move_parts(meta, here, there, masks, grad)
        if stored:
            first, second = self.saved_by_sharing(meta, here, there, masks, grad)
            seconds = self.machine.exposed(forward - first, backward - second)
        else:
            seconds = forward + backward
        memory = self._kept(meta, here, there, counted)[np.ix_(row_of, column_of)] if keeps else None
        return seconds[np.ix_(row_of, column_of)], memory

    def move_parts(self, meta: TensorMeta, source: Codes, target: Codes, gradients: Array, grad: bool) -> tuple[Array, Array]:
        """Computes the seconds ``(S, T)`` of redistributions, forward and backward apart.

        Args:
            meta: the value.
            source, target: layout codes ``(S, A)`` and ``(T, A)``.
            gradients: ``(T, A)``, axes over which the gradient that comes back is partial.
            grad: whether a gradient comes back.
        """
        size = meta.dtype.itemsize
        forward = self.communication.moves(meta.shape, size, source, target).seconds
        if not grad:
            return forward, np.zeros_like(forward)
        back_from, back_to = gradient_codes(source, target, gradients)
        return forward, self.communication.moves(meta.shape, size, back_from, back_to).seconds.T

    def saved_by_sharing(
        self, meta: TensorMeta, source: Codes, target: Codes, gradients: Array, grad: bool
    ) -> tuple[Array, Array]:
        """Computes the launches of others' collectives that a parameter saves by sharing, forward and backward.

        Args:
            meta, source, target, gradients, grad: as for :meth:`move_parts`.
        """
        forward, backward, share = self.launches(meta, source, target, gradients, grad)
        return forward * (1 - share), backward * (1 - share)

    def launches(
        self, meta: TensorMeta, source: Codes, target: Codes, gradients: Array, grad: bool
    ) -> tuple[Array, Array, Array]:
        """Computes the launch seconds of a parameter's collectives, forward and backward, and its share.

        A parameter pays launches in proportion to its bytes in its bucket, at least as if all parameters shared one. A search
        prices
        one parameter at a time; by bytes, the best choice of a large parameter is also the best for the small ones, and they
        share
        its collectives.

        Args:
            meta, source, target, gradients, grad: as for :meth:`move_parts`.
        """
        larger = np.maximum(self.piece_bytes(meta, source)[:, None], self.piece_bytes(meta, target)[None, :])
        empty = [self.communication.moves(meta.shape, 0, source, target).seconds, np.zeros_like(larger)]
        if grad:
            back_from, back_to = gradient_codes(source, target, gradients)
            empty[1] = self.communication.moves(meta.shape, 0, back_from, back_to).seconds.T
        part = meta.bytes / self.sharing if self.sharing else 1.0
        share = np.where(empty[0] > 0, self._share(self.gathers, larger, part), self._share(self.sums, larger, part))
        possible = np.isfinite(empty[0]) & np.isfinite(empty[1])
        return np.where(possible, empty[0], 0.0), np.where(possible, empty[1], 0.0), share

    def _share(self, buckets: Buckets, size: Array, part: float) -> Array:
        """Computes the share of a launch of a parameter: ``size`` bytes, ``part`` of all."""
        if buckets.starts is not None:
            return np.full_like(size, min(1.0, (1 + len(buckets.starts)) * part))
        return np.clip(size / buckets.bytes, part, 1.0) if buckets.bytes else np.ones_like(size)

    def _unique(self, codes: Codes, gradients: Array) -> tuple[Array, Array]:
        _, first, where = np.unique(self.keys(codes, gradients), return_index=True, return_inverse=True)
        return first, where.reshape(-1)

    def _kept(self, meta: TensorMeta, source: Codes, target: Codes, counted: bool) -> Array:
        """Counts the bytes that a reader keeps: those of the whole source for a slice, of a new tensor for other moves."""
        before, after = self.piece_bytes(meta, source)[:, None], self.piece_bytes(meta, target)[None, :]
        changed = source[:, None, :] != target[None, :, :]
        sliced = (~changed | (source[:, None, :] == REPLICATED)).all(axis=-1)
        held = 0.0 if counted else 1.0
        return np.where(sliced, before * held, after + 0.0 * before)

    def read(
        self, meta: TensorMeta, state: Codes, state_gradients: Array, target: Codes, gradients: Array, grad: bool, keeps: bool
    ) -> tuple[Array, Array | None]:
        """Prices like :meth:`move`, from a shared reading: readers that need exactly what it has pay nothing.

        Args:
            meta: the value.
            state, state_gradients: codes of the shared reading and of its gradients.
            target, gradients: codes of the readers and of their gradients.
            grad: whether a gradient comes back.
            keeps: whether autograd keeps what the reader reads.
        """

        def make() -> tuple[Array, Array | None]:
            masks = gradients if grad else np.zeros_like(gradients)
            seconds, memory = self._move(meta, state, target, masks, grad, keeps, False, True)
            same = self.keys(state, state_gradients)[:, None] == self.keys(target, masks)[None, :]
            return np.where(same, 0.0, seconds), None if memory is None else np.where(same, 0.0, memory)

        arrays = (state, state_gradients, target, gradients)
        return self._once(("read", meta.shape, meta.dtype, *map(id, arrays), grad, keeps), arrays, make)  # type: ignore[no-any-return]


def launches_of(buckets: Buckets, size: float, count: int) -> float:
    """Counts the collectives of ``count`` parameters of ``size`` bytes in all; a bucket that is not full counts partly.

    >>> launches_of(Buckets(4 << 20), 6 << 20, 10), launches_of(Buckets(), 6 << 20, 10)
    (1.5, 10.0)
    """
    if buckets.starts is not None:
        return float(min(count, 1 + len(buckets.starts)))
    return min(float(count), max(1.0, size / buckets.bytes)) if buckets.bytes else float(count)


def bytes_of_parameters(graph: Graph) -> float:
    """Counts the bytes of all parameters of a graph, whole."""
    return float(sum(i.meta.bytes for i in graph.inputs if i.kind == "parameter"))


def gradient_codes(source: Codes, target: Codes, gradients: Array) -> tuple[Codes, Codes]:
    """Returns the codes between which gradients move: partial at the target's readers, and the source's own pieces."""
    whole = np.where(target == PARTIAL, REPLICATED, target)
    start = np.where(gradients & (target == REPLICATED), PARTIAL, whole).astype(np.int8)
    return start, np.where(source == PARTIAL, REPLICATED, source).astype(np.int8)
