"""One callable, captured, planned, partitioned and bound for one signature of inputs."""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright import train_step
from shardwright.capture.attributes import check_attributes
from shardwright.capture.capture import capture
from shardwright.capture.closure import FunctionModule, attribute_of
from shardwright.capture.graph import Graph, GraphInput
from shardwright.capture.marks import Mark
from shardwright.capture.torch_private import pytree
from shardwright.cost.machine import Machine, load_machine
from shardwright.data.handed import Handed
from shardwright.errors import CaptureError, Problems, WorldError
from shardwright.layout import Layout
from shardwright.partition.partitioner import scheduled, unscheduled
from shardwright.partition.program import LocalProgram
from shardwright.partition.schedule import Schedule
from shardwright.plan.attributes import with_attributes
from shardwright.plan.modes import plan_graph
from shardwright.plan.own_layouts import check_in_place
from shardwright.plan.plan import Plan
from shardwright.plan.semi_auto import PlanRequest
from shardwright.redistribute.planner import Options
from shardwright.train.communication_fusion import buckets_of
from shardwright.train.compile import SegmentCompiler
from shardwright.train.gradient_accumulation import AccumulatedRun, GradAccumulation, cut_program, given_a_part
from shardwright.train.interleave import interleave
from shardwright.train.interleaved_axis import is_interleaved, prepare_copies
from shardwright.train.mixed_precision import Precision, with_wires
from shardwright.train.optimizer_parallel import OptimizerParallel, split_parameters
from shardwright.train.recompute import recompute_parameter_gathers
from shardwright.train.recompute_auto import plan_with_recompute
from shardwright.train.recompute_request import RecomputeRequest, gather_requests
from shardwright.world import parameters as distributed_parameters
from shardwright.world.current import World
from shardwright.world.delayed_init import is_delayed, materialise
from shardwright.world.random_state import agree_on_random_state
from shardwright.world.signature import Signature, lines_of, looked_at
from shardwright.world.watcher import compare_on_ranks, explain, note

MARK = "_shardwright_mark"

# Called in turn before anything is captured, with the root, its inputs and the settings; planning without running ends
# the call here.
before_compiling: list[Callable[..., None]] = []


@dataclass
class Settings:
    """What a user asked of an ``AutoParallel``, apart from marks on operators."""

    mode: str = "semi_auto"
    dataset_strategy: Any = "full_batch"
    strategies: dict[str, Any] | None = None
    source: str = ""
    enable_alltoall: bool = True
    of_step: bool = False  # one part of a train step: a pattern may be another part's
    search: SearchSettings = field(default_factory=lambda: SearchSettings())
    file: Any = None  # a plan file whose layouts are pinned
    recompute: tuple[RecomputeRequest, ...] = ()
    planner: Callable[[Graph, PlanRequest], Plan] | None = None  # makes the plan instead of the mode's
    hsdp: OptimizerParallel | None = None
    schedule: Schedule = field(default_factory=Schedule)
    over: Any = None  # of hybrid_parallel: the mesh of the user's collectives
    gradients_mean: bool = True  # of hybrid_parallel: whether losses are averaged over the data axes
    compiler: SegmentCompiler | None = None  # compiles what runs between moves
    precision: Precision = field(default_factory=Precision)


@dataclass(frozen=True)
class SearchSettings:
    """What plans are priced on and must fit; see :meth:`shardwright.api.AutoParallel.search`."""

    machine: Any = None
    memory: float | None = None
    mesh: tuple[int, ...] | None = None
    axes: tuple[str, ...] = ()
    states: float = 2.0
    seconds: float = 30.0


def plan_request(
    devices: int, settings: Settings, parameter_plan: dict[str, tuple[Any, str]], machine: Machine | str
) -> PlanRequest:
    """What the settings ask of a plan for a number of devices; ``machine`` where they name none."""
    search = settings.search
    return PlanRequest(
        devices, settings.dataset_strategy, parameter_plan, settings.mode != "data_parallel", settings.mode,
        search.machine or machine, search.memory, search.mesh, search.axes, search.states, search.seconds,
        schedule=settings.schedule,
    )  # fmt: skip


