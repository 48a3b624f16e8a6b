"""Finds values and gradients that nobody else holds. A sum over ranks may overwrite them."""

from __future__ import annotations

from collections import Counter

from shardwright.ir.instructions import Call, Instruction, Ref
from shardwright.ir.operator import OpOverload
from shardwright.ir.program import LocalProgram
from shardwright.rules.traits import Traits, traits_of


def _traits(call: Instruction | None) -> Traits:
    """Returns the traits of torch's operator that a call runs; empty traits for anything else."""
    function = call.function if isinstance(call, Call) else None
    return traits_of(function) if isinstance(function, OpOverload) else Traits()


def result_is_free(maker: Instruction | None) -> bool:
    """Tells whether an operator's result is new memory that autograd does not keep.

    Args:
        maker: of the value; ``None`` for an input of the program.
    """
    return _traits(maker).new_result


def values_read_once(program: LocalProgram) -> frozenset[str]:
    """Finds the values that one instruction reads, once, and that nothing else does."""
    reads = Counter(name for i in program.instructions for name in i.reads)
    kept = {o for o in program.outputs if isinstance(o, str)} | {value for _, value in program.updates}
    return frozenset(name for name, count in reads.items() if count == 1 and name not in kept)


def values_with_free_gradients(program: LocalProgram) -> frozenset[str]:
    """Finds values that one operator alone reads, once, and whose gradient is new memory."""
    calls = [call for call in program.calls if _traits(call).new_gradients]
    return values_read_once(program) & {a.name for call in calls for a in call.args[:2] if isinstance(a, Ref)}
