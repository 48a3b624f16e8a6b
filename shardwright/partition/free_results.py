"""Free results: what operators make that nobody else holds, so that a sum over ranks may be done in place."""

from __future__ import annotations

from shardwright.partition.program import Call, Instruction
from shardwright.rules.operator import OpOverload

# Operators whose result is new memory that autograd does not keep.
_FREE = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm"})


def result_is_free(maker: Instruction | None) -> bool:
    """Whether the result of an operator's call is new memory that autograd does not keep.

    Args:
        maker: of the value; ``None`` for an input of the program.
    """
    function = maker.function if isinstance(maker, Call) else None
    return (
        isinstance(function, OpOverload)
        and function.namespace == "aten"
        and function.overloadpacket.__name__ in _FREE
    )
