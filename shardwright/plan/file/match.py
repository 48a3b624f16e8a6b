"""Matches a plan file to a graph, and makes the plan that it gives.

A file that determines everything about the graph is the plan. The entries of any other file are pins: the planner of the
mode plans around them. Everything that does not fit the graph is refused, all at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from shardwright.errors import Problems
from shardwright.ir.choice import Choice
from shardwright.ir.graph import Graph, GraphInput, Node
from shardwright.ir.layout import Layout
from shardwright.ir.names import LOADED, operator_keys, shapes_text
from shardwright.ir.plan import Plan
from shardwright.plan.asked.pins import Pin, check_fits, check_pin
from shardwright.plan.asked.splits import choice_of_layouts
from shardwright.plan.file.format import OperatorEntry, PlanFile, TensorEntry
from shardwright.plan.file.read import load_plan_file
from shardwright.plan.modes.planner import Planner
from shardwright.plan.modes.table import plan_graph
from shardwright.plan.request import PlanRequest

_NAMED = 4  # of many operators with the same problem, those that a message names


def plan_from_file(
    file: PlanFile | str | os.PathLike[str],
    graph: Graph,
    request: PlanRequest,
    part: bool = False,
    planner: Callable[[Graph, PlanRequest], Plan] = plan_graph,
) -> Plan:
    """Makes the plan that a file gives a graph.

    Args:
        file: a file, or the path of one.
        graph: the graph.
        request: what is asked of the plan.
        part: whether the graph is one part of a train step: entries of other parts are ignored.
        planner: plans what the file leaves open, in the request's mode.

    Returns:
        The very plan that was saved, where the file determines all of it; else the planner's, with the file's entries pinned.

    Raises:
        StrategyError: the file does not fit the graph or the devices, or has layouts that an operator cannot follow; every
            such problem is listed.
    """
    problems = Problems()
    file = file if isinstance(file, PlanFile) else load_plan_file(file)
    if file.devices != request.world_size:
        problems.add(f"{file.path}: it is for {file.devices} devices, here are {request.world_size}; plan again and save")
        problems.raise_if_any(f"the plan file {file.path} cannot be followed")
    found = _Match(file, graph, problems)
    found.operators_fit(part)
    found.tensors_fit(part)
    problems.raise_if_any(f"the plan file {file.path} cannot be followed")
    if found.is_whole:
        plan = _Whole(found, request).plan()
    else:
        plan = planner(graph if request.honour_marks else _without_marks(graph), found.pinned(request))
    found.sums_are_there(plan)
    problems.raise_if_any(f"the plan file {file.path} cannot be followed")
    return plan


@dataclass
class _Match:
    """Entries of a file, by the nodes and inputs of a graph."""

    file: PlanFile
    graph: Graph
    problems: Problems
    operators: dict[str, OperatorEntry] = field(default_factory=dict)
    parameters: dict[str, TensorEntry] = field(default_factory=dict)
    inputs: dict[str, TensorEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keys = operator_keys(self.graph)

    def refuse(self, why: str) -> None:
        self.problems.add(f"{self.file.path}: {why}")

    # -- operators --------------------------------------------------------------------------------------------------

    def operators_fit(self, part: bool) -> None:
        """Finds the entry of each node; reports nodes that are gone, are new or have other shapes."""
        entries = self.file.operators
        patterns = [key for key in entries if "*" in key or "?" in key]
        used = set()
        for node in self.graph.nodes:
            key = self.keys[node.name]
            if key not in entries:
                key = next((p for p in reversed(patterns) if fnmatchcase(key, p)), "")
            if key:
                used.add(key)
                self.operators[node.name] = entries[key]
        gone = [key for key in entries if key not in used]
        if gone and not part:
            lines = [f"{key} (line {entries[key].line})" for key in gone]
            self.refuse(f"{_count(gone, 'operator')} not in the model any more: {_some(lines)}; save the plan again, or "
                        "delete the entries")  # fmt: skip
        new = [self.keys[n.name] for n in self.graph.nodes if n.name not in self.operators]
        if new and self.file.complete and not (part and len(new) == len(self.graph.nodes)):
            self.refuse(f"{_count(new, 'operator')} not in the file: {_some(new)}; save the plan again, or "
                        'delete "complete" to have them planned around the others')  # fmt: skip
        other = []
        for node in self.graph.nodes:
            entry = self.operators.get(node.name)
            if entry is not None and entry.shapes is not None and entry.shapes != (now := shapes_text(node)):
                other.append(f"{self.keys[node.name]} (line {entry.line}) has {now}, in the file {entry.shapes}")
        if other:
            self.refuse(f"{_count(other, 'operator')} of other shapes: {_some(other)}; save a plan for these shapes, or "
                        'delete "shapes" where the layouts suit them too')  # fmt: skip

    # -- parameters and inputs --------------------------------------------------------------------------------------

    def tensors_fit(self, part: bool) -> None:
        here = {str(i.target): i for i in self.graph.inputs if i.kind in ("parameter", "buffer")}
        self.parameters = self._fitting("parameter", self.file.parameters, here, part)
        given = {str(i.target): i for i in self.graph.inputs if i.kind == "input"}
        self.inputs = self._fitting("input", self.file.inputs, given, part)
        new = [name for name, i in here.items() if i.kind == "parameter" and name not in self.file.parameters]
        if new and self.file.complete and not (part and not self.operators):
            self.refuse(f"{_count(new, 'parameter')} not in the file: {_some(new)}; save the plan again, or "
                        'delete "complete" to have them placed as operators want them')  # fmt: skip

    def _fitting(
        self, kind: str, entries: dict[str, TensorEntry], here: dict[str, GraphInput], part: bool
    ) -> dict[str, TensorEntry]:
        """Returns the entries of tensors that are there and have the right shapes."""
        gone = [f"{name} (line {entry.line})" for name, entry in entries.items() if name not in here]
        if gone and not part:
            self.refuse(f"{_count(gone, kind)} read by no operator: {_some(gone)}; delete the entries")
        fitting = {}
        for name, entry in entries.items():
            if name not in here:
                continue
            meta, what = here[name].meta, f"{self.file.where(entry)}: {kind} {name}"
            if entry.shape is not None and entry.shape != meta.shape:
                self.problems.add(f"{what} is {list(meta.shape)}, in the file {list(entry.shape)}; save the plan again")
            elif entry.layout.partial:
                self.problems.add(f"{what}: {entry.layout.short()} has sums pending; a tensor is stored without them")
            elif check_fits(entry.layout, meta, self.file.devices, what, self.problems):
                fitting[name] = entry
        return fitting

    # -- what comes of it -------------------------------------------------------------------------------------------

    @property
    def is_whole(self) -> bool:
        """Tells whether the file determines how every operator runs and where every tensor is."""
        return len(self.operators) == len(self.graph.nodes) and all(
            str(i.target) in (self.inputs if i.kind == "input" else self.parameters)
            for i in self.graph.inputs
            if i.kind in ("input", "parameter")
        )

    def pin(self, node: Node) -> Pin:
        entry = self.operators[node.name]
        source = self.file.where(entry)
        return Pin(entry.inputs, entry.outputs, source, f"{source}: {self.keys[node.name]}")

    def sums_are_there(self, plan: Plan) -> None:
        """Checks that values read with a sum pending are made so: a sum cannot be made pending."""
        where = dict(plan.input_layouts)
        for node in self.graph.nodes:
            choice = plan.choices[node.name]
            for slot, (value, layout) in enumerate(zip(node.inputs, choice.inputs)):
                source = where[value]
                if layout.partial and (source.mesh != layout.mesh or not set(layout.partial) <= set(source.partial)):
                    what = self.pin(node).what if node.name in self.operators else node.where
                    comes = f"but {value} comes as {source.short()}, without that sum; read it without"
                    self.problems.add(f"{what}: input {slot} is read as {layout.short()}, {comes}")
            where.update(zip(node.outputs, choice.outputs))

    def pinned(self, request: PlanRequest) -> PlanRequest:
        """Adds the file's entries to the request."""
        pins = {node.name: self.pin(node) for node in self.graph.nodes if node.name in self.operators}
        # without the line, which would tell the parameters of repeated layers apart
        layouts: dict[str, Any] = {n: (e.layout, self.file.path) for n, e in self.parameters.items()}
        asked = request.parameter_plan if request.honour_marks else {}
        mesh, names = request.mesh, request.mesh_axes
        if mesh is None and len(self.file.mesh.axes) > 1:  # a mesh of one axis can be cut in any way; others are kept
            mesh, names = self.file.mesh.sizes, self.file.mesh.axes
        return replace(
            request, parameter_plan={**asked, **layouts}, honour_marks=True, operator_plan=pins,
            stored=frozenset(self.parameters), mesh=mesh, mesh_axes=names,
        )  # fmt: skip


