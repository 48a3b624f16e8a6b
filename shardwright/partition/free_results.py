"""Free results: values and gradients that nobody else holds, so that a sum over ranks may be done in place."""

from __future__ import annotations

from collections import Counter

from shardwright.ir.instructions import Call, Instruction, Ref
from shardwright.ir.operator import OpOverload
from shardwright.ir.program import LocalProgram

# Operators whose result is new memory that autograd does not keep.
_FREE = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm"})
# Operators whose backward makes the gradients of their first two operands in new memory. (A bias's may be the gradient of the
# result itself, which others get too.)
_FREE_BACKWARD = frozenset({"linear", "matmul", "mm", "bmm", "conv1d", "conv2d", "conv3d", "convolution", "embedding"})


def _name(call: Instruction | None) -> str:
    """Of torch's operator that a call runs; empty for anything else."""
    function = call.function if isinstance(call, Call) else None
    if isinstance(function, OpOverload) and function.namespace == "aten":
        return str(function.overloadpacket.__name__)
    return ""


def result_is_free(maker: Instruction | None) -> bool:
    """Whether the result of an operator's call is new memory that autograd does not keep.

    Args:
        maker: of the value; ``None`` for an input of the program.
    """
    return _name(maker) in _FREE


def values_read_once(program: LocalProgram) -> frozenset[str]:
    """Values that one instruction reads, once, and that nothing else does."""
    reads = Counter(name for i in program.instructions for name in i.reads)
    kept = {o for o in program.outputs if isinstance(o, str)} | {value for _, value in program.updates}
    return frozenset(name for name, count in reads.items() if count == 1 and name not in kept)


def values_with_free_gradients(program: LocalProgram) -> frozenset[str]:
    """Values that one operator alone reads, once, which makes their gradient in new memory."""
    calls = [call for call in program.calls if _name(call) in _FREE_BACKWARD]
    return values_read_once(program) & {a.name for call in calls for a in call.args[:2] if isinstance(a, Ref)}