def follow_attributes(graph: Graph, devices: int, settings: Settings, parameter_plan: dict[str, tuple[Any, str]]) -> Graph:
    """The graph with the attributes of its operators carried out; not where strategies are ignored."""
    return graph if settings.mode == "data_parallel" else with_attributes(graph, devices, parameter_plan)


def plan_as_asked(
    root: nn.Module, graph: Graph, request: PlanRequest, settings: Settings, again: Mapping[str, RecomputeRequest] | None = None
) -> Plan:
    """The plan of the mode, or what stands in for it, with its parameters stored as the settings ask.

    Args:
        again: by module path, what is computed again in the backward pass.
    """

    parameters = dict(root.named_parameters(remove_duplicate=False))
    schedule = replace(settings.schedule, ids=buckets_of(graph.inputs, parameters))

    def make(request: PlanRequest) -> Plan:
        plan = replace(_plan_of_operators(graph, request, settings), schedule=schedule)
        check_in_place(plan)
        if settings.hsdp is None:
            return plan
        plan = split_parameters(plan, settings.hsdp, parameters)
        return replace(plan, passes=(*plan.passes, recompute_parameter_gathers)) if settings.hsdp.gathers_again else plan

    automatic = next((r for r in settings.recompute if r.is_automatic), None)
    return plan_with_recompute(make, request, again or {}, automatic)


def _plan_of_operators(graph: Graph, request: PlanRequest, settings: Settings) -> Plan:
    """The plan of the mode, of the plan file that the settings name, or of the planner that stands in for both."""
    if settings.planner is not None:
        return settings.planner(graph, request)
    if settings.file is None:
        return plan_graph(graph, request)
    from shardwright.plan.loading import plan_from_file

    return plan_from_file(settings.file, graph, request, part=settings.of_step)


