"""Decides how the readers of one value share redistributions.

Readers that need the same layout share one. A reader may also start from another one's layout: after a gather over the
first of two axes, a gather over the second one is left. A tree of least cost, forward and backward, says which need is
derived from which.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

from shardwright.ir.layout import Layout
from shardwright.redistribute.planner import Options
from shardwright.redistribute.steps import redistribution

# A layout, and the axes over which the gradient that comes back is partial.
Need = tuple[Layout, tuple[str, ...]]

# Up to this many needs every tree is tried; beyond it the tree grows by the cheapest need first.
_EXHAUSTIVE = 4


@lru_cache(maxsize=16384)
def sharing(
    source: Layout, needs: tuple[Need, ...], shape: tuple[int, ...], with_backward: bool, options: Options
) -> dict[Need, Need]:
    """Returns, for every need, its source: ``(source, ())`` or another need.

    A need whose gradient is partial is a leaf: the gradients of what would be derived from it are whole.

    Args:
        source: the layout of the value.
        needs: layouts of the readers, with the axes over which their gradients are partial.
        shape: global shape.
        with_backward: whether the backward pass counts.
        options: which steps redistributions may use and their costs.

    >>> base = Layout((2, 2), ("a", "b"))
    >>> both, one = base(("a", "b")), base("a")
    >>> tree = sharing(both, ((base("None"), ()), (one, ())), (8,), True, Options())
    >>> tree[base("None"), ()][0].short(), tree[one, ()][0].short()
    ('a', '(a,b)')
    """
    root: Need = (source, ())
    wanted = tuple(n for n in needs if n != root)
    if not wanted:
        return {}
    best = _tree(root, wanted, shape, with_backward, options)
    reduced: Need = (source.without_partial(), ())
    if len(wanted) > 1 and source.partial and reduced not in wanted and not any(n.partial for n, _ in wanted):
        best = min(best, _tree(root, (*wanted, reduced), shape, with_backward, options), key=lambda found: found[0])
    return best[1]


def _tree(
    root: Need, wanted: tuple[Need, ...], shape: tuple[int, ...], with_backward: bool, options: Options
) -> tuple[float, dict[Need, Need]]:
    def cost(parent: Need, need: Need) -> float:
        plan = redistribution(parent[0], need[0], shape, need[1], options)
        steps = [*plan.forward, *(plan.backward if with_backward else ())]
        return sum(options.links.seconds(step, shape, options.itemsize) for step in steps)

    parents = {need: [p for p in (root, *wanted) if p != need and _can_follow(p, need, root)] for need in wanted}
    costs = {(p, need): cost(p, need) for need in wanted for p in parents[need]}
    if len(wanted) > _EXHAUSTIVE:
        return _grown(root, wanted, costs)
    trees = (dict(zip(wanted, choice, strict=True)) for choice in itertools.product(*(parents[n] for n in wanted)))
    priced = ((sum(costs[p, n] for n, p in tree.items()), tree) for tree in trees if _is_tree(tree, root))
    return min(priced, key=lambda found: found[0])


def _can_follow(parent: Need, need: Need, root: Need) -> bool:
    return (parent == root or not parent[1]) and set(need[0].partial) <= set(parent[0].partial)


def _is_tree(parents: dict[Need, Need], root: Need) -> bool:
    for need in parents:
        seen = {need}
        while need != root:
            need = parents[need]
            if need in seen:
                return False
            seen.add(need)
    return True


def _grown(root: Need, wanted: Sequence[Need], costs: dict[tuple[Need, Need], float]) -> tuple[float, dict[Need, Need]]:
    tree: dict[Need, Need] = {}
    total = 0.0
    while len(tree) < len(wanted):
        reached = {root, *tree}
        price, parent, need = min(
            ((c, p, n) for (p, n), c in costs.items() if p in reached and n not in tree), key=lambda found: found[0]
        )
        tree[need], total = parent, total + price
    return total, tree
