"""Rules of matrix products: rows and columns are free, the dim summed over leaves partial sums.

A bias is added after those sums are reduced, so that it is counted once.
"""

from __future__ import annotations

import math
import string
from typing import Any

import torch
from torch import Tensor

from shardwright.ir.operator import Operator, Slot
from shardwright.ir.signature import Signature
from shardwright.rules.lowering import Local
from shardwright.rules.notation import parse
from shardwright.rules.pieces import guarded_same_call
from shardwright.rules.registry import rule, rule_for
from shardwright.rules.traits import Traits, register_traits

aten = torch.ops.aten

rule("aten.mm", "m k+, k+ n -> m n")
rule("aten.bmm", "b m k+, b k+ n -> b m n")
rule("aten.mv", "m k+, k+ -> m")
rule("aten.dot", "k+, k+ -> ")
rule("aten.vdot", "k+, k+ -> ")
rule("aten.outer", "m, n -> m n")
rule("aten.ger", "m, n -> m n")

_MATMUL = {
    (False, False): "k+, k+ -> ",
    (False, True): "k+, ... k+ n -> ... n",
    (True, False): "... m k+, k+ -> ... m",
    (True, True): "... m k+, ... k+ n -> ... m n",
}


@rule_for("aten.matmul")
def _matmul(op: Operator) -> Signature:
    left, right = (len(meta.shape) > 1 for meta in op.inputs)
    return parse(_MATMUL[left, right], op)


@rule_for("aten.linear")
def _linear(op: Operator) -> Signature:
    """Builds the rule of ``y = x Wᵀ + b``. A weight of one dim has one output feature and no dim for it."""
    n = "n" if len(op.inputs[1].shape) == 2 else ""
    if len(op.inputs) == 2:
        return parse(f"... k+, {n} k+ -> ... {n}", op)
    return parse(f"... k+, {n} k+, {n} -> ... {n}", op, None, (), _linear_with_bias, (2,))


def _linear_with_bias(local: Local) -> Any:
    if not local.axes_of("k"):
        return local.same_call()
    product = local.settle(local.same_call(bias=None)[0])
    return (local.call(add_scaled, product, local.inputs[2]),)


@rule_for("aten.addmm", "aten.addmv", "aten.addbmm", "aten.baddbmm")
def _add_product(op: Operator) -> Signature:
    """Builds the rule of ``beta · input + alpha · product``. The input is broadcast to the product."""
    product, result = {
        "aten.addmm": ("m k+, k+ n", "m n"),
        "aten.addmv": ("m k+, k+", "m"),
        "aten.addbmm": ("b+ m k+, b+ k+ n", "m n"),
        "aten.baddbmm": ("b m k+, b k+ n", "b m n"),
    }[op.name]
    letters = result.split()
    added = " ".join(letters[len(letters) - len(op.inputs[0].shape) :])
    return parse(f"{added}, {product} -> {result}", op, None, (), _product_then_add, (0,))


def _product_then_add(local: Local) -> Any:
    if not any(local.axes_of(factor) for factor in local.signature.summed):
        return guarded_same_call(local)
    added, left, right = local.inputs
    multiply = sum_of_products if local.op.name == "aten.addbmm" else aten.matmul.default
    product = local.settle(local.call(multiply, left, right))
    return (local.call(add_scaled, product, added, local.op.argument("alpha"), local.op.argument("beta")),)


def sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Computes the sum over the batch of matrix products, as ``addbmm`` adds it."""
    return left.transpose(0, 1).flatten(1) @ right.flatten(0, 1)


def add_scaled(product: Tensor, added: Tensor, alpha: float = 1, beta: float = 1) -> Tensor:
    """Computes ``alpha · product + beta · added`` in the product's dtype. With ``beta`` 0, ``added`` is not read.

    Args:
        product, added: local tensors of the same shape, or one that broadcasts.
        alpha, beta: their factors.
    """
    if alpha != 1:
        product = product * alpha
    return product if beta == 0 else product.add(added.to(product.dtype), alpha=beta)


@rule_for("aten.einsum")
def _einsum(op: Operator) -> Signature | None:
    """Builds the rule from the equation, with its letters as factors. Those that reach no output are summed."""
    equation = op.argument("equation").replace(" ", "")
    operands = op.argument("tensors")
    if not all(isinstance(operand, Slot) for operand in operands):
        return None
    shapes = [op.inputs[operand.index].shape for operand in operands]
    left, arrow, result_term = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        result_term = _implicit_output(terms)
    spelled = [_spell(term, _extra(term, shape)) for term, shape in zip(terms, shapes, strict=True)]
    result = _spell(result_term, max(_extra(term, shape) for term, shape in zip(terms, shapes)))
    sizes: dict[str, int] = {}
    for term, shape in zip(spelled, shapes):
        for letter, size in zip(term, shape, strict=True):
            sizes[letter] = size if sizes.get(letter, 1) == 1 else sizes[letter]
    marked = {letter: letter + _mark(letter, spelled, result) for letter in sizes}
    text = ", ".join(" ".join(marked[letter] for letter in term) for term in spelled)
    return parse(f"{text} -> {' '.join(marked[letter] for letter in result)}", op, sizes)


def _implicit_output(terms: list[str]) -> str:
    """Returns the result's letters if the equation has no arrow.

    They are those that appear once, in order, capitals first, after the ellipsis.
    """
    letters = "".join(terms)
    ellipsis = "..." if "..." in letters else ""
    return ellipsis + "".join(x for x in string.ascii_uppercase + string.ascii_lowercase if letters.count(x) == 1)


def _extra(term: str, shape: tuple[int, ...]) -> int:
    """Counts the dims that the ellipsis of a term stands for."""
    return len(shape) - len(term.replace("...", ""))


def _spell(term: str, extra: int) -> list[str]:
    """Returns the factors of a term. Its ellipsis becomes ``extra`` factors that line up from the right."""
    before, found, after = term.partition("...")
    middle = [f"_{i}" for i in reversed(range(extra))] if found else []
    return [*before, *middle, *after]


def _mark(letter: str, terms: list[list[str]], result: list[str]) -> str:
    """Returns the mark of a letter: one of a diagonal stays whole, one that the result lacks is summed."""
    if any(term.count(letter) > 1 for term in terms):
        return "!"
    return "" if letter in result else "+"


# -- traits ------------------------------------------------------------------------------------------------------------------


def _nothing(op: Operator) -> float:
    return 1.0


def _batch_and_inner(op: Operator) -> float:
    batch, _, inner = op.inputs[1].shape
    return float(batch * inner)


def _letters_not_kept(op: Operator) -> float:
    """Computes the product of the sizes of an equation's letters that its output lacks."""
    inputs, arrow, output = str(op.argument("equation", "")).replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, meta in zip(inputs.split(","), op.inputs):
        leading, _, trailing = term.partition("...")
        found = [*zip(leading, meta.shape), *zip(reversed(trailing), reversed(meta.shape))]
        for letter, size in found:
            sizes[letter] = max(size, sizes.get(letter, 1))
    if not arrow:  # without an arrow, letters that stand there once are the output's
        output = "".join(letter for letter in sizes if inputs.count(letter) == 1)
    return float(math.prod(size for letter, size in sizes.items() if letter not in output))


TRAITS = {
    Traits("matmul", new_result=True, new_gradients=True, half=True): "linear matmul mm bmm",
    Traits("matmul", operands=1, new_result=True, half=True): "addmm baddbmm",
    Traits("matmul", operands=1): "addmv",
    Traits("matmul", operands=1, summed=_batch_and_inner): "addbmm",
    Traits("matmul", summed=_letters_not_kept, half=True): "einsum",
    Traits("matmul", summed=_nothing): "outer ger",
    Traits("matmul"): "mv dot vdot",
    Traits(linear=True): "add_scaled",  # called by the lowering above; its product is a separate call
}
register_traits(TRAITS)
