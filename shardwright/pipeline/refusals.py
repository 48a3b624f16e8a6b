"""Says why an operator cannot compute a micro-batch by itself, and what to change."""

from __future__ import annotations

import math

from shardwright.base.opaque import OpaqueFunction
from shardwright.ir.graph import Graph, Node
from shardwright.pipeline.batch import is_reshape
from shardwright.pipeline.units import NEVER_MEET, NEVER_MEET_SLICES, Cut
from shardwright.rules.registry import signature_of
from shardwright.rules.traits import family

CANNOT = "the batch cannot pass in {} micro-batches; without .pipeline(...) it is computed at once"
CANNOT_SLICES = 'the sequence cannot pass in {} slices; with scheduler="1f1b", without slices=, it is whole'
LATER = "at the end of the network, where it runs after all micro-batches"
SAME_FOR_SLICES = "computes what is the same for every slice of the sequence"
NO_RULE = "has no rule and runs whole"
TOGETHER = "computes something of all samples together, such as their mean"
SUMMED = "is not linear in what it reads, which is a sum over the whole batch"


def cannot(cut: Cut) -> str:
    """Returns the heading of refusals."""
    return CANNOT_SLICES.format(cut.slices) if cut.slices > 1 else CANNOT.format(cut.micro)


def refusal(graph: Graph, node: Node, why: str, dim: int | None = None) -> str:
    """Returns the line about an operator that needs the whole batch.

    Args:
        graph: the graph that it is in.
        node: the operator.
        why: the reason, unless the operator itself says more.
        dim: the dim of an input that it needs whole, if that is the reason.
    """
    what, edit = node.where, f"Compute it of each sample, or {LATER}"
    if any(later.op.draws for later in _behind(graph, node)):
        edit = "Compute it of each sample, or draw random numbers before it, so that it can run after all micro-batches"
    if any(0 in meta.shape for meta in (*node.op.inputs, *node.op.outputs)):
        why, edit = "has a tensor without elements, in which no sample is", "Leave such a batch out"
    elif isinstance(node.op.target, OpaqueFunction):
        why, edit = _of_function(node.op.target)
    elif why == SUMMED:
        pass
    elif is_reshape(node) and dim is not None and _is_behind(node, dim):
        reader = next((other for other in graph.nodes if node.outputs[0] in other.inputs), None)
        what = reader.where if reader is not None else f"{node.module} at {node.source}"
        why = "needs rows in their order, in which those of one sample do not follow each other, such as (T * B, ...)"
        edit = "Put the batch before the dims that it is flattened with, (B * T, ...)"
    elif family(node.op) == "norm":
        why = "computes its mean and variance of the whole batch"
        edit = "Call its eval(), or use a norm of each sample, such as a group norm"
    elif signature_of(node.op) is None:
        why, edit = NO_RULE, f"Register a rule of it, or compute it {LATER}"
    elif node.op.draws:
        why = "draws random numbers by the values of the whole batch, in turn, and nothing draws after all micro-batches"
        edit = "Draw with torch.rand_like or torch.randn_like before that, and compute the rest of each sample"
    return f"{what} {why}; {NEVER_MEET}. {edit}"


def not_followed(node: Node) -> str:
    """Returns the line about an operator behind which the sequence of its inputs is not known.

    Args:
        node: the operator.
    """
    why = "computes its result of other positions too, or puts them into another order"
    return f"{node.where} {NO_RULE if signature_of(node.op) is None else why}; {NEVER_MEET_SLICES}"


def needs_dim(index: int, dim: int, word: str) -> str:
    """Returns that an operator needs a dim of an input whole.

    Args:
        index, dim: the input and the dim.
        word: what the dim is.
    """
    return f"needs dim {dim} of its input {index} whole, which is the {word}"


def changes_buffer(node: Node, name: str) -> str:
    """Returns the line about a buffer that the whole batch changes.

    Args:
        node: the operator that makes its value.
        name: that of the buffer.
    """
    return (
        f"{node.where} changes the buffer {name} by the values of the whole batch; {NEVER_MEET}. Return what it is changed by, "
        "and change it after the call"
    )


def _of_function(function: OpaqueFunction) -> tuple[str, str]:
    """Returns why a function runs whole, and what to change."""
    if function.hook:
        return (
            f"has {function.hook}, which gets the gradient of the whole batch",
            "Remove it before the net trains in a pipeline",
        )
    return (
        "is one function that nothing shows how to split, and runs whole",
        f"Register a rule of it, or call it {LATER}",
    )


def _behind(graph: Graph, node: Node) -> list[Node]:
    """Lists the operators that read what an operator makes, and those that read these."""
    made, found = set(node.outputs), []
    for other in graph.nodes:
        if made.intersection(other.inputs):
            made.update(other.outputs)
            found.append(other)
    return found


def _is_behind(node: Node, dim: int) -> bool:
    """Tells whether a reshape puts a dim of its input behind another one, within one dim."""
    before = math.prod(node.op.inputs[0].shape[:dim])
    shape = node.op.outputs[0].shape
    return all(math.prod(shape[:d]) != before for d in range(len(shape)))
