"""A callable that is captured, planned, partitioned and bound for one signature of inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwright.agreement.job_watch import explain, note
from shardwright.agreement.signature import Signature, lines_of, value_summaries
from shardwright.api.decided import UndoneOtherwise, captured_way
from shardwright.api.inner_results import inner_results, watch_gradients
from shardwright.api.settings import Settings
from shardwright.api.stages import (
    before_compiling,
    make_target,
    plan_target,
)
from shardwright.base.derivatives import with_first_derivatives_only
from shardwright.base.dump import dump_of
from shardwright.base.torch_private import copy_each, pytree
from shardwright.capture.closure import attribute_of
from shardwright.capture.decisions import Decisions
from shardwright.capture.numbers import Numbers
from shardwright.capture.own_backward import retained_outputs
from shardwright.cost.machine_files import load_machine
from shardwright.data.rank_inputs import GlobalInputs
from shardwright.errors import CaptureError, WorldError
from shardwright.ir.graph import GraphInput
from shardwright.ir.layout import Layout
from shardwright.ir.machine import Machine
from shardwright.ir.mesh import Mesh
from shardwright.ir.plan import Plan
from shardwright.ir.program import LocalProgram
from shardwright.parameters.distribute import distribute_parameters
from shardwright.parameters.enter import enter
from shardwright.parameters.handles import current
from shardwright.parameters.placements import layout_of
from shardwright.parameters.whole import whole_buffers
from shardwright.partition.local_program import finished, program_before_overlap
from shardwright.partition.partitioner import scheduled
from shardwright.report.plan_view import PlanView
from shardwright.train.accumulation.cut import cut_program
from shardwright.train.accumulation.module import GradAccumulation
from shardwright.train.accumulation.run import AccumulatedRun
from shardwright.train.compile.compiler import SegmentCompiler
from shardwright.train.outputs.reader import split_outputs
from shardwright.world.current import World


class BoundCall:
    """A callable ready to run on a world: the graph, the plan, the local program and how to call it."""

    compiler: SegmentCompiler | None = None
    numbers: Numbers | None = None  # attributes that are numbers of each call
    decisions: Decisions | None = None  # by values of tensors, which the program assumes
    _now: Sequence[Any] = ()  # values of the numbers in this call
    _split: Sequence[tuple[int, Callable[[Any], Any]]] = ()  # positions of outputs that stay split, and what wraps them
    signatures: dict[bool, Signature]  # its descriptions for other ranks, by gradient mode

    def __init__(
        self, root: nn.Module, args: Any, kwargs: Any, world: World, settings: Settings, given: GlobalInputs | None = None,
        may_be_a_step: bool = False, changing: Collection[str] = (), assumed: Sequence[Any] = (),
    ):  # fmt: skip
        if given is not None:
            args, kwargs = self._global_inputs(args, kwargs, given.shapes)
            settings = replace(settings, dataset_strategy=given.strategy)
        for notice in before_compiling:
            notice(root, args, kwargs, settings)
        self.root, self.world = root, world
        if world.keeps_pieces:
            whole_buffers(root)
        device = device_of(root, world)
        if settings.compiler is not None:
            settings.compiler.check(device)
        self.device_type = device.type
        self.micro = root if isinstance(root, GradAccumulation) else None
        named = settings.search.machine or ("cpu-gloo" if device.type != "cuda" else "h100")
        # a calibration may be on one host and not on another
        machine: Machine = world.on_first_rank(lambda: load_machine(named))
        dump = dump_of(type(root).__name__, world.rank if world.processes > 1 else None)
        target = make_target(
            root, args, kwargs, settings, world.size, device, machine, world.adds_wide(device),
            dump=dump, may_be_a_step=may_be_a_step, on_first_rank=world.on_first_rank,
        )  # fmt: skip
        graph, self.numbers, self.decisions = captured_way(target, changing, assumed)
        constants = list(graph.constants.values())
        world.compare("graph", lambda: (lines_of(str(graph), root), value_summaries(constants, sketched=True)))
        plan = plan_target(target, graph)
        self.graph = plan.graph
        self.plan: Plan = replace(plan, input_layouts=self._stored(plan, device))
        program = program_before_overlap(self.plan, dump=dump)
        self.program: LocalProgram = finished(program, self.plan, dump)
        self.schedule = self.plan.schedule
        world.compare("program", lambda: (lines_of(self.program.text(0)), ()))
        self.view = PlanView(self.plan, self.program)
        self.compiler = settings.compiler
        self.runs = self.program  # what runs: the program, or its form of compiled segments
        self.run: Callable[..., Any]
        self.run = self._bound(self.program) if self.micro is None else self._accumulated(program, settings)
        self._split = split_outputs(self.plan, program, world)
        self._find_inputs()
        self.is_random = any(n.op.draws for n in self.graph.nodes)
        self._count_inputs()

    def _count_inputs(self) -> None:
        """Sorts the graph's inputs into parameters, arguments and others, and records which are written to."""
        self._retained = retained_outputs(self.graph)
        self._inner = inner_results(self.graph)
        kinds = [i.kind for i in self.graph.inputs]
        self._parameters = [n for n, kind in enumerate(kinds) if kind == "parameter"]
        self._arguments = [n for n, kind in enumerate(kinds) if kind == "input"]
        self.made_to_require = [n for n, i in enumerate(self.graph.inputs) if i.is_made_to_require]
        self._other_inputs = [n for n, kind in enumerate(kinds) if kind in ("buffer", "constant")]
        moving = {value for node in self.graph.nodes if node.op.moves_statistics for value in node.inputs}
        self.moved_inputs = [n for n in self._other_inputs if self.graph.inputs[n].value in moving]
        self._written = {name for name, _ in self.graph.updates}
        self._checked: list[Any] = []
        self._memory: dict[int, GraphInput] = {}  # of buffers and constants, by address

    def _bound(self, program: LocalProgram) -> Callable[..., Any]:
        """Binds the program to the world, compiled with ``torch.compile`` if that is asked for."""
        self.runs = program
        if self.compiler is not None:
            self.runs = self.compiler.compiled(program, self.graph, self.world.runs_rank_groups)
        return self.world.bind(self.runs)

    def _finished(self, program: LocalProgram) -> LocalProgram:
        """Applies the last passes to a program: fuses moves and starts them early."""
        return finished(program, self.plan)

    def _accumulated(self, program: LocalProgram, settings: Settings) -> AccumulatedRun:
        """Cuts the program into one part per step and one per micro-batch, and binds both."""
        assert self.micro is not None
        gathers_once = settings.hsdp is None or not settings.hsdp.reduces_each_micro_batch
        first, second, kept = cut_program(program, gathers_once)
        once = self.world.bind(scheduled(first, self.schedule), keep=kept)
        each = self._bound(self._finished(second))
        return AccumulatedRun(self.micro, program.inputs, once, each, self._update)

    def _global_inputs(self, args: Any, kwargs: Any, shapes: tuple[tuple[int, ...], ...]) -> Any:
        """Replaces each tensor input by a meta tensor of the given global shape."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        known = iter(shapes)

        def whole(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            made = torch.empty(next(known), dtype=leaf.dtype, device="meta")
            return made.requires_grad_(leaf.requires_grad)

        return pytree.tree_unflatten([whole(leaf) for leaf in leaves], spec)

    def _stored(self, plan: Plan, device: torch.device) -> dict[str, Layout]:
        """Places the parameters as the plan stores them; returns the layouts that they really have.

        Raises:
            WorldError: ordinary tensors stand in their place, on ranks that hold pieces.
        """
        if self.world.keeps_pieces:
            for name, p in self.root.named_parameters():
                if not isinstance(current(p), (nn.Parameter, DTensor)):
                    raise WorldError(
                        f"an ordinary tensor stands in the place of the parameter {name}, as torch.func.functional_call puts "
                        "it: it would get no gradient\n  Compute it of the parameter, or give AutoParallel the function that "
                        "calls it"
                    )
        layouts = dict(plan.input_layouts)
        named = {str(i.target): layouts[i.value] for i in self.graph.inputs if i.kind == "parameter"}
        actual = self.world.place_parameters(self.root, self._all(named, plan.mesh), device)
        for i in self.graph.inputs:
            if i.kind == "parameter":
                layouts[i.value] = actual[str(i.target)]
        return layouts

    def _all(self, named: dict[str, Layout], mesh: Mesh) -> dict[str, Layout]:
        """Adds the parameters that no operator reads to the layouts, as replicated."""
        result = dict(named)
        for name, parameter in self.root.named_parameters():
            result.setdefault(name, Layout.replicated(mesh, parameter.ndim))
        return result

    def _find_inputs(self) -> None:
        """Finds where the graph's inputs are: what a call gives, and tables that have the others by keys."""
        self._given: list[tuple[int, Callable[[list[Any]], Any]]] = []
        self._tables: list[Any] = []
        self._keys: list[Any] = []
        for n, graph_input in enumerate(self.graph.inputs):
            table, key = self._place_of(n, graph_input)
            self._tables.append(table)
            self._keys.append(key)
        numbers = {i.value: n for n, i in enumerate(self.graph.inputs)}
        self._updated = [numbers[name] for name, _ in self.graph.updates]

    def _place_of(self, n: int, graph_input: GraphInput) -> tuple[Any, Any]:
        target = graph_input.target
        if graph_input.kind == "input":
            self._given.append((n, operator.itemgetter(target)))
            return [None], 0
        if graph_input.kind == "constant" and str(target) in self.graph.numbers:
            formula, dtype = self.graph.numbers[str(target)]
            self._given.append((n, lambda leaves: torch.full((), formula.value(self._now), dtype=dtype)))
            return [None], 0
        if graph_input.kind == "constant":
            value = self.graph.constants[str(target)]
            return attribute_of(self.root, value) or ([value], 0)
        path, _, name = str(target).rpartition(".")
        owner = self.root.get_submodule(path)
        return owner._parameters if graph_input.kind == "parameter" else owner._buffers, name

    def _values(self, leaves: list[Any]) -> list[Any]:
        """Reads the graph's inputs, in their order."""
        values = list(map(operator.getitem, self._tables, self._keys))
        for n, read in self._given:
            values[n] = read(leaves)
        return values

    def __call__(self, leaves: list[Any], settled: int = 0) -> Any:
        """Runs the program on the flat inputs; returns the callable's result, with global tensors.

        Args:
            leaves: the flat inputs.
            settled: how many of its decisions hold in any case.

        Raises:
            OtherWay: Python decides otherwise by values of tensors; nothing is changed then.
        """
        if self.numbers is not None:
            self._now = self.numbers.read()
        values = self._values(leaves)
        if self.world.keeps_pieces and any(type(values[n]) is DTensor for n in self._other_inputs):
            whole_buffers(self.root)
            values = self._values(leaves)
        undone = UndoneOtherwise(self, values, settled) if self.decisions is not None else nullcontext()
        for n in self.made_to_require:
            values[n].requires_grad_()
        if self.graph.updates:
            self._check_aliases(values)
        if self.world.keeps_pieces and self._parameters:
            stored = [values[n] for n in self._parameters]
            if not all(type(p) is DTensor for p in stored):
                stored = self._replaced(stored)
            local = enter(stored)
            for n, value in zip(self._parameters, local, strict=True):
                values[n] = value
        with undone:
            if torch.is_autocast_enabled(self.device_type):  # the program turns it on itself, for operators only
                with torch.autocast(self.device_type, enabled=False):
                    outputs, updates = self._run(values)
            else:
                outputs, updates = self._run(values)
        if updates:
            self._update(values, updates)
        if self.compiler is not None and torch.is_grad_enabled():  # compiled backward passes are constants to autograd
            outputs = with_first_derivatives_only(outputs)
        for index, wrap in self._split:
            outputs[index] = wrap(outputs[index])
        for index, gradient in self._retained:
            gradient.hand_to(outputs[index])
        if self._inner[1] and torch.is_grad_enabled():
            watch_gradients(outputs, *self._inner, frozenset(index for index, _ in self._retained))
        result = pytree.tree_unflatten(outputs, self.graph.out_spec)
        if self.decisions is not None:
            result = result[0]
        if self.graph.assignments:
            result = self._assigned(result)
        if self.decisions is not None and (error := self.decisions.raised(outputs)) is not None:
            raise error
        return result

    def _check_aliases(self, values: list[Any]) -> None:
        """Refuses writes to an input or buffer that shares its memory. A program treats each as separate."""
        held = [values[n] for n in self._other_inputs]
        if not (len(held) == len(self._checked) and all(map(operator.is_, held, self._checked))):
            self._checked, self._memory = held, {}
            self._note_memory(self._other_inputs, values, self._memory)
        of_inputs = dict(self._memory)
        self._note_memory(self._arguments, values, of_inputs)

    def _note_memory(self, numbers: Sequence[int], values: list[Any], memory: dict[int, GraphInput]) -> None:
        """Records the memory of some inputs of the graph in ``memory``.

        Raises:
            CaptureError: two inputs share their memory, and one of them is written to.
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

    def _assigned(self, result: Any) -> Any:
        """Assigns the attributes that the callable assigns, and returns its result without their values."""
        made, tensors = self.graph.assignments, ()
        if any(assignment.tensors for assignment in made):
            result, tensors = result
        rest = iter(tensors)
        for assignment in made:
            assignment.carry_out(rest, self._now)
        return result

    def fits(self, decided: Sequence[Any] = ()) -> bool:
        """Tells whether Python would decide by the changing numbers as it did in the capture.

        Args:
            decided: how it decides by values of tensors at first.
        """
        taken = self.decisions.taken if self.decisions is not None else []
        holds = self.numbers is None or self.numbers.hold(self.numbers.read())
        return holds and tuple(taken[: len(decided)]) == tuple(decided)

    @property
    def raises(self) -> bool:
        """True if the callable raises an error, for the decisions that the program assumes."""
        return self.decisions is not None and self.decisions.error is not None

    def changing_values(self) -> list[Tensor]:
        """Returns the changing numbers as they are now, for a comparison between ranks."""
        return [] if self.numbers is None else [torch.tensor(value) for value in self.numbers.read()]

    def weights(self, parts: int, part: int) -> dict[str, Tensor]:
        """Returns one part of the parameters that every rank holds whole.

        Args:
            parts: the number of parts that the parameters are divided into.
            part: which of them, from 0.
        """
        found = list(dict(self.root.named_parameters()).items())[part::parts]
        layouts = {name: layout_of(p) for name, p in found}
        size = self.world.size  # stages of a pipeline hold their parameters only
        return {
            name: p.to_local()  # type: ignore[attr-defined]
            for name, p in found
            if (at := layouts[name]) is not None and at.is_replicated and at.mesh.size == size
        }

    def _replaced(self, stored: list[Any]) -> list[Any]:
        """Distributes parameters that the user put in the place of distributed ones, on all ranks."""
        by_name = {i.name: i for i in self.program.inputs}
        inputs = [by_name[self.graph.inputs[n].value] for n in self._parameters]
        found = [current(p) for p in stored]
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
            distribute_parameters(self.root, layouts, self.world.device_of(self.root))
        return [self._tables[n][self._keys[n]] for n in self._parameters]

    def _run(self, values: list[Any]) -> Any:
        try:
            if self.is_random:
                self.world.agree_on_random_state()
            return self.run(*values)
        except RuntimeError as error:  # of communication, it may be, because of what another rank did
            said = explain(self.world, error)
            if not said:
                raise
            raise WorldError(said) from error

    def single_device(self) -> AbstractContextManager[None]:
        """Returns a context in which the target runs as on a single device."""
        return nullcontext()

    def _update(self, values: list[Any], updates: list[Tensor]) -> None:
        """Writes back the buffers and inputs that the callable changed in place."""
        held, changed = [values[n] for n in self._updated], list(updates)
        for at, ((name, _), new) in enumerate(zip(self.graph.updates, updates, strict=True)):
            if new.shape != held[at].shape:  # a frozen parameter of which this rank keeps a piece
                changed[at] = new[self.plan.input_layouts[name].slices(new.shape)[self.world.rank]]
        with torch.no_grad():
            copy_each(held, changed)


def device_of(root: nn.Module, world: World) -> torch.device:
    """Returns the device on which the program will run."""
    return world.device_of(root)


# -- strategies given to modules and parameters by name -------------------------------------------------------------------
