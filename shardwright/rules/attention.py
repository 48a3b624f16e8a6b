"""Rules of attention: samples and heads are free, the sequence of queries where no causal mask counts positions."""

from __future__ import annotations

from shardwright.ir.operator import Operator, Slot
from shardwright.ir.signature import Signature
from shardwright.rules.notation import parse
from shardwright.rules.registry import rule_for
from shardwright.rules.traits import Traits, register_traits


@rule_for("aten.scaled_dot_product_attention")
def _attention(op: Operator) -> Signature | None:
    """Splits queries ``... h l e``, keys ``... h s e``, values ``... h s v`` and a mask that broadcasts to ``... h l s``.

    With grouped queries (``enable_gqa``) a key's head serves ``r`` heads of queries. Dropout has no rule: it would need, for
    each piece, the random numbers that the whole tensor gets there.
    """
    if op.argument("dropout_p"):
        return None
    length = "l!" if op.argument("is_causal") else "l"
    heads, served, sizes = "", "", {}
    if op.argument("enable_gqa"):
        heads, served = "(h r)", "h"
        sizes = {"h": op.inputs[1].shape[-3], "r": op.inputs[0].shape[-3] // op.inputs[1].shape[-3]}
    texts = [f"... {heads} {length} e!", f"... {served} s! e!", f"... {served} s! v"]
    if isinstance(op.argument("attn_mask"), Slot):
        texts.append(_mask(op.inputs[3].shape, heads, length))
    return parse(f"{', '.join(texts)} -> ... {heads} {length} v", op, sizes)


def _mask(shape: tuple[int, ...], heads: str, length: str) -> str:
    """Returns the notation of a mask, which broadcasts to ``... h l s``."""
    if len(shape) == 2 or not heads:
        return f"... {length} s!"
    return f"... {'1' if shape[-3] == 1 else heads} {length} s!"


# -- traits ------------------------------------------------------------------------------------------------------------------

TRAITS = {Traits("attention", fused=True, kernel="attention", half=True): "scaled_dot_product_attention"}
register_traits(TRAITS)
