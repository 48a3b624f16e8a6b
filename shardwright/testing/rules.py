"""Testing: proves rules by running them.

:func:`check_rule` splits an operator's inputs in every way its rule allows, runs the local calls, puts the outputs
together again and compares with the whole, forward and backward, in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import shardwright.rules.tables  # noqa: F401  (registers the rules)
from shardwright.base.torch_private import pytree
from shardwright.capture.capture import capture
from shardwright.capture.closure import FunctionModule
from shardwright.ir.choice import Choice, make_choice
from shardwright.ir.graph import Graph, Node
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.ir.plan import Plan
from shardwright.ir.signature import Signature
from shardwright.partition.partitioner import partition
from shardwright.rules.registry import replicated_signature, signature_of
from shardwright.testing.difference import difference
from shardwright.world.simulated.world import SimulatedWorld

MESHES = ((2,), (3,), (2, 2), (2, 3))


def check_rule(
    function: Callable[..., Any],
    *args: Any,
    operator: str | None = None,
    meshes: Sequence[tuple[int, ...]] = MESHES,
    limit: int = 60,
    tolerance: float = 1e-10,
    needs_rule: bool = True,
    seed: int = 0,
    **kwargs: Any,
) -> int:
    """Proves the rule of the operator that ``function`` calls.

    Args:
        function: calls one operator of interest (other operators in it run replicated).
        args, kwargs: its arguments; floating tensors should be float64, and have their gradients checked.
        operator: name of the operator of interest, e.g. ``"aten.linear"``; default: every operator of the function.
        meshes: mesh sizes to split over.
        limit: most choices tried on each mesh, spread evenly over all that exist.
        tolerance: largest relative difference allowed.
        needs_rule: whether the operator must have a rule that allows some split.

    Returns:
        The number of choices tried.

    Raises:
        AssertionError: a choice computes something else than the single device; the message names it.

    >>> check_rule(torch.relu, torch.randn(4, 6, dtype=torch.float64)) > 4
    True
    """
    graph = _captured(function, args, kwargs)
    nodes = [n for n in graph.nodes if operator is None or n.op.name == operator]
    assert nodes, f"no {operator} in\n{graph}"
    tried = 0
    for node in nodes:
        signature = signature_of(node.op)
        if signature is None:
            assert not needs_rule, f"{node.op.name} has no rule for this call"
            continue
        for sizes in meshes:
            mesh = Mesh(tuple(f"x{i}" for i in range(len(sizes))), sizes)
            for choice in _spread(list(_choices(graph, node, signature, mesh)), limit):
                _compare(function, args, kwargs, graph, node, signature, mesh, choice, tolerance, seed)
                tried += 1
    assert tried or not needs_rule, "the rule allows no split at all"
    return tried


def _captured(function: Callable[..., Any], args: Any, kwargs: Any) -> Graph:
    args, kwargs = pytree.tree_map(_differentiable, (args, kwargs))
    return capture(FunctionModule(function), tuple(args), kwargs, torch.device("cpu"))


def _differentiable(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        leaf = leaf.detach()
        return leaf.requires_grad_() if leaf.is_floating_point() else leaf
    return leaf


def _spread(items: list[Any], limit: int) -> list[Any]:
    step = max(1, -(-len(items) // limit))
    return items[::step]


def _choices(graph: Graph, node: Node, signature: Signature, mesh: Mesh) -> Iterator[Choice]:
    """Yields every assignment of the mesh's axes to factors. If two axes share a factor, both orders are tried."""
    factors = [f for f in signature.order if signature.splittable(f)]
    seen = set()
    for assignment in itertools.product([None, *factors], repeat=len(mesh.axes)):
        for axes in itertools.permutations(mesh.axes):
            split: dict[str, Any] = {}
            for axis in axes:
                factor = assignment[mesh.axes.index(axis)]
                if factor is not None:
                    split[factor] = ((*split.get(factor, ((), None))[0], axis), None)
            key = tuple(sorted((f, a) for f, (a, _) in split.items()))
            if not split or key in seen or not _allowed(signature, mesh, split):
                continue
            seen.add(key)
            yield make_choice(node.op, signature, mesh, split, [v in graph.needs_grad for v in node.inputs])


def _allowed(signature: Signature, mesh: Mesh, split: dict[str, Any]) -> bool:
    """Tells whether every split factor may be split in its compound dims."""
    for tensor in (*signature.inputs, *signature.outputs):
        for dim in tensor:
            if any(f in split for f in dim if f != signature.major(dim)):
                return False
    return True


def _plan(graph: Graph, node: Node, signature: Signature, mesh: Mesh, choice: Choice) -> Plan:
    choices, signatures = {}, {}
    for other in graph.nodes:
        own = signature if other is node else signature_of(other.op) or replicated_signature(other.op)
        signatures[other.name] = own
        choices[other.name] = choice if other is node else make_choice(other.op, own, mesh, {}, [False] * len(other.inputs))
    layouts = {i.value: Layout.replicated(mesh, len(i.meta.shape)) for i in graph.inputs}
    return Plan(graph, mesh, choices, signatures, layouts)


def _compare(
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    graph: Graph,
    node: Node,
    signature: Signature,
    mesh: Mesh,
    choice: Choice,
    tolerance: float,
    seed: int,
) -> None:
    what = f"{node.op.name} split { ({f: a for f, (a, _) in choice.split.items()}) } of {mesh}, shapes " + str(
        [m.shape for m in node.op.inputs]
    )
    program = partition(graph, _plan(graph, node, signature, mesh, choice))
    run = SimulatedWorld(mesh.size).bind(program)

    def parallel(leaves: list[Any]) -> list[Any]:
        by_kind = {"input": lambda i: leaves[i.target], "constant": lambda i: graph.constants[i.target]}
        return run(*(by_kind[i.kind](i) for i in graph.inputs))[0]

    def single(leaves: list[Any]) -> list[Any]:
        again, keywords = pytree.tree_unflatten(leaves, spec)
        return pytree.tree_leaves(function(*again, **keywords))

    flat, spec = pytree.tree_flatten((args, kwargs))
    try:
        expected = _values_and_gradients(single, flat, seed)
        got = _values_and_gradients(parallel, flat, seed)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}\n{program}") from error
    for position, (e, g) in enumerate(zip(expected, got, strict=True)):
        problem = difference(e, g, tolerance)
        assert problem is None, f"{what}: result {position} (outputs, then gradients): {problem}\n{program}"


def _values_and_gradients(run: Callable[[list[Any]], list[Any]], flat: list[Any], seed: int) -> list[Any]:
    leaves = [_differentiable(leaf) for leaf in flat]
    torch.manual_seed(seed)
    outputs = [o for o in run(leaves) if isinstance(o, Tensor)]
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    generator = torch.Generator().manual_seed(seed + 1)
    loss = None
    for output in outputs:
        if output.requires_grad:
            weight = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
            term = (output * weight).sum()
            loss = term if loss is None else loss + term
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True) if loss is not None and inputs else []
    return [*(o.detach() for o in outputs), *gradients]
