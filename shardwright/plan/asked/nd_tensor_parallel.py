"""High-dimension tensor parallel: products whose operands rest more finely split than they are computed with.

A strategy in two or three dimensions says where the operands of a product *rest*. The product gathers what it needs,
multiplies, and scatters its sum, so that the result rests as finely split again. In both patterns ``x`` splits the dim
that is summed over, and ``y`` the columns of the weight:

===  ==========================  ==================  =================================  =======================
     activation                  weight              gathered                           result
===  ==========================  ==================  =================================  =======================
2-D  ``("None", ("x", "y"))``    ``("x", "y")``      the activation over ``y``          ``("None", ("y", "x"))``
3-D  ``(("z", "y"), "x")``       ``(("x", "z"), "y")``  the activation over ``y``, the  ``(("z", "x"), "y")``
                                                     weight over ``z``
===  ==========================  ==================  =================================  =======================

The first axis of each pair is the more significant: the other is what is gathered, or was scattered, and a gather takes
the least significant axis of a dim. That holds whatever the order of the device matrix, so a tuple is read so here; an
order that is written out, ``"y>x"``, has to be this one.

Nothing else is new: the layouts in which a product computes are a choice, and the edges to where its operands rest are
redistributions like any other, with their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shardwright.ir.layout import Layout
from shardwright.ir.operator import Operator
from shardwright.rules.registry import signature_of
from shardwright.rules.traits import traits_of

Axes = tuple[str, ...]
Refuse = Callable[[str], None]


@dataclass(frozen=True)
class Product:
    """Roles of the dims of a product.

    Args:
        left, right: which inputs are the activation and the weight.
        inner: the dim that is summed over, of the activation and of the weight.
        columns: the dim of the weight that the activation does not have, of the weight and of the result.
        rows: the dims of the activation that the weight does not have, of the activation and of the result.
        shared: all dims of the activation that the result has, of the activation and of the result.
        ndims: dims of the activation, the weight and the result.
    """

    left: int
    right: int
    inner: tuple[int, int]
    columns: tuple[int, int]
    rows: tuple[tuple[int, int], ...]
    shared: tuple[tuple[int, int], ...]
    ndims: tuple[int, int, int]


@dataclass(frozen=True)
class Pattern:
    """Layouts of a product: where activation and weight are stored, those it computes with, and that of its result."""

    resting: tuple[Layout, Layout]
    computing: tuple[Layout, Layout]
    result: Layout


def product_of(op: Operator) -> Product | None:
    """Returns the dims of a product of an activation and a weight; ``None`` for any other operator."""
    signature = signature_of(op) if traits_of(op).family == "matmul" else None
    if signature is None or len(signature.summed) != 1:
        return None
    operands = [i for i in range(len(op.inputs)) if i not in signature.late]
    if len(operands) != 2:
        return None
    at_left, at_right = operands
    left, right = signature.inputs[at_left], signature.inputs[at_right]
    inner = (next(iter(signature.summed)),)
    result = {factors: dim for dim, factors in enumerate(signature.outputs[0]) if factors}
    columns = [dim for dim, factors in enumerate(right) if factors in result and factors not in left]
    shared = tuple((dim, result[factors]) for dim, factors in enumerate(left) if factors in result)
    if left.count(inner) != 1 or right.count(inner) != 1 or len(columns) != 1:
        return None
    return Product(
        at_left,
        at_right,
        (left.index(inner), right.index(inner)),
        (columns[0], result[right[columns[0]]]),
        tuple((dim, there) for dim, there in shared if left[dim] not in right),
        shared,
        (len(left), len(right), len(signature.outputs[0])),
    )


def pattern_of(product: Product, left: Layout, right: Layout, scatter: int | None, refuse: Refuse) -> Pattern | None:
    """Finds the pattern that the layouts of an activation and a weight stand for.

    Args:
        product: the roles of the dims.
        left, right: the layouts of activation and weight.
        scatter: the dim of the result over which its sum is scattered; ``None``: the pattern's own.
        refuse: called with what is wrong.

    Returns:
        ``None`` where they follow neither pattern.
    """
    if left.mesh != right.mesh:
        refuse(f"the activation is over {left.mesh} and the weight over {right.mesh}; use one Layout for both")
        return None
    if any(left.sizes) or any(right.sizes):
        refuse("pieces of given sizes cannot be gathered axis by axis; leave the sizes out")
        return None
    if scatter is not None and not -product.ndims[2] <= scatter < product.ndims[2]:
        refuse(f"ndtp_reduce_scatter_axis is {scatter}, but the result has {product.ndims[2]} dims; give one of them")
        return None
    resting: tuple[dict[int, Axes], dict[int, Axes]]
    computing: tuple[dict[int, Axes], dict[int, Axes]]
    inner, held, columns = left.bound[product.inner[0]], right.bound[product.inner[1]], right.bound[product.columns[0]]
    if held and columns and {*inner} == {*held, *columns}:
        # 2-D
        summed, onto = held, product.columns[1]
        resting = {product.inner[0]: (*held, *columns)}, {}
        computing = {product.inner[0]: held}, {}
    else:
        spare = tuple(a for a in held if a not in inner)
        rows = [(dim, there) for dim, there in product.rows if {*columns, *spare} <= {*left.bound[dim]}]
        if not (inner and columns and {*inner} <= {*held} and len(rows) == 1):
            refuse(_neither(product, left, right))
            return None
        (row, onto), summed = rows[0], inner
        kept = tuple(a for a in left.bound[row] if a not in columns)
        resting = {row: (*kept, *columns)}, {product.inner[1]: (*inner, *spare)}
        computing = {row: kept}, {product.inner[1]: inner}
    if not (_reads_so(left, resting[0], refuse, "activation") and _reads_so(right, resting[1], refuse, "weight")):
        return None
    computed = with_axes(left, computing[0])
    dims: list[Axes] = [()] * product.ndims[2]
    for dim, there in product.shared:
        dims[there] = computed.bound[dim]
    dims[product.columns[1]] = columns
    dims[onto if scatter is None else scatter] += left.mesh.ordered(summed)
    return Pattern(
        (with_axes(left, resting[0]), with_axes(right, resting[1])),
        (computed, with_axes(right, computing[1])),
        Layout.of(left.mesh, dims),
    )


def weight_for(product: Product, left: Layout) -> Layout | None:
    """Derives the layout of the weight from the activation's, by the order of its axes; ``None`` without a pattern."""
    inner = left.bound[product.inner[0]]
    rows = [left.bound[dim] for dim, _ in product.rows if len(left.bound[dim]) > 1]
    dims: list[Axes] = [()] * product.ndims[1]
    if len(inner) > 1:
        dims[product.inner[1]], dims[product.columns[0]] = inner[:-1], inner[-1:]
    elif inner and len(rows) == 1 and len(rows[0]) == 2:
        dims[product.inner[1]], dims[product.columns[0]] = (*inner, rows[0][0]), rows[0][1:]
    else:
        return None
    return Layout.of(left.mesh, dims)


