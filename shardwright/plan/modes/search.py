"""Searches the whole plan, with the user's strategies as pinned choices of the same problem.

- ``dynamic_programming``: the optimum of the cost model on a mesh, by elimination.
- ``recursive_programming``: one mesh axis at a time, each level an exact problem of a few choices per operator, then each
  axis once more with the others as found; any number of devices.
- ``auto``: the best known over several meshes, with a certified gap.

The memory of a rank is a hard limit in all of them.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shardwright.base.text import bytes_text, enough
from shardwright.cost.machine_files import load_machine
from shardwright.errors import MemoryLimitError, StrategyError
from shardwright.ir.choice import Choice
from shardwright.ir.graph import Graph
from shardwright.ir.layout import Layout
from shardwright.ir.machine import Machine
from shardwright.ir.plan import Plan, Search
from shardwright.plan.asked.strategies import resolve_strategy
from shardwright.plan.choose.follow import choice_for_output
from shardwright.plan.choose.meshes import meshes_to_try
from shardwright.plan.choose.tables import ChoiceTable, Codes, Symbol, choices_of, codes_of, layout_of, table_of_choice
from shardwright.plan.memory import step_memory
from shardwright.plan.modes.attempt import Attempt
from shardwright.plan.modes.planner import Planner
from shardwright.plan.modes.recursive import Recursion
from shardwright.plan.problem.blocks import blocks_of
from shardwright.plan.problem.formulation import Folded, Formulation, stored_codes
from shardwright.plan.problem.prices import Pricing, bytes_of_parameters
from shardwright.plan.problem.ready import ready_values
from shardwright.plan.request import PlanRequest
from shardwright.search.problem import Infeasible, Problem, Solution
from shardwright.search.solve import solve

# A gap below this is not worth more time.
GAP = 0.002
# How often the search is repeated under a tighter limit, if its plan needs more memory than it computed.
_TIGHTENINGS = 5
# Prices of all memory against all time, for what needs least memory: with time left out, the search would think nothing of
# making large tensors that nobody keeps.
_MEMORY_WEIGHTS = (1.0, 10.0, 100.0)


class SearchPlanner(Planner):
    """Searches for the plan of a graph; see the module for the modes."""

    def __init__(self, graph: Graph, request: PlanRequest):
        super().__init__(graph, request)
        self.machine: Machine = load_machine(request.machine)
        self.full_batch = request.dataset_strategy == "full_batch"
        self.building = self.solving = 0.0
        self.live: dict[int, str] = {}

    def plan(self) -> Plan:
        """Searches the meshes that are worth it and returns the best plan.

        Raises:
            StrategyError: strategies that cannot be followed.
            MemoryLimitError: no plan fits into the memory of a rank.
        """
        started = time.perf_counter()
        self.deadline = started + self.request.seconds
        self.find_rules()
        self.check()
        self.problems.raise_if_any("the strategies cannot be followed")
        self.asked = self.refinement
        self.ready = set(ready_values(self.graph, self.full_batch))
        asked = self.request.parameter_plan
        labels = {i.value: str(asked[str(i.target)][0]) for i in self.graph.inputs if str(i.target) in asked}
        self.folded = Folded(self.graph, frozenset(self.ready), blocks_of(self.graph, labels))
        how = self.recursive if self.request.mode == "recursive_programming" else self.exact
        tried: list[tuple[tuple[int, ...], float]] = []
        best: Plan | None = None
        failed: MemoryLimitError | None = None
        candidates = self.candidates()
        for count, sizes in enumerate(candidates, 1):
            self.on_mesh(sizes)
            self.request.tell(f"searching for a plan on the mesh {self.mesh}, {count} of {len(candidates)}")
            try:
                found = self.within_limit(how)
            except MemoryLimitError as error:
                failed = failed if failed is not None and failed.least <= error.least else error
                continue
            assert found.search is not None
            tried.append((self.mesh.sizes, found.search.seconds))
            if best is None or found.search.seconds < best.search.seconds:  # type: ignore[union-attr]
                best = found
        if best is None:
            assert failed is not None
            raise failed
        assert best.search is not None
        bound = best.search.bound
        search = replace(best.search, tried=tuple(tried), planning=time.perf_counter() - started, bound=bound)
        return replace(best, search=search)

    # -- meshes -----------------------------------------------------------------------------------------------------

    def candidates(self) -> Sequence[tuple[int, ...]]:
        mesh = self.request.mesh
        if mesh is not None:
            if math.prod(mesh) != self.size:
                sizes = "·".join(map(str, mesh))
                raise StrategyError(
                    f"the mesh {sizes} = {math.prod(mesh)} was asked for, the world has {self.size} devices: give sizes whose "
                    f"product is {self.size}"
                )
            return [mesh]
        return meshes_to_try(self.size, self.machine, 1 if self.request.mode == "recursive_programming" else 3)

    def on_mesh(self, sizes: tuple[int, ...]) -> None:
        """Starts over on a mesh, refined so that it can name the user's strategies."""
        self.refinement = copy.deepcopy(self.asked)
        self.refinement.add_if_fits(sizes)
        if self.request.mesh_axes and len(self.request.mesh_axes) == len(sizes):
            self.refinement.add(sizes, self.request.mesh_axes)
        self.refinement.finish()
        self.mesh = self.refinement.meshes[0]
        self.choices = {}
        self.pricing = Pricing(self.machine, self.mesh, bytes_of_parameters(self.graph), self.request.schedule)
        self.tables: dict[Any, ChoiceTable] = {}
        self.pinned: dict[int, ChoiceTable] = {}
        for site in self.folded.sites:
            choice = self.pinned_choice(site)
            if choice is not None:
                node = self.graph.nodes[site]
                table = table_of_choice(node.op, self.signatures[node.name], self.mesh, choice)
                self.pinned[site] = self.pricing.interned_table(table)
        self.problems.raise_if_any("the strategies cannot be followed")
        self.batch = dict.fromkeys(i.value for i in self.graph.inputs)
        if not self.full_batch:
            self.batch.update((i.value, layout) for i, layout in self.batch_layouts())
        self.where = {i.value: self.given(i) for i in self.graph.inputs}

    def pinned_choice(self, site: int) -> Choice | None:
        node = self.graph.nodes[site]
        signature, needs = self.signatures[node.name], self.needs[node.name]
        if node.name in self.checked:
            return resolve_strategy(node, signature, self.checked[node.name], self.refinement, needs, self.problems)
        if node.name in self.pins:
            return choice_for_output(node.op, signature, self.laid_out(self.pins[node.name], node.op.inputs[0].shape), needs)
        return None

    # -- the problem ------------------------------------------------------------------------------------------------

    def table(
        self,
        site: int,
        base: tuple[Symbol, ...] | None = None,
        free: Sequence[int] | None = None,
        among: frozenset[Symbol] | None = None,
    ) -> ChoiceTable:
        """Lists the choices of a site; see :func:`shardwright.plan.choose.tables.choices_of`.

        Args:
            site: the operator.
            base, free: where given, only choices that differ from ``base`` on the axes ``free``.
            among: the symbols that axes may have.
        """
        if site in self.pinned:
            return self.pinned[site]
        node = self.graph.nodes[site]
        if free is not None and len(free) == len(self.mesh.axes):
            base = free = None
        key = (id(node.op), base, None if free is None else tuple(free), among)
        if key not in self.tables:
            found = choices_of(node.op, self.signatures[node.name], self.mesh, base, free, among)
            self.tables[key] = self.pricing.interned_table(found)
        return self.tables[key]

    def stored(self, value: str, base: tuple[int, ...] | None = None, free: Sequence[int] | None = None) -> Codes:
        """Returns the codes in which a parameter may be stored."""
        asked = self.where.get(value)
        if asked is not None:
            codes = codes_of([asked], self.mesh)
        else:
            codes = stored_codes(self.graph.metas[value], self.mesh)
            if base is not None and free is not None:
                kept = [a for a in range(len(self.mesh.axes)) if a not in free]
                codes = codes[(codes[:, kept] == np.array(base, dtype=np.int8)[kept]).all(axis=1)]
        return self.pricing.interned(codes)

    def formulate(
        self,
        tables: dict[int, ChoiceTable],
        stored: dict[str, Codes],
        gradients: float = 0.0,
    ) -> Formulation:
        given = {
            i.value: self.pricing.interned(codes_of([self.placed(i)], self.mesh))
            for i in self.graph.inputs
            if i.kind != "parameter" and i.value not in self.ready
        }
        return Formulation(
            self.folded,
            self.mesh,
            self.pricing,
            tables,
            stored,
            given,
            self.request.optimizer_bytes_per_byte,
            1.0,
            gradients,
            self.live,
        )

    def placed(self, graph_input: Any) -> Layout:
        return self.where[graph_input.value] or Layout.replicated(self.mesh, len(graph_input.meta.shape))

    def read_parameters(self) -> list[str]:
        return [i.value for i in self.graph.inputs if i.kind == "parameter" and i.value in self.folded.uses]

    # -- ways to solve it -------------------------------------------------------------------------------------------

    def exact(self, limit: float | None, gradients: float) -> Attempt:
        """Searches all axes at once."""
        started = time.perf_counter()
        tables = {site: self.table(site) for site in self.folded.sites}
        stored = {value: self.stored(value) for value in self.read_parameters()}
        formulation = self.latest = self.formulate(tables, stored, gradients)
        problem = replace(formulation.problem, limit=limit)
        built = time.perf_counter()
        solution = self.find(problem, GAP)
        self.building, self.solving = built - started, time.perf_counter() - built
        return Attempt(self.mesh, formulation, solution)

    def find(self, problem: Problem, gap: float) -> Solution:
        """Runs the search, on one process of a job."""
        found: Solution = self.request.on_first_rank(lambda: solve(problem, gap=gap, seconds=self.share_of_time()))
        return found

    def share_of_time(self) -> float:
        """Returns the seconds that the next solution may take: a large part of the remaining ones."""
        return max(0.5, (self.deadline - time.perf_counter()) / 3)

    def recursive(self, limit: float | None, gradients: float) -> Attempt:
        return Recursion(self, limit, gradients).run()

    def within_limit(self, how: Callable[[float | None, float], Attempt]) -> Plan:
        """Searches the plan of this mesh whose whole step fits into memory.

        The search limits what adds up over operators: parameters, optimizer states, what autograd keeps. Where the rest
        (gradients, buffers) makes the plan too large, the limit is tightened by what is missing.
        """
        limit = self.request.memory_limit
        target, gradients, bound = limit, 0.0, 0.0
        self.live = {}
        for _ in range(_TIGHTENINGS):
            try:
                attempt = how(target, gradients)
            except Infeasible as error:
                found = self.smallest(error)
                if limit is None or found is None or step_memory(found).peak > limit:
                    raise self.does_not_fit(found, error) from None
                return replace(found, search=replace(found.search, bound=bound))  # type: ignore[type-var]
            if target == limit:  # every plan that fits keeps less than this, so its bound holds for all of them
                bound = max(bound, attempt.solution.bound)
            plan = self.assemble(attempt, bound)
            if limit is None:
                return plan
            memory = step_memory(plan)
            if memory.peak <= limit:
                return plan
            assert target is not None
            if not self.live and self.near_the_end(plan):
                self.live = {self.site_of(memory.at[1]): memory.at[0]}
            elif memory.at[0] != "forward" and not gradients and memory.parts["gradients"] > 0.5 * (limit - target):
                target, gradients = limit, 1.0  # gradients weigh, too
            else:
                target -= max(memory.peak - limit, 0.001 * limit)
        raise self.does_not_fit(plan, None)

    def near_the_end(self, plan: Plan) -> bool:
        """Tells whether a plan's peak is where nearly all kept values are alive. They then count in full."""
        phase, name = step_memory(plan).at
        last = [n.name for n in self.graph.nodes[-max(8, len(self.graph.nodes) // 20) :]]
        return phase != "optimizer" and name in last and self.site_of(name) in self.folded.sites

    def site_of(self, name: str) -> int:
        return next(at for at, node in enumerate(self.graph.nodes) if node.name == name)

    # -- from answers to a plan -------------------------------------------------------------------------------------

    def assemble(self, attempt: Attempt, bound: float) -> Plan:
        form, answer = attempt.formulation, attempt.solution.choices
        self.choices = {}
        made: dict[Any, Choice] = {}
        layouts: dict[str, Layout] = {}
        for site, variable in form.at_site.items():
            table, needs = form.tables[site], form.needs_grad(self.graph.nodes[site])
            rows = answer[variable]
            for index, node in form.folded.copies(site):
                row = int(rows if isinstance(rows, (int, np.integer)) else rows[index])
                key = (id(table), row, needs)
                if key not in made:
                    made[key] = table.choice(row, needs)
                self.choices[self.graph.nodes[node].name] = made[key]
        for value, variable in form.at_parameter.items():
            rows, codes, ndim = answer[variable], form.stored[value], len(self.graph.metas[value].shape)
            for index, name in form.parameter_copies(value):
                row = int(rows if isinstance(rows, (int, np.integer)) else rows[index])
                asked = self.where.get(name)
                layouts[name] = asked if asked is not None else layout_of(codes[row], ndim, self.mesh)
        self.backward()
        for i in self.graph.inputs:
            if i.value not in layouts:
                layouts[i.value] = self.placed(i) if i.kind == "input" else Layout.replicated(self.mesh, len(i.meta.shape))
        fixed = self.machine.step_launch
        search = Search(
            attempt.solution.cost + fixed, bound + fixed, attempt.solution.method, building=self.building, solving=self.solving
        )  # fmt: skip
        plan = Plan(
            self.graph, self.mesh, self.choices, self.signatures, layouts, tuple(self.notes), self.request.mode,
            machine=self.machine, search=search,
            optimizer_bytes_per_byte=self.request.optimizer_bytes_per_byte, full_batch=self.full_batch,
            memory_limit=self.request.memory_limit,
        )  # fmt: skip
        return plan

    # -- what does not fit ------------------------------------------------------------------------------------------

    def smallest(self, error: Infeasible) -> Plan | None:
        """Returns the plan of least memory, among searches that weigh memory more and more."""
        if not error.choices:
            return None
        problem = self.latest.problem
        cost, memory = problem.price(error.choices)
        plans = []
        for weight in _MEMORY_WEIGHTS:
            answer = self.find(problem.weighted(weight * cost / max(memory, 1.0)), 0.05)
            cost_of, memory_of = problem.price(answer.choices)
            solution = Solution(answer.choices, cost_of, 0.0, memory_of, "least memory")
            plans.append(self.assemble(Attempt(self.mesh, self.latest, solution), 0.0))
        return min(plans, key=lambda plan: step_memory(plan).peak)

    def does_not_fit(self, plan: Plan | None, error: Infeasible | None) -> MemoryLimitError:
        """Builds the error that says what the smallest plan needs, and what would help."""
        if plan is None:
            return MemoryLimitError(f"no plan on the mesh {self.mesh} can be made: {error}", math.inf)
        limit, need = self.request.memory_limit or 0.0, step_memory(plan).peak
        return MemoryLimitError(
            f"no plan for {self.size} devices fits into {bytes_text(int(limit))} a rank; the smallest on the mesh {self.mesh} "
            f"needs {step_memory(plan)}\n  allow memory='{enough(need)}', use more devices or a smaller batch, or have layers "
            "computed again in the backward: .recompute('auto')",
            need,
        )
