"""Writes out what ``torch.func`` and ``torch.autograd.grad`` compute within a captured callable, as operators.

``torch.export`` records operators, and neither transformations nor derivatives. Here they run once on tensors without values,
outside of the export; the operators that they are made of then run within it, on the tensors of the callable. So they are
operators of the graph like others: split by their rules, and differentiated where the program runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, fx

from shardwright.base.torch_private import (
    FakeTensor,
    disable_current_modes,
    make_fx,
    no_function_modes,
    no_saved_tensors_hooks,
    pytree,
    set_grad_mode,
    tracer_of_export,
)
from shardwright.capture.functionalise import draws
from shardwright.capture.fx_nodes import attribute_at, map_arguments

# Changes the traced graph before its operators run, and the context in which each of them does.
Edit = Callable[[fx.Graph], None]
AtLine = Callable[[], AbstractContextManager[Any]]


def written_out(function: Callable[..., Any], tensors: Sequence[Tensor], at_line: AtLine, edit: Edit) -> Any:
    """Runs the operators that a function of tensors is made of, and returns its nested result.

    Args:
        function: takes tensors; those of the capture that it closes over may be among what it computes with.
        tensors: tensors of the capture.
        at_line: makes the context in which each operator is recorded.
        edit: what is to be done to the operators before.
    """
    spec: Any = None
    constants: dict[int, Any] = {}
    without_grad: set[fx.Node] = set()

    def flat(*given: Tensor) -> list[Tensor]:
        nonlocal spec
        _note_grad_mode(tracer_of_export().graph, without_grad)
        leaves, spec = pytree.tree_flatten(function(*given))
        constants.update({i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)})
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    with no_function_modes(), no_saved_tensors_hooks(), disable_current_modes(), ExitStack() as stack:
        mode = next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)
        if mode is not None:
            stack.enter_context(mode)
        traced = make_fx(flat)(*tensors)
    edit(traced.graph)
    _with_all_results(traced.graph)
    _drop_dead(traced.graph)
    with ExitStack() as stack, torch.set_grad_enabled(torch.is_grad_enabled()):
        device = next((t.device.type for t in tensors), "cpu")
        if torch.is_autocast_enabled(device):  # the operators are cast already
            stack.enter_context(torch.autocast(device, enabled=False))
        values = iter(_run(traced, tensors, without_grad, at_line))
    leaves = [constants[i] if i in constants else next(values) for i in range(spec.num_leaves)]
    return pytree.tree_unflatten(leaves, spec)


def _note_grad_mode(graph: fx.Graph, without_grad: set[fx.Node]) -> None:
    """Adds, from now on, the nodes of a graph that are made without gradients to a set."""
    plain = graph.create_node

    def create_node(*args: Any, **kwargs: Any) -> fx.Node:
        node = plain(*args, **kwargs)
        if not torch.is_grad_enabled():
            without_grad.add(node)
        return node

    graph.create_node = create_node  # type: ignore[method-assign]


def _run(traced: fx.GraphModule, tensors: Sequence[Tensor], without_grad: set[fx.Node], at_line: AtLine) -> list[Tensor]:
    """Runs a graph's operators on tensors of the capture, each in the grad mode in which it was made."""
    values: dict[fx.Node, Any] = {}
    given = iter(tensors)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = attribute_at(traced, str(node.target))
        elif node.op == "call_function":
            if torch.is_grad_enabled() is (node in without_grad):
                set_grad_mode(node not in without_grad)
            args, kwargs = map_arguments(lambda a: values[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs))
            with at_line():
                values[node] = node.target(*args, **kwargs)
    return [values[node] for node in next(n for n in traced.graph.nodes if n.op == "output").args[0]]


def _drop_dead(graph: fx.Graph) -> None:
    """Removes what no result needs, but for random numbers, which advance the generator, and writes."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        stays = node.op in ("output", "placeholder") or _writes(node) or draws(node)
        if stays or node in needed:
            needed.update((node, *node.all_input_nodes))
    for node in reversed(list(graph.nodes)):
        if node not in needed:
            graph.erase_node(node)


def _with_all_results(graph: fx.Graph) -> None:
    """Has backward operators compute all gradients that they can. A graph has no place for one that is left out."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        names = [] if schema is None else [argument.name for argument in schema.arguments]
        if "output_mask" not in names:
            continue
        given = dict(zip(names, node.args)) | dict(node.kwargs)
        given["output_mask"] = [True] * len(given["output_mask"])
        if given.get("bias_sizes", 0) is None:  # of a convolution without bias: as many as it has channels
            weight, transposed = given["weight"].meta["val"], given["transposed"]
            given["bias_sizes"] = [weight.shape[1] * given["groups"] if transposed else weight.shape[0]]
        for name in ("weight", "bias"):
            if name in given and given[name] is None:
                given["output_mask"][names.index(name) - names.index("weight") + 1] = False
        node.args, node.kwargs = tuple(given[name] for name in names), {}


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)