def with_axes(layout: Layout, changes: Mapping[int, Axes]) -> Layout:
    """Returns the layout with other axes for some dims.

    >>> str(with_axes(Layout((2, 2), ("x", "y"))("None", ("x", "y")), {1: ("y", "x")}))
    'None,y>x @ x=2,y=2'
    """
    return Layout.of(layout.mesh, [changes.get(dim, axes) for dim, axes in enumerate(layout.bound)])


def same_axes(one: Axes, other: Axes) -> bool:
    """Tells whether two dims are split by the same axes, in any order."""
    return one == other or (len(one) == len(other) and {*one} == {*other})


def _reads_so(layout: Layout, wanted: Mapping[int, Axes], refuse: Refuse, name: str) -> bool:
    """Tells whether every dim has the wanted axes in the wanted order. A tuple means the device matrix's order."""
    for dim, axes in wanted.items():
        if layout.bound[dim] not in (axes, layout.mesh.ordered(axes)):
            given, right = ">".join(layout.bound[dim]), ">".join(axes)
            refuse(f"dim {dim} of the {name} is {given}, but what is gathered there comes last; write {right!r} or a tuple")
            return False
    return True


def _neither(product: Product, left: Layout, right: Layout) -> str:
    """Describes layouts that follow neither pattern, for a message."""
    a, b = product.inner
    c, row = product.columns[0], product.rows[0][0] if product.rows else None
    forms: list[tuple[str, dict[int, Axes], dict[int, Axes]]] = [("2-D", {a: ("x", "y")}, {b: ("x",), c: ("y",)})]
    if row is not None:
        forms.append(("3-D", {row: ("z", "y"), a: ("x",)}, {b: ("x", "z"), c: ("y",)}))
    known = "; ".join(
        f"{name}: activation {_entries(act, product.ndims[0])}, weight {_entries(weight, product.ndims[1])}"
        for name, act, weight in forms
    )
    return (
        f"enable_nd_tp: the activation is ({left.short()}) and the weight ({right.short()}), which is no pattern; write "
        f"{known}, with axes x, y, z of your own"
    )


def _entries(axes: Mapping[int, Sequence[str]], ndim: int) -> str:
    entries = []
    for dim in range(ndim):
        names = [f'"{a}"' for a in axes.get(dim, ())]
        entries.append('"None"' if not names else names[0] if len(names) == 1 else f"({', '.join(names)})")
    return f"({', '.join(entries)})"