class Compiled:
    """A callable ready to run on a world: the graph, the plan, the local program and how to call it."""

    compiler: SegmentCompiler | None = None
    signs: dict[bool, Signature]  # what other ranks are told of it, by gradient mode

    def __init__(
        self, root: nn.Module, args: Any, kwargs: Any, world: World, settings: Settings, handed: Handed | None = None,
        may_be_a_step: bool = False,
    ):  # fmt: skip
        if handed is not None:
            args, kwargs = self._global_inputs(args, kwargs, handed.shapes)
            settings = replace(settings, dataset_strategy=handed.strategy)
        for notice in before_compiling:
            notice(root, args, kwargs, settings)
        self.root, self.world = root, world
        device = device_of(root, world)
        if settings.compiler is not None:
            settings.compiler.check(device)
        self.device_type = device.type
        self.micro = root if isinstance(root, GradAccumulation) else None
        if self.micro is not None:
            args, kwargs = self._first_part(self.micro, args, kwargs)
        marks, parameter_plan = gather_marks(root, settings)
        again = gather_again(root, settings)
        # only within the capture: planning differentiates on its own account
        watch = train_step.backward_is_a_step(may_be_a_step)
        with watch, given_a_part(self.micro), settings.precision.computing(device.type):
            self.graph: Graph = capture(root, args, kwargs, device, marks)
        self._check_assignments()
        if not world.is_simulated:
            text, constants = lines_of(str(self.graph), root), list(self.graph.constants.values())
            compare_on_ranks(world, "graph", text, looked_at(constants, sketched=True))
        self.graph = follow_attributes(self.graph, world.size, settings, parameter_plan)
        self.graph = prepare_copies(self.graph, parameter_plan if settings.mode != "data_parallel" else None)
        named = settings.search.machine or ("cpu-gloo" if device.type != "cuda" else "h100")
        machine: Machine = world.once(lambda: load_machine(named))  # a calibration may be on one host and not on another
        request = replace(plan_request(world.size, settings, parameter_plan, machine), machine=machine, once=world.once)
        self.plan: Plan = plan_as_asked(root, self.graph, request, settings, again)
        self.plan = replace(self.plan, input_layouts=self._stored(device))
        links = machine.links(self.plan.mesh)
        options = Options(links, enable_alltoall=settings.enable_alltoall and not is_interleaved(self.graph))
        program = unscheduled(self.graph, self.plan, options)
        adds_wide = world.is_simulated or device.type == "cpu"
        program = with_wires(program, self.graph, settings.precision, self.micro is not None, adds_wide)
        for change in self.plan.passes:
            program = change(program)
        how = self.plan.schedule
        self.program: LocalProgram = interleave(scheduled(program, how), self.graph)
        if not world.is_simulated:
            compare_on_ranks(world, "program", lines_of(self.program.text(0)))
        self.plan.attach(self.program)
        self.compiler = settings.compiler
        self.runs = self.program  # what runs: the program, or its form of compiled segments
        self.run: Callable[..., Any]
        self.run = self._bound(self.program) if self.micro is None else self._accumulated(program, how, settings)
        self._read = [self._reader(i) for i in self.graph.inputs]
        self._is_random = any(n.op.draws for n in self.graph.nodes)
        self._count_inputs()

    def _count_inputs(self) -> None:
        """Notes which inputs of the graph are parameters, which are handed in, which are held, and what is written to."""
        kinds = [i.kind for i in self.graph.inputs]
        self._parameters = [n for n, kind in enumerate(kinds) if kind == "parameter"]
        self._handed = [n for n, kind in enumerate(kinds) if kind == "input"]
        self._held = [n for n, kind in enumerate(kinds) if kind in ("buffer", "constant")]
        self._written = {name for name, _ in self.graph.updates}
        self._looked_at: list[Any] = []
        self._memory: dict[int, GraphInput] = {}  # of buffers and constants, by address

    @staticmethod
    def _first_part(module: GradAccumulation, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return pytree.tree_unflatten(module.parts(leaves)[0], spec)

    def _bound(self, program: LocalProgram) -> Callable[..., Any]:
        """The program bound to the world, compiled if that is asked for."""
        self.runs = program
        if self.compiler is not None:
            self.runs = self.compiler.compiled(program, self.graph, self.world.is_simulated)
        return self.world.bind(self.runs)

    def _accumulated(self, program: LocalProgram, how: Schedule, settings: Settings) -> AccumulatedRun:
        """The program in two parts, and what runs them."""
        assert self.micro is not None
        gathers_once = settings.hsdp is None or not settings.hsdp.reduces_each_micro_batch
        first, second, handed = cut_program(program, gathers_once)
        once = self.world.bind(scheduled(first, how), keep=handed)
        each = self._bound(interleave(scheduled(second, how), self.graph))
        return AccumulatedRun(self.micro, program.inputs, once, each, self._update)

    def _global_inputs(self, args: Any, kwargs: Any, shapes: tuple[tuple[int, ...], ...]) -> Any:
        """Inputs of these shapes, one a tensor: where ranks hand in slices, those of the global tensors."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        known = iter(shapes)

        def whole(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            made = torch.empty(next(known), dtype=leaf.dtype, device="meta")
            return made.requires_grad_(leaf.requires_grad)

        return pytree.tree_unflatten([whole(leaf) for leaf in leaves], spec)

    def _stored(self, device: torch.device) -> dict[str, Layout]:
        """Places the parameters as the plan stores them; returns the layouts they really have."""
        layouts = dict(self.plan.input_layouts)
        named = {str(i.target): layouts[i.value] for i in self.graph.inputs if i.kind == "parameter"}
        if self.world.is_simulated:
            materialise_whole(self.root)
            return layouts
        actual = distributed_parameters.distribute_parameters(self.root, self._all(named), device)
        for i in self.graph.inputs:
            if i.kind == "parameter":
                layouts[i.value] = actual[str(i.target)]
        return layouts

    def _all(self, named: dict[str, Layout]) -> dict[str, Layout]:
        """Layouts for every parameter of the root: those that no operator reads are replicated."""
        result = dict(named)
        for name, parameter in self.root.named_parameters():
            result.setdefault(name, Layout.replicated(self.plan.mesh, parameter.ndim))
        return result

    def _reader(self, graph_input: GraphInput) -> Callable[[list[Any]], Any]:
        target = graph_input.target
        if graph_input.kind == "input":
            return lambda leaves: leaves[target]  # type: ignore[index]
        if graph_input.kind == "constant":
            value = self.graph.constants[str(target)]
            found = attribute_of(self.root, value)
            if found is not None:
                attributes, attribute = found
                return lambda leaves: attributes[attribute]
            return lambda leaves: value
        path, _, name = str(target).rpartition(".")
        owner = self.root.get_submodule(path)
        table = owner._parameters if graph_input.kind == "parameter" else owner._buffers
        return lambda leaves: table[name]

    def __call__(self, leaves: list[Any]) -> Any:
        """Runs the program on the flat inputs; returns what the callable returns, global."""
        values = [read(leaves) for read in self._read]
        if self.graph.updates:
            self._check_aliases(values)
        if not self.world.is_simulated and self._parameters:
            stored = [values[n] for n in self._parameters]
            if not all(type(p) is DTensor for p in stored):
                stored = self._replaced(stored)
            local = distributed_parameters.enter(stored)
            for n, value in zip(self._parameters, local, strict=True):
                values[n] = value
        if torch.is_autocast_enabled(self.device_type):  # the program turns it on itself, for operators only
            with torch.autocast(self.device_type, enabled=False):
                outputs, updates = self._run(values)
        else:
            outputs, updates = self._run(values)
        if updates:
            self._update(values, updates)
        result = pytree.tree_unflatten(outputs, self.graph.out_spec)
        return self._assigned(result) if self.graph.assignments else result

    def _check_aliases(self, values: list[Any]) -> None:
        """Refuses a write to an input or buffer whose memory another one shares: a program has each by itself."""
        held = [values[n] for n in self._held]
        if not (len(held) == len(self._looked_at) and all(map(operator.is_, held, self._looked_at))):
            self._looked_at, self._memory = held, {}
            self._note_memory(self._held, values, self._memory)
        of_inputs = dict(self._memory)
        self._note_memory(self._handed, values, of_inputs)

    def _note_memory(self, numbers: Sequence[int], values: list[Any], memory: dict[int, GraphInput]) -> None:
        """Adds the memory of some inputs of the graph to what is known of others.

        Raises:
            CaptureError: it is that of another one, and one of the two is written to.
        """
        for n in numbers:
            own, value = self.graph.inputs[n], values[n]
            if not isinstance(value, Tensor) or not value.numel():
                continue
            other = memory.setdefault(value.untyped_storage().data_ptr(), own)
            if other is not own and (own.value in self._written or other.value in self._written):
                raise CaptureError(
                    f"{other.kind} {other.target} and {own.kind} {own.target} share their memory, and the captured callable "
                    "writes to it in place\n  Hand in a copy, x.clone(), or write out of place"
                )

    def _check_assignments(self) -> None:
        names = [made.where for made in self.graph.assignments if made.tensors]
        if names and self.micro is not None:
            raise CaptureError(
                f"a network in GradAccumulation assigns tensors to attributes: {', '.join(names)}\n  Each micro-batch has its "
                "own; return them instead"
            )

    def _assigned(self, result: Any) -> Any:
        """What the callable returns, after the attributes that it assigns have been assigned."""
        made, tensors = self.graph.assignments, ()
        if any(assignment.tensors for assignment in made):
            result, tensors = result
        rest = iter(tensors)
        for assignment in made:
            assignment.carry_out(rest)
        return result

    def weights(self, parts: int, part: int) -> dict[str, Tensor]:
        """One part of the parameters that every rank of a job holds the whole of, as this rank has them."""
        found = list(dict(self.root.named_parameters()).items())[part::parts]
        layouts = {name: distributed_parameters.layout_of(p) for name, p in found}
        return {name: p.to_local() for name, p in found if (at := layouts[name]) is not None and at.is_replicated}  # type: ignore[attr-defined]

    def _replaced(self, stored: list[Any]) -> list[Any]:
        """Distributes parameters that the user put in the place of distributed ones; all ranks do."""
        by_name = {i.name: i for i in self.program.inputs}
        inputs = [by_name[self.graph.inputs[n].value] for n in self._parameters]
        found = [distributed_parameters.current(p) for p in stored]
        for i, parameter in zip(inputs, found, strict=True):
            shape, dtype = getattr(parameter, "shape", None), getattr(parameter, "dtype", None)
            if shape != i.meta.shape or dtype != i.meta.dtype:
                raise WorldError(
                    f"parameter {i.target} is {dtype} {list(shape or ())} now and was {i.meta.dtype} {list(i.meta.shape)} when "
                    "the net was made: make a new AutoParallel"
                )
        if not all(type(p) is DTensor for p in found):
            note("parameters put in the place of others")
            layouts, mesh = {str(i.target): i.layout for i in inputs}, inputs[0].layout.mesh
            for name, parameter in self.root.named_parameters():
                layouts.setdefault(name, Layout.replicated(mesh, parameter.ndim))
            distributed_parameters.distribute_parameters(self.root, layouts, self.world.device)  # type: ignore[union-attr]
        return [self._read[n]([]) for n in self._parameters]

    def _run(self, values: list[Any]) -> Any:
        try:
            if self._is_random and not self.world.is_simulated:
                agree_on_random_state(self.world.device)  # type: ignore[union-attr]
            return self.run(*values)
        except RuntimeError as error:  # of communication, it may be, because of what another rank did
            said = explain(self.world)
            if not said:
                raise
            raise WorldError(said) from error

    def single_device(self) -> AbstractContextManager[None]:
        """Within the block, the target runs as on a single device."""
        return nullcontext()

    def _update(self, values: list[Any], updates: list[Tensor]) -> None:
        """Writes back what the callable changed in place: buffers, or inputs."""
        by_name = {i.value: n for n, i in enumerate(self.graph.inputs)}
        with torch.no_grad():
            for (name, _), new in zip(self.graph.updates, updates, strict=True):
                values[by_name[name]].copy_(new)


def device_of(root: nn.Module, world: World) -> torch.device:
    """Where the program will run."""
    if not world.is_simulated:
        return world.device  # type: ignore[union-attr]
    devices = {p.device for p in root.parameters() if p.device.type != "meta"}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


def materialise_whole(root: nn.Module) -> None:
    """Gives delayed parameters and buffers their whole values: the simulated world holds global tensors."""
    wanted = {n: t for n, t in [*root.named_parameters(), *root.named_buffers()] if is_delayed(t)}
    if not wanted:
        return
    values = materialise(wanted, lambda name, value: value.clone())
    for name, tensor in wanted.items():
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(values[name], requires_grad=tensor.requires_grad)
            made.__class__ = type(tensor)  # with what the user hung on it
            vars(made).update(vars(tensor))
            torch.utils.swap_tensors(tensor, made)
        else:
            torch.utils.swap_tensors(tensor, values[name])


# -- strategies given to modules and parameters by name -------------------------------------------------------------------


def gather_marks(root: nn.Module, settings: Settings) -> tuple[dict[nn.Module, Mark], dict[str, tuple[Any, str]]]:
    """The marks on the root's modules and the layouts given to parameters, by qualified name."""
    problems = Problems()
    marks: dict[nn.Module, Mark] = {}
    plan: dict[str, tuple[Any, str]] = {}
    names = {id(p): n for n, p in reversed(list(root.named_parameters(remove_duplicate=False)))}
    for path, module in root.named_modules():
        mark = module.__dict__.get(MARK)
        if mark is not None:
            marks[module] = replace(mark, module_path=path)
    for pattern, strategy in (settings.strategies or {}).items():
        _match(root, pattern, strategy, settings.source, marks, plan, problems, settings.of_step)
    for module, mark in marks.items():
        own = dict(module.named_parameters(remove_duplicate=False))
        for name, entry in (mark.parameter_plan or {}).items():
            name = name.removeprefix("self.")
            what = f"{mark.name} {mark.module_path}".strip() + (f" at {mark.source}" if mark.source else "")
            if name not in own:
                close = ", ".join(list(own)[:6]) or "none"
                problems.add(f"{what}: parameter_plan names {name!r}, which is not a parameter of it; it has {close}")
            else:
                plan[names[id(own[name])]] = (entry, what)
    problems.raise_if_any("the strategies cannot be followed")
    return marks, plan


def gather_again(root: nn.Module, settings: Settings) -> dict[str, RecomputeRequest]:
    """By module path, what the settings and the modules' own marks say is computed again in the backward pass."""
    return gather_requests(root, settings.recompute, _fits, settings.of_step)


def check_patterns(step: nn.Module, settings: Settings) -> None:
    """Refuses a pattern that matches nothing in any module a train step reaches; each is named from its own root too."""
    names = [n for n, _ in step.named_modules() if n] + [n for n, _ in step.named_parameters(remove_duplicate=False)]
    if not names:
        return  # the step finds its modules only as it runs
    problems = Problems()
    for pattern in settings.strategies or {}:
        if not any(_fits(step, n, pattern) for n in names):
            problems.add(f"strategies: {pattern!r} at {settings.source} matches no module and no parameter of the step")
    problems.raise_if_any("the strategies cannot be followed")


def _fits(root: nn.Module, name: str, pattern: str) -> bool:
    """Whether a pattern names a module or parameter; of a function, also from the root of the module it reads."""
    if fnmatch.fnmatchcase(name, pattern):
        return True
    inner = name.partition(".")[2]
    return isinstance(root, FunctionModule) and bool(inner) and fnmatch.fnmatchcase(inner, pattern)


def _match(
    root: nn.Module,
    pattern: str,
    strategy: Any,
    source: str,
    marks: dict[nn.Module, Mark],
    plan: dict[str, tuple[Any, str]],
    problems: Problems,
    of_step: bool,
) -> None:
    modules = [(p, m) for p, m in root.named_modules() if p and _fits(root, p, pattern)]
    first: dict[int, str] = {}  # a tied weight is planned by its first name, and may be called by any
    for name, parameter in root.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    fitting = [p for n, p in root.named_parameters(remove_duplicate=False) if _fits(root, n, pattern)]
    parameters = list(dict.fromkeys(first[id(p)] for p in fitting))
    if not modules and not parameters and not of_step:
        known = ", ".join([p for p, _ in root.named_modules() if p][:6]) or "none: mark the module itself, sw.shard(module)"
        problems.add(f"strategies: {pattern!r} at {source} matches no module and no parameter; modules are {known}")
    for path, module in modules:
        given = strategy if isinstance(strategy, dict) else {"in_strategy": strategy}
        unknown = set(given) - {"in_strategy", "out_strategy", "parameter_plan", "attributes"}
        if unknown:
            problems.add(f"strategies: {pattern!r} at {source} has the keys {sorted(unknown)}; use in_strategy, "
                         "out_strategy, parameter_plan, attributes")  # fmt: skip
            continue
        given = {**given, "attributes": check_attributes(f"strategies: {pattern!r} at {source}", given.get("attributes"))}
        marks[module] = Mark(type(module).__name__, **given, source=source, module_path=path)
    if not modules:
        for name in parameters:
            plan[name] = (strategy, f"strategies {pattern!r} at {source}")
