"""Writes what ``add_prim_attr`` asks of operators into the graph, before anything is planned.

After this pass an attribute is an ordinary strategy: layouts on operators, layouts pinned onto the values they read.
Planners need not know of attributes, and plan files contain all their effects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shardwright.base.operators import ALIAS
from shardwright.errors import Problems
from shardwright.ir.choice import late_layout
from shardwright.ir.graph import Graph, Node, where_of
from shardwright.ir.layout import Layout
from shardwright.ir.marks import Mark
from shardwright.ir.operator import Operator, Slot, TensorMeta
from shardwright.plan.asked.given_layouts import GivenLayouts
from shardwright.plan.asked.manual_split import self_defined, split_by_hand
from shardwright.plan.asked.nd_tensor_parallel import Pattern, Product, pattern_of, product_of, same_axes, weight_for
from shardwright.plan.asked.strategies import check_layout
from shardwright.rules.registry import signature_of

ParameterPlan = Mapping[str, tuple[Any, str]]


def with_attributes(graph: Graph, devices: int, parameter_plan: ParameterPlan | None = None) -> Graph:
    """Carries out every operator attribute of a graph.

    Args:
        graph: the graph.
        devices: number of ranks.
        parameter_plan: the layouts given to parameters by name, and where they were given.

    Returns:
        The graph itself where no operator has an attribute.

    Raises:
        StrategyError: all attributes that cannot be followed.
    """
    if not any(asked(node) for node in graph.nodes):
        return graph
    return _Attributes(graph, devices, parameter_plan or {}).run()


def asked(node: Node) -> dict[str, Any]:
    """Returns the attributes of an operator: its own, or those of the marked function or module that contains it."""
    mark = node.mark if node.mark is not None else node.region
    if mark is None or mark.is_pin or not mark.attributes or node.op.target is ALIAS:
        return {}
    return {name: value for name, value in mark.attributes.items() if value is not False and name != "recompute"}


class _Attributes:
    def __init__(self, graph: Graph, devices: int, parameter_plan: ParameterPlan):
        self.graph, self.devices = graph, devices
        self.problems = Problems()
        self.nodes: list[Node] = []
        self.given_layouts = GivenLayouts(graph, parameter_plan)
        self.maker: dict[str, Node] = {}
        self.aliases: dict[TensorMeta, Operator] = {}  # one for all that are alike, as captures have it
        self.resting: dict[tuple[str, Layout], str] = {}  # value and where it rests -> its alias there
        self.followed: set[int] = set()  # marks whose attribute found its operator

    def run(self) -> Graph:
        for node in self.graph.nodes:
            changed = self.node(node)
            self.nodes.append(changed)
            self.maker.update(dict.fromkeys(changed.outputs, changed))
            self.given_layouts.learn(changed)
        for node in self.graph.nodes:
            mark = node.region
            if asked(node).get("enable_nd_tp") and mark is not None and id(mark) not in self.followed:
                self.problems.add(f"{mark.name}{_at(mark.source)}: enable_nd_tp, but it has no matrix product; remove it")
        self.problems.raise_if_any("the operator attributes cannot be followed")
        return replace(self.graph, nodes=tuple(self.without_unread()))

    def node(self, node: Node) -> Node:
        attributes = asked(node)
        own = node.mark is not None
        if attributes.get("enable_nd_tp") and (own or product_of(node.op) is not None):
            return self.high_dimensional(node, attributes.get("ndtp_reduce_scatter_axis"))
        if "ndtp_reduce_scatter_axis" in attributes and not attributes.get("enable_nd_tp"):
            self.problems.add(f"{where_of(node)}: ndtp_reduce_scatter_axis goes with enable_nd_tp; set that too")
        if "manual_split" in attributes:
            table, indices = self.given_layouts.given(node, 0), self.given_layouts.given(node, 1)
            return split_by_hand(node, attributes["manual_split"], table, indices, self.devices, self.problems)
        if attributes.get("self_define_shard"):
            return self_defined(node, self.devices, self.problems)
        if attributes.get("skip_redistribution"):
            return self.kept_in_place(node)
        return self.given_layouts.reordered(node) if self.followed else node

    # -- high-dimension tensor parallel -------------------------------------------------------------------------------

    def high_dimensional(self, node: Node, scatter: int | None) -> Node:
        product, mark = product_of(node.op), node.mark or node.region
        assert mark is not None
        self.followed.add(id(mark))
        if product is None:
            why = "is for products of a matrix by a matrix, which this operator is not; remove it"
            self.problems.add(f"{where_of(node)}: enable_nd_tp {why}")
            return node
        found = self.pattern(node, product, scatter)
        if found is None:
            return node
        signature = signature_of(node.op)
        assert signature is not None
        inputs = list(node.inputs)
        layouts = [late_layout(signature, i, found.result, node.op) for i in range(len(inputs))]
        for i, resting, computing in zip((product.left, product.right), found.resting, found.computing):
            layouts[i] = computing
            if resting != computing:
                inputs[i] = self.at_rest(node, i, resting, mark)
        self.check_given(node, layouts, found.result)
        told = replace(
            mark, name=mark.name, in_strategy=tuple(layouts), out_strategy=(found.result,), parameter_plan=None, exact=True
        )
        count = len(inputs)
        return replace(node, inputs=tuple(inputs), mark=told, mark_positions=tuple(range(count)), mark_count=count)

    def pattern(self, node: Node, product: Product, scatter: int | None) -> Pattern | None:
        """Finds the pattern of the layouts given to a product; ``None``, with a problem, where there is none."""

        def refuse(why: str) -> None:
            self.problems.add(f"{where_of(node)}: {why}")

        left, right = self.given_layouts.given(node, product.left), self.given_layouts.given(node, product.right)
        if isinstance(left, Layout) and right is None and node.mark is None:
            right = self.weight_of(node, product, left)
        for name, entry, index in (("activation", left, product.left), ("weight", right, product.right)):
            if not isinstance(entry, Layout):
                given = "no layout" if entry is None else repr(entry)
                refuse(f"enable_nd_tp needs a Layout for activation and weight, but the {name} has {given}; write "
                       'layout("None", ("x", "y")) and layout("x", "y")')  # fmt: skip
                return None
            what = f"{where_of(node)} {name}"
            if not check_layout(entry, len(node.op.inputs[index].shape), self.devices, what, self.problems):
                return None
        return pattern_of(product, left, right, scatter, refuse)

    def weight_of(self, node: Node, product: Product, left: Layout) -> Layout | None:
        """Returns the weight's layout in a module that was given layouts for its inputs only."""
        if left.dims is None or left.ndim != product.ndims[0]:
            return None
        have = self.given_layouts.of.get(node.inputs[product.left])
        return weight_for(product, have if have is not None and have.ndim == left.ndim else left)

    def at_rest(self, node: Node, index: int, layout: Layout, mark: Mark) -> str:
        """Pins an input of ``node`` to the layout it is stored in. Readers of one layout share the result.

        Args:
            node: the operator.
            index: of the input.
            layout: the layout it is stored in.
            mark: the mark of the pin.
        """
        value, meta = node.inputs[index], node.op.inputs[index]
        while value in self.maker and _is_entry(self.maker[value]):  # where the module was entered: that is said here
            value = self.maker[value].inputs[0]
        key = (value, layout)
        if key not in self.resting:
            name = f"{node.name}_at_rest_{index}"
            pin = Mark(f"{mark.name} input {index}", (layout,), source=mark.source, is_pin=True, module_path=mark.module_path)
            op = self.aliases.setdefault(meta, Operator(ALIAS, (Slot(0),), {}, (meta,), (meta,)))
            alias = replace(
                node,
                name=name,
                op=op,
                inputs=(value,),
                outputs=(name,),
                mark=pin,
                mark_positions=(0,),
                mark_count=1,
                region=None,
            )
            if value in self.given_layouts.parameters:  # not the first reader's alone
                alias = replace(alias, recompute=None, copy=None, carries_batch=False)
            self.nodes.append(alias)
            self.resting[key] = name
        return self.resting[key]

    def check_given(self, node: Node, layouts: Sequence[Layout], result: Layout) -> None:
        """Checks that the given layouts of bias and result are those of the pattern."""
        mark = node.mark
        if mark is None:
            return
        product = product_of(node.op)
        told = [("the bias", self.given_layouts.given(node, i), layout) for i, layout in enumerate(layouts)
                if product is not None and i not in (product.left, product.right)]  # fmt: skip
        told += [("out_strategy", entry, result) for entry in mark.out_strategy or ()]
        for name, entry, right in told:
            fine = isinstance(entry, Layout) and entry.dims is not None and entry.ndim == right.ndim
            if entry is not None and not (fine and all(map(same_axes, entry.bound, right.bound))):
                self.problems.add(f"{where_of(node)}: {name} is {_text(entry)}, but comes as {right.short()}; write that")

    # -- reshapes -------------------------------------------------------------------------------------------------------

    def kept_in_place(self, node: Node) -> Node:
        """Returns a reshape that follows its input; ``manual_split.check_in_place`` checks the plan later."""
        if node.mark is None or node.mark.in_strategy is not None:
            return node
        return replace(node, mark=None, region=node.mark)

    # -- after ------------------------------------------------------------------------------------------------------------

    def without_unread(self) -> list[Node]:
        """Removes the entries into modules that nothing reads any more."""
        read = {v for node in self.nodes for v in node.inputs} | {o for o in self.graph.outputs if isinstance(o, str)}
        read |= {v for _, v in self.graph.updates}
        return [node for node in self.nodes if node.outputs[0] in read or not _is_entry(node)]


def _is_entry(node: Node) -> bool:
    """Tells whether a node is where a value enters a module with ``enable_nd_tp``."""
    return (
        node.op.target is ALIAS
        and node.mark is not None
        and node.mark.is_pin
        and bool(node.mark.attributes.get("enable_nd_tp"))
    )


def _text(entry: Any) -> str:
    return entry.short() if isinstance(entry, Layout) and entry.dims is not None else repr(entry)


def _at(source: str) -> str:
    return f" at {source}" if source else ""