def _without_marks(graph: Graph) -> Graph:
    """Removes the operators' strategies, for a mode that ignores them but follows a file."""
    nodes = [
        replace(n, mark=replace(n.mark, in_strategy=None, is_pin=False) if n.mark else None, region=None) for n in graph.nodes
    ]
    return replace(graph, nodes=tuple(nodes))


class _Whole:
    """Makes the plan of a file that determines all of it."""

    def __init__(self, found: _Match, request: PlanRequest):
        self.found, self.file, self.graph, self.request = found, found.file, found.graph, request
        self.problems = found.problems

    def plan(self) -> Plan:
        planner = Planner(self.graph, self.request)
        planner.find_rules()
        choices = self.choices(planner)
        self.inputs_fit(planner)
        self.problems.raise_if_any(f"the plan file {self.file.path} cannot be followed")
        file, request = self.file, self.request
        layouts = {i.value: self.layout_of(i) for i in self.graph.inputs}
        machine = _machine(request)
        same = machine is not None and machine.name == file.machine
        return Plan(
            self.graph, file.mesh, choices, planner.signatures, layouts, (*file.notes, f"{LOADED}{file.path}"), request.mode,
            machine=machine, search=file.search if same else None, optimizer_bytes_per_byte=request.optimizer_bytes_per_byte,
            full_batch=request.dataset_strategy == "full_batch", memory_limit=request.memory_limit,
        )  # fmt: skip

    def choices(self, planner: Planner) -> dict[str, Choice]:
        """Returns every node's choice; equal ones are one object, as planners make them."""
        made: dict[Any, Choice | None] = {}
        same: dict[Any, Choice] = {}
        result = {}
        for node in self.graph.nodes:
            pin, needs = self.found.pin(node), tuple(planner.needs[node.name])
            if not check_pin(node, pin, self.file.devices, self.problems):
                continue
            key = (id(node.op), pin.inputs, pin.outputs, needs)
            if key not in made or made[key] is None:
                made[key] = choice_of_layouts(
                    node.op, planner.signatures[node.name], pin.inputs, pin.outputs, needs, pin.what, self.problems
                )
            choice = made[key]
            if choice is not None:
                split = tuple(choice.split.items())
                alike = (choice.mesh, split, choice.inputs, choice.partial_gradient, choice.computed, choice.outputs)
                result[node.name] = same.setdefault(alike, choice)
        return result

    def layout_of(self, graph_input: GraphInput) -> Layout:
        entries = self.found.inputs if graph_input.kind == "input" else self.found.parameters
        entry = entries.get(str(graph_input.target))
        return entry.layout if entry else Layout.replicated(self.file.mesh, len(graph_input.meta.shape))

    def inputs_fit(self, planner: Planner) -> None:
        """Checks that ranks give the same inputs as when the plan was saved."""
        inputs = [i for i in self.graph.inputs if i.kind == "input"]
        if self.request.dataset_strategy == "full_batch":
            told: Iterable[Layout] = [Layout.replicated(self.file.mesh, len(i.meta.shape)) for i in inputs]
        else:
            told = self._handed_in(planner)
        for i, layout in zip(inputs, told):
            saved = self.layout_of(i)
            if saved.slices(i.meta.shape) != layout.slices(i.meta.shape):
                entry = self.found.inputs[str(i.target)]
                self.problems.add(
                    f"{self.file.where(entry)}: input {i.target} is {saved.short()}, dataset_strategy says {layout.short()}; "
                    "call dataset_strategy as when the plan was saved"
                )

    def _handed_in(self, planner: Planner) -> list[Layout]:
        mesh = self.file.mesh
        planner.refinement.add(mesh.sizes, mesh.axes, mesh.ranks)
        planner.check_dataset()
        self.problems.lines += [line for line in planner.problems.lines if line not in self.problems.lines]
        if planner.problems.lines:
            return []
        planner.make_room_for_batch()
        planner.refinement.finish()
        planner.mesh = planner.refinement.meshes[0]
        return [layout for _, layout in planner.batch_layouts()]


def _machine(request: PlanRequest) -> Any:
    from shardwright.cost.machine_files import load_machine

    return load_machine(request.machine) if request.machine is not None else None


def _count(found: list[str], what: str) -> str:
    return f"1 {what} is" if len(found) == 1 else f"{len(found)} {what}s are"


def _some(found: list[str]) -> str:
    """Formats a few names of many."""
    more = len(found) - _NAMED
    return ", ".join(found[:_NAMED]) + (f" and {more} more" if more > 0 else "")
