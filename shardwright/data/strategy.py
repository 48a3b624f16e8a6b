"""Dataset strategies: how the input tensors of a rank are slices of the global ones.

A strategy is ``"full_batch"``, ``"data_parallel"``, or one entry per input: slice counts or a Layout. Slice counts stand for
a device matrix with the counts as its axes, in order. Ranks beyond their product form a last axis, along which inputs are
the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from shardwright.errors import ArgumentTypeError, Problems, ShardwrightError, StrategyError
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.plan.asked.strategies import check_counts, check_layout

Shape = tuple[int, ...]

_FORMS = "'full_batch', 'data_parallel' or a tuple with one entry an input"


def check_dataset_strategy(config: Any) -> None:
    """Refuses what is no dataset strategy, whatever the inputs and the number of ranks.

    Raises:
        ArgumentTypeError: neither a string nor a tuple; an entry that is neither a tuple of ints nor a Layout.
        ShardwrightError: ``None``, an unknown string, a count below 1, a Layout without dims, counts and Layouts mixed.

    >>> check_dataset_strategy(((2, 1), (2,)))
    >>> check_dataset_strategy("half_batch")
    Traceback (most recent call last):
        ...
    shardwright.errors.ShardwrightError: dataset_strategy('half_batch'): give 'full_batch', 'data_parallel' or a tuple with
    one entry an input
    """
    if config is None or (isinstance(config, str) and config not in ("full_batch", "data_parallel")):
        raise ShardwrightError(f"dataset_strategy({config!r}): give {_FORMS}")
    if isinstance(config, str):
        return
    if not isinstance(config, tuple):
        raise ArgumentTypeError(f"dataset_strategy({config!r}) is a {type(config).__name__}; give {_FORMS}")
    for position, entry in enumerate(config):
        _check_entry(entry, position)
    if len({isinstance(entry, Layout) for entry in config}) > 1:
        raise StrategyError(f"dataset_strategy({config!r}) mixes slice counts and Layouts; write all entries as Layouts")


def _check_entry(entry: Any, position: int) -> None:
    what = f"dataset_strategy: entry {position}"
    if isinstance(entry, Layout):
        if entry.dims is None:
            raise ShardwrightError(f"{what} is the Layout ({entry.mesh}) without dims; call it with one entry a dim")
        if entry.copies > 1:
            raise ShardwrightError(
                f"{what}, {entry.short()}, has the axis 'interleaved_parallel', which cuts what a device computes, not what it "
                "is handed; write the layout without it"
            )
        if entry.partial:
            raise ShardwrightError(f"{what}, {entry.short()}, has pending sums, which an input cannot have; leave them out")
        return
    if not isinstance(entry, tuple):
        raise ArgumentTypeError(f"{what}, {entry!r}, is a {type(entry).__name__}; give a tuple of slice counts or a Layout")
    for count in entry:
        if not isinstance(count, int) or isinstance(count, bool):
            raise ArgumentTypeError(f"{what}, {entry!r}, holds {count!r}, a {type(count).__name__}; slice counts are ints")
        if count < 1:
            raise ShardwrightError(f"{what}, {entry!r}, holds {count}; a dim is cut into at least 1 slice")


def layouts_of(strategy: Any, ndims: Sequence[int], carries: Sequence[bool], size: int) -> list[Layout]:
    """Returns the layouts that a checked strategy gives the tensor inputs.

    Args:
        strategy: the dataset strategy.
        ndims: the number of dims of each tensor input.
        carries: whether each has the batch as dim 0, for ``"data_parallel"``.
        size: number of ranks.

    Raises:
        StrategyError: another number of inputs, dims or ranks.

    >>> layouts_of(((2, 1), (1,)), [2, 1], [True, True], 4)
    [Layout('dim0,None @ dim0=2,rest=2'), Layout('None @ rest=4')]
    """
    if isinstance(strategy, str):
        mesh = Mesh(("batch",), (size,))
        split = [strategy == "data_parallel" and carried for carried in carries]
        return [Layout.of(mesh, [("batch",) if s and d == 0 else () for d in range(n)]) for n, s in zip(ndims, split)]
    problems = Problems()
    if len(strategy) != len(ndims):
        problems.add(f"dataset_strategy: {len(strategy)} entries for {len(ndims)} tensor inputs; give one per input")
    for i, (entry, ndim) in enumerate(zip(strategy, ndims)):
        check = check_layout if isinstance(entry, Layout) else check_counts
        check(entry, ndim, size, f"dataset_strategy input {i}", problems)
    problems.raise_if_any("the dataset strategy cannot be followed")
    return [entry if isinstance(entry, Layout) else _of_counts(entry, size) for entry in strategy]


def _of_counts(counts: Sequence[int], size: int) -> Layout:
    named = [(f"dim{i}", n) for i, n in enumerate(counts)] + [("rest", size // math.prod(counts))]
    axes = [(name, n) for name, n in named if n > 1]
    mesh = Mesh(tuple(name for name, _ in axes), tuple(n for _, n in axes))
    return Layout.of(mesh, [(f"dim{i}",) if n > 1 else () for i, n in enumerate(counts)])
